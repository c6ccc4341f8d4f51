// Reference-counted blocks of log memory, and the account that the memory budget reads.
//
// A chunk is filled once, from its front, and never moved or overwritten: whoever holds a ChunkRef
// may read what was published in it for as long as he holds it, without a lock, even after its
// session dropped it. Full-sized chunks go back to a short free list; smaller ones to malloc.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "fork_guard.hpp"

namespace pyserve {

class ChunkPool;

struct Chunk {
  std::shared_ptr<ChunkPool> pool;  // set while the chunk is in use, so that a pool outlives it
  std::atomic<uint32_t> references{1};
  uint32_t capacity_bytes;

  explicit Chunk(uint32_t capacity) : capacity_bytes(capacity) {}
  char* bytes() { return reinterpret_cast<char*>(this + 1); }
};

class ChunkRef {
 public:
  ChunkRef() = default;
  explicit ChunkRef(Chunk* adopted) : chunk_(adopted) {}
  ChunkRef(const ChunkRef& other) : chunk_(other.chunk_) {
    if (chunk_) chunk_->references.fetch_add(1, std::memory_order_relaxed);
  }
  ChunkRef(ChunkRef&& other) noexcept : chunk_(std::exchange(other.chunk_, nullptr)) {}
  ChunkRef& operator=(ChunkRef other) noexcept {
    std::swap(chunk_, other.chunk_);
    return *this;
  }
  ~ChunkRef();

  Chunk* operator->() const { return chunk_; }
  explicit operator bool() const { return chunk_ != nullptr; }

 private:
  Chunk* chunk_ = nullptr;
};

// Thread-safe. Always owned by a shared_ptr.
class ChunkPool : public std::enable_shared_from_this<ChunkPool> {
 public:
  static constexpr size_t kFullChunkBytes = 64 * 1024;

  explicit ChunkPool(size_t budget_bytes) : budget_bytes_(budget_bytes) {}
  ~ChunkPool();
  ChunkPool(const ChunkPool&) = delete;
  ChunkPool& operator=(const ChunkPool&) = delete;

  // A chunk of at least `capacity_bytes`, charged to the account until its last reference goes.
  ChunkRef allocate(size_t capacity_bytes);

  // Memory that is not in chunks (unfinished events, the sessions themselves).
  void charge(size_t bytes) { used_bytes_.fetch_add(bytes, std::memory_order_relaxed); }
  void discharge(size_t bytes) { used_bytes_.fetch_sub(bytes, std::memory_order_relaxed); }

  size_t used_bytes() const { return used_bytes_.load(std::memory_order_relaxed); }
  size_t budget_bytes() const { return budget_bytes_; }
  // Bytes above the budget, 0 when within it.
  size_t excess_bytes() const {
    const size_t used = used_bytes();
    return used > budget_bytes_ ? used - budget_bytes_ : 0;
  }

 private:
  friend class ChunkRef;
  static constexpr size_t kMaxFreeChunks = 64;  // 4 MiB kept for reuse, whatever was freed

  void take_back(Chunk* chunk);

  const size_t budget_bytes_;
  const ForkGuard fork_guard_;
  std::atomic<size_t> used_bytes_{0};
  std::mutex mutex_;  // guards free_
  std::vector<Chunk*> free_;
};

}  // namespace pyserve
