// Clients that leave, block or fall behind, and deliveries that are detached.
#include <doctest/doctest.h>

#include <functional>
#include <memory>
#include <string>

#include "../../csrc/socket_pump.hpp"
#include "known_stream.hpp"
#include "pump_support.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using test::Connection;
using test::KnownLog;
using test::LoneSession;
using test::narrow_connection;
using test::narrow_unix_connection;
using test::PumpBench;
using test::PumpedReader;
using test::tcp_connection;
using test::unix_connection;

struct Leaving {
  const char* name;
  Connection (*connect)();
  void (*leave)(Connection&);
};

const Leaving kLeavings[] = {
    {"TCP close", [] { return tcp_connection(); }, [](Connection& c) { c.client.close(); }},
    {"TCP half-close", [] { return tcp_connection(); },
     [](Connection& c) { ::shutdown(c.client.get(), SHUT_WR); }},
    {"TCP reset", [] { return tcp_connection(); }, [](Connection& c) { c.reset(); }},
    {"unix close", unix_connection, [](Connection& c) { c.client.close(); }},
    {"unix half-close", unix_connection,
     [](Connection& c) { ::shutdown(c.client.get(), SHUT_WR); }},
};

// The log of a session that grew beyond what a narrow connection takes.
struct LongSession {
  explicit LongSession(size_t cap_bytes = size_t{1} << 30)
      : session(LoneSession::Limits{cap_bytes, size_t{1} << 30}) {
    session->append(log.input);
  }
  const KnownLog log{3000};
  const LoneSession session;
};

// What came is what stood at the front of the log, and as much as the pump says.
void check_true_prefix(PumpedReader& reader, const KnownLog& log) {
  const test::ChunkDecoder& got = reader.client.decoder();
  CHECK(reader.client.read_raw(reader.delivery->sent_bytes()));
  CHECK_FALSE(reader.client.read_some(1, 0));
  CHECK(got.raw_bytes() == reader.delivery->sent_bytes());
  CHECK(got.is_valid());
  const std::string body = got.body_so_far();
  CHECK(!body.empty());
  CHECK_MESSAGE(log.holds(0, body), "the bytes differ");
}

// --- gone

TEST_CASE("a client that left before it was attached is gone") {
  for (const Leaving& leaving : kLeavings) {
    CAPTURE(leaving.name);
    const LoneSession session;
    PumpBench bench;
    for (const bool with_log : {false, true}) {
      if (with_log) session->append("data: a\n\n");
      Connection connection = leaving.connect();
      leaving.leave(connection);
      const auto reader = bench.attach(session.session, 0, std::move(connection));
      CHECK(reader->outcome() == DeliveryOutcome::gone);
    }
  }
}

TEST_CASE("a client that leaves at a live end is gone without any new event") {
  for (const Leaving& leaving : kLeavings) {
    CAPTURE(leaving.name);
    const LoneSession session;
    session->append("data: a\n\n");
    const uint64_t end = session->progress().end_offset;
    PumpBench bench;
    const auto reader = bench.attach(session.session, 0, leaving.connect());
    const auto other = bench.attach(session.session);
    REQUIRE(reader->client.read_body(end));
    REQUIRE(other->client.read_body(end));
    leaving.leave(reader->connection);
    CHECK(reader->outcome() == DeliveryOutcome::gone);
    CHECK(reader->delivery->sent_bytes() == reader->client.decoder().raw_bytes());
    session->cancel();
    CHECK(other->read_to_end() == DeliveryOutcome::end);
    CHECK(other->client.body() == test::read_all(*session));
  }
}

TEST_CASE("a client that leaves while it blocks is gone") {
  for (const Leaving& leaving : kLeavings) {
    CAPTURE(leaving.name);
    const LongSession log;
    PumpBench bench;
    Connection connection = leaving.connect();
    test::set_option(connection.server, SO_SNDBUF, 4096);
    const auto reader = bench.attach(log.session.session, 0, std::move(connection));
    bench.await_turn();
    leaving.leave(reader->connection);
    CHECK(reader->outcome() == DeliveryOutcome::gone);
    CHECK(bench.completions.total() == 2);
  }
}

TEST_CASE("a client that leaves after the end changes nothing, nor touches what is no more") {
  for (const Leaving& leaving : kLeavings) {
    CAPTURE(leaving.name);
    const LoneSession session;
    session->cancel();
    PumpBench bench;
    auto reader = bench.attach(session.session, 0, leaving.connect());
    REQUIRE(reader->read_to_end() == DeliveryOutcome::end);
    Connection connection = std::move(reader->connection);
    reader.reset();
    bench.pump->collect();
    leaving.leave(connection);
    bench.await_turn();
    CHECK(bench.completions.total() == 2);
  }
}

TEST_CASE("what is no connection is gone, and nobody else notices") {
  const LoneSession session;
  PumpBench bench;
  const test::Descriptor file(test::checked(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC)));
  int ends[2];
  test::checked(::pipe2(ends, O_CLOEXEC | O_NONBLOCK));
  const test::Descriptor read_end(ends[0]), write_end(ends[1]);
  session->append("data: a\n\n");
  for (const int fd : {file.get(), write_end.get()}) {
    const uint64_t token = bench.completions.next_token();
    const auto delivery =
        bench.pump->attach(session.session, 0, fd, bench.completions.wakeup(), token);
    REQUIRE(bench.completions.await(token));
    CHECK(delivery->outcome() == DeliveryOutcome::gone);
  }
}

// --- behind

TEST_CASE("a blocked client whose next bytes are dropped is lost after a true prefix") {
  const KnownLog log(3000);
  const std::string_view input = log.input;
  for (const bool tcp : {false, true}) {
    const LoneSession session({200'000, size_t{1} << 30});
    PumpBench bench;
    session->append(input.substr(0, 150'000));
    const auto reader =
        bench.attach(session.session, 0, tcp ? narrow_connection() : narrow_unix_connection());
    bench.await_turn();
    session->append(input.substr(150'000));
    session->finalize(State::completed, "");
    if (!tcp) CHECK(reader->delivery->outcome() == DeliveryOutcome::running);
    CHECK(reader->read_to_end() == DeliveryOutcome::lost);
    check_true_prefix(*reader, log);
    CHECK(reader->client.decoder().at_border());
    CHECK(reader->client.body().size() < session->snapshot().first_offset);
  }
}

TEST_CASE("an offset that was dropped before is lost at once, and nothing is sent") {
  const LongSession log(100'000);
  PumpBench bench;
  const auto reader = bench.attach(log.session.session, 0);
  CHECK(reader->outcome() == DeliveryOutcome::lost);
  CHECK(reader->delivery->sent_bytes() == 0);
  const uint64_t first = log.session->snapshot().first_offset;
  const auto other = bench.attach(log.session.session, first);
  log.session->finalize(State::completed, "");
  CHECK(other->read_to_end() == DeliveryOutcome::end);
  CHECK(other->client.body() == log.log.text.substr(first));
}

TEST_CASE("a client that blocks keeps nobody else from their bytes") {
  const LongSession log;
  PumpBench bench;
  const auto blocked = bench.attach(log.session.session, 0, narrow_connection());
  const auto other = bench.attach(log.session.session);
  REQUIRE(other->client.read_body(log.session->progress().end_offset));
  log.session->finalize(State::completed, "");
  CHECK(other->read_to_end() == DeliveryOutcome::end);
  CHECK(other->client.body() == log.log.text);
  CHECK(blocked->delivery->outcome() == DeliveryOutcome::running);
  CHECK(blocked->read_to_end() == DeliveryOutcome::end);
  CHECK(blocked->client.body() == log.log.text);
}

TEST_CASE("a client that takes few bytes at a time gets them all") {
  const KnownLog log(600);
  const LoneSession session;
  session->append(log.input);
  PumpBench bench;
  const auto reader = bench.attach(session.session, 0, narrow_connection());
  test::Random random(1);
  while (reader->client.body().size() < session->progress().end_offset) {
    REQUIRE(reader->client.read_some(random.between(1, 1000)));
  }
  session->finalize(State::completed, "");
  CHECK(reader->read_to_end() == DeliveryOutcome::end);
  CHECK(reader->client.body() == log.text);
}

// --- stalled

TEST_CASE("a client that takes nothing is stalled when the write timeout has passed, not before") {
  constexpr int64_t kTimeoutNs = 100 * test::kMillisecondNs;
  const LongSession log;
  for (const bool tcp : {true, false}) {
    PumpBench bench(kTimeoutNs);
    const int64_t before_ns = SystemClock().steady_ns();
    const auto reader =
        bench.attach(log.session.session, 0, tcp ? narrow_connection() : unix_connection());
    CHECK(reader->outcome() == DeliveryOutcome::stalled);
    CHECK(SystemClock().steady_ns() >= before_ns + kTimeoutNs);
    check_true_prefix(*reader, log.log);
  }
}

TEST_CASE("who waits for events is not stalled, whatever time passes, though it was blocked once") {
  const LongSession log;
  const LoneSession quiet;
  PumpBench bench(100 * test::kMillisecondNs);
  const auto idle = bench.attach(quiet.session);
  const auto was_blocked = bench.attach(log.session.session, 0, narrow_unix_connection());
  bench.await_turn();
  REQUIRE(was_blocked->client.read_body(log.session->progress().end_offset));
  for (int timeouts = 0; timeouts < 2; ++timeouts) {
    const auto stalled = bench.attach(log.session.session, 0, narrow_unix_connection());
    CHECK(stalled->outcome() == DeliveryOutcome::stalled);
  }
  CHECK(idle->delivery->outcome() == DeliveryOutcome::running);
  CHECK(was_blocked->delivery->outcome() == DeliveryOutcome::running);
}

// A unix socket is reported as writable only when three quarters of what it holds were taken: it
// takes many timeouts to get there.
TEST_CASE("a client that takes a little now and then is not stalled, however slowly") {
  const LoneSession session;
  session->append("data: " + std::string(8 << 20, 'x') + "\n\n");
  PumpBench bench(200 * test::kMillisecondNs);
  Connection connection = unix_connection();
  test::set_option(connection.server, SO_SNDBUF, 2 << 20);
  const auto slow = bench.attach(session.session, 0, std::move(connection));
  uint64_t held_bytes = 0;
  for (int timeouts = 0; timeouts < 3; ++timeouts) {
    const auto still = bench.attach(session.session, 0, unix_connection());
    while (!still->is_over()) {
      REQUIRE(slow->client.read_some(32 << 10));
      test::is_readable(bench.completions.wakeup()->fd(), 20);
    }
    CHECK(still->outcome() == DeliveryOutcome::stalled);
    CHECK(slow->delivery->outcome() == DeliveryOutcome::running);
    if (timeouts == 0) held_bytes = slow->delivery->sent_bytes();
  }
  CHECK_MESSAGE(slow->delivery->sent_bytes() == held_bytes, "it was writable: this tested nothing");
  session->finalize(State::completed, "");
  CHECK(slow->read_to_end() == DeliveryOutcome::end);
  CHECK(slow->client.body() == test::read_all(*session));
}

// --- detached

TEST_CASE("a reader that waits is detached, and the others go on") {
  const LoneSession session;
  PumpBench bench;
  const auto reader = bench.attach(session.session);
  const auto other = bench.attach(session.session);
  session->append("data: a\n\n");
  REQUIRE(reader->client.read_body(session->progress().end_offset));
  bench.pump->detach(*reader->delivery);
  CHECK(reader->outcome() == DeliveryOutcome::detached);
  session->append("data: b\n\n");
  session->cancel();
  CHECK(other->read_to_end() == DeliveryOutcome::end);
  CHECK(other->client.body() == test::read_all(*session));
  CHECK_FALSE(reader->client.read_some(1, 0));
}

TEST_CASE("a detach in the middle of a frame leaves it broken off, and the socket to the caller") {
  const LongSession log;
  PumpBench bench;
  const auto reader = bench.attach(log.session.session, 0, narrow_connection());
  bench.await_turn();
  bench.pump->detach(*reader->delivery);
  CHECK(reader->outcome() == DeliveryOutcome::detached);
  check_true_prefix(*reader, log.log);
  CHECK_FALSE(reader->client.decoder().at_border());
  REQUIRE(::send(reader->connection.server.get(), "bye", 3, 0) == 3);
  char got[8];
  CHECK(::recv(reader->connection.client.get(), got, sizeof got, 0) == 3);
}

TEST_CASE("a reader is detached right after it was attached") {
  const LongSession log;
  PumpBench bench;
  const auto reader = bench.attach(log.session.session, 0, narrow_connection());
  bench.pump->detach(*reader->delivery);
  CHECK(reader->outcome() == DeliveryOutcome::detached);
}

TEST_CASE("a delivery that is over cannot be detached, nor twice") {
  const LoneSession session;
  PumpBench bench;
  const auto detached = bench.attach(session.session);
  const auto ended = bench.attach(session.session);
  bench.pump->detach(*detached->delivery);
  bench.pump->detach(*detached->delivery);
  CHECK(detached->outcome() == DeliveryOutcome::detached);
  session->cancel();
  CHECK(ended->outcome() == DeliveryOutcome::end);
  bench.pump->detach(*ended->delivery);
  bench.pump->detach(*detached->delivery);
  bench.await_turn();
  CHECK(ended->delivery->outcome() == DeliveryOutcome::end);
  CHECK(bench.completions.total() == 3);
}

}  // namespace
}  // namespace pyserve
