#include "../../csrc/fork_guard.hpp"

#include <doctest/doctest.h>

#include <memory>

#include "../../csrc/session_manager.hpp"
#include "forked.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using test::answer_of_child;

TEST_CASE("a guard knows a child from its own process") {
  const ForkGuard guard;
  CHECK_FALSE(guard.forked());
  CHECK(answer_of_child([&] { return guard.forked(); }));
  CHECK_MESSAGE(!guard.forked(), "the parent goes on as before");
  CHECK_FALSE(answer_of_child([] { return ForkGuard().forked(); }));
  CHECK_MESSAGE(answer_of_child([&] { return answer_of_child([&] { return guard.forked(); }); }),
                "a grandchild is a child, too");
}

TEST_CASE("manager and session made before the fork say so in the child") {
  const auto manager = std::make_shared<StreamSessionManager>(
      ManagerOptions{4096, 1 << 20, kNanosPerSecond, kNanosPerSecond},
      std::make_shared<ManualClock>());
  const auto session = manager->create_or_replace({"owner", "id"}, {}, {}, {});
  CHECK_FALSE(manager->fork_guard().forked());
  CHECK_FALSE(session->fork_guard().forked());
  CHECK(answer_of_child([&] { return manager->fork_guard().forked(); }));
  CHECK(answer_of_child([&] { return session->fork_guard().forked(); }));
}

TEST_CASE("a child may let go of readers and pieces, and the parent keeps its own") {
  const auto pool = test::make_pool();
  const auto session = std::make_shared<StreamSession>(
      SessionKey{"owner", "id"}, SessionOptions{"e", 4096, kNanosPerSecond, {}, {}, {}}, pool,
      std::make_shared<ManualClock>(), std::weak_ptr<SessionObserver>());
  session->append("data: a\n\n");
  auto reader = std::make_unique<SessionReader>(session, 0);
  ReadResult result = reader->read(100);
  CHECK(answer_of_child([&] {
    reader.reset();
    result = ReadResult{};
    return session->snapshot().readers == 1;
  }));
  CHECK(session->snapshot().readers == 1);
}

}  // namespace
}  // namespace pyserve
