#include "wire_frame.hpp"

#include <algorithm>
#include <charconv>
#include <string_view>
#include <utility>

namespace pyserve {
namespace {

constexpr std::string_view kLineEnd = "\r\n";

}  // namespace

WireFrame::WireFrame(uint64_t offset, Piece body)
    : offset_(offset), body_bytes_(body.bytes.size()) {
  std::array<char, 16> hex;
  const auto hex_end = std::to_chars(hex.begin(), hex.end(), body_bytes_, 16).ptr;
  head_.append(hex.begin(), hex_end).append(kLineEnd);
  if (body_bytes_ < kCopyBelowBytes) {
    head_.append(body.bytes).append(kLineEnd);
  } else {
    body_ = std::move(body);
  }
}

WireFrame::WireFrame(const WireFrame& other, size_t sent_bytes)
    : offset_(other.offset_), body_bytes_(other.body_bytes_) {
  std::array<iovec, 3> spans;
  const size_t count = other.spans_after(sent_bytes, spans);
  head_.reserve(other.size_bytes() - sent_bytes);
  for (size_t i = 0; i < count; ++i) {
    head_.append(static_cast<const char*>(spans[i].iov_base), spans[i].iov_len);
  }
}

size_t WireFrame::size_bytes() const {
  return head_.size() + (body_.bytes.empty() ? 0 : body_.bytes.size() + kLineEnd.size());
}

size_t WireFrame::spans_after(size_t sent_bytes, std::array<iovec, 3>& spans) const {
  size_t count = 0;
  const auto add = [&](std::string_view part) {
    const size_t skipped = std::min(sent_bytes, part.size());
    sent_bytes -= skipped;
    part.remove_prefix(skipped);
    if (!part.empty()) spans[count++] = {const_cast<char*>(part.data()), part.size()};
  };
  add(head_);
  if (!body_.bytes.empty()) {
    add(body_.bytes);
    add(kLineEnd);
  }
  return count;
}

}  // namespace pyserve
