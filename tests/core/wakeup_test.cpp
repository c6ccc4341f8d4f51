#include "../../csrc/wakeup.hpp"

#include <doctest/doctest.h>
#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#include "support.hpp"

namespace pyserve {
namespace {

using test::is_readable;
using test::kPollTimeoutMs;

using Tokens = std::vector<uint64_t>;

TEST_CASE("a wakeup is readable exactly while tokens are waiting") {
  Wakeup wakeup;
  CHECK_FALSE(is_readable(wakeup.fd()));
  CHECK(wakeup.drain().empty());
  for (uint64_t round = 0; round < 3; ++round) {
    wakeup.notify(round);
    CHECK(is_readable(wakeup.fd()));
    CHECK(is_readable(wakeup.fd()));
    CHECK(wakeup.drain() == Tokens{round});
    CHECK_FALSE(is_readable(wakeup.fd()));
    CHECK(wakeup.drain().empty());
  }
}

TEST_CASE("many notifications write to the descriptor once") {
  Wakeup wakeup;
  for (uint64_t token = 0; token < 10'000; ++token) wakeup.notify(token);
  // An eventfd adds up what is written to it, a pipe keeps it apart: in both cases one write is
  // one read of 1.
  uint64_t written = 0;
  REQUIRE(::read(wakeup.fd(), &written, sizeof written) == sizeof written);
  CHECK(written == 1);
  CHECK_FALSE(is_readable(wakeup.fd()));
  CHECK_MESSAGE(wakeup.drain().size() == 10'000, "drain does not wait for a byte that is gone");
}

TEST_CASE("tokens come in the order of their news, each as often as it was given") {
  Wakeup wakeup;
  const Tokens given{7, 1, 7, 0, UINT64_MAX, 3};
  for (const uint64_t token : given) wakeup.notify(token);
  CHECK(wakeup.drain() == given);
}

TEST_CASE("after close nothing happens") {
  Wakeup wakeup;
  wakeup.notify(1);
  const int closed_fd = wakeup.fd();
  wakeup.close();
  CHECK(wakeup.drain().empty());
  // The next descriptor gets the number that came free: a late notify must not write to it.
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  CHECK((ends[0] == closed_fd || ends[1] == closed_fd));
  wakeup.notify(2);
  wakeup.close();
  CHECK_FALSE(is_readable(ends[0]));
  CHECK(::close(ends[0]) == 0);
  CHECK(::close(ends[1]) == 0);
  CHECK(wakeup.drain().empty());
}

constexpr uint64_t kThreads = 6;
constexpr uint64_t kTokensEach = 5'000;

// Polls and drains until `expected` tokens came, or a wake-up seems lost.
Tokens collect(Wakeup& wakeup, size_t expected) {
  Tokens all;
  while (all.size() < expected && is_readable(wakeup.fd(), kPollTimeoutMs)) {
    const Tokens batch = wakeup.drain();
    all.insert(all.end(), batch.begin(), batch.end());
  }
  return all;
}

TEST_CASE("a polling loop gets each token of several threads once, each thread's in order") {
  Wakeup wakeup;
  std::vector<std::thread> threads;
  for (uint64_t thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&wakeup, thread] {
      for (uint64_t i = 0; i < kTokensEach; ++i) wakeup.notify(thread * kTokensEach + i);
    });
  }
  const Tokens all = collect(wakeup, kThreads * kTokensEach);
  for (std::thread& thread : threads) thread.join();
  CHECK(all.size() == kThreads * kTokensEach);
  Tokens next(kThreads, 0);
  bool in_order = true;
  for (const uint64_t token : all) {
    in_order = in_order && token % kTokensEach == next[token / kTokensEach]++;
  }
  CHECK(in_order);
  CHECK(wakeup.drain().empty());
}

TEST_CASE("threads may notify while the loop closes") {
  for (int round = 0; round < 50; ++round) {
    Wakeup wakeup;
    std::atomic<bool> closed{false};
    std::vector<std::thread> threads;
    for (uint64_t thread = 0; thread < 3; ++thread) {
      threads.emplace_back([&] {
        do {
          wakeup.notify(1);
        } while (!closed.load());
        wakeup.notify(2);
      });
    }
    REQUIRE(is_readable(wakeup.fd(), kPollTimeoutMs));
    wakeup.close();
    closed.store(true);
    for (std::thread& thread : threads) thread.join();
    CHECK(wakeup.drain().empty());
  }
}

}  // namespace
}  // namespace pyserve
