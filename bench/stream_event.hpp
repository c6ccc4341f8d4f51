// The event that every producer of the bench makes, and how a reader knows that no byte of it is
// wrong. bench/events.py makes the same one.
//
//     data: {"choices":[...],"seq":"00000042","t":"0000052133123456789","pad":"qrst..."}\n
//     \n
//
// `seq` counts the events of a stream from 0, `t` is the steady clock of the machine at the moment
// of the append, in nanoseconds, and `pad` begins at another letter for each `seq`.
#pragma once

#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace bench {

// With the id line that a log adds an event has 240 bytes, as llama.cpp's short ones have.
constexpr size_t kEventBytes = 220;
constexpr size_t kSeqDigits = 8;
constexpr size_t kTimeDigits = 19;

constexpr std::string_view kBeforeSeq =
    R"(data: {"choices":[{"index":0,"delta":{"content":" token"}}],"seq":")";
constexpr std::string_view kBeforeTime = R"(","t":")";
constexpr std::string_view kBeforePad = R"(","pad":")";
constexpr std::string_view kLineTail = R"("})";
constexpr std::string_view kDoneLine = "data: [DONE]";
constexpr std::string_view kLetters =
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";

constexpr size_t kSeqAt = kBeforeSeq.size();
constexpr size_t kTimeAt = kSeqAt + kSeqDigits + kBeforeTime.size();
constexpr size_t kPadAt = kTimeAt + kTimeDigits + kBeforePad.size();
constexpr size_t kPadBytes = kEventBytes - 2 - kLineTail.size() - kPadAt;
constexpr size_t kLineBytes = kEventBytes - 2;

inline int64_t steady_now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

inline std::string_view pad_of(uint64_t seq) {
  static const std::string letters = [] {
    std::string repeated;
    while (repeated.size() < kPadBytes + kLetters.size()) repeated += kLetters;
    return repeated;
  }();
  return std::string_view(letters).substr(seq % kLetters.size(), kPadBytes);
}

inline void put_number(char* to, size_t digits, uint64_t number) {
  for (size_t i = digits; i-- > 0; number /= 10) to[i] = static_cast<char>('0' + number % 10);
}

// The `data:` line, without its end.
inline std::string event_line(uint64_t seq, int64_t time_ns) {
  std::string line;
  line.reserve(kEventBytes);
  line.append(kBeforeSeq).append(kSeqDigits, '0').append(kBeforeTime).append(kTimeDigits, '0');
  line.append(kBeforePad).append(pad_of(seq)).append(kLineTail);
  put_number(line.data() + kSeqAt, kSeqDigits, seq);
  put_number(line.data() + kTimeAt, kTimeDigits, static_cast<uint64_t>(time_ns));
  return line;
}

// Whether `line` is event `seq` to the letter; its time into `time_ns`.
inline bool is_event_line(std::string_view line, uint64_t seq, int64_t& time_ns) {
  if (line.size() != kLineBytes) return false;
  char digits[kSeqDigits];
  put_number(digits, kSeqDigits, seq);
  const char* time = line.data() + kTimeAt;
  const auto parsed = std::from_chars(time, time + kTimeDigits, time_ns);
  return line.substr(0, kSeqAt) == kBeforeSeq &&
         line.substr(kSeqAt, kSeqDigits) == std::string_view(digits, kSeqDigits) &&
         line.substr(kSeqAt + kSeqDigits, kBeforeTime.size()) == kBeforeTime &&
         parsed.ec == std::errc() && parsed.ptr == time + kTimeDigits &&
         line.substr(kTimeAt + kTimeDigits, kBeforePad.size()) == kBeforePad &&
         line.substr(kPadAt, kPadBytes) == pad_of(seq) &&
         line.substr(kPadAt + kPadBytes) == kLineTail;
}

}  // namespace bench
