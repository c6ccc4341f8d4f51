// One HTTP/1.1 answer, taken apart as its bytes come, cut anywhere. The body ends with its last
// chunk or its Content-Length; an answer with neither is refused.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace bench {

class HttpAnswer {
 public:
  // Calls `on_body` for each run of the body in `bytes`. Throws std::runtime_error on nonsense.
  template <class OnBody>
  void feed(std::string_view bytes, OnBody&& on_body) {
    while (!bytes.empty()) {
      if (expected_ == Part::nothing) throw std::runtime_error("bytes after the end of the answer");
      if (expected_ != Part::body) {
        take_line(bytes);
        continue;
      }
      const auto run =
          bytes.substr(0, static_cast<size_t>(std::min<uint64_t>(left_, bytes.size())));
      bytes.remove_prefix(run.size());
      left_ -= run.size();
      if (left_ == 0) expected_ = is_chunked_ ? Part::chunk_end : Part::nothing;
      on_body(run);
    }
  }

  bool has_head() const { return expected_ > Part::header; }
  bool is_complete() const { return expected_ == Part::nothing; }
  int status() const { return status_; }

 private:
  enum class Part { status_line, header, chunk_size, body, chunk_end, trailer, nothing };

  void take_line(std::string_view& bytes) {
    const size_t at = bytes.find('\n');
    line_.append(bytes.substr(0, at));
    bytes.remove_prefix(at == std::string_view::npos ? bytes.size() : at + 1);
    if (at == std::string_view::npos) return;
    if (!line_.empty() && line_.back() == '\r') line_.pop_back();
    on_line();
    line_.clear();
  }

  void on_line() {
    switch (expected_) {
      case Part::status_line:
        status_ = static_cast<int>(number(std::string_view(line_).substr(0, 12), 9, 10));
        expected_ = Part::header;
        break;
      case Part::header: line_.empty() ? end_head() : on_header(); break;
      case Part::chunk_size:
        left_ = number(line_, 0, 16);
        expected_ = left_ == 0 ? Part::trailer : Part::body;
        break;
      case Part::chunk_end:
        if (!line_.empty()) throw std::runtime_error("a chunk is longer than its size");
        expected_ = Part::chunk_size;
        break;
      case Part::trailer:
        if (line_.empty()) expected_ = Part::nothing;
        break;
      case Part::body:
      case Part::nothing: break;
    }
  }

  void on_header() {
    std::string lower = line_;
    std::transform(lower.begin(), lower.end(), lower.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (lower == "transfer-encoding: chunked") is_chunked_ = true;
    constexpr std::string_view kLength = "content-length: ";
    if (lower.rfind(kLength, 0) == 0) {
      left_ = number(lower, kLength.size(), 10);
      has_length_ = true;
    }
  }

  void end_head() {
    if (is_chunked_) {
      expected_ = Part::chunk_size;
    } else if (has_length_) {
      expected_ = left_ == 0 ? Part::nothing : Part::body;
    } else {
      throw std::runtime_error("an answer without a length, status " + std::to_string(status_));
    }
  }

  static uint64_t number(std::string_view text, size_t at, int base) {
    uint64_t value = 0;
    const char* end = text.data() + text.size();
    if (at >= text.size() || std::from_chars(text.data() + at, end, value, base).ptr != end) {
      throw std::runtime_error("not a number: " + std::string(text));
    }
    return value;
  }

  Part expected_ = Part::status_line;
  std::string line_;  // of the framing, as far as it has come
  int status_ = 0;
  bool is_chunked_ = false;
  bool has_length_ = false;
  uint64_t left_ = 0;  // of the chunk, or of the body
};

}  // namespace bench
