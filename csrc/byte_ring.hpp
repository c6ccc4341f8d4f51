// A log of bytes under absolute offsets, of which the front can be dropped. No locks, threads,
// time.
//
//   offset:   0 ........ first_offset ................................. end_offset
//             (dropped)  | chunk | chunk |     chunk     | .. |   chunk   .. free |
//
// Chunks double from 1 KiB to 64 KiB, so that a short log stays small and a long one costs the same
// for each append, whatever its cap. Published bytes never change and never move.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "chunk_pool.hpp"

namespace pyserve {

// A run of published bytes, and the reference that keeps them readable without any lock.
struct Piece {
  ChunkRef chunk;
  std::string_view bytes;
};

class ByteRing {
 public:
  static constexpr uint64_t kNotFound = UINT64_MAX;

  explicit ByteRing(std::shared_ptr<ChunkPool> pool) : pool_(std::move(pool)) {}

  uint64_t first_offset() const { return first_offset_; }
  uint64_t end_offset() const { return end_offset_; }
  uint64_t size() const { return end_offset_ - first_offset_; }
  // Memory that comes back when everything below oldest_chunk_end() is dropped; 0 when there is
  // only the chunk that is being filled.
  size_t droppable_chunk_bytes() const;
  uint64_t oldest_chunk_end() const;

  // O(bytes). Throws std::bad_alloc; what fitted before that stays appended.
  void append(std::string_view bytes);
  // Forgets everything below `offset`, which must lie in [first_offset, end_offset]. Memory goes
  // back chunk by chunk.
  void drop_to(uint64_t offset);
  // At most `max_bytes` from `offset` on, as many as lie together in one chunk; empty at the end.
  // `offset` must lie in [first_offset, end_offset]. O(log chunks).
  Piece piece(uint64_t offset, size_t max_bytes) const;
  // Offset of the first '\n' at or after `offset`, or kNotFound.
  uint64_t find_line_end(uint64_t offset) const;
  // Whether `text` stands at `offset`.
  bool starts_with(uint64_t offset, std::string_view text) const;

 private:
  static constexpr size_t kFirstChunkBytes = 1024;

  struct Segment {
    uint64_t start_offset;
    ChunkRef chunk;
  };

  const Segment& segment_at(uint64_t offset) const;
  size_t readable_bytes(const Segment& segment) const;
  void add_chunk();

  std::shared_ptr<ChunkPool> pool_;
  std::vector<Segment> segments_;  // [head_, end) are live; the front is compacted now and then
  size_t head_ = 0;
  uint64_t first_offset_ = 0;
  uint64_t end_offset_ = 0;
};

}  // namespace pyserve
