// The pump and everything that may happen to it at the same time: producers that append, clients
// that come, read, block and leave, deliveries that are detached, sessions that end and are
// replaced, and the pump itself destroyed. Written for ThreadSanitizer, but each byte that arrives
// is also compared with what it must be.
//
// Threads report what they find to a Findings; doctest's macros stay on the main thread. Nobody
// sleeps: threads wait in poll().
#include <doctest/doctest.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/session_manager.hpp"
#include "../../csrc/socket_pump.hpp"
#include "known_stream.hpp"
#include "pump_support.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using test::Completions;
using test::Connection;
using test::Findings;
using test::KnownLog;
using test::PumpedReader;
using test::Random;
using test::StreamChecker;
using SessionPtr = std::shared_ptr<StreamSession>;

// Runs each function in a thread of its own, to its end. An exception is a finding.
void run_together(const std::vector<std::function<void()>>& functions, Findings& findings) {
  std::vector<std::thread> threads;
  for (const auto& function : functions) {
    threads.emplace_back([&findings, &function] {
      try {
        function();
      } catch (const std::exception& error) {
        findings.require(false, "an exception: ", error.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

Connection random_connection(Random& random) {
  switch (random.below(4)) {
    case 0: return test::tcp_connection();
    case 1: return test::narrow_connection();
    default: return test::unix_connection();
  }
}

// --- one log

// Clients of one thread, each at another place of a known log that grows.
void read_known(SocketPump& pump, const SessionPtr& session, const KnownLog& log, Random random,
                Findings& findings) {
  Completions completions;
  std::vector<std::pair<uint64_t, std::unique_ptr<PumpedReader>>> readers;
  for (int i = 0; i < 12; ++i) {
    const uint64_t offset = random.below(session->progress().end_offset + 1);
    readers.emplace_back(offset, std::make_unique<PumpedReader>(pump, completions, session, offset,
                                                                random_connection(random)));
  }
  for (const auto& [offset, reader] : readers) {
    findings.require(reader->read_to_end() == DeliveryOutcome::end, "no end for ", offset);
    const test::ChunkDecoder& got = reader->client.decoder();
    findings.require(got.is_valid() && got.at_border(), "wrong framing from ", offset);
    findings.require(got.body() == log.text.substr(offset), "wrong bytes from ", offset);
    findings.count(got.body().size());
    pump.collect();
  }
}

// Appends in portions, and reads along, so that the others do not all find a finished log.
void produce_known(SocketPump& pump, const SessionPtr& session, const KnownLog& log, Random random,
                   Findings& findings) {
  Completions completions;
  PumpedReader own(pump, completions, session, 0, test::unix_connection());
  uint64_t until_pause = 0;
  for (std::string_view rest = log.input; !rest.empty() && !findings.failed();) {
    const std::string_view part = rest.substr(0, random.between(1, random.one_in(4) ? 5000 : 300));
    session->append(part);
    rest.remove_prefix(part.size());
    until_pause += part.size();
    if (until_pause < 20'000) continue;
    until_pause = 0;
    findings.require(own.client.read_body(session->progress().end_offset), "the log stands still");
  }
  session->finalize(State::completed, "");
  findings.require(own.read_to_end() == DeliveryOutcome::end, "the producer's own end");
}

TEST_CASE("race: clients in several threads read each byte of a growing log from one pump") {
  const uint64_t rounds = test::soak() ? 200 : 3;
  const KnownLog log(2000);
  for (uint64_t round = 0; round < rounds; ++round) {
    INFO("seed ", test::base_seed(), ", round ", round);
    const test::LoneSession session;
    SocketPump pump(test::kNoTimeoutNs, 0);
    Findings findings;
    std::vector<std::function<void()>> threads;
    for (uint64_t i = 0; i < 4; ++i) {
      threads.push_back(
          [&, i] { read_known(pump, session.session, log, Random(round * 100 + i), findings); });
    }
    threads.push_back(
        [&] { produce_known(pump, session.session, log, Random(round * 100 + 50), findings); });
    run_together(threads, findings);
    REQUIRE_MESSAGE(!findings.failed(), findings.first());
  }
}

TEST_CASE("race: the end, a client that leaves and a detach, all at once, are one outcome") {
  const int rounds = test::soak() ? 20'000 : 300;
  SocketPump pump(test::kNoTimeoutNs, 0);
  for (int round = 0; round < rounds; ++round) {
    INFO("round ", round);
    const test::LoneSession session;
    Completions completions;
    Findings findings;
    PumpedReader reader(pump, completions, session.session, 0, test::unix_connection());
    run_together({[&] { session->cancel(); }, [&] { pump.detach(*reader.delivery); },
                  [&] { reader.connection.client.close(); }, [&] { pump.collect(); }},
                 findings);
    const DeliveryOutcome outcome = reader.outcome();
    REQUIRE(!findings.failed());
    REQUIRE(outcome != DeliveryOutcome::running);
    REQUIRE(outcome != DeliveryOutcome::lost);
    REQUIRE(outcome != DeliveryOutcome::stalled);
    REQUIRE(completions.total() == 1);
  }
}

// --- everything at once

// A delivery that any thread may detach.
struct Seat {
  std::shared_ptr<SocketPump> pump;
  std::shared_ptr<Delivery> delivery;
};

// Held by sessions; must not go on the pump's thread.
class Hook {
 public:
  explicit Hook(Findings& findings) : findings_(findings) {}
  ~Hook() {
    std::array<char, 16> name{};
    ::pthread_getname_np(::pthread_self(), name.data(), name.size());
    findings_.require(std::string(name.data()) != "pyserve-pump",
                      "a session was let go of on the pump's thread");
  }

 private:
  Findings& findings_;
};

// A manager with few keys and little memory, a pump that is replaced now and then, and threads that
// use all of it.
class PumpStorm {
 public:
  explicit PumpStorm(uint64_t seed) : seed_(seed) {}

  void run(int sessions_each) {
    std::vector<std::function<void()>> threads;
    for (uint64_t i = 0; i < kProducers; ++i) {
      threads.push_back([=] {
        for (int n = 0; n < sessions_each; ++n) produce_session(Random(seed_ + 1000 * i + n));
        if (--producers_left_ == 0) over_ = true;
      });
    }
    for (uint64_t i = 0; i < kClients; ++i)
      threads.push_back([=] { follow_sessions(Random(seed_ + i)); });
    threads.push_back([=] { meddle(Random(seed_ + 77)); });
    run_together(threads, findings);
    pump_.reset();
    seats_.clear();
    clock_->advance_ns(10 * kNanosPerSecond);
    manager_->tick();
    findings.require(manager_->used_bytes() == 0, "memory is left: ", manager_->used_bytes());
  }

  Findings findings;
  std::array<std::atomic<int>, 6> outcomes{};

 private:
  static constexpr int kProducers = 3;
  static constexpr int kClients = 5;
  enum class Habit { reads, closes, half_closes, resets, stops };

  static std::shared_ptr<SocketPump> make_pump() {
    return std::make_shared<SocketPump>(20 * test::kMillisecondNs, 0);
  }
  static SessionKey random_key(Random& random) {
    static const char* const ids[] = {"a", "b", "c", "d"};
    return {"owner", ids[random.below(std::size(ids))]};
  }

  void produce_session(Random random) {
    SessionPtr session;
    try {
      const auto hook = std::make_shared<Hook>(findings);
      session = manager_->create_or_replace(random_key(random), [hook] {}, [hook] {}, "tag");
    } catch (const MemoryBudgetError&) {
      return;
    }
    std::string input;
    const uint64_t events = random.below(120);
    for (uint64_t n = 0; n < events; ++n) input += test::known_event_input(n);
    for (std::string_view rest = input; !rest.empty();) {
      const std::string_view part = rest.substr(0, random.between(1, 700));
      rest.remove_prefix(part.size());
      if (session->append(part) != AppendStatus::ok) break;
      std::this_thread::yield();
    }
    if (random.one_in(20)) return leave_live(std::move(session));
    if (random.one_in(2)) session->finalize(State::completed, "");
    if (random.one_in(2)) session->finalize(State::failed, "why", "data: {}\n\n");
    session->cancel();
  }

  // Let go of without an ending: only its readers, if any, are left, with the hooks.
  void leave_live(SessionPtr session) { manager_->evict(session->key(), session->epoch()); }

  void follow_sessions(Random random) {
    Completions completions;
    while (!over_ && !findings.failed()) {
      if (const SessionPtr session = manager_->get(random_key(random))) {
        follow(session, completions, random);
      } else {
        std::this_thread::yield();
      }
    }
  }

  void follow(const SessionPtr& session, Completions& completions, Random& random) {
    const SessionSnapshot now = session->snapshot();
    const uint64_t starts[] = {now.first_offset, now.last_event_start, now.last_event_end};
    const uint64_t start = starts[random.below(3)];
    std::shared_ptr<SocketPump> pump = current_pump();
    PumpedReader reader(*pump, completions, session, start, random_connection(random));
    take_seat({std::move(pump), reader.delivery}, random);
    const auto habit = static_cast<Habit>(random.below(5));
    StreamChecker checker(session->epoch(), start, findings);
    size_t checked = 0;
    for (uint64_t reads_left = random.below(20); !reader.is_over();) {
      pollfd watched[] = {{habit == Habit::stops ? -1 : reader.connection.client.get(), POLLIN, 0},
                          {completions.wakeup()->fd(), POLLIN, 0}};
      // One that gets no news leaves, or it would wait for a session that was let go of.
      const bool news = ::poll(watched, 2, kPatienceMs) > 0;
      if (watched[0].revents != 0) reader.client.read_some(random.between(1, 5000));
      check(reader, checker, checked);
      const bool stays = habit == Habit::reads || habit == Habit::stops;
      if (!news || (!stays && reads_left-- == 0)) {
        leave(reader, habit);
        break;
      }
    }
    settle(reader, habit, checker, checked);
  }

  static void leave(PumpedReader& reader, Habit habit) {
    switch (habit) {
      case Habit::half_closes: ::shutdown(reader.connection.client.get(), SHUT_WR); break;
      case Habit::resets: reader.connection.reset(); break;
      default: reader.connection.client.close();
    }
  }

  void check(PumpedReader& reader, StreamChecker& checker, size_t& checked) {
    const test::ChunkDecoder& got = reader.client.decoder();
    findings.require(got.is_valid(), "wrong framing");
    checker.take(std::string_view(got.body()).substr(checked));
    checked = got.body().size();
  }

  void settle(PumpedReader& reader, Habit habit, StreamChecker& checker, size_t& checked) {
    const DeliveryOutcome outcome = reader.outcome();
    ++outcomes[static_cast<size_t>(outcome)];
    findings.require(outcome != DeliveryOutcome::running, "a delivery that never ends");
    if (reader.connection.client.get() < 0) return;
    findings.require(reader.client.read_raw(reader.delivery->sent_bytes()), "less than was sent");
    check(reader, checker, checked);
    const test::ChunkDecoder& got = reader.client.decoder();
    findings.require(got.raw_bytes() == reader.delivery->sent_bytes(), "more than was sent");
    if (outcome == DeliveryOutcome::end) {
      findings.require(got.at_border() && (checker.ended() || got.raw_bytes() == 0),
                       "no last line");
    }
    if (outcome == DeliveryOutcome::lost) findings.require(got.at_border(), "lost within a frame");
    findings.require(outcome != DeliveryOutcome::gone || habit == Habit::half_closes,
                     "gone, though it did not leave");
  }

  std::shared_ptr<SocketPump> current_pump() {
    const std::lock_guard lock(mutex_);
    return pump_;
  }

  // What sat there before goes after the lock: it may be the last that holds a pump.
  void take_seat(Seat seat, Random& random) {
    const std::lock_guard lock(mutex_);
    std::swap(seats_[random.below(seats_.size())], seat);
  }

  void meddle(Random random) {
    while (!over_ && !findings.failed()) {
      switch (random.below(8)) {
        case 0: manager_->evict_and_cancel(random_key(random)); break;
        case 1:
          if (const SessionPtr session = manager_->get(random_key(random))) session->shrink(10'000);
          break;
        case 2:
          if (const SessionPtr session = manager_->get(random_key(random))) session->heartbeat();
          clock_->advance_ns(kNanosPerSecond / 100);
          break;
        case 3: replace_pump(random); break;
        case 4: detach_one(random); break;
        default: current_pump()->collect();
      }
      std::this_thread::yield();
    }
  }

  // The old one goes with the last thread that uses it, deliveries and all.
  void replace_pump(Random& random) {
    if (!random.one_in(20)) return;
    std::vector<Seat> seats(8);
    std::shared_ptr<SocketPump> pump = make_pump();
    const std::lock_guard lock(mutex_);
    std::swap(seats, seats_);
    std::swap(pump, pump_);
  }

  void detach_one(Random& random) {
    Seat seat;
    {
      const std::lock_guard lock(mutex_);
      seat = seats_[random.below(seats_.size())];
    }
    if (seat.delivery) seat.pump->detach(*seat.delivery);
  }

  static constexpr int kPatienceMs = 200;

  const uint64_t seed_;
  const std::shared_ptr<ManualClock> clock_ = std::make_shared<ManualClock>();
  const std::shared_ptr<StreamSessionManager> manager_ = std::make_shared<StreamSessionManager>(
      ManagerOptions{20'000, 400'000, 2 * kNanosPerSecond, kNanosPerSecond}, clock_);
  std::atomic<int> producers_left_{kProducers};
  std::atomic<bool> over_{false};
  std::mutex mutex_;  // guards the pump and the seats
  std::shared_ptr<SocketPump> pump_ = make_pump();
  std::vector<Seat> seats_ = std::vector<Seat>(8);
};

TEST_CASE("race: attach, detach, leave, end, replace and destroy the pump, all at once") {
  const uint64_t rounds = test::soak() ? 60 : 4;
  uint64_t bytes = 0;
  std::array<int, 6> outcomes{};
  for (uint64_t round = 0; round < rounds; ++round) {
    INFO("seed ", test::base_seed(), ", round ", round);
    PumpStorm storm(round * 1'000'000);
    storm.run(100);
    REQUIRE_MESSAGE(!storm.findings.failed(), storm.findings.first());
    bytes += storm.findings.bytes();
    for (size_t i = 0; i < outcomes.size(); ++i) outcomes[i] += storm.outcomes[i];
  }
  CHECK(bytes > 0);
  CHECK(outcomes[static_cast<size_t>(DeliveryOutcome::end)] > 0);
  CHECK(outcomes[static_cast<size_t>(DeliveryOutcome::gone)] > 0);
  CHECK(outcomes[static_cast<size_t>(DeliveryOutcome::detached)] > 0);
  if (test::soak()) MESSAGE(bytes << " bytes checked");
}

}  // namespace
}  // namespace pyserve
