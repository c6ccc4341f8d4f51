// The framer's promise once more, slow and obvious: what the whole input must become, line by line.
// Shares no code with csrc/.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pyserve::test {

// The smallest end offset whose own digits, written into the event, make it end there.
inline uint64_t reference_end(uint64_t offset, uint64_t length_without_digits) {
  for (uint64_t digits = 1;; ++digits) {
    const uint64_t end = offset + length_without_digits + digits;
    if (std::to_string(end).size() == digits) return end;
  }
}

// One published event: the upstream's lines, then the fields that are ours.
inline std::string reference_event(const std::string& lines, bool first, const std::string& epoch,
                                   uint64_t offset) {
  const std::string head = lines + (first ? "retry: 1000\n" : "") + "id: " + epoch + "-";
  return head + std::to_string(reference_end(offset, head.size() + 2)) + "\n\n";
}

// A log that holds these blocks (the upstream's lines of each) and nothing else.
inline std::string reference_log(const std::vector<std::string>& blocks,
                                 const std::string& epoch = "e") {
  std::string log;
  for (const std::string& lines : blocks) {
    log += reference_event(lines, log.empty(), epoch, log.size());
  }
  return log;
}

// CRLF and CR become LF.
inline std::string with_lf_only(std::string_view input) {
  std::string text;
  for (size_t i = 0; i < input.size(); ++i) {
    const bool crlf = input.substr(i, 2) == "\r\n";
    text += input[i] == '\r' ? '\n' : input[i];
    if (crlf) ++i;
  }
  return text;
}

// The blocks of an event stream that become events. A block that no blank line ends is one of them
// only if `finished` and its last line is complete.
inline std::vector<std::string> reference_blocks(std::string_view input, bool finished) {
  if (input.substr(0, 3) == "\xEF\xBB\xBF") input.remove_prefix(3);
  std::string text = with_lf_only(input);
  const bool last_line_complete = text.empty() || text.back() == '\n';
  if (finished && last_line_complete) text += '\n';
  std::vector<std::string> blocks;
  std::string block;
  bool has_data = false;
  for (size_t end; (end = text.find('\n')) != std::string::npos; text.erase(0, end + 1)) {
    const std::string line = text.substr(0, end);
    const std::string field = line.substr(0, line.find(':'));
    if (line.empty()) {
      if (has_data) blocks.push_back(block);
      block.clear();
      has_data = false;
    } else if (field != "id" && field != "retry") {
      block += line + '\n';
      has_data = has_data || field == "data";
    }
  }
  return blocks;
}

}  // namespace pyserve::test
