// A stream of the bench's native server: its whole log in one piece of memory that never moves.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "stream_event.hpp"

namespace bench {

struct Reader;

class EventLog {
 public:
  // With ids it is a session's log as pyserve writes it, without them what an upstream sends.
  EventLog(uint64_t events, bool has_ids) : has_ids_(has_ids) {
    bytes_.reserve((events + 2) * (kEventBytes + 40));
  }

  void append_event(int64_t time_ns) { append(event_line(events_++, time_ns)); }

  void end() {
    append(kDoneLine);
    if (has_ids_) bytes_ += ": end completed\n";
    is_over_ = true;
  }

  std::string_view from(size_t offset) const { return std::string_view(bytes_).substr(offset); }
  size_t size() const { return bytes_.size(); }
  uint64_t events() const { return events_; }
  bool is_over() const { return is_over_; }

  std::vector<Reader*> readers;

 private:
  void append(std::string_view line) {
    if (has_ids_ && bytes_.empty()) bytes_ += "retry: 1000\n";
    bytes_.append(line).append("\n");
    if (has_ids_) {
      const size_t before = bytes_.size() + kId.size() + 2;  // two line ends follow the digits
      size_t end = before + 1;
      while (end != before + std::to_string(end).size()) ++end;
      bytes_.append(kId).append(std::to_string(end)).append("\n");
    }
    bytes_.append("\n");
  }

  static constexpr std::string_view kId = "id: m3x9k2ab-";

  const bool has_ids_;
  std::string bytes_;
  uint64_t events_ = 0;
  bool is_over_ = false;
};

}  // namespace bench
