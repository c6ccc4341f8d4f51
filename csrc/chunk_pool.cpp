#include "chunk_pool.hpp"

#include <new>

namespace pyserve {
namespace {

Chunk* make_chunk(size_t capacity_bytes) {
  void* memory = ::operator new(sizeof(Chunk) + capacity_bytes);
  return new (memory) Chunk(static_cast<uint32_t>(capacity_bytes));
}

void destroy_chunk(Chunk* chunk) {
  chunk->~Chunk();
  ::operator delete(chunk);
}

}  // namespace

ChunkRef::~ChunkRef() {
  // acq_rel: the bytes written through any reference happen before the chunk is given back.
  if (chunk_ && chunk_->references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
    const std::shared_ptr<ChunkPool> pool = std::move(chunk_->pool);
    pool->take_back(chunk_);
  }
}

ChunkPool::~ChunkPool() {
  for (Chunk* chunk : free_) destroy_chunk(chunk);
}

ChunkRef ChunkPool::allocate(size_t capacity_bytes) {
  Chunk* chunk = nullptr;
  if (capacity_bytes == kFullChunkBytes) {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      chunk = free_.back();
      free_.pop_back();
    }
  }
  if (chunk) {
    chunk->references.store(1, std::memory_order_relaxed);
  } else {
    chunk = make_chunk(capacity_bytes);
  }
  chunk->pool = shared_from_this();
  charge(capacity_bytes);
  return ChunkRef(chunk);
}

void ChunkPool::take_back(Chunk* chunk) {
  discharge(chunk->capacity_bytes);
  // In a forked child the mutex may be held by a thread that doesn't exist there: leak instead.
  if (fork_guard_.forked()) return;
  if (chunk->capacity_bytes == kFullChunkBytes) {
    const std::lock_guard lock(mutex_);
    if (free_.size() < kMaxFreeChunks) {
      free_.push_back(chunk);
      return;
    }
  }
  destroy_chunk(chunk);
}

}  // namespace pyserve
