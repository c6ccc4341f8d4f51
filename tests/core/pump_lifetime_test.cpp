// What the pump holds, what it gives back, and on which thread.
#include <doctest/doctest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "../../csrc/socket_pump.hpp"
#include "forked.hpp"
#include "pump_support.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using test::LoneSession;
using test::PumpBench;
using test::PumpedReader;
using test::tcp_connection;
using test::unix_connection;

size_t open_descriptors() {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    count += !entry.path().empty();
  }
  return count;
}

// --- descriptors

TEST_CASE("every descriptor is given back, whatever a delivery ended as") {
  const size_t before = open_descriptors();
  {
    LoneSession log({100'000, size_t{1} << 30});
    log->append("data: " + std::string(90'000, 'x') + "\n\n");
    PumpBench bench(50 * test::kMillisecondNs);
    const size_t with_pump = open_descriptors();
    for (int round = 0; round < 3; ++round) {
      const LoneSession live;
      const auto gone = bench.attach(live.session);
      const auto detached = bench.attach(live.session, 0, unix_connection());
      const auto stalled = bench.attach(log.session, 0, test::narrow_connection());
      const auto ended = bench.attach(live.session);
      gone->connection.client.close();
      CHECK(gone->outcome() == DeliveryOutcome::gone);
      bench.pump->detach(*detached->delivery);
      CHECK(detached->outcome() == DeliveryOutcome::detached);
      CHECK(stalled->outcome() == DeliveryOutcome::stalled);
      live->cancel();
      CHECK(ended->outcome() == DeliveryOutcome::end);
      CHECK_MESSAGE(open_descriptors() == with_pump + 7, "only the connections' own are left");
    }
    CHECK(open_descriptors() == with_pump);
  }
  CHECK(open_descriptors() == before);
}

TEST_CASE("a session that lives on holds nothing of a pump that is no more") {
  const LoneSession session;
  const size_t before = open_descriptors();
  for (const bool left_before : {true, false}) {
    PumpBench bench;
    const auto reader = bench.attach(session.session);
    bench.await_turn();
    if (left_before) {
      bench.pump->detach(*reader->delivery);
      REQUIRE(reader->outcome() == DeliveryOutcome::detached);
    }
  }
  CHECK(open_descriptors() == before);
  session->append("data: nobody is told\n\n");
}

TEST_CASE("the caller's descriptor stays open, and the caller may close it at any time") {
  const LoneSession session;
  PumpBench bench;
  const auto kept = bench.attach(session.session);
  const auto closed = bench.attach(session.session);
  closed->connection.server.close();
  session->append("data: a\n\n");
  session->finalize(State::completed, "");
  for (PumpedReader* reader : {kept.get(), closed.get()}) {
    CHECK(reader->read_to_end() == DeliveryOutcome::end);
    CHECK(reader->client.body() == test::read_all(*session));
  }
  CHECK_FALSE_MESSAGE(kept->client.read_some(1, 0), "its connection is still open");
  CHECK(::fcntl(kept->connection.server.get(), F_GETFD) >= 0);
  REQUIRE(::send(kept->connection.server.get(), "0\r\n\r\n", 5, 0) == 5);
  CHECK(test::is_readable(kept->connection.client.get(), test::kPollTimeoutMs));
}

TEST_CASE("a bad descriptor is refused, and nothing was begun") {
  const LoneSession session;
  PumpBench bench;
  const long references = session.session.use_count();
  for (const int fd : {-1, 1'000'000}) {
    CHECK_THROWS_AS(bench.pump->attach(session.session, 0, fd, bench.completions.wakeup(), 1),
                    std::system_error);
  }
  bench.await_turn();
  CHECK(session.session.use_count() == references);
  CHECK(bench.completions.total() == 1);
}

TEST_CASE("where no descriptor is left an attach is refused, and a new pump, too") {
  const LoneSession session;
  PumpBench bench;
  const test::Connection connection = unix_connection();
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  const size_t open = open_descriptors();
  rlimit none{0, before.rlim_max};
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  bool attach_refused = false, pump_refused = false;
  try {
    bench.pump->attach(session.session, 0, connection.server.get(), bench.completions.wakeup(), 1);
  } catch (const std::system_error&) {
    attach_refused = true;
  }
  try {
    SocketPump(test::kNoTimeoutNs, 0);
  } catch (const std::system_error&) {
    pump_refused = true;
  }
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(attach_refused);
  CHECK(pump_refused);
  CHECK(open_descriptors() == open);
}

// --- the end of the pump

TEST_CASE("a pump that is destroyed detaches whom it serves and tells of each") {
  const LoneSession live;
  const LoneSession long_one;
  long_one->append("data: " + std::string(3'000'000, 'x') + "\n\n");
  PumpBench bench;
  std::vector<std::unique_ptr<PumpedReader>> readers;
  readers.push_back(bench.attach(live.session));
  readers.push_back(bench.attach(long_one.session, 0, test::narrow_connection()));
  bench.await_turn();
  readers.push_back(bench.attach(live.session));
  bench.pump.reset();
  for (const auto& reader : readers) {
    CHECK(reader->is_over());
    CHECK(reader->delivery->outcome() == DeliveryOutcome::detached);
  }
  CHECK(bench.completions.total() == 4);
  live->append("data: a\n\n");
  CHECK(live.session.use_count() == 3);  // the handles of two deliveries
  readers.clear();
  CHECK(live.session.use_count() == 1);
  CHECK(long_one.session.use_count() == 1);
}

TEST_CASE("a pump without readers comes and goes") {
  for (int i = 0; i < 50; ++i) SocketPump(test::kNoTimeoutNs, 0);
}

// --- sessions

// Of a kind whose destructor may only run on a thread that knows it, as a Python object's.
struct Hook {
  explicit Hook(std::thread::id& destroyed_on) : destroyed_on(destroyed_on) {}
  ~Hook() { destroyed_on = std::this_thread::get_id(); }
  std::thread::id& destroyed_on;
};

// A session of which only the pump knows once its delivery's handle is dropped.
struct OnlyPumped {
  std::thread::id destroyed_on;
  std::unique_ptr<PumpedReader> reader;

  OnlyPumped(PumpBench& bench, test::Connection connection) {
    const LoneSession session({}, [hook = std::make_shared<Hook>(destroyed_on)] {});
    session->append("data: a\n\n");
    reader = bench.attach(session.session, 0, std::move(connection));
    reader->client.read_body(session->progress().end_offset);
    reader->delivery.reset();
  }
  bool destroyed() const { return destroyed_on != std::thread::id(); }
  bool destroyed_here() const { return destroyed_on == std::this_thread::get_id(); }
};

TEST_CASE("a session whose last reader left is let go of by collect(), on the thread that calls") {
  PumpBench bench;
  OnlyPumped session(bench, tcp_connection());
  session.reader->connection.client.close();
  REQUIRE(bench.completions.await(session.reader->token));
  // A turn of the pump's later: whatever it held beyond the delivery's end is gone.
  const LoneSession other;
  other->cancel();
  REQUIRE(bench.attach(other.session)->outcome() == DeliveryOutcome::end);
  CHECK_FALSE(session.destroyed());
  bench.pump->collect();
  CHECK(session.destroyed_here());
}

TEST_CASE("a session that nobody collected is let go of with the pump, on the thread that calls") {
  for (const bool left_before : {true, false}) {
    PumpBench bench;
    OnlyPumped session(bench, unix_connection());
    if (left_before) {
      session.reader->connection.client.close();
      REQUIRE(bench.completions.await(session.reader->token));
    }
    CHECK_FALSE(session.destroyed());
    bench.pump.reset();
    CHECK(session.destroyed_here());
    CHECK(bench.completions.has(session.reader->token));
  }
}

TEST_CASE("a collected session is free of the pump while its other readers go on") {
  const LoneSession session;
  PumpBench bench;
  const auto stays = bench.attach(session.session);
  {
    const auto leaves = bench.attach(session.session);
    bench.pump->detach(*leaves->delivery);
    REQUIRE(leaves->outcome() == DeliveryOutcome::detached);
  }
  bench.pump->collect();
  session->cancel();
  CHECK(stays->read_to_end() == DeliveryOutcome::end);
  bench.await_turn();
  CHECK(session.session.use_count() == 2);  // this and the handle of the delivery
}

TEST_CASE("a client that blocks holds no memory of a log that was dropped") {
  const LoneSession::Limits limits{size_t{100'000}, size_t{1} << 30};
  const LoneSession read(limits), unread(limits);
  PumpBench bench;
  std::unique_ptr<test::PumpedReader> blocked;
  for (const char letter : {'x', 'y', 'z'}) {
    for (const LoneSession* session : {&read, &unread}) {
      (*session)->append("data: " + std::string(90'000, letter) + "\n\n");
    }
    if (!blocked) blocked = bench.attach(read.session, 0, test::narrow_connection());
    bench.await_turn();
  }
  CHECK(blocked->delivery->outcome() == DeliveryOutcome::running);
  CHECK(read.pool->used_bytes() == unread.pool->used_bytes());
}

// --- the process

TEST_CASE("no signal is handled on the pump's thread") {
  PumpBench bench;
  bench.await_turn();  // a thread that is about to begin has all signals blocked
  size_t pumps = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name, field, mask;
    std::ifstream(task.path() / "comm") >> name;
    if (name != "pyserve-pump") continue;
    ++pumps;
    std::ifstream status(task.path() / "status");
    while (status >> field && field != "SigBlk:") continue;
    status >> mask;
    const uint64_t blocked = std::strtoull(mask.c_str(), nullptr, 16);
    for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGCHLD, SIGALRM, SIGPROF}) {
      CAPTURE(signal);
      CHECK((blocked >> (signal - 1) & 1) == 1);
    }
  }
  CHECK(pumps == 1);
}

TEST_CASE("a forked child lets go of a pump without its thread, and the parent's goes on") {
  const LoneSession session;
  PumpBench bench;
  const auto reader = bench.attach(session.session);
  session->append("data: a\n\n");
  REQUIRE(reader->client.read_body(session->progress().end_offset));
  CHECK(test::answer_of_child([&] {
    const bool forked = bench.pump->fork_guard().forked();
    bench.pump.reset();
    return forked && reader->delivery->outcome() == DeliveryOutcome::running;
  }));
  session->append("data: b\n\n");
  session->cancel();
  CHECK(reader->read_to_end() == DeliveryOutcome::end);
  CHECK(reader->client.body() == test::read_all(*session));
}

}  // namespace
}  // namespace pyserve
