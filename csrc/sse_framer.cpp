#include "sse_framer.hpp"

#include <charconv>
#include <cstring>

namespace pyserve {
namespace {

constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
constexpr std::string_view kRetryLine = "retry: 1000\n";
// A line end is looked for in windows of this size, so that input with only CRs is not scanned to
// its end for a LF again and again.
constexpr size_t kScanWindowBytes = 4096;
// A buffer that one huge event made is given back after it.
constexpr size_t kKeptCapacityBytes = 64 * 1024;
constexpr unsigned kMaxOffsetDigits = 20;

// Compared, not divided: it runs for each event.
unsigned count_digits(uint64_t value) {
  unsigned digits = 1;
  for (uint64_t limit = 10; value >= limit; limit *= 10) {
    if (++digits == kMaxOffsetDigits) break;  // the next limit would overflow
  }
  return digits;
}

bool is_field(std::string_view line, std::string_view name) {
  return line.substr(0, name.size()) == name &&
         (line.size() == name.size() || line[name.size()] == ':');
}

// The end of the line within `window`, at LF or CR, or nullptr.
const char* find_line_end(std::string_view window) {
  const void* lf = std::memchr(window.data(), '\n', window.size());
  const size_t length =
      lf ? static_cast<size_t>(static_cast<const char*>(lf) - window.data()) : window.size();
  const void* cr = std::memchr(window.data(), '\r', length);
  return static_cast<const char*>(cr ? cr : lf);
}

}  // namespace

uint64_t end_offset_with_digits(uint64_t offset, uint64_t length) {
  const uint64_t bare = offset + length;
  const unsigned digits = count_digits(bare);
  const uint64_t end = bare + digits;
  return count_digits(end) == digits ? end : end + 1;
}

void SseFramer::start_block() {
  block_.clear();
  if (block_.capacity() > kKeptCapacityBytes) block_.shrink_to_fit();
  line_start_ = 0;
  has_data_ = false;
  published_ = false;
}

void SseFramer::discard() { start_block(); }

void SseFramer::release() {
  start_block();
  block_.shrink_to_fit();
}

SseFramer::Status SseFramer::consume(std::string_view& input, uint64_t offset) {
  if (published_) start_block();
  while (!input.empty()) {
    if (skip_lf_) {
      skip_lf_ = false;
      if (input.front() == '\n') {
        input.remove_prefix(1);
        continue;
      }
    }
    const std::string_view window = input.substr(0, kScanWindowBytes);
    const char* end = find_line_end(window);
    const size_t length = end ? static_cast<size_t>(end - window.data()) : window.size();
    block_.append(window.data(), length);
    if (block_.size() > max_event_bytes_) return Status::event_too_large;
    if (!end) {
      input.remove_prefix(length);
      continue;
    }
    skip_lf_ = *end == '\r';
    input.remove_prefix(length + 1);
    if (end_line()) return complete_event(offset);
  }
  return Status::need_more;
}

bool SseFramer::end_line() {
  if (first_line_) {
    first_line_ = false;
    if (block_.compare(0, kByteOrderMark.size(), kByteOrderMark) == 0) {
      block_.erase(0, kByteOrderMark.size());
    }
  }
  const std::string_view line = std::string_view(block_).substr(line_start_);
  if (line.empty()) {
    if (has_data_) return true;
    start_block();
    return false;
  }
  if (is_field(line, "id") || is_field(line, "retry")) {
    block_.resize(line_start_);
    return false;
  }
  has_data_ = has_data_ || is_field(line, "data");
  block_.push_back('\n');
  line_start_ = block_.size();
  return false;
}

SseFramer::Status SseFramer::complete_event(uint64_t offset) {
  if (first_event_) block_.append(kRetryLine);
  block_.append(id_prefix_);
  constexpr size_t kTwoLineEnds = 2;
  const uint64_t end = end_offset_with_digits(offset, block_.size() + kTwoLineEnds);
  char digits[kMaxOffsetDigits + kTwoLineEnds];
  char* last = std::to_chars(digits, digits + kMaxOffsetDigits, end).ptr;
  *last++ = '\n';
  *last++ = '\n';
  block_.append(digits, last);
  if (block_.size() > max_event_bytes_) return Status::event_too_large;
  first_event_ = false;
  published_ = true;
  return Status::event;
}

SseFramer::Status SseFramer::finish(uint64_t offset) {
  const bool last_line_complete = block_.size() == line_start_;
  if (!published_ && has_data_ && last_line_complete) return complete_event(offset);
  start_block();
  return Status::need_more;
}

}  // namespace pyserve
