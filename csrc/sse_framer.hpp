// Upstream bytes in, whole events with ids out. No locks, threads, time.
//
// What comes out is the upstream's event with `\n` line ends, without its own `id:` and `retry:`
// fields, and with one field more as its last line:
//
//   event: delta                      kept as it came
//   data: {"content": "hi"}           kept as it came
//   retry: 1000                       on the first event only
//   id: m3x9k2-4711                   <epoch>-<offset of the end of this event>
//                                     the blank line that ends it
//
// A block without a `data:` line (a comment, a keep-alive) is dropped. Splitting the input
// elsewhere gives the same output. Line and field grammar: WHATWG HTML, section 9.2.6.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace pyserve {

class SseFramer {
 public:
  enum class Status {
    need_more,        // all input is consumed, no event is complete
    event,            // event() holds a whole event; call again for the rest of the input
    event_too_large,  // the block is larger than max_event_bytes; the framer is of no use any more
  };

  // `max_event_bytes` bounds what a malicious or broken upstream can make us hold: it counts the
  // finished event with its id, and the unfinished block while it grows.
  SseFramer(std::string_view epoch, size_t max_event_bytes)
      : id_prefix_("id: " + std::string(epoch) + "-"), max_event_bytes_(max_event_bytes) {}

  // Consumes from the front of `input`. A returned event is numbered as starting at `offset`.
  Status consume(std::string_view& input, uint64_t offset);

  // The input has ended without a blank line: event() if the last line is complete, else need_more.
  Status finish(uint64_t offset);

  // Forgets the unfinished block.
  void discard();
  // The same, and gives back the memory: no more input will come.
  void release();

  // Valid after Status::event until the next call.
  std::string_view event() const { return block_; }

  // Bytes of the unfinished block.
  size_t pending_bytes() const { return published_ ? 0 : block_.size(); }
  // Memory held, for the budget.
  size_t capacity_bytes() const { return block_.capacity(); }

 private:
  void start_block();
  bool end_line();  // true when the line was the blank one that completes an event
  Status complete_event(uint64_t offset);

  const std::string id_prefix_;
  const size_t max_event_bytes_;
  std::string block_;        // complete lines of the block, then the unfinished line
  size_t line_start_ = 0;    // where the unfinished line begins in block_
  bool has_data_ = false;    // the block holds a `data` field
  bool published_ = false;   // block_ is an event that was handed out
  bool skip_lf_ = false;     // the last line ended with CR: a LF that follows belongs to it
  bool first_line_ = true;   // a byte order mark may stand here
  bool first_event_ = true;  // carries `retry:`
};

// Where an event of `length` bytes without its offset's digits ends, when it starts at `offset`:
// the digits of the end offset are part of the event. The smaller one where two solve it.
uint64_t end_offset_with_digits(uint64_t offset, uint64_t length);

}  // namespace pyserve
