// Those who read a session's log, and how they are woken.
#include <doctest/doctest.h>

#include <memory>
#include <string>
#include <vector>

#include "../../csrc/stream_session.hpp"
#include "../../csrc/wakeup.hpp"
#include "framer_reference.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using test::LoneSession;
using test::reference_log;
using Tokens = std::vector<uint64_t>;

TEST_CASE("what a read at each position answers") {
  LoneSession::Limits limits;
  limits.max_session_bytes = 4096;
  const LoneSession session(limits);
  CHECK(session->read(0, 10).status == ReadStatus::wait);
  CHECK(session->read(1, 10).status == ReadStatus::ahead);
  while (session->snapshot().first_offset == 0) session->append("data: abc\n\n");
  for (const bool ended : {false, true}) {
    if (ended) session->finalize(State::completed, "");
    CAPTURE(ended);
    const SessionSnapshot now = session->snapshot();
    CHECK(session->read(0, 10).status == ReadStatus::lost);
    CHECK(session->read(now.first_offset - 1, 10).status == ReadStatus::lost);
    CHECK(session->read(now.first_offset, 10).piece.bytes == "data: abc\n");
    CHECK(session->read(now.end_offset - 1, 10).piece.bytes == "\n");
    CHECK(session->read(now.end_offset, 10).status == (ended ? ReadStatus::end : ReadStatus::wait));
    CHECK(session->read(now.end_offset + 1, 10).status == ReadStatus::ahead);
    CHECK(session->read(UINT64_MAX, 10).status == ReadStatus::ahead);
    CHECK(session->read(now.end_offset, 10).piece.bytes.empty());
  }
}

TEST_CASE("a read hands over no more than was asked for, and a reader goes on from there") {
  const LoneSession session;
  session->append("data: " + std::string(300'000, 'x') + "\n\n");
  session->finalize(State::completed, "");
  SessionReader reader(session.session, 0);
  std::string text;
  for (ReadResult result; (result = reader.read(1000)).status == ReadStatus::data;) {
    CHECK(result.piece.bytes.size() <= 1000);
    text += result.piece.bytes;
    CHECK(reader.offset() == text.size());
  }
  CHECK((text == test::read_all(*session)));
  CHECK(reader.read(1000).status == ReadStatus::end);
}

TEST_CASE("a session counts its readers") {
  const LoneSession session;
  {
    const SessionReader one(session.session, 0);
    SessionReader two(session.session, 17);
    CHECK(session->snapshot().readers == 2);
    two.detach();
    two.detach();
    CHECK(session->snapshot().readers == 1);
    CHECK(two.read(10).status == ReadStatus::end);
    CHECK_FALSE(two.notify_when_readable(std::make_shared<Wakeup>(), 1));
  }
  CHECK(session->snapshot().readers == 0);
}

TEST_CASE("a reader that left without reading on does not touch the session") {
  const LoneSession session;
  session->append("data: a\n\n");
  {
    const SessionReader reader(session.session, 0);
  }
  CHECK(session->snapshot().state == State::streaming);
  CHECK(session->append("data: b\n\n") == AppendStatus::ok);
}

// --- waiting

struct WaitingSession : LoneSession {
  std::shared_ptr<Wakeup> wakeup = std::make_shared<Wakeup>();

  bool wait(uint64_t token) const {
    return session->notify_when_readable(session->snapshot().end_offset, wakeup, token);
  }
};

TEST_CASE("each wait is one notification, however much is appended") {
  const WaitingSession session;
  CHECK(session.wait(7));
  for (int i = 0; i < 3; ++i) session->append("data: a\n\ndata: b\n\n");
  session->finalize(State::completed, "");
  CHECK(session.wakeup->drain() == Tokens{7});
}

TEST_CASE("everything that ends a wait: an event, a heartbeat, an ending") {
  const WaitingSession session;
  CHECK(session.wait(1));
  session->append("data: a\n\n");
  CHECK(session.wakeup->drain() == Tokens{1});
  CHECK(session.wait(2));
  session.clock->advance_ns(kNanosPerSecond);
  session->heartbeat();
  CHECK(session.wakeup->drain() == Tokens{2});
  CHECK(session.wait(3));
  session->cancel();
  CHECK(session.wakeup->drain() == Tokens{3});
}

TEST_CASE("what does not end a wait: a part of an event, a comment, a heartbeat not due, start") {
  const WaitingSession session;
  CHECK(session.wait(1));
  session->start();
  session->append("data: a\n");
  session->append("data: b");
  session->heartbeat();
  CHECK(session.wakeup->drain().empty());
  const WaitingSession comments;
  CHECK(comments.wait(1));
  comments->append(": x\n\nid: 4\n\n");
  CHECK(comments.wakeup->drain().empty());
}

TEST_CASE("there is nothing to wait for where a read would not answer wait") {
  LoneSession::Limits limits;
  limits.max_session_bytes = 4096;
  const LoneSession session(limits);
  const auto wakeup = std::make_shared<Wakeup>();
  while (session->snapshot().first_offset == 0) session->append("data: a\n\n");
  const uint64_t end = session->snapshot().end_offset;
  for (const uint64_t offset : {uint64_t{0}, end - 1, end + 1}) {
    CHECK_FALSE(session->notify_when_readable(offset, wakeup, 1));
  }
  session->cancel();
  CHECK_FALSE(session->notify_when_readable(session->snapshot().end_offset, wakeup, 1));
  CHECK(wakeup->drain().empty());
}

TEST_CASE("all who wait are woken, in the order in which they came, each through its own loop") {
  const WaitingSession session;
  const auto other = std::make_shared<Wakeup>();
  for (const uint64_t token : {5, 3, 9}) CHECK(session.wait(token));
  CHECK(session->notify_when_readable(0, other, 5));
  session->append("data: a\n\n");
  CHECK(session.wakeup->drain() == Tokens{5, 3, 9});
  CHECK(other->drain() == Tokens{5});
}

TEST_CASE("a forgotten wait leaves nothing behind, and takes no other with it") {
  WaitingSession session;
  auto gone = std::make_shared<Wakeup>();
  const std::weak_ptr<Wakeup> watched = gone;
  SessionReader reader(session.session, 0);
  CHECK(reader.notify_when_readable(gone, 1));
  CHECK(session.wait(1));
  CHECK(session.wait(2));
  reader.forget(*gone, 99);
  reader.forget(*gone, 1);
  reader.forget(*gone, 1);
  session->append("data: a\n\n");
  CHECK(gone->drain().empty());
  CHECK(session.wakeup->drain() == Tokens{1, 2});
  gone.reset();
  CHECK_MESSAGE(watched.expired(), "the session does not keep the loop's wakeup");
}

TEST_CASE("a wakeup that its loop closed is no trouble") {
  const WaitingSession session;
  CHECK(session.wait(1));
  session.wakeup->close();
  CHECK(session->append("data: a\n\n") == AppendStatus::ok);
  CHECK(session.wakeup->drain().empty());
}

TEST_CASE("who is woken by the ending finds the last line, then the end") {
  const WaitingSession session;
  SessionReader reader(session.session, 0);
  CHECK(reader.notify_when_readable(session.wakeup, 1));
  session->finalize(State::failed, "why");
  CHECK(session.wakeup->drain() == Tokens{1});
  CHECK(reader.read(100).piece.bytes == ": end failed why\n");
  CHECK(reader.read(100).status == ReadStatus::end);
}

}  // namespace
}  // namespace pyserve
