// One producer and many readers in threads, and everything else that may happen at the same time.
// Written for ThreadSanitizer, but each byte that is read is also compared with what it must be.
//
// Threads report what they find to a Findings; doctest's macros stay on the main thread. Nobody
// sleeps: threads wait in poll() or on a condition variable.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/session_manager.hpp"
#include "../../csrc/wakeup.hpp"
#include "known_stream.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using test::Findings;
using test::is_readable;
using test::KnownLog;
using test::kPollTimeoutMs;
using test::Random;
using test::StreamChecker;
using SessionPtr = std::shared_ptr<StreamSession>;

// Runs each function in a thread of its own, to its end.
void run_together(const std::vector<std::function<void()>>& functions) {
  std::vector<std::thread> threads;
  for (const auto& function : functions) threads.emplace_back(function);
  for (std::thread& thread : threads) thread.join();
}

// Lets a producer go on only after some reader came to the end of what there is, so that the
// readers do not all find a finished log.
class LiveEnd {
 public:
  void reached(uint64_t offset) {
    const std::lock_guard lock(mutex_);
    furthest_ = std::max(furthest_, offset);
    changed_.notify_all();
  }
  // Returns also when nobody is left to come there.
  void await(uint64_t offset) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return furthest_ >= offset || readers_left_ == 0; });
  }
  void enter(int readers) {
    const std::lock_guard lock(mutex_);
    readers_left_ += readers;
  }
  void leave() {
    const std::lock_guard lock(mutex_);
    --readers_left_;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t furthest_ = 0;
  int readers_left_ = 0;
};

struct Shared {
  const KnownLog& log;
  SessionPtr session;
  Findings& findings;
  LiveEnd live_end;
};

// One reader of a known log: compares each byte, keeps some pieces to look at them again later,
// leaves now and then and comes back somewhere else.
class CheckingReader {
 public:
  CheckingReader(Shared& shared, uint64_t seed) : shared_(shared), random_(seed) {
    reader_ = std::make_unique<SessionReader>(shared_.session, 0);
  }

  enum class Next { more, wait, over };

  Next step() {
    if (restarts_left_ > 0 && random_.one_in(200)) restart_anywhere();
    const uint64_t at = reader_->offset();
    const ReadResult result = reader_->read(random_.between(1, random_.one_in(8) ? 70'000 : 500));
    switch (result.status) {
      case ReadStatus::data: compare(at, result.piece); return Next::more;
      case ReadStatus::lost: return accept_loss(at);
      case ReadStatus::end:
        shared_.findings.require(at == shared_.log.text.size(), "the end came at ", at);
        recheck_kept();
        reader_->detach();
        return Next::over;
      case ReadStatus::ahead: shared_.findings.require(false, "ahead at ", at); return Next::over;
      case ReadStatus::wait: break;
    }
    return Next::wait;
  }

  bool wait(const std::shared_ptr<Wakeup>& wakeup, uint64_t token) {
    return reader_->notify_when_readable(wakeup, token);
  }
  void forget(const Wakeup& wakeup, uint64_t token) { reader_->forget(wakeup, token); }
  uint64_t offset() const { return reader_->offset(); }
  // Whether it gives up waiting and asks again.
  bool impatient() { return restarts_left_ > 0 && random_.one_in(20); }

 private:
  void compare(uint64_t at, const Piece& piece) {
    shared_.findings.require(!piece.bytes.empty(), "an empty piece at ", at);
    shared_.findings.require(shared_.log.holds(at, piece.bytes), "wrong bytes at ", at);
    shared_.findings.count(piece.bytes.size());
    if (!random_.one_in(16)) return;
    recheck_kept();
    kept_at_ = at;
    kept_ = piece;
  }

  // The log may have dropped these bytes long ago.
  void recheck_kept() {
    shared_.findings.require(shared_.log.holds(kept_at_, kept_.bytes), "changed bytes at ",
                             kept_at_);
  }

  Next accept_loss(uint64_t at) {
    const uint64_t first = shared_.session->snapshot().first_offset;
    shared_.findings.require(at < first, "lost at ", at, ", but the log begins at ", first);
    shared_.findings.require(shared_.log.is_border(first),
                             "the log begins within an event: ", first);
    shared_.findings.count_loss();
    reader_ = std::make_unique<SessionReader>(shared_.session, first);
    return Next::more;
  }

  // At an event's border (as an event id names it) or at any byte (as a byte count does).
  void restart_anywhere() {
    --restarts_left_;
    const SessionSnapshot now = shared_.session->snapshot();
    const uint64_t at = random_.one_in(2) ? now.last_event_start
                                          : random_.between(now.first_offset, now.end_offset);
    reader_ = std::make_unique<SessionReader>(shared_.session, at);
  }

  Shared& shared_;
  Random random_;
  std::unique_ptr<SessionReader> reader_;
  int restarts_left_ = 4;
  uint64_t kept_at_ = 0;
  Piece kept_;
};

// An event loop: some readers, one wakeup, one thread.
class ReaderLoop {
 public:
  ReaderLoop(Shared& shared, int readers, uint64_t seed) : shared_(shared) {
    for (int i = 0; i < readers; ++i) {
      slots_.push_back({std::make_unique<CheckingReader>(shared, seed * 1000 + i)});
      ready_.push_back(i);
    }
    open_ = readers;
    shared_.live_end.enter(readers);
  }

  void run() {
    while (open_ > 0 && !shared_.findings.failed()) {
      while (!ready_.empty()) {
        const size_t index = ready_.front();
        ready_.pop_front();
        serve(index);
      }
      if (open_ > 0) sleep_until_news();
    }
    for (; open_ > 0; --open_) shared_.live_end.leave();
  }

 private:
  struct Slot {
    std::unique_ptr<CheckingReader> reader;
    uint64_t awaited = 0;  // the token of its wait, 0 when it does not wait
  };

  void serve(size_t index) {
    Slot& slot = slots_[index];
    for (int steps = 0; steps < 10; ++steps) {
      switch (slot.reader->step()) {
        case CheckingReader::Next::over:
          --open_;
          shared_.live_end.leave();
          return;
        case CheckingReader::Next::wait:
          slot.awaited = ++last_token_ * slots_.size() + index;
          if (slot.reader->wait(wakeup_, slot.awaited)) {
            return shared_.live_end.reached(slot.reader->offset());
          }
          slot.awaited = 0;
          break;
        case CheckingReader::Next::more: break;
      }
    }
    ready_.push_back(index);
  }

  void sleep_until_news() {
    const bool woken = is_readable(wakeup_->fd(), kPollTimeoutMs);
    shared_.findings.require(woken, "a wake-up was lost");
    for (const uint64_t token : wakeup_->drain()) {
      Slot& slot = slots_[token % slots_.size()];
      // A wait that was forgotten may have been told just before.
      if (slot.awaited != token) continue;
      slot.awaited = 0;
      ready_.push_back(token % slots_.size());
    }
    for (size_t index = 0; index < slots_.size(); ++index) give_up_waiting(index);
  }

  void give_up_waiting(size_t index) {
    Slot& slot = slots_[index];
    if (slot.awaited == 0 || !slot.reader->impatient()) return;
    slot.reader->forget(*wakeup_, slot.awaited);
    slot.awaited = 0;
    ready_.push_back(index);
  }

  Shared& shared_;
  const std::shared_ptr<Wakeup> wakeup_ = std::make_shared<Wakeup>();
  std::vector<Slot> slots_;
  std::deque<size_t> ready_;
  int open_ = 0;
  uint64_t last_token_ = 0;
};

void produce(Shared& shared, const std::string& input, uint64_t seed) {
  Random random(seed);
  size_t until_pause = 0;
  for (std::string_view rest = input; !rest.empty() && !shared.findings.failed();) {
    const std::string_view part = rest.substr(0, random.between(1, random.one_in(4) ? 5000 : 300));
    shared.session->append(part);
    rest.remove_prefix(part.size());
    until_pause += part.size();
    if (until_pause > 8000) {
      shared.live_end.await(shared.session->snapshot().end_offset);
      until_pause = 0;
    }
  }
  shared.session->finalize(State::completed, "");
}

struct Crowd {
  int loops;
  int readers_each;
  size_t cap_bytes;
  size_t events;
};

void run_crowd(const Crowd& crowd, uint64_t seed, Findings& findings) {
  const auto pool = test::make_pool();
  {
    const KnownLog log(crowd.events);
    Shared shared{log,
                  std::make_shared<StreamSession>(
                      SessionKey{"owner", "id"},
                      SessionOptions{log.epoch, crowd.cap_bytes, kNanosPerSecond, {}, {}, {}}, pool,
                      std::make_shared<ManualClock>(), std::weak_ptr<SessionObserver>()),
                  findings,
                  {}};
    std::vector<std::unique_ptr<ReaderLoop>> loops;
    std::vector<std::function<void()>> threads;
    for (int i = 0; i < crowd.loops; ++i) {
      loops.push_back(std::make_unique<ReaderLoop>(shared, crowd.readers_each, seed * 100 + i));
      threads.push_back([loop = loops.back().get()] { loop->run(); });
    }
    threads.push_back([&] { produce(shared, log.input, seed); });
    run_together(threads);
    findings.require(shared.session->snapshot().readers == 0, "readers are left");
  }
  findings.require(pool->used_bytes() == 0, "memory is left: ", pool->used_bytes());
}

// In rounds, until enough bytes were checked: a sample, or all of a soak.
void run_crowds(const Crowd& crowd, uint64_t sample_bytes) {
  const uint64_t wanted = test::soak() ? 300'000'000 : sample_bytes;
  Findings findings;
  for (uint64_t round = 0; findings.bytes() < wanted; ++round) {
    INFO("seed ", test::base_seed(), ", round ", round);
    run_crowd(crowd, round, findings);
    REQUIRE_MESSAGE(!findings.failed(), findings.first());
  }
  if (test::soak()) {
    MESSAGE(findings.bytes() << " bytes checked, " << findings.losses() << " losses");
  }
}

constexpr size_t kNoCap = size_t{1} << 30;

TEST_CASE("race: 64 readers, each in its own thread, read each byte of a growing log") {
  run_crowds({64, 1, kNoCap, 2000}, 200'000'000);
}

TEST_CASE("race: a few event loops with several readers each read each byte of a growing log") {
  run_crowds({4, 16, kNoCap, 2000}, 200'000'000);
}

TEST_CASE("race: under a small cap readers see exact bytes or an explicit loss") {
  run_crowds({8, 4, 6000, 2000}, 40'000'000);
}

TEST_CASE("race: the smallest crowd, one reader at the live end") {
  run_crowds({1, 1, kNoCap, 3000}, 5'000'000);
}

// --- endings

TEST_CASE("race: of several endings one wins, and hooks, state and last line agree with it") {
  const int rounds = test::soak() ? 5'000 : 300;
  for (int round = 0; round < rounds; ++round) {
    INFO("round ", round);
    std::atomic<int> winners{0}, cancels{0}, ends{0};
    const test::LoneSession session({}, [&] { ++cancels; }, [&] { ++ends; });
    const auto wakeup = std::make_shared<Wakeup>();
    REQUIRE(session->notify_when_readable(0, wakeup, 1));
    run_together({[&] { winners += session->cancel(); },
                  [&] { winners += session->finalize(State::completed, ""); },
                  [&] { winners += session->finalize(State::failed, "why"); },
                  [&] {
                    while (session->append("data: a\n\n") == AppendStatus::ok) continue;
                  }});
    const State state = session->snapshot().state;
    const std::string last = state == State::completed ? ": end completed\n"
                             : state == State::failed  ? ": end failed why\n"
                                                       : ": end cancelled\n";
    const std::string log = test::read_all(*session);
    REQUIRE(log.substr(log.size() - last.size()) == last);
    REQUIRE(winners == 1);
    REQUIRE(ends == 1);
    REQUIRE(cancels == (state == State::cancelled ? 1 : 0));
    REQUIRE(wakeup->drain() == std::vector<uint64_t>{1});
  }
}

// --- everything at once

struct HookCounts {
  std::atomic<int> cancels{0};
  std::atomic<int> ends{0};
  std::atomic<bool> end_before_cancel{false};
};

// A manager with few keys and little memory, and threads that use all of it.
class Storm {
 public:
  explicit Storm(uint64_t seed) : seed_(seed) {}

  void run(int sessions_each) {
    std::vector<std::function<void()>> threads;
    for (uint64_t i = 0; i < kProducers; ++i) {
      threads.push_back([=] {
        for (int n = 0; n < sessions_each; ++n) produce_session(Random(seed_ + 1000 * i + n));
        if (--producers_left_ == 0) over_ = true;
      });
    }
    for (uint64_t i = 0; i < kReaders; ++i)
      threads.push_back([=] { read_along(Random(seed_ + i)); });
    threads.push_back([=] { meddle(Random(seed_ + 77)); });
    threads.push_back([=] { keep_ticking(Random(seed_ + 78)); });
    run_together(threads);
    check_account();
  }

  Findings findings;

 private:
  static constexpr int kProducers = 3;
  static constexpr int kReaders = 4;

  static SessionKey random_key(Random& random) {
    static const char* const ids[] = {"a", "a::1", "a::2", "b", "b::1", "c"};
    return {random.one_in(2) ? "one" : "two", ids[random.below(std::size(ids))]};
  }

  SessionPtr create(Random& random, const std::shared_ptr<HookCounts>& hooks) {
    const auto on_cancel = [this, hooks] {
      hooks->end_before_cancel = hooks->ends > 0;
      ++hooks->cancels;
      manager_->lookup("one", {"a"});
    };
    const auto on_end = [this, hooks] {
      ++hooks->ends;
      manager_->live_sessions();
    };
    try {
      return manager_->create_or_replace(random_key(random), on_cancel, on_end, "tag");
    } catch (const MemoryBudgetError&) {
      return nullptr;
    }
  }

  void produce_session(Random random) {
    const auto hooks = std::make_shared<HookCounts>();
    const SessionPtr session = create(random, hooks);
    if (!session) return;
    const uint64_t events = random.below(80);
    std::string input;
    for (uint64_t n = 0; n < events; ++n) input += test::known_event_input(n);
    for (std::string_view rest = input; !rest.empty();) {
      const std::string_view part = rest.substr(0, random.between(1, 700));
      rest.remove_prefix(part.size());
      if (session->append(part) != AppendStatus::ok) break;
      std::this_thread::yield();
    }
    if (random.one_in(2)) session->finalize(State::completed, "");
    if (random.one_in(2)) session->finalize(State::failed, "why", "data: {}\n\n");
    session->cancel();
    await_hooks(*session, *hooks);
  }

  // Another thread may have ended it and be about to call the hooks.
  void await_hooks(const StreamSession& session, const HookCounts& hooks) {
    while (hooks.ends == 0) std::this_thread::yield();
    const bool cancelled = session.snapshot().state == State::cancelled;
    findings.require(hooks.ends == 1, "on_end was called ", hooks.ends.load(), " times");
    findings.require(hooks.cancels == (cancelled ? 1 : 0), "on_cancel was called ",
                     hooks.cancels.load(), " times");
    findings.require(!hooks.end_before_cancel, "on_end came before on_cancel");
  }

  void read_along(Random random) {
    const auto wakeup = std::make_shared<Wakeup>();
    while (!over_ && !findings.failed()) {
      const SessionPtr session = manager_->get(random_key(random));
      if (session) {
        read_session(session, wakeup, random);
      } else {
        std::this_thread::yield();
      }
    }
  }

  void read_session(const SessionPtr& session, const std::shared_ptr<Wakeup>& wakeup,
                    Random& random) {
    const SessionSnapshot now = session->snapshot();
    const uint64_t starts[] = {now.first_offset, now.last_event_start, now.last_event_end};
    const uint64_t start = starts[random.below(3)];
    StreamChecker checker(session->epoch(), start, findings);
    SessionReader reader(session, start);
    for (;;) {
      const ReadResult result = reader.read(random.between(1, 3000));
      if (result.status == ReadStatus::data) {
        checker.take(result.piece.bytes);
      } else if (result.status == ReadStatus::wait) {
        if (random.one_in(50)) return;
        wait_for_news(reader, *session, wakeup, ++last_token_);
      } else {
        const bool complete = result.status == ReadStatus::lost || checker.ended();
        findings.require(complete, "a log without a last line, at ", reader.offset());
        return;
      }
      if (random.one_in(500)) return;
    }
  }

  void wait_for_news(SessionReader& reader, const StreamSession& session,
                     const std::shared_ptr<Wakeup>& wakeup, uint64_t token) {
    wakeup->drain();
    if (!reader.notify_when_readable(wakeup, token)) return;
    const bool woken = is_readable(wakeup->fd(), kPollTimeoutMs);
    findings.require(woken, "a wake-up was lost");
    findings.require(wakeup->drain() == std::vector<uint64_t>{token}, "not the token awaited");
    findings.require(session.read(reader.offset(), 1).status != ReadStatus::wait,
                     "woken without news");
  }

  void meddle(Random random) {
    while (!over_) {
      const SessionKey key = random_key(random);
      switch (random.below(8)) {
        case 0: manager_->evict(key); break;
        case 1: manager_->evict_and_cancel(key); break;
        case 2: manager_->evict_and_cancel(key, "another"); break;
        case 3:
          if (const auto session = manager_->get(key)) session->cancel("meddled");
          break;
        case 4:
          if (const auto session = manager_->get(key)) session->shrink(10'000);
          break;
        default: look_up(key.owner);
      }
      std::this_thread::yield();
    }
  }

  void look_up(const std::string& owner) {
    for (const SessionPtr& session : manager_->lookup(owner, {"a", "b", "a::1"})) {
      findings.require(session->key().owner == owner, "another owner's session");
      const SessionSnapshot now = session->snapshot();
      findings.require(now.first_offset <= now.end_offset, "a log that ends before it begins");
      findings.require(is_live(now.state) == (now.ended_unix_ms == 0), "half an ending");
    }
  }

  void keep_ticking(Random random) {
    while (!over_) {
      clock_->advance_ns(static_cast<int64_t>(random.below(kNanosPerSecond / 4)));
      const int64_t due_in_ns = manager_->tick();
      findings.require(due_in_ns <= 2 * kNanosPerSecond,
                       "the next tick is too far off: ", due_in_ns);
      std::this_thread::yield();
    }
  }

  void check_account() {
    for (const char* owner : {"one", "two"}) {
      for (const SessionPtr& session : manager_->lookup(owner, {"a", "b", "c"})) {
        findings.require(!is_live(session->snapshot().state), "a live session is left");
      }
    }
    clock_->advance_ns(10 * kNanosPerSecond);
    findings.require(manager_->tick() == -1, "work is left");
    findings.require(manager_->session_count() == 0, "sessions are left");
    findings.require(manager_->used_bytes() == 0, "memory is left: ", manager_->used_bytes());
  }

  const uint64_t seed_;
  const std::shared_ptr<ManualClock> clock_ = std::make_shared<ManualClock>();
  const std::shared_ptr<StreamSessionManager> manager_ = std::make_shared<StreamSessionManager>(
      ManagerOptions{8000, 120'000, 2 * kNanosPerSecond, kNanosPerSecond}, clock_);
  std::atomic<int> producers_left_{kProducers};
  std::atomic<bool> over_{false};
  std::atomic<uint64_t> last_token_{0};
};

TEST_CASE("race: create, replace, evict, cancel, tick, look up and read, all at once") {
  const uint64_t rounds = test::soak() ? 60 : 6;
  uint64_t bytes = 0;
  for (uint64_t round = 0; round < rounds; ++round) {
    INFO("seed ", test::base_seed(), ", round ", round);
    Storm storm(round * 1'000'000);
    storm.run(100);
    REQUIRE_MESSAGE(!storm.findings.failed(), storm.findings.first());
    bytes += storm.findings.bytes();
  }
  CHECK(bytes > 0);
  if (test::soak()) MESSAGE(bytes << " bytes checked");
}

}  // namespace
}  // namespace pyserve
