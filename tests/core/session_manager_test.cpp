#include "../../csrc/session_manager.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "framer_reference.hpp"
#include "support.hpp"

namespace pyserve {

// How a failed comparison shows a session.
static doctest::String toString(const StreamSessionManager::SessionPtr& session) {
  return session ? (session->key().conversation_id + "@" + session->epoch()).c_str() : "nullptr";
}

namespace {

using test::read_all;
using SessionPtr = StreamSessionManager::SessionPtr;
using Ids = std::vector<std::string>;

constexpr int64_t kSecond = kNanosPerSecond;
constexpr int64_t kTtl = 300 * kSecond;

struct TestManager {
  explicit TestManager(size_t max_total_bytes = size_t{1} << 30)
      : manager(std::make_shared<StreamSessionManager>(
            ManagerOptions{size_t{1} << 20, max_total_bytes, kTtl, kSecond}, clock)) {}

  StreamSessionManager* operator->() const { return manager.get(); }

  SessionPtr create(const std::string& id, const std::string& owner = "owner") const {
    return manager->create_or_replace({owner, id}, {}, {}, {});
  }
  SessionPtr create_finished(const std::string& id, size_t bytes = 1) const {
    const SessionPtr session = create(id);
    session->append_event(std::string(bytes, 'x'), "");
    session->finalize(State::completed, "");
    return session;
  }
  bool has(const std::string& id) const { return manager->get({"owner", id}) != nullptr; }

  std::shared_ptr<ManualClock> clock = std::make_shared<ManualClock>();
  std::shared_ptr<StreamSessionManager> manager;
};

Ids ids_of(const std::vector<SessionPtr>& sessions) {
  Ids ids;
  for (const SessionPtr& session : sessions) ids.push_back(session->key().conversation_id);
  return ids;
}

// --- keys

TEST_CASE("a session is found under its owner and its id, byte for byte, and nowhere else") {
  const TestManager manager;
  const std::string with_nul("a\0b", 3);
  const auto session = manager.create("a", "one");
  const auto other = manager.create("a", "two");
  const auto nul = manager.create(with_nul, "one");
  CHECK(manager->get({"one", "a"}) == session);
  CHECK(manager->get({"two", "a"}) == other);
  CHECK(manager->get({"one", with_nul}) == nul);
  for (const SessionKey& key :
       {SessionKey{"three", "a"}, SessionKey{"", "a"}, SessionKey{"one", "A"},
        SessionKey{"one", "a "}, SessionKey{"one", ""}, SessionKey{"onea", ""}}) {
    CHECK(manager->get(key) == nullptr);
    CHECK(manager->evict(key) == nullptr);
  }
  CHECK(manager->session_count() == 3);
}

TEST_CASE("another owner's session of the same id is neither replaced nor evicted") {
  const TestManager manager;
  const auto mine = manager.create("a", "one");
  manager.create("a", "two");
  manager->evict_and_cancel({"two", "a"});
  CHECK(mine->snapshot().state == State::queued);
  CHECK(manager->get({"one", "a"}) == mine);
}

TEST_CASE("a session carries what it was created with") {
  const TestManager manager;
  const auto session = manager->create_or_replace({"owner", "a"}, {}, {}, "tag");
  CHECK(session->tag() == "tag");
  CHECK(session->key().owner == "owner");
  CHECK(session->key().conversation_id == "a");
}

TEST_CASE("lookup: each id, then all that begins with it and ::, each session once") {
  const TestManager manager;
  for (const char* id : {"x", "x::b", "x::a", "x::a::1", "x:", "x:c", "xy", "xy::a", "w", "x::"}) {
    manager.create(id);
  }
  manager.create("x::z", "another");
  struct Example {
    Ids asked, found;
  };
  const Example examples[] = {
      {{"x"}, {"x", "x::", "x::a", "x::a::1", "x::b"}},
      {{"x::a"}, {"x::a", "x::a::1"}},
      {{"x:"}, {"x:"}},
      {{"xy", "w"}, {"xy", "xy::a", "w"}},
      {{"x::b", "x", "x"}, {"x::b", "x", "x::", "x::a", "x::a::1"}},
      {{"unknown", ""}, {}},
      {{}, {}},
  };
  for (const Example& example : examples) {
    CAPTURE(example.asked.size());
    CHECK(ids_of(manager->lookup("owner", example.asked)) == example.found);
  }
  CHECK(manager->lookup("nobody", {"x"}).empty());
}

TEST_CASE("lookup: a conversation's subkeys belong to it, in their order, and to no other") {
  const TestManager manager;
  for (const char* id : {"a\x1f"
                         "2",
                         "a",
                         "a\x1f"
                         "1",
                         "ab\x1f"
                         "1",
                         "a::m\x1f"
                         "1"}) {
    manager.create(id);
  }
  CHECK(ids_of(manager->lookup("owner", {"a"})) == Ids{"a",
                                                       "a\x1f"
                                                       "1",
                                                       "a\x1f"
                                                       "2",
                                                       "a::m\x1f"
                                                       "1"});
  CHECK(ids_of(manager->lookup("owner", {"ab"})) == Ids{"ab\x1f"
                                                        "1"});
}

TEST_CASE("newest: the younger of a conversation's own session and the last of its subkeys") {
  const TestManager manager;
  const auto newest = [&](const std::string& id, const std::string& owner = "owner") {
    return manager->newest({owner, id});
  };
  CHECK(newest("a") == nullptr);
  const SessionPtr own = manager.create("a");
  CHECK(newest("a") == own);
  manager.create(
      "a\x1f"
      "1");
  const SessionPtr second = manager.create(
      "a\x1f"
      "2");
  manager.create(
      "a\x1f"
      "3",
      "another");
  manager.create("a ");
  manager.create(
      "a::m\x1f"
      "4");
  CHECK(newest("a") == second);
  const SessionPtr replacement = manager.create("a");
  CHECK(newest("a") == replacement);
  CHECK(newest("a", "nobody") == nullptr);
  CHECK(newest("") == nullptr);
}

TEST_CASE("newest: a log whose TTL is over is none") {
  const TestManager manager;
  manager.create_finished(
      "a\x1f"
      "1");
  manager.clock->advance_ns(kTtl);
  CHECK(manager->newest({"owner", "a"}) == nullptr);
}

TEST_CASE("live_sessions are those that are queued or streaming and not evicted") {
  const TestManager manager;
  manager.create("queued");
  manager.create("streaming")->start();
  manager.create_finished("finished");
  manager.create("evicted");
  manager->evict({"owner", "evicted"});
  CHECK(ids_of(manager->live_sessions()) == Ids{"queued", "streaming"});
}

// --- replace and evict

TEST_CASE("a live session that is replaced is cancelled, after the new one took its place") {
  const TestManager manager;
  Ids calls;
  SessionPtr found_by_hook;
  const auto old = manager->create_or_replace(
      {"owner", "a"},
      [&] {
        calls.push_back("cancel");
        found_by_hook = manager->get({"owner", "a"});
      },
      [&] { calls.push_back("end"); }, {});
  old->start();
  const auto created = manager.create("a");
  CHECK(old->snapshot().state == State::cancelled);
  CHECK(old->snapshot().reason == "replaced");
  CHECK(read_all(*old) == ": end cancelled\n");
  CHECK(calls == Ids{"cancel", "end"});
  CHECK(found_by_hook == created);
  CHECK(manager->get({"owner", "a"}) == created);
  CHECK(created->snapshot().state == State::queued);
  CHECK(manager->session_count() == 1);
}

TEST_CASE(
    "a finished session that is replaced keeps its ending, and its TTL is not the new one's") {
  const TestManager manager;
  const auto old = manager.create_finished("a");
  const auto created = manager.create("a");
  CHECK(old->snapshot().state == State::completed);
  manager.clock->advance_ns(2 * kTtl);
  manager->tick();
  CHECK(manager->get({"owner", "a"}) == created);
  old->cancel();
  CHECK(manager.has("a"));
}

TEST_CASE("evict takes a session out and leaves it running") {
  const TestManager manager;
  const auto session = manager.create("a");
  CHECK(manager->evict({"owner", "a"}) == session);
  CHECK_FALSE(manager.has("a"));
  CHECK(manager->evict({"owner", "a"}) == nullptr);
  CHECK(session->append("data: a\n\n") == AppendStatus::ok);
  manager.clock->advance_ns(kSecond);
  manager->tick();
  CHECK_MESSAGE(read_all(*session).find(": ping\n") != std::string::npos, "its heart beats on");
  const auto next = manager.create("a");
  CHECK(session->finalize(State::completed, ""));
  CHECK_MESSAGE(manager->get({"owner", "a"}) == next, "its ending is not the next one's");
  CHECK(manager->live_sessions().size() == 1);
}

TEST_CASE("evict_and_cancel stops it") {
  const TestManager manager;
  int cancels = 0;
  const auto session = manager->create_or_replace({"owner", "a"}, [&] { ++cancels; }, {}, {});
  CHECK(manager->evict_and_cancel({"owner", "a"}) == session);
  CHECK(session->snapshot().state == State::cancelled);
  CHECK(cancels == 1);
  CHECK(manager->evict_and_cancel({"owner", "a"}) == nullptr);
  const auto finished = manager.create_finished("b");
  CHECK(manager->evict_and_cancel({"owner", "b"}) == finished);
  CHECK(finished->snapshot().state == State::completed);
}

TEST_CASE("with an epoch only that epoch's session is taken out") {
  const TestManager manager;
  const std::string old_epoch = manager.create("a")->epoch();
  const auto session = manager.create("a");
  CHECK(manager->evict({"owner", "a"}, old_epoch) == nullptr);
  CHECK(manager->evict_and_cancel({"owner", "a"}, old_epoch) == nullptr);
  CHECK(session->snapshot().state == State::queued);
  CHECK(manager->evict_and_cancel({"owner", "a"}, session->epoch()) == session);
}

// --- epochs

int64_t number(const std::string& epoch) { return std::stoll(epoch, nullptr, 36); }

TEST_CASE("epochs grow strictly: across managers, while a clock stands still or is behind") {
  const TestManager one, two;
  const auto system = std::make_shared<StreamSessionManager>(
      ManagerOptions{4096, size_t{1} << 20, kTtl, kSecond}, std::make_shared<SystemClock>());
  int64_t last = 0;
  for (int i = 0; i < 50; ++i) {
    const SessionPtr sessions[] = {one.create("a"), two.create("a"), one.create("b"),
                                   system->create_or_replace({"owner", "a"}, {}, {}, {})};
    for (const SessionPtr& session : sessions) {
      CHECK(number(session->epoch()) > last);
      last = number(session->epoch());
      CHECK(session->epoch().find_first_not_of("0123456789abcdefghijklmnopqrstuvwxyz") ==
            std::string::npos);
      CHECK_MESSAGE(session->epoch().size() == 8, "Unix milliseconds until the year 2059");
    }
  }
  CHECK(last >= SystemClock().unix_ms() - 60'000);
}

TEST_CASE("the epoch is the one in the ids") {
  const TestManager manager;
  const auto session = manager.create("a");
  session->append("data: a\n\n");
  CHECK(read_all(*session) == test::reference_log({"data: a\n"}, session->epoch()));
}

// --- the clock

TEST_CASE("a log is kept for its TTL after the ending, and not a nanosecond longer") {
  const TestManager manager;
  const auto session = manager.create("a");
  manager.clock->advance_ns(10 * kTtl);
  CHECK_MESSAGE(manager.has("a"), "a live session does not age");
  session->finalize(State::completed, "");
  manager.clock->advance_ns(kTtl - 1);
  CHECK(manager.has("a"));
  CHECK(manager->lookup("owner", {"a"}).size() == 1);
  manager.clock->advance_ns(1);
  CHECK(manager->lookup("owner", {"a"}).empty());
  CHECK_FALSE(manager.has("a"));
  CHECK(manager->session_count() == 0);
}

TEST_CASE("logs are collected in the order in which they ended") {
  const TestManager manager;
  const SessionPtr sessions[] = {manager.create("a"), manager.create("b"), manager.create("c")};
  for (const int i : {1, 2, 0}) {
    sessions[i]->cancel();
    manager.clock->advance_ns(kSecond);
  }
  manager.clock->advance_ns(kTtl - 3 * kSecond);
  for (const Ids& left : {Ids{"a", "c"}, Ids{"a"}, Ids{}}) {
    manager->tick();
    CHECK(ids_of(manager->lookup("owner", {"a", "b", "c"})) == left);
    CHECK(manager->session_count() == left.size());
    manager.clock->advance_ns(kSecond);
  }
}

TEST_CASE("a collected log lives on for the reader that holds it") {
  const TestManager manager;
  SessionReader reader(manager.create_finished("a"), 0);
  manager.clock->advance_ns(kTtl);
  manager->tick();
  CHECK_FALSE(manager.has("a"));
  CHECK(reader.read(7).piece.bytes == "data: x");
  CHECK(manager->used_bytes() > 0);
  reader.detach();
  CHECK(manager->used_bytes() == 0);
}

TEST_CASE("tick says when there is work again") {
  const TestManager manager;
  CHECK(manager->tick() == -1);
  const auto session = manager.create("a");
  CHECK(manager->tick() == kSecond);
  manager.clock->advance_ns(kSecond / 4);
  CHECK(manager->tick() == kSecond * 3 / 4);
  manager.clock->advance_ns(kSecond * 3 / 4);
  CHECK_MESSAGE(manager->tick() == kSecond, "it beat now");
  CHECK(read_all(*session) == ": ping\n");

  manager.clock->advance_ns(kSecond / 2);
  session->append("data: a\n\n");
  manager.clock->advance_ns(kSecond / 2);
  CHECK_MESSAGE(manager->tick() == kSecond / 2, "no heartbeat: an event came meanwhile");

  session->finalize(State::completed, "");
  manager.clock->advance_ns(kSecond / 2);
  CHECK_MESSAGE(manager->tick() == kTtl - kSecond / 2, "only the collection is left");
  manager.clock->advance_ns(kTtl);
  CHECK(manager->tick() == -1);
  CHECK(manager->session_count() == 0);
}

TEST_CASE("tick beats the hearts that are due, and only those") {
  const TestManager manager;
  const auto a = manager.create("a");
  manager.clock->advance_ns(kSecond / 2);
  const auto b = manager.create("b");
  manager.clock->advance_ns(kSecond / 2);
  CHECK(manager->tick() == kSecond / 2);
  CHECK(read_all(*a) == ": ping\n");
  CHECK(read_all(*b).empty());
  manager.clock->advance_ns(kSecond / 2);
  CHECK(manager->tick() == kSecond / 2);
  CHECK(read_all(*a) == ": ping\n");
  CHECK(read_all(*b) == ": ping\n");
}

// --- the memory budget

TEST_CASE("a new session makes room: finished ones go, oldest ending first, live ones stay") {
  const TestManager manager(300'000);
  const auto live = manager.create("live");
  manager.create_finished("b", 60'000);
  manager.create_finished("a", 60'000);
  manager.create_finished("c", 60'000);
  // One more finished log than fits.
  manager.create_finished("d", 60'000);
  CHECK(manager->used_bytes() <= 300'000);
  CHECK_FALSE(manager.has("b"));
  CHECK(manager.has("c"));
  CHECK(manager.has("d"));
  CHECK(manager.has("live"));
  CHECK(live->snapshot().state == State::queued);
}

TEST_CASE("a growing session takes room from finished ones before it loses bytes of its own") {
  const TestManager manager(500'000);
  manager.create_finished("old", 150'000);
  const auto live = manager.create("live");
  while (manager.has("old")) {
    REQUIRE(live->snapshot().first_offset == 0);
    live->append_event(std::string(1000, 'x'), "");
  }
  CHECK(manager->used_bytes() <= 500'000);
  for (int i = 0; i < 1000; ++i) live->append_event(std::string(1000, 'x'), "");
  CHECK(live->snapshot().first_offset > 0);
  CHECK(manager->used_bytes() <= 500'000 + ChunkPool::kFullChunkBytes);
}

TEST_CASE("when only live sessions are left a new one is refused, and nothing is changed") {
  const TestManager manager(10 * StreamSession::kOverheadBytes);
  std::vector<SessionPtr> live;
  for (int i = 0; i < 10; ++i) live.push_back(manager.create(std::to_string(i)));
  CHECK_THROWS_AS(manager.create("one more"), MemoryBudgetError);
  CHECK_THROWS_AS(manager.create("0"), MemoryBudgetError);
  CHECK(live[0]->snapshot().state == State::queued);
  CHECK(manager->get({"owner", "0"}) == live[0]);
  CHECK(manager->session_count() == 10);
  manager->evict_and_cancel({"owner", "0"});
  live[0].reset();
  CHECK(manager.create("one more") != nullptr);
}

TEST_CASE("every byte of the account comes back") {
  const TestManager manager;
  for (int i = 0; i < 100; ++i) {
    const auto session = manager.create(std::to_string(i % 10));
    session->append("data: " + std::string(static_cast<size_t>(i) * 997, 'x') + "\n\ndata: y");
    if (i % 3 == 0) session->cancel();
  }
  for (int i = 0; i < 10; ++i) manager->evict({"owner", std::to_string(i)});
  manager.clock->advance_ns(kSecond);
  manager->tick();
  CHECK(manager->used_bytes() == 0);
}

// --- callbacks

TEST_CASE("a hook may call everything of its manager") {
  const TestManager manager;
  const auto use_all = [&manager] {
    manager->get({"owner", "a"});
    manager->lookup("owner", {"a"});
    manager->tick();
    manager->live_sessions();
    manager->session_count();
    manager.create("from a hook");
    manager->evict_and_cancel({"owner", "from a hook"});
  };
  const auto create = [&] {
    return manager->create_or_replace({"owner", "a"}, use_all, use_all, {});
  };
  create();
  const auto second = create();
  second->finalize(State::completed, "");
  create();
  manager->evict_and_cancel({"owner", "a"});
  create()->cancel();
  CHECK(manager->session_count() == 1);
}

// Runs something when it is asked for the time the next time but one.
class InterruptingClock final : public Clock {
 public:
  int64_t steady_ns() const override {
    if (countdown > 0 && --countdown == 0) interruption();
    return now_ns;
  }
  int64_t unix_ms() const override { return 1'700'000'000'000; }

  mutable int countdown = 0;
  int64_t now_ns = 0;
  std::function<void()> interruption;
};

TEST_CASE("tick holds no lock while the last reference to a live session goes") {
  const auto clock = std::make_shared<InterruptingClock>();
  const auto manager = std::make_shared<StreamSessionManager>(
      ManagerOptions{4096, size_t{1} << 20, kTtl, kSecond}, clock);
  size_t sessions_seen = 99;
  // What the hook holds is let go of with the session, and then calls the manager.
  std::shared_ptr<void> held(nullptr, [&](void*) { sessions_seen = manager->session_count(); });
  manager->create_or_replace({"owner", "a"}, [held] {}, {}, {});
  held.reset();
  SessionPtr evicted = manager->evict({"owner", "a"});
  clock->now_ns = kSecond;
  // tick asks once for itself; the heartbeat that it sends then asks again, and by that time the
  // session's owner has gone: tick holds the last reference.
  clock->countdown = 2;
  clock->interruption = [&] { evicted.reset(); };
  manager->tick();
  CHECK(sessions_seen == 0);
}

TEST_CASE("sessions outlive their manager") {
  SessionPtr session;
  {
    const TestManager manager;
    session = manager.create("a");
  }
  CHECK(session->append("data: a\n\n") == AppendStatus::ok);
  CHECK(session->finalize(State::completed, ""));
}

}  // namespace
}  // namespace pyserve
