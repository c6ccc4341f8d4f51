// One reader of the load client: a connection, what has come over it, and when.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "event_check.hpp"
#include "histogram.hpp"
#include "http_answer.hpp"
#include "load_options.hpp"
#include "sockets.hpp"

namespace bench {

// What all readers' findings go into.
struct Findings {
  Histogram latency;      // append to arrival
  Histogram first_byte;   // connect to the body's first byte
  Histogram first_event;  // connect to the end of the first event's line
  Histogram event_gap;    // mean time between two events, of each reader
  uint64_t events = 0;
  uint64_t body_bytes = 0;
  int64_t begin_ns = 0;  // the append of the first event, or where unknown its arrival
  int64_t last_event_ns = 0;
};

class LoadReader {
 public:
  LoadReader(const LoadOptions& options, uint64_t index)
      : options_(options), index_(index), check_(!options.is_foreign, options.first_seq) {}
  ~LoadReader() { close(); }
  LoadReader(const LoadReader&) = delete;
  LoadReader& operator=(const LoadReader&) = delete;

  void open(int epoll) {
    connect_ns_ = steady_now_ns();
    fd_ = checked(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), "socket");
    send_at_once(fd_);
    const sockaddr_in address = loopback(static_cast<uint16_t>(options_.port));
    const int result = connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address);
    if (result < 0 && errno != EINPROGRESS) checked(result, "connect");
    request_ = request_of(options_, index_);
    watch(epoll, EPOLL_CTL_ADD, fd_, EPOLLOUT, this);
  }

  // Takes what the socket has. Throws std::runtime_error when that is wrong.
  void on_ready(int epoll, std::vector<char>& buffer, Findings& findings) {
    if (!request_.empty()) {
      send_request(epoll);
      return;
    }
    const ssize_t size = recv(fd_, buffer.data(), buffer.size(), 0);
    if (size < 0 && errno == EAGAIN) return;
    if (size < 0) throw std::runtime_error(std::string("recv: ") + std::strerror(errno));
    if (size == 0) throw std::runtime_error("closed before the end of the body");
    const int64_t now_ns = steady_now_ns();
    answer_.feed({buffer.data(), static_cast<size_t>(size)},
                 [&](std::string_view run) { on_body(run, now_ns, findings); });
    if (answer_.has_head() && answer_.status() != 200) {
      throw std::runtime_error("status " + std::to_string(answer_.status()));
    }
    const bool leaves = options_.leave_after != 0 && check_.events() >= options_.leave_after;
    if (answer_.is_complete() || leaves) finish(findings, !leaves);
  }

  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  // Reads nothing more, in a buffer that does not grow: soon the server can send it nothing more.
  void stall(int epoll) {
    watch(epoll, EPOLL_CTL_DEL, fd_, 0, this);
    const int bytes = 4096;
    checked(setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes), "SO_RCVBUF");
  }
  bool has_head() const { return answer_.has_head(); }
  bool is_over() const { return is_over_; }
  uint64_t index() const { return index_; }
  uint64_t digest() const { return check_.digest(); }

 private:
  void send_request(int epoll) {
    const ssize_t size = send(fd_, request_.data(), request_.size(), MSG_NOSIGNAL);
    if (size < 0 && errno == EAGAIN) return;
    if (size < 0) throw std::runtime_error(std::string("send: ") + std::strerror(errno));
    request_.erase(0, static_cast<size_t>(size));
    if (request_.empty()) watch(epoll, EPOLL_CTL_MOD, fd_, EPOLLIN, this);
  }

  void on_body(std::string_view run, int64_t now_ns, Findings& findings) {
    if (body_bytes_ == 0) findings.first_byte.add(now_ns - connect_ns_);
    body_bytes_ += run.size();
    findings.body_bytes += run.size();
    check_.take(run, [&](int64_t time_ns) {
      if (time_ns != 0) findings.latency.add(now_ns - time_ns);
      if (first_event_ns_ == 0) {
        first_event_ns_ = now_ns;
        findings.first_event.add(now_ns - connect_ns_);
        if (findings.begin_ns == 0) findings.begin_ns = time_ns != 0 ? time_ns : now_ns;
      }
      findings.last_event_ns = last_event_ns_ = now_ns;
      ++findings.events;
    });
  }

  void finish(Findings& findings, bool at_end) {
    close();
    is_over_ = true;
    if (check_.events() > 1) {
      findings.event_gap.add((last_event_ns_ - first_event_ns_) /
                             static_cast<int64_t>(check_.events() - 1));
    }
    if (at_end) check_end();
  }

  void check_end() const {
    if (options_.events != 0 && check_.events() != options_.events) {
      throw std::runtime_error(std::to_string(check_.events()) + " events instead of " +
                               std::to_string(options_.events));
    }
    if (!options_.is_foreign && !check_.saw_done()) throw std::runtime_error("no [DONE]");
  }

  const LoadOptions& options_;
  const uint64_t index_;
  EventCheck check_;
  HttpAnswer answer_;
  int fd_ = -1;
  std::string request_;  // what is left to send of it
  uint64_t body_bytes_ = 0;
  bool is_over_ = false;
  int64_t connect_ns_ = 0;
  int64_t first_event_ns_ = 0;
  int64_t last_event_ns_ = 0;
};

}  // namespace bench
