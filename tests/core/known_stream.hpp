// Streams whose every byte can be recomputed, and those who compare.
//
// Event n is `data: <n> <letters that depend on n>`. Where nothing but a producer writes, the whole
// log is known beforehand (KnownLog); where heartbeats and endings fall in between, each event is
// known from its number and the offset at which it starts (StreamChecker).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "framer_reference.hpp"

namespace pyserve::test {

// What threads found out: the first thing that was wrong, and how much was right.
class Findings {
 public:
  template <typename... Parts>
  void require(bool right, const Parts&... parts) {
    if (right) return;
    std::ostringstream text;
    (text << ... << parts);
    const std::lock_guard lock(mutex_);
    if (!failed_.exchange(true)) first_ = text.str();
  }
  void count(uint64_t bytes) { bytes_.fetch_add(bytes, std::memory_order_relaxed); }
  void count_loss() { losses_.fetch_add(1, std::memory_order_relaxed); }

  bool failed() const { return failed_; }
  uint64_t bytes() const { return bytes_; }
  uint64_t losses() const { return losses_; }
  std::string first() const {
    const std::lock_guard lock(mutex_);
    return first_;
  }

 private:
  mutable std::mutex mutex_;
  std::string first_;
  std::atomic<bool> failed_{false};
  std::atomic<uint64_t> bytes_{0};
  std::atomic<uint64_t> losses_{0};
};

inline std::string known_line(uint64_t n) {
  uint64_t state = (n + 1) * 0x9E3779B97F4A7C15u;
  const auto next = [&state] {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  };
  std::string line = "data: " + std::to_string(n) + " ";
  const uint64_t length = 1 + next() % (n % 20 == 0 ? 4000 : 300);
  for (uint64_t i = 0; i < length; ++i) line += static_cast<char>('A' + next() % 16);
  return line + "\n";
}

inline std::string known_event_input(uint64_t n) { return known_line(n) + "\n"; }

inline std::string known_event(uint64_t n, const std::string& epoch, uint64_t offset) {
  return reference_event(known_line(n), n == 0, epoch, offset);
}

// What a producer of `events` events appends, and the completed log that comes of it.
struct KnownLog {
  explicit KnownLog(size_t events) {
    for (uint64_t n = 0; n < events; ++n) {
      input += known_event_input(n);
      text += known_event(n, epoch, text.size());
      borders.push_back(text.size());
    }
    text += ": end completed\n";
  }

  bool holds(uint64_t offset, std::string_view bytes) const {
    return offset <= text.size() && std::string_view(text).substr(offset, bytes.size()) == bytes;
  }
  bool is_border(uint64_t offset) const {
    return std::binary_search(borders.begin(), borders.end(), offset);
  }

  const std::string epoch = "e";
  std::string input;
  std::string text;
  std::vector<uint64_t> borders{0};
};

// Takes the bytes of one reader, in any portions, and holds each against what must stand there:
// events in unbroken sequence with the right id, heartbeats and one last line between them.
class StreamChecker {
 public:
  StreamChecker(std::string epoch, uint64_t offset, Findings& findings)
      : epoch_(std::move(epoch)), offset_(offset), findings_(findings) {}

  void take(std::string_view bytes) {
    findings_.count(bytes.size());
    pending_ += bytes;
    while (take_one()) continue;
  }

  bool ended() const { return ended_ && pending_.empty(); }

 private:
  // False when the rest is not yet whole.
  bool take_one() {
    const bool comment = pending_.substr(0, 1) == ":";
    const std::string_view terminator = comment ? "\n" : "\n\n";
    const size_t end = pending_.find(terminator);
    if (end == std::string::npos) return false;
    const std::string text = pending_.substr(0, end + terminator.size());
    findings_.require(!ended_, "bytes after the last line: ", text);
    if (comment) {
      check_comment(text);
    } else {
      check_event(text);
    }
    offset_ += text.size();
    pending_.erase(0, text.size());
    return true;
  }

  void check_comment(const std::string& line) {
    ended_ =
        line == ": end completed\n" || line == ": end failed why\n" || line == ": end cancelled\n";
    findings_.require(ended_ || line == ": ping\n", "an unknown line: ", line);
  }

  void check_event(const std::string& text) {
    if (is_error_event(text)) return;
    const uint64_t n = std::strtoull(text.c_str() + 6, nullptr, 10);
    findings_.require(!last_ || n == *last_ + 1, "event ", n, " at ", offset_, " out of sequence");
    findings_.require(text == known_event(n, epoch_, offset_), "wrong bytes in event ", n, " at ",
                      offset_, ": ", text);
    last_ = n;
  }

  // What a failing session says last; its first event, too, if it failed before any other.
  bool is_error_event(const std::string& text) const {
    const auto error = [&](bool first) {
      return reference_event("data: {}\n", first, epoch_, offset_);
    };
    return text == error(false) || (!last_ && text == error(true));
  }

  const std::string epoch_;
  uint64_t offset_;
  Findings& findings_;
  std::string pending_;
  std::optional<uint64_t> last_;
  bool ended_ = false;
};

}  // namespace pyserve::test
