// What the log of a session keeps: the cap, heartbeats, the memory budget.
#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <set>
#include <string>

#include "../../csrc/stream_session.hpp"
#include "framer_reference.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using test::LoneSession;
using test::make_pool;
using test::Random;
using test::read_all;
using test::reference_event;
using test::reference_log;

LoneSession::Limits capped(size_t bytes) {
  LoneSession::Limits limits;
  limits.max_session_bytes = bytes;
  return limits;
}

LoneSession::Limits budgeted(size_t bytes) {
  LoneSession::Limits limits;
  limits.budget_bytes = bytes;
  return limits;
}

std::string big_event(size_t bytes) { return "data: " + std::string(bytes, 'x') + "\n\n"; }

// --- the cap

// The whole log as it would be without a cap, and the places where it may begin.
class UncutLog {
 public:
  void add_event(const std::string& lines) {
    text += reference_event(lines, first_, "e", text.size());
    first_ = false;
    borders.insert(text.size());
  }
  void add_heartbeat() {
    text += ": ping\n";
    borders.insert(text.size());
  }

  std::string text;
  std::set<uint64_t> borders{0};

 private:
  bool first_ = true;
};

// One of: an event in two parts, an event of several lines, a heartbeat.
void grow(LoneSession& session, UncutLog& uncut, Random& random) {
  if (random.one_in(4)) {
    session.clock->advance_ns(kNanosPerSecond);
    session->heartbeat();
    uncut.add_heartbeat();
    return;
  }
  const std::string first(random.below(random.one_in(8) ? 3000 : 200), 'a');
  std::string lines = "data: " + first + "\n: ping\ndata: b\n";
  if (random.one_in(2)) lines = "event: x\n" + lines;
  const size_t cut = random.below(lines.size());
  REQUIRE(session->append(lines.substr(0, cut)) == AppendStatus::ok);
  CHECK(session->snapshot().pending_bytes + session->snapshot().end_offset -
            session->snapshot().first_offset <=
        4096);
  REQUIRE(session->append(lines.substr(cut) + "\n") == AppendStatus::ok);
  uncut.add_event(lines);
}

TEST_CASE("a log over its cap loses whole events and heartbeats, no more than it must") {
  for (uint64_t round = 0; round < (test::soak() ? 500 : 20); ++round) {
    INFO("seed ", test::base_seed(), ", round ", round);
    Random random(round);
    LoneSession session(capped(4096));
    UncutLog uncut;
    for (int step = 0; step < 150; ++step) {
      grow(session, uncut, random);
      const SessionSnapshot snapshot = session->snapshot();
      REQUIRE(snapshot.end_offset == uncut.text.size());
      REQUIRE(snapshot.end_offset - snapshot.first_offset <= 4096);
      REQUIRE(uncut.borders.count(snapshot.first_offset) == 1);
      REQUIRE(read_all(*session, snapshot.first_offset) ==
              uncut.text.substr(snapshot.first_offset));
    }
    const uint64_t first = session->snapshot().first_offset;
    REQUIRE(first > 0);
    // Room for what was kept back unfinished is the reason to drop more; that is an event at most.
    const uint64_t before = *std::prev(uncut.borders.find(first));
    CHECK(uncut.text.size() - before + 3300 > 4096);
  }
}

TEST_CASE("the cap counts the unfinished event") {
  const LoneSession session(capped(4096));
  for (int i = 0; i < 3; ++i) session->append(big_event(1000));
  CHECK(session->snapshot().first_offset == 0);
  session->append("data: " + std::string(1500, 'x'));
  const SessionSnapshot snapshot = session->snapshot();
  CHECK(snapshot.first_offset > 0);
  CHECK(snapshot.end_offset - snapshot.first_offset + snapshot.pending_bytes <= 4096);
}

TEST_CASE("a log of heartbeats alone stays under its cap, whole heartbeats at a time") {
  const LoneSession session(capped(4096));
  const std::string ping = ": ping\n";
  for (int i = 0; i < 2000; ++i) {
    session.clock->advance_ns(kNanosPerSecond);
    session->heartbeat();
  }
  const SessionSnapshot snapshot = session->snapshot();
  CHECK(snapshot.end_offset == 2000 * ping.size());
  CHECK(snapshot.first_offset % ping.size() == 0);
  CHECK(snapshot.end_offset - snapshot.first_offset == 4096 / ping.size() * ping.size());
}

TEST_CASE("the last line makes room for itself and is there to be read") {
  const LoneSession session(capped(4096));
  while (session->snapshot().first_offset == 0) session->append("data: a\n\n");
  session->finalize(State::failed, std::string(100, 'r'));
  const SessionSnapshot snapshot = session->snapshot();
  CHECK(snapshot.end_offset - snapshot.first_offset <= 4096);
  const std::string log = read_all(*session, snapshot.first_offset);
  CHECK(log.substr(0, 8) == "data: a\n");
  const std::string last = ": end failed " + std::string(100, 'r') + "\n";
  CHECK(log.substr(log.size() - last.size()) == last);
}

// --- heartbeats

TEST_CASE("a heartbeat is due when nothing was appended for the interval") {
  const LoneSession session;  // its interval is one second
  const int64_t second = kNanosPerSecond;
  CHECK(session->heartbeat() == second);
  session.clock->advance_ns(second - 1);
  CHECK(session->heartbeat() == second);
  CHECK(read_all(*session).empty());
  session.clock->advance_ns(1);
  CHECK(session->heartbeat() == 2 * second);
  CHECK(session->heartbeat() == 2 * second);
  CHECK(read_all(*session) == ": ping\n");
  session.clock->advance_ns(5 * second);
  CHECK_MESSAGE(session->heartbeat() == 7 * second, "one for a long pause, not five");
  CHECK(read_all(*session) == ": ping\n: ping\n");
}

TEST_CASE("a queued session beats, and stays queued") {
  const LoneSession session;
  session.clock->advance_ns(kNanosPerSecond);
  session->heartbeat();
  CHECK(read_all(*session) == ": ping\n");
  CHECK(session->snapshot().state == State::queued);
}

TEST_CASE("while events flow there is no heartbeat") {
  const LoneSession session;
  for (int i = 0; i < 100; ++i) {
    session.clock->advance_ns(kNanosPerSecond * 9 / 10);
    session->append("data: a\n\n");
    CHECK(session->heartbeat() == session.clock->steady_ns() + kNanosPerSecond);
  }
  CHECK(read_all(*session).find("ping") == std::string::npos);
}

TEST_CASE("a heartbeat stands between two events and moves the id of the one that is pending") {
  const LoneSession session;
  session->append("data: a\n\ndata: b\nda");
  session.clock->advance_ns(kNanosPerSecond);
  session->heartbeat();
  session->append("ta: c\n\n");
  const std::string before = reference_log({"data: a\n"}) + ": ping\n";
  CHECK(read_all(*session) ==
        before + reference_event("data: b\ndata: c\n", false, "e", before.size()));
  CHECK(session->snapshot().last_event_start == before.size());
}

// --- memory

TEST_CASE("a session takes its account back to where it was") {
  const auto held = [] {
    const LoneSession session;
    CHECK(session.pool->used_bytes() == StreamSession::kOverheadBytes);
    session->append(big_event(200'000) + "data: " + std::string(100'000, 'x'));
    CHECK(session.pool->used_bytes() >= 300'000);
    return std::make_pair(session.pool, session->read(0, 100));
  }();
  CHECK_MESSAGE(held.first->used_bytes() >= 1, "a piece holds its chunk");
  CHECK_MESSAGE(held.first->used_bytes() <= ChunkPool::kFullChunkBytes, "and only that");
  CHECK(held.second.piece.bytes.substr(0, 7) == "data: x");

  std::shared_ptr<ChunkPool> pool;
  {
    const LoneSession session;
    pool = session.pool;
    session->append(big_event(200'000) + "data: " + std::string(100'000, 'x'));
    session->cancel();
  }
  CHECK(pool->used_bytes() == 0);
}

TEST_CASE("an idle session and a short one stay small") {
  const LoneSession session;
  session->append("data: a\n\n");
  CHECK(session.pool->used_bytes() <= StreamSession::kOverheadBytes + 1024 + 256);
}

TEST_CASE("an unfinished event counts toward the budget, and no longer than it lasts") {
  const LoneSession session;
  session->append("data: " + std::string(50'000, 'x'));
  CHECK(session.pool->used_bytes() >= StreamSession::kOverheadBytes + 50'000);
  session->finalize(State::failed, "");
  CHECK(session.pool->used_bytes() <= StreamSession::kOverheadBytes + 1024 + 64 * 1024 + 1);
}

TEST_CASE("shrink drops whole events, by whole chunks, and leaves the chunk being filled") {
  const LoneSession session;
  session->append(big_event(500));
  session->shrink(1'000'000);
  CHECK_MESSAGE(session->snapshot().first_offset == 0, "with one chunk nothing is dropped");

  for (int i = 0; i < 300; ++i) session->append(big_event(1000));
  const uint64_t end = session->snapshot().end_offset;
  const size_t used = session.pool->used_bytes();
  session->shrink(100'000);
  const uint64_t first = session->snapshot().first_offset;
  CHECK(first >= 100'000);
  CHECK(first <= 100'000 + ChunkPool::kFullChunkBytes + 1100);
  CHECK(read_all(*session, first).substr(0, 6) == "data: ");
  CHECK(session.pool->used_bytes() <= used - 100'000);

  session->shrink(UINT64_MAX / 2);
  CHECK(end - session->snapshot().first_offset <= ChunkPool::kFullChunkBytes);
  CHECK(end > session->snapshot().first_offset);
  CHECK(session.pool->used_bytes() <=
        StreamSession::kOverheadBytes + 2 * ChunkPool::kFullChunkBytes);
}

// Frees another's memory when it is asked, as a manager does with finished sessions.
class Reclaimer final : public SessionObserver {
 public:
  void session_ended(StreamSession&) override { ++ended; }
  void reclaim_memory() override {
    ++asked;
    reclaimable = ChunkRef();
  }

  int ended = 0;
  int asked = 0;
  ChunkRef reclaimable;
};

TEST_CASE("over the budget, the observer frees first; only then the growing log loses its front") {
  const auto reclaimer = std::make_shared<Reclaimer>();
  const LoneSession session(budgeted(600'000), {}, {}, reclaimer);
  reclaimer->reclaimable = session.pool->allocate(200'000);
  while (reclaimer->asked == 0) session->append(big_event(1000));
  CHECK(session->snapshot().first_offset == 0);
  CHECK(session.pool->excess_bytes() == 0);

  for (int i = 0; i < 2000; ++i) {
    session->append(big_event(1000));
    REQUIRE(session.pool->used_bytes() <= 600'000 + ChunkPool::kFullChunkBytes);
  }
  CHECK(session->snapshot().first_offset > 0);
  CHECK_MESSAGE(session->snapshot().end_offset - session->snapshot().first_offset > 400'000,
                "no more is dropped than the budget asks for");
  session->cancel();
  CHECK(reclaimer->ended == 1);
}

// --- what is told before the start and at a stop

TEST_CASE("an announcement is an event of the log and leaves the session queued") {
  const LoneSession session;
  CHECK(session->announce("place 1", "queued") == AppendStatus::ok);
  CHECK(session->snapshot().state == State::queued);
  CHECK(read_all(*session) == reference_event("event: queued\ndata: place 1\n", true, "e", 0));
  CHECK(session->start());
  CHECK(session->announce("late", "queued") == AppendStatus::ok);
  CHECK(session->snapshot().state == State::streaming);
  session->cancel();
  CHECK(session->announce("too late", "queued") == AppendStatus::ended);
}

TEST_CASE("a cancel may have a last event, and drops one that is not whole") {
  const LoneSession session;
  session->append("data: half");
  CHECK(session->cancel("cancelled", "event: over\ndata: 1\n\n"));
  CHECK_FALSE(session->cancel("again", "data: 2\n\n"));
  CHECK(read_all(*session) ==
        reference_event("event: over\ndata: 1\n", true, "e", 0) + ": end cancelled\n");
}

TEST_CASE("a session knows for how long nobody has read it") {
  const LoneSession session;
  const auto unread_ns = [&] { return session->snapshot().unread_ns; };
  CHECK(unread_ns() == 0);
  session.clock->advance_ns(5);
  CHECK(unread_ns() == 5);
  session->attach_reader();
  session->attach_reader();
  session.clock->advance_ns(5);
  CHECK(unread_ns() == 0);
  session->detach_reader();
  session.clock->advance_ns(5);
  CHECK(unread_ns() == 0);
  session->detach_reader();
  session.clock->advance_ns(7);
  CHECK(unread_ns() == 7);
}

}  // namespace
}  // namespace pyserve
