// A run of a log as it goes over the wire: one chunk, `<size in hex>\r\n<bytes>\r\n` (RFC
// 9112, 7.1).
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "byte_ring.hpp"

namespace pyserve {

class WireFrame {
 public:
  // Shorter bodies are copied next to their framing: one span is cheaper to send than three, and
  // the log's memory is not held. Longer ones stay where they are in the log.
  static constexpr size_t kCopyBelowBytes = 4096;

  // `body` is what the log holds from `offset` on.
  WireFrame(uint64_t offset, Piece body);

  // What is left of `other` after its first `sent_bytes`, in memory of its own. A whole frame still
  // stands for the same run of the log: body_bytes() stays.
  WireFrame(const WireFrame& other, size_t sent_bytes);

  uint64_t offset() const { return offset_; }
  size_t body_bytes() const { return body_bytes_; }
  size_t size_bytes() const;
  // What is left to send after the first `sent_bytes`, into `spans`; returns how many spans.
  size_t spans_after(size_t sent_bytes, std::array<iovec, 3>& spans) const;

 private:
  const uint64_t offset_;
  const size_t body_bytes_;
  std::string head_;  // the size line; with a short body also the rest
  Piece body_;        // empty for a short one
};

}  // namespace pyserve
