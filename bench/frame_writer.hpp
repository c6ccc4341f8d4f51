// Sends a log to sockets as HTTP chunks. A frame is made once for all readers at the same place.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>

#include "event_log.hpp"
#include "sockets.hpp"

namespace bench {

struct Reader {
  explicit Reader(int socket) : fd(socket) {}

  const int fd;
  EventLog* log = nullptr;
  std::string request;
  // The frame being sent: [offset, frame_end) of the log; `sent` bytes of it, framing and all, are
  // gone.
  size_t offset = 0;
  size_t frame_end = 0;
  size_t sent = 0;
  bool has_frame = false;
  bool is_blocked = false;
  bool has_ended = false;
  bool is_dead = false;
};

class FrameWriter {
 public:
  // Sends what the reader has not got, as far as its socket takes it. False: the socket is broken.
  bool send_all(Reader& reader) {
    while (!reader.is_blocked) {
      if (!reader.has_frame && !begin_frame(reader)) return true;
      if (!send_frame(reader)) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kFrameBytes = 64 * 1024;
  static constexpr size_t kCopyBelowBytes = 4096;  // one span is cheaper to send than three

  // False: there is nothing to send.
  static bool begin_frame(Reader& reader) {
    const bool has_all = reader.offset == reader.log->size();
    if (has_all && (!reader.log->is_over() || reader.has_ended)) return false;
    reader.has_ended = has_all;  // an empty frame is the last chunk
    reader.frame_end = std::min(reader.log->size(), reader.offset + kFrameBytes);
    reader.sent = 0;
    reader.has_frame = true;
    return true;
  }

  bool send_frame(Reader& reader) {
    const auto body = reader.log->from(reader.offset).substr(0, reader.frame_end - reader.offset);
    make_frame(body);
    std::array<iovec, 3> spans{};
    size_t count = 0, skipped = reader.sent, total = 0;
    const auto add = [&](std::string_view part) {
      const size_t cut = std::min(skipped, part.size());
      total += part.size();
      skipped -= cut;
      if (cut < part.size()) {
        spans[count++] = {const_cast<char*>(part.data() + cut), part.size() - cut};
      }
    };
    add(head_);
    if (is_split_) {
      add(body);
      add("\r\n");
    }
    msghdr message{};
    message.msg_iov = spans.data();
    message.msg_iovlen = count;
    const ssize_t size = count == 1
                             ? send(reader.fd, spans[0].iov_base, spans[0].iov_len, MSG_NOSIGNAL)
                             : sendmsg(reader.fd, &message, MSG_NOSIGNAL);
    if (size < 0 && errno != EAGAIN) return false;
    reader.sent += size < 0 ? 0 : static_cast<size_t>(size);
    reader.is_blocked = reader.sent < total;
    if (reader.is_blocked) return true;
    reader.offset = reader.frame_end;
    reader.has_frame = false;
    return true;
  }

  void make_frame(std::string_view body) {
    if (body.data() == framed_.data() && body.size() == framed_.size()) return;
    framed_ = body;
    std::array<char, 32> size_line{};
    std::snprintf(size_line.data(), size_line.size(), "%zx\r\n", body.size());
    head_ = size_line.data();
    is_split_ = body.size() >= kCopyBelowBytes;
    if (!is_split_) head_.append(body).append("\r\n");
  }

  std::string_view framed_;  // the body that `head_` was made for
  std::string head_;         // the size line; for a short body all of the frame
  bool is_split_ = false;
};

}  // namespace bench
