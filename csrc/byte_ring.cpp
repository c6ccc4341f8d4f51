#include "byte_ring.hpp"

#include <algorithm>
#include <cstring>

namespace pyserve {

void ByteRing::append(std::string_view bytes) {
  while (!bytes.empty()) {
    size_t room = 0;
    if (head_ < segments_.size()) {
      const Segment& last = segments_.back();
      room = last.start_offset + last.chunk->capacity_bytes - end_offset_;
    }
    if (room == 0) {
      add_chunk();
      continue;
    }
    const Segment& last = segments_.back();
    const size_t taken = std::min(room, bytes.size());
    std::memcpy(last.chunk->bytes() + (end_offset_ - last.start_offset), bytes.data(), taken);
    end_offset_ += taken;
    bytes.remove_prefix(taken);
  }
}

void ByteRing::add_chunk() {
  size_t capacity = kFirstChunkBytes;
  while (capacity < size() && capacity < ChunkPool::kFullChunkBytes) capacity *= 2;
  segments_.push_back({end_offset_, pool_->allocate(capacity)});
}

void ByteRing::drop_to(uint64_t offset) {
  first_offset_ = offset;
  while (head_ < segments_.size()) {
    Segment& oldest = segments_[head_];
    if (oldest.start_offset + oldest.chunk->capacity_bytes > offset) break;
    oldest.chunk = ChunkRef();
    ++head_;
  }
  // Moving the live half once for each dropped half keeps a drop at O(1) on average.
  if (head_ * 2 > segments_.size()) {
    segments_.erase(segments_.begin(), segments_.begin() + static_cast<std::ptrdiff_t>(head_));
    head_ = 0;
  }
}

size_t ByteRing::droppable_chunk_bytes() const {
  return segments_.size() - head_ > 1 ? segments_[head_].chunk->capacity_bytes : 0;
}

uint64_t ByteRing::oldest_chunk_end() const {
  return segments_[head_].start_offset + segments_[head_].chunk->capacity_bytes;
}

const ByteRing::Segment& ByteRing::segment_at(uint64_t offset) const {
  const Segment& oldest = segments_[head_];  // where drops look
  if (offset < oldest.start_offset + oldest.chunk->capacity_bytes) return oldest;
  const auto live = segments_.begin() + static_cast<std::ptrdiff_t>(head_);
  const auto after =
      std::upper_bound(live, segments_.end(), offset,
                       [](uint64_t wanted, const Segment& s) { return wanted < s.start_offset; });
  return *std::prev(after);
}

size_t ByteRing::readable_bytes(const Segment& segment) const {
  return std::min<uint64_t>(segment.chunk->capacity_bytes, end_offset_ - segment.start_offset);
}

Piece ByteRing::piece(uint64_t offset, size_t max_bytes) const {
  if (offset >= end_offset_) return {};
  const Segment& segment = segment_at(offset);
  const size_t skipped = offset - segment.start_offset;
  const size_t length = std::min(max_bytes, readable_bytes(segment) - skipped);
  return {segment.chunk, std::string_view(segment.chunk->bytes() + skipped, length)};
}

uint64_t ByteRing::find_line_end(uint64_t offset) const {
  while (offset < end_offset_) {
    const Segment& segment = segment_at(offset);
    const size_t skipped = offset - segment.start_offset;
    const size_t length = readable_bytes(segment) - skipped;
    const char* from = segment.chunk->bytes() + skipped;
    if (const void* found = std::memchr(from, '\n', length)) {
      return offset + static_cast<uint64_t>(static_cast<const char*>(found) - from);
    }
    offset += length;
  }
  return kNotFound;
}

bool ByteRing::starts_with(uint64_t offset, std::string_view text) const {
  while (!text.empty()) {
    const Piece next = piece(offset, text.size());
    if (next.bytes.empty() || next.bytes != text.substr(0, next.bytes.size())) return false;
    offset += next.bytes.size();
    text.remove_prefix(next.bytes.size());
  }
  return true;
}

}  // namespace pyserve
