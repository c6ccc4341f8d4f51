// A reader's view of a stream: every line of it is held against what must come.
#pragma once

#include <charconv>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "stream_event.hpp"

namespace bench {

class EventCheck {
 public:
  // `exact`: the events are the bench's own, from `first_seq` on. Otherwise (llama.cpp's) they are
  // counted, and digest() tells whether two readers got the same.
  EventCheck(bool exact, uint64_t first_seq) : is_exact_(exact), first_seq_(first_seq) {}

  // Takes the next bytes of a body, cut anywhere. Calls `on_event` with the producer's time of each
  // event, 0 where it is unknown. Throws std::runtime_error at the first wrong byte.
  template <class OnEvent>
  void take(std::string_view bytes, OnEvent&& on_event) {
    if (!is_exact_) add_to_digest(bytes);
    while (!bytes.empty()) {
      const auto* end = static_cast<const char*>(std::memchr(bytes.data(), '\n', bytes.size()));
      const size_t size = end ? static_cast<size_t>(end - bytes.data()) : bytes.size();
      const std::string_view line = bytes.substr(0, size);
      bytes.remove_prefix(end ? size + 1 : size);
      if (!end || !carried_.empty()) carried_.append(line);
      if (!end) return;
      on_line(carried_.empty() ? line : carried_, on_event);
      carried_.clear();
    }
  }

  uint64_t events() const { return events_; }
  bool saw_done() const { return saw_done_; }
  uint64_t digest() const { return digest_; }

 private:
  template <class OnEvent>
  void on_line(std::string_view line, OnEvent&& on_event) {
    bytes_ += line.size() + 1;
    if (line.rfind("data: ", 0) == 0) {
      if (line == kDoneLine) {
        saw_done_ = true;
      } else {
        int64_t time_ns = 0;
        if (saw_done_) throw std::runtime_error("an event after [DONE]");
        if (is_exact_ && !is_event_line(line, first_seq_ + events_, time_ns)) fail("event", line);
        ++events_;
        on_event(time_ns);
      }
    } else if (is_exact_ && line.rfind("id: ", 0) == 0) {
      check_id(line);
    } else if (is_exact_ && !line.empty() && line[0] != ':' && line.rfind("retry: ", 0) != 0) {
      fail("line", line);
    }
  }

  // An id ends in the offset of its event's end: this line and the blank one after it.
  void check_id(std::string_view line) {
    const size_t dash = line.rfind('-');
    uint64_t offset = 0;
    const char* end = line.data() + line.size();
    if (dash == std::string_view::npos ||
        std::from_chars(line.data() + dash + 1, end, offset).ptr != end) {
      fail("id", line);
    }
    const uint64_t start = offset - (bytes_ + 1);
    if (!knows_start_ && (first_seq_ != 0 || start == 0)) {
      start_ = start;
      knows_start_ = true;
    }
    if (!knows_start_ || start != start_) fail("offset", line);
  }

  [[noreturn]] void fail(const char* what, std::string_view line) const {
    throw std::runtime_error("after " + std::to_string(events_) + " events a wrong " + what + ": " +
                             std::string(line.substr(0, 300)));
  }

  void add_to_digest(std::string_view bytes) {  // FNV-1a
    for (const char c : bytes) digest_ = (digest_ ^ static_cast<unsigned char>(c)) * 1099511628211u;
  }

  bool is_exact_;
  uint64_t first_seq_;
  std::string carried_;  // the beginning of a line whose end has not come
  uint64_t bytes_ = 0;
  uint64_t events_ = 0;
  bool saw_done_ = false;
  bool knows_start_ = false;
  uint64_t start_ = 0;  // the log's offset of the body's first byte
  uint64_t digest_ = 14695981039346656037u;
};

}  // namespace bench
