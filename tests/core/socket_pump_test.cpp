// What arrives at clients that read, how it is framed and merged, and when a delivery is over.
// Clients that leave, block or are detached: pump_clients_test.cpp; what the pump holds and gives
// back: pump_lifetime_test.cpp; threads: pump_race_test.cpp.
#include "../../csrc/socket_pump.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/session_manager.hpp"
#include "known_stream.hpp"
#include "pump_support.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using test::KnownLog;
using test::LoneSession;
using test::PumpBench;
using test::PumpedReader;
using test::tcp_connection;
using test::unix_connection;
using Readers = std::vector<std::unique_ptr<PumpedReader>>;

int64_t now_ns() { return SystemClock().steady_ns(); }

std::string tail_of(const KnownLog& log, uint64_t offset) { return log.text.substr(offset); }

size_t framing_bytes(const test::ChunkDecoder& decoder) {
  size_t bytes = 0;
  for (const size_t size : decoder.chunk_sizes()) {
    for (size_t rest = size; rest > 0; rest /= 16) ++bytes;
    bytes += 4;
  }
  return bytes;
}

void check_all_arrived(PumpedReader& reader, const std::string& expected) {
  CHECK(reader.read_to_end() == DeliveryOutcome::end);
  const test::ChunkDecoder& got = reader.client.decoder();
  CHECK(got.is_valid());
  CHECK(got.at_border());
  CHECK_MESSAGE(got.body() == expected, "the bytes differ");
  CHECK(reader.delivery->sent_bytes() == got.raw_bytes());
  CHECK(got.raw_bytes() == expected.size() + framing_bytes(got));
}

// --- bytes

TEST_CASE("a finished log arrives whole and exact, from every event and from within events") {
  const KnownLog log(100);
  const LoneSession session;
  session->append(log.input);
  session->finalize(State::completed, "");
  PumpBench bench;
  std::vector<uint64_t> offsets = log.borders;
  for (uint64_t offset = 1; offset < log.text.size(); offset += 997) offsets.push_back(offset);
  for (const uint64_t offset : offsets) {
    CAPTURE(offset);
    check_all_arrived(*bench.attach(session.session, offset, unix_connection()),
                      tail_of(log, offset));
  }
}

TEST_CASE("a log of many memory chunks arrives whole in frames of at most 64 KiB") {
  const KnownLog log(6000);
  REQUIRE(log.text.size() > 16 * test::kMaxFrameBytes);
  const LoneSession session;
  session->append(log.input);
  session->finalize(State::completed, "");
  PumpBench bench;
  for (const int buffer_bytes : {0, 4096}) {
    CAPTURE(buffer_bytes);
    const auto reader = bench.attach(session.session, 0, tcp_connection(buffer_bytes));
    check_all_arrived(*reader, log.text);
    const auto& sizes = reader->client.decoder().chunk_sizes();
    CHECK(*std::max_element(sizes.begin(), sizes.end()) == test::kMaxFrameBytes);
    CHECK(sizes.size() < 2 * log.text.size() / test::kMaxFrameBytes);
  }
}

TEST_CASE("an event larger than any frame arrives whole, live and replayed") {
  const LoneSession session;
  PumpBench bench;
  const auto live = bench.attach(session.session);
  const std::string event = "data: " + std::string(300'000, 'x') + "\n\n";
  session->append(event);
  session->finalize(State::completed, "");
  const std::string expected = test::read_all(*session);
  check_all_arrived(*live, expected);
  check_all_arrived(*bench.attach(session.session), expected);
}

TEST_CASE("a log that grows arrives whole at readers that came at different times") {
  const KnownLog log(300);
  const LoneSession session;
  PumpBench bench;
  Readers readers;
  std::vector<uint64_t> starts;
  for (uint64_t n = 0; n < 300; ++n) {
    if (n % 10 == 0) {
      // Where the log ends, and somewhere in what there is.
      starts.push_back(n % 20 == 0 ? log.borders[n] : log.borders[n] / 2);
      readers.push_back(bench.attach(session.session, starts.back(),
                                     n % 30 == 0 ? tcp_connection() : unix_connection()));
    }
    session->append(test::known_event_input(n));
  }
  session->finalize(State::completed, "");
  for (size_t i = 0; i < readers.size(); ++i) {
    CAPTURE(starts[i]);
    check_all_arrived(*readers[i], tail_of(log, starts[i]));
  }
}

TEST_CASE("the log of one session never reaches another's readers") {
  PumpBench bench;
  std::vector<LoneSession> sessions(20);
  Readers readers;
  for (const LoneSession& session : sessions) readers.push_back(bench.attach(session.session));
  for (int round = 0; round < 20; ++round) {
    for (size_t i = 0; i < sessions.size(); ++i) {
      sessions[i]->append("data: " + std::to_string(i) + "\n\n");
    }
  }
  for (size_t i = 0; i < sessions.size(); ++i) {
    sessions[i]->cancel();
    check_all_arrived(*readers[i], test::read_all(*sessions[i]));
  }
}

TEST_CASE("a reader at a live end gets only what comes after it") {
  const LoneSession session;
  session->append("data: before\n\n");
  const uint64_t end = session->progress().end_offset;
  PumpBench bench;
  const auto reader = bench.attach(session.session, end);
  bench.await_turn();
  CHECK(reader->delivery->sent_bytes() == 0);
  CHECK_FALSE(reader->is_over());
  session->append("data: after\n\n");
  session->finalize(State::completed, "");
  check_all_arrived(*reader, test::read_all(*session, end));
}

TEST_CASE("at the very end of a finished session there is nothing to send, and that is the end") {
  const LoneSession session;
  session->append("data: a\n\n");
  session->finalize(State::completed, "");
  PumpBench bench;
  const auto reader = bench.attach(session.session, session->progress().end_offset);
  CHECK(reader->outcome() == DeliveryOutcome::end);
  CHECK(reader->delivery->sent_bytes() == 0);
}

TEST_CASE("a session that ends without an event sends its last line") {
  for (const bool attached_first : {true, false}) {
    const LoneSession session;
    PumpBench bench;
    if (!attached_first) session->cancel();
    const auto reader = bench.attach(session.session);
    if (attached_first) {
      bench.await_turn();
      session->cancel();
    }
    check_all_arrived(*reader, ": end cancelled\n");
  }
}

TEST_CASE("a session that is evicted while it is read goes on to its end") {
  const auto manager = std::make_shared<StreamSessionManager>(
      ManagerOptions{1 << 20, 1 << 24, kNanosPerSecond, kNanosPerSecond},
      std::make_shared<ManualClock>());
  PumpBench bench;
  for (const bool cancel : {false, true}) {
    auto session = manager->create_or_replace({"owner", "id"}, {}, {}, {});
    const auto reader = bench.attach(session);
    session->append("data: a\n\n");
    REQUIRE(reader->client.read_body(1));
    if (cancel) {
      manager->evict_and_cancel({"owner", "id"});
    } else {
      manager->evict({"owner", "id"});
      session->append("data: b\n\n");
      session->finalize(State::completed, "");
    }
    check_all_arrived(*reader, test::read_all(*session));
  }
}

// --- merging

TEST_CASE("where there is time, each event is sent at once and alone") {
  const LoneSession session;
  PumpBench bench;
  Readers readers;
  for (int i = 0; i < 3; ++i) readers.push_back(bench.attach(session.session));
  constexpr size_t kEvents = 30;  // together less than a chunk of memory, which would divide one
  for (size_t n = 0; n < kEvents; ++n) {
    session->append("data: a\n\n");
    const uint64_t end = session->progress().end_offset;
    for (const auto& reader : readers) REQUIRE(reader->client.read_body(end));
  }
  for (const auto& reader : readers) {
    CHECK(reader->client.decoder().chunk_sizes().size() == kEvents);
  }
}

TEST_CASE("in a burst events are merged") {
  const KnownLog log(3000);
  const LoneSession session;
  PumpBench bench;
  Readers readers;
  for (int i = 0; i < 50; ++i) {
    readers.push_back(bench.attach(session.session, 0, unix_connection()));
  }
  std::thread producer([&] {
    for (uint64_t n = 0; n < 3000; ++n) session->append(test::known_event_input(n));
    session->finalize(State::completed, "");
  });
  for (const auto& reader : readers) {
    check_all_arrived(*reader, log.text);
    CHECK(reader->client.decoder().chunk_sizes().size() < 3000 / 2);
  }
  producer.join();
}

TEST_CASE("after a flush that took long the next one waits as long, and takes all") {
  const LoneSession session;
  PumpBench bench;
  const auto reader = bench.attach(session.session);
  bench.await_turn();
  {
    const test::HeldSession held(session);  // an event for the pump, which can't get at it
    CHECK_FALSE(reader->client.read_some(1, 400));
  }
  const uint64_t first_end = session->progress().end_offset;
  REQUIRE(reader->client.read_body(first_end));
  session->append("data: b\n\n");
  CHECK_FALSE(reader->client.read_some(1, 50));
  session->append("data: c\n\n");
  REQUIRE(reader->client.read_body(session->progress().end_offset));
  CHECK(reader->client.decoder().chunk_sizes().size() == 2);
}

TEST_CASE("coalesce keeps flushes apart, but not the first, and loses nothing") {
  constexpr int64_t kCoalesceNs = 100 * test::kMillisecondNs;
  const LoneSession session;
  PumpBench bench(test::kNoTimeoutNs, kCoalesceNs);
  const auto reader = bench.attach(session.session);
  bench.await_turn();
  const int64_t before_first_ns = now_ns();
  session->append("data: a\n\n");
  REQUIRE(reader->client.read_body(session->progress().end_offset));
  for (int i = 0; i < 10; ++i) session->append("data: b\n\n");
  const bool in_time = now_ns() < before_first_ns + kCoalesceNs;
  REQUIRE(reader->client.read_body(session->progress().end_offset));
  CHECK(now_ns() >= before_first_ns + kCoalesceNs);
  if (in_time) CHECK(reader->client.decoder().chunk_sizes().size() == 2);
  session->finalize(State::completed, "");
  check_all_arrived(*reader, test::read_all(*session));
}

TEST_CASE("however long coalesce is, the first event after a silence is sent at once") {
  const LoneSession session;
  PumpBench bench(test::kNoTimeoutNs, test::kNoTimeoutNs);
  const auto reader = bench.attach(session.session);
  bench.await_turn();
  session->append("data: a\n\n");
  CHECK(reader->client.read_body(session->progress().end_offset));
}

// --- turns

TEST_CASE("a long replay does not keep others waiting") {
  const LoneSession held_session, long_session, short_session;
  long_session->append("data: " + std::string(3 << 20, 'x') + "\n\n");
  for (const LoneSession* session : {&long_session, &short_session}) (*session)->cancel();
  PumpBench bench;
  test::Connection wide = unix_connection();
  test::set_option(wide.server, SO_SNDBUF, 4 << 20);
  Readers readers;
  {
    // So that the pump gets both together.
    const test::HeldSession held(held_session);
    readers.push_back(bench.attach(held_session.session));
    readers.push_back(bench.attach(long_session.session, 0, std::move(wide)));
    readers.push_back(bench.attach(short_session.session));
  }
  CHECK(readers[1]->outcome() == DeliveryOutcome::end);
  CHECK(bench.completions.in_order() == std::vector{readers[2]->token, readers[1]->token});
}

// --- completion

TEST_CASE("the end comes only when the kernel has all bytes") {
  const KnownLog log(3000);
  const LoneSession session;
  session->append(log.input);
  session->finalize(State::completed, "");
  PumpBench bench;
  const auto reader = bench.attach(session.session, 0, test::narrow_connection());
  bench.await_turn();
  const uint64_t held_bytes = reader->delivery->sent_bytes();
  CHECK(held_bytes > 0);
  CHECK(held_bytes < log.text.size());
  CHECK(reader->delivery->outcome() == DeliveryOutcome::running);
  check_all_arrived(*reader, log.text);
}

TEST_CASE("a delivery that is over before anyone waits for it is told of, once") {
  const LoneSession session;
  session->cancel();
  PumpBench bench;
  const auto early = bench.attach(session.session);
  bench.await_turn();
  CHECK(early->delivery->outcome() == DeliveryOutcome::end);
  CHECK(early->outcome() == DeliveryOutcome::end);
  CHECK(bench.completions.total() == 2);  // this one and that of await_turn()
}

TEST_CASE("one connection serves one delivery after the other") {
  const KnownLog log(20);
  const LoneSession session;
  session->append(log.input);
  session->finalize(State::completed, "");
  PumpBench bench;
  test::Connection connection = tcp_connection();
  for (int request = 0; request < 20; ++request) {
    CAPTURE(request);
    auto reader = bench.attach(session.session, 0, std::move(connection));
    check_all_arrived(*reader, log.text);
    connection = std::move(reader->connection);
    const std::string last_chunk = "0\r\n\r\n";
    REQUIRE(::send(connection.server.get(), last_chunk.data(), last_chunk.size(), 0) == 5);
    char got[16];
    REQUIRE(::recv(connection.client.get(), got, sizeof got, 0) == 5);
    reader.reset();
    if (request % 2 == 0) bench.pump->collect();
  }
}

TEST_CASE("bytes that a client sends meanwhile are left for the caller") {
  const LoneSession session;
  PumpBench bench;
  const auto reader = bench.attach(session.session);
  REQUIRE(::send(reader->connection.client.get(), "GET", 3, 0) == 3);
  bench.await_turn();
  session->cancel();
  check_all_arrived(*reader, ": end cancelled\n");
  char got[16];
  CHECK(::recv(reader->connection.server.get(), got, sizeof got, 0) == 3);
}

}  // namespace
}  // namespace pyserve
