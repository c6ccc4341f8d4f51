// The least that sending events to readers can cost: one thread, epoll, no Python, no session.
//
//   bare_server              a log with ids for each stream: GET /<anything><number of the stream>
//   bare_server --upstream   an OpenAI-shaped upstream: each POST reads the next stream, without
//   ids
//
// It prints {"port": N} and takes commands from standard input, each answered by a line of JSON:
//
//   prepare STREAMS EVENTS RATE   RATE events a second on each stream; 0: as fast as it can
//   fill                          append all events now; {"position": where the tenth from last is}
//   end                           end all streams
//   go                            append the events at their rate, then end
//   finish                        close all readers, drop all streams

#include <fcntl.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "event_log.hpp"
#include "frame_writer.hpp"
#include "sockets.hpp"

namespace bench {

namespace {

constexpr int kSendBufferBytes = 128 * 1024;  // more costs cache misses
constexpr uint64_t kBurstEvents = 256;        // appended between two looks at the sockets
constexpr int64_t kShortestTickNs = 2'000'000;
constexpr uint64_t kEventsBehind = 10;
constexpr std::string_view kHead =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n";

class BareServer {
 public:
  explicit BareServer(bool is_upstream)
      : is_upstream_(is_upstream), epoll_(checked(epoll_create1(0), "epoll_create1")) {
    listener_ = checked(socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), "socket");
    sockaddr_in address = loopback(0);
    socklen_t size = sizeof address;
    checked(bind(listener_, reinterpret_cast<sockaddr*>(&address), size), "bind");
    checked(listen(listener_, 4096), "listen");
    checked(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size), "getsockname");
    timer_ = checked(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK), "timerfd_create");
    fcntl(STDIN_FILENO, F_SETFL, O_NONBLOCK);
    watch(epoll_, EPOLL_CTL_ADD, listener_, EPOLLIN, &listener_);
    watch(epoll_, EPOLL_CTL_ADD, timer_, EPOLLIN, &timer_);
    watch(epoll_, EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, &commands_);
    std::printf("{\"port\": %d}\n", ntohs(address.sin_port));
    std::fflush(stdout);
  }

  void run() {
    while (!is_stopped_) {
      std::array<epoll_event, 256> ready{};
      const int count =
          epoll_wait(epoll_, ready.data(), static_cast<int>(ready.size()), is_bursting_ ? 0 : -1);
      for (int i = 0; i < count; ++i) on_ready(ready[i].data.ptr, ready[i].events);
      if (is_bursting_) on_burst();
      bury_dead();
    }
  }

 private:
  void on_ready(void* what, uint32_t events) {
    if (what == &listener_) return accept_all();
    if (what == &timer_) return on_timer();
    if (what == &commands_) return on_commands();
    auto& reader = *static_cast<Reader*>(what);
    if (reader.is_dead) return;
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP)) on_request(reader);
    if (events & EPOLLOUT && reader.is_blocked) {
      reader.is_blocked = false;
      flush(reader);
    }
  }

  void accept_all() {
    for (;;) {
      const int fd = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK);
      if (fd < 0) return;
      send_at_once(fd);
      setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kSendBufferBytes, sizeof kSendBufferBytes);
      readers_.push_back(std::make_unique<Reader>(fd));
      watch(epoll_, EPOLL_CTL_ADD, fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
            readers_.back().get());
    }
  }

  void on_request(Reader& reader) {
    std::array<char, 4096> block{};
    ssize_t size;
    while ((size = recv(reader.fd, block.data(), block.size(), 0)) > 0) {
      reader.request.append(block.data(), static_cast<size_t>(size));
    }
    if (size == 0 || errno != EAGAIN) return die(reader);
    const size_t head_end = reader.request.find("\r\n\r\n");
    if (reader.log != nullptr || head_end == std::string::npos) return;
    const size_t at = reader.request.find("Content-Length: ");
    const size_t body = at == std::string::npos ? 0 : std::stoul(reader.request.substr(at + 16));
    if (reader.request.size() >= head_end + 4 + body) attach(reader);
  }

  // "GET /stream12?from=345 HTTP/1.1"
  void attach(Reader& reader) {
    if (logs_.empty()) return die(reader);
    const std::string line = reader.request.substr(0, reader.request.find(" HTTP/"));
    const size_t query = line.find("?from=");
    const size_t last = line.find_last_not_of("0123456789", query - 1);
    size_t number = is_upstream_ ? next_++ : std::strtoul(line.c_str() + last + 1, nullptr, 10);
    reader.log = logs_[number % logs_.size()].get();
    if (query != std::string::npos) reader.offset = std::stoul(line.substr(query + 6));
    reader.log->readers.push_back(&reader);
    if (send(reader.fd, kHead.data(), kHead.size(), MSG_NOSIGNAL) < 0) return die(reader);
    flush(reader);
  }

  // Sends all that the reader has not, as far as the socket takes it.
  void flush(Reader& reader) {
    if (!reader.is_dead && !writer_.send_all(reader)) die(reader);
  }

  // RATE events a second for each stream, the streams spread over the interval. What is late is
  // appended together, and sent together.
  void on_timer() {
    uint64_t ticks = 0;
    if (read(timer_, &ticks, sizeof ticks) != sizeof ticks) return;
    std::vector<EventLog*> grown;
    for (; ticks > 0; --ticks) {
      for (size_t i = slice_; i < logs_.size(); i += slices_) {
        append_to(*logs_[i], 1);
        grown.push_back(logs_[i].get());
      }
      slice_ = (slice_ + 1) % slices_;
    }
    for (EventLog* log : grown) flush_all(*log);
  }

  void on_burst() {
    is_bursting_ = false;
    for (const auto& log : logs_) {
      append_to(*log, kBurstEvents);
      flush_all(*log);
      is_bursting_ = is_bursting_ || !log->is_over();
    }
  }

  void append_to(EventLog& log, uint64_t events) {
    if (log.is_over()) return;
    const int64_t now_ns = steady_now_ns();
    for (; events > 0 && log.events() < events_; --events) log.append_event(now_ns);
    if (log.events() == events_) log.end();
  }

  void flush_all(EventLog& log) {
    for (Reader* reader : log.readers) flush(*reader);
  }

  void on_commands() {
    std::array<char, 4096> block{};
    const ssize_t size = read(STDIN_FILENO, block.data(), block.size());
    if (size == 0) is_stopped_ = true;
    if (size > 0) commands_.append(block.data(), static_cast<size_t>(size));
    for (size_t at; (at = commands_.find('\n')) != std::string::npos; commands_.erase(0, at + 1)) {
      const size_t position = obey(commands_.substr(0, at));
      std::printf("{\"position\": %zu}\n", position);
      std::fflush(stdout);
    }
  }

  size_t obey(const std::string& command) {
    std::istringstream words(command);
    std::string verb;
    size_t streams = 0, position = 0;
    words >> verb;
    if (verb == "prepare") {
      words >> streams >> events_ >> rate_;
      for (size_t i = 0; i < streams; ++i) {
        logs_.push_back(std::make_unique<EventLog>(events_, !is_upstream_));
      }
    } else if (verb == "fill") {
      position = fill();
    } else if (verb == "end") {
      for (const auto& log : logs_) log->end();
    } else if (verb == "go") {
      go();
    } else if (verb == "finish") {
      finish();
    }
    return position;
  }

  size_t fill() {
    size_t position = 0;
    for (const auto& log : logs_) {
      while (log->events() < events_) {
        if (log->events() + kEventsBehind == events_) position = log->size();
        log->append_event(steady_now_ns());
      }
    }
    return position;
  }

  void go() {
    is_bursting_ = rate_ == 0;
    if (is_bursting_) return;
    const auto interval_ns = static_cast<int64_t>(1e9 / rate_);
    slices_ = std::max<size_t>(
        1, std::min(logs_.size(), static_cast<size_t>(interval_ns / kShortestTickNs)));
    slice_ = 0;
    set_timer(interval_ns / static_cast<int64_t>(slices_));
  }

  void finish() {
    set_timer(0);
    is_bursting_ = false;
    for (const auto& reader : readers_) die(*reader);
    bury_dead();
    logs_.clear();
    writer_ = {};
    next_ = 0;
  }

  void set_timer(int64_t interval_ns) {
    const timespec time{interval_ns / 1'000'000'000, interval_ns % 1'000'000'000};
    const itimerspec spec{time, time};
    checked(timerfd_settime(timer_, 0, &spec, nullptr), "timerfd_settime");
  }

  void die(Reader& reader) {
    reader.is_dead = true;
    has_dead_ = true;
  }

  void bury_dead() {
    if (!has_dead_) return;
    has_dead_ = false;
    const auto is_dead = [](const auto& reader) { return reader->is_dead; };
    for (const auto& log : logs_) {
      auto& readers = log->readers;
      readers.erase(std::remove_if(readers.begin(), readers.end(), is_dead), readers.end());
    }
    for (const auto& reader : readers_) {
      if (reader->is_dead) ::close(reader->fd);
    }
    readers_.erase(std::remove_if(readers_.begin(), readers_.end(), is_dead), readers_.end());
  }

  const bool is_upstream_;
  const int epoll_;
  int listener_, timer_;
  bool is_stopped_ = false;
  std::string commands_;
  std::vector<std::unique_ptr<EventLog>> logs_;
  std::vector<std::unique_ptr<Reader>> readers_;
  bool has_dead_ = false;
  uint64_t events_ = 0;
  double rate_ = 0;
  bool is_bursting_ = false;
  size_t slices_ = 1, slice_ = 0;
  size_t next_ = 0;  // stream of the next POST
  FrameWriter writer_;
};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::raise_descriptor_limit();
  bench::BareServer(argc > 1 && std::string_view(argv[1]) == "--upstream").run();
}
