#include "../../csrc/chunk_pool.hpp"

#include <doctest/doctest.h>

#include <atomic>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "support.hpp"

namespace pyserve {
namespace {

using test::make_pool;

constexpr size_t kFull = ChunkPool::kFullChunkBytes;

TEST_CASE("a chunk is charged from its making to the end of its last reference") {
  const auto pool = make_pool();
  ChunkRef chunk = pool->allocate(1024);
  CHECK(chunk->capacity_bytes == 1024);
  CHECK(pool->used_bytes() == 1024);
  {
    const ChunkRef copy = chunk;
    chunk = ChunkRef();
    CHECK_FALSE(static_cast<bool>(chunk));
    CHECK(pool->used_bytes() == 1024);
    ChunkRef assigned;
    assigned = copy;
    assigned = copy;
    const ChunkRef moved = std::move(assigned);
    CHECK(pool->used_bytes() == 1024);
  }
  CHECK(pool->used_bytes() == 0);
}

TEST_CASE("excess is what is above the budget, chunks and charges together") {
  const auto pool = make_pool(5000);
  pool->charge(4000);
  CHECK(pool->excess_bytes() == 0);
  {
    const ChunkRef chunk = pool->allocate(1024);
    CHECK(pool->excess_bytes() == 24);
  }
  pool->charge(1000);
  CHECK(pool->excess_bytes() == 0);
  pool->discharge(5000);
  CHECK(pool->used_bytes() == 0);
}

TEST_CASE("a full chunk that was given back is used again, one that is held is not") {
  const auto pool = make_pool();
  ChunkRef held = pool->allocate(kFull);
  const char* given_back;
  {
    ChunkRef other = pool->allocate(kFull);
    given_back = other->bytes();
  }
  const ChunkRef again = pool->allocate(kFull);
  CHECK(again->bytes() == given_back);
  const ChunkRef fresh = pool->allocate(kFull);
  CHECK(fresh->bytes() != held->bytes());
  CHECK(fresh->bytes() != again->bytes());
  CHECK(pool->used_bytes() == 3 * kFull);
}

TEST_CASE("more full chunks come back than are kept for reuse, and all leave the account") {
  const auto pool = make_pool();
  std::vector<ChunkRef> many;
  for (int i = 0; i < 200; ++i) many.push_back(pool->allocate(kFull));
  CHECK(pool->used_bytes() == 200 * kFull);
  many.clear();
  CHECK(pool->used_bytes() == 0);
}

TEST_CASE("threads that share a pool never share a chunk that they did not hand over") {
  const auto pool = make_pool();
  std::atomic<bool> mixed_up{false};
  std::vector<std::thread> threads;
  for (const char mark : {'a', 'b', 'c', 'd'}) {
    threads.emplace_back([&, mark] {
      for (int round = 0; round < 300; ++round) {
        const ChunkRef chunk = pool->allocate(kFull);
        std::memset(chunk->bytes(), mark, 500);
        const ChunkRef copy = chunk;
        std::this_thread::yield();
        if (std::string_view(copy->bytes(), 500) != std::string(500, mark)) mixed_up = true;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_FALSE(mixed_up);
  CHECK(pool->used_bytes() == 0);
}

}  // namespace
}  // namespace pyserve
