// What the tests of the socket pump share: pairs of sockets, a decoder of the chunks that arrive,
// and a client that reads them.
#pragma once

#include <arpa/inet.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <future>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/socket_pump.hpp"
#include "support.hpp"

namespace pyserve::test {

constexpr size_t kMaxFrameBytes = 64 * 1024;
constexpr int64_t kNoTimeoutNs = 600 * kNanosPerSecond;
constexpr int64_t kMillisecondNs = 1'000'000;

// Outside doctest, so that threads may use it.
inline int checked(int result) {
  if (result < 0) throw std::system_error(errno, std::generic_category());
  return result;
}

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() { close(); }

  int get() const { return fd_; }
  void close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

 private:
  int fd_;
};

inline void set_option(const Descriptor& socket, int option, int value) {
  checked(::setsockopt(socket.get(), SOL_SOCKET, option, &value, sizeof value));
}

// Two ends of one connection. The server's does not block, as the pump requires.
struct Connection {
  Descriptor server;
  Descriptor client;

  void reset() {
    const linger at_once{1, 0};
    checked(::setsockopt(client.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once));
    client.close();
  }
};

inline Connection unix_connection() {
  int ends[2];
  checked(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends));
  checked(::fcntl(ends[0], F_SETFL, O_NONBLOCK));
  return {Descriptor(ends[0]), Descriptor(ends[1])};
}

// `buffer_bytes` 0 leaves the kernel's own sizes.
inline Connection tcp_connection(int buffer_bytes = 0) {
  const Descriptor listener(checked(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  checked(::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), length));
  checked(::listen(listener.get(), 1));
  checked(::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &length));
  Descriptor client(checked(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)));
  if (buffer_bytes > 0) set_option(client, SO_RCVBUF, buffer_bytes);
  checked(::connect(client.get(), reinterpret_cast<sockaddr*>(&address), length));
  Descriptor server(checked(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC)));
  if (buffer_bytes > 0) set_option(server, SO_SNDBUF, buffer_bytes);
  checked(::fcntl(server.get(), F_SETFL, O_NONBLOCK));
  return {std::move(server), std::move(client)};
}

// Holds so little that a client which takes nothing blocks it within one turn of the pump's.
inline Connection narrow_connection() { return tcp_connection(4096); }

// The same without TCP's own: it has room again only after the client took something.
inline Connection narrow_unix_connection() {
  Connection connection = unix_connection();
  set_option(connection.server, SO_SNDBUF, 4096);
  return connection;
}

// Decodes chunks from any portions, and notes whatever no chunked answer may hold.
class ChunkDecoder {
 public:
  void take(std::string_view bytes) {
    raw_bytes_ += bytes.size();
    pending_ += bytes;
    size_t used = 0;
    while (take_one(std::string_view(pending_).substr(used), used)) continue;
    pending_.erase(0, used);
  }

  const std::string& body() const { return body_; }
  const std::vector<size_t>& chunk_sizes() const { return chunk_sizes_; }
  uint64_t raw_bytes() const { return raw_bytes_; }
  bool is_valid() const { return valid_; }
  // Nothing of a further chunk has come.
  bool at_border() const { return pending_.empty(); }
  // With as much of the body of a chunk that broke off as came.
  std::string body_so_far() const {
    const size_t line_end = pending_.find("\r\n");
    if (line_end == std::string::npos) return body_;
    const size_t size = parse_size(std::string_view(pending_).substr(0, line_end));
    return body_ + pending_.substr(line_end + 2, size);
  }

 private:
  static size_t parse_size(std::string_view hex) {
    size_t size = 0;
    const auto [end, error] = std::from_chars(hex.data(), hex.data() + hex.size(), size, 16);
    return error == std::errc() && end == hex.data() + hex.size() ? size : 0;
  }

  bool take_one(std::string_view text, size_t& used) {
    const size_t line_end = text.find("\r\n");
    if (line_end == std::string_view::npos) {
      valid_ = valid_ && text.size() <= 16;
      return false;
    }
    const size_t size = parse_size(text.substr(0, line_end));
    if (size == 0 || size > kMaxFrameBytes) valid_ = false;
    const size_t whole = line_end + 2 + size + 2;
    if (!valid_ || text.size() < whole) return false;
    valid_ = text.substr(whole - 2, 2) == "\r\n";
    body_ += text.substr(line_end + 2, size);
    chunk_sizes_.push_back(size);
    used += whole;
    return true;
  }

  std::string pending_, body_;
  std::vector<size_t> chunk_sizes_;
  uint64_t raw_bytes_ = 0;
  bool valid_ = true;
};

// The client's end: reads what is there, or waits for what must come.
class Client {
 public:
  explicit Client(Descriptor& socket) : socket_(socket) {}

  // One read of at most `most` bytes; false at the end of the stream, or when nothing comes.
  bool read_some(size_t most = 256 * 1024, int timeout_ms = kPollTimeoutMs) {
    if (!is_readable(socket_.get(), timeout_ms)) return false;
    buffer_.resize(most);
    const ssize_t got = ::recv(socket_.get(), buffer_.data(), most, 0);
    if (got <= 0) return false;
    decoder_.take({buffer_.data(), static_cast<size_t>(got)});
    return true;
  }
  // Until so much of the log has come.
  bool read_body(size_t bytes) {
    while (decoder_.body().size() < bytes) {
      if (!decoder_.is_valid() || !read_some()) return false;
    }
    return true;
  }
  // Until so much has come, framing included.
  bool read_raw(uint64_t bytes) {
    while (decoder_.raw_bytes() < bytes) {
      if (!read_some()) return false;
    }
    return true;
  }

  const ChunkDecoder& decoder() const { return decoder_; }
  const std::string& body() const { return decoder_.body(); }

 private:
  Descriptor& socket_;
  ChunkDecoder decoder_;
  std::string buffer_;
};

// While it lives nobody gets at the session: an event is appended on a thread of its own, and a
// listener, who is told with the session's mutex held, does not return.
class HeldSession {
 public:
  explicit HeldSession(const LoneSession& session) : session_(session.session) {
    session_->notify_when_readable(session_->progress().end_offset, listener_, 0);
    appender_ = std::thread([this] { session_->append("data: held\n\n"); });
    listener_->told.get_future().wait();
  }
  ~HeldSession() {
    listener_->release.set_value();
    appender_.join();
  }
  HeldSession(const HeldSession&) = delete;
  HeldSession& operator=(const HeldSession&) = delete;

 private:
  struct Listener final : NewsListener {
    void notify(uint64_t) override {
      told.set_value();
      release.get_future().wait();
    }
    std::promise<void> told, release;
  };

  const std::shared_ptr<StreamSession> session_;
  const std::shared_ptr<Listener> listener_ = std::make_shared<Listener>();
  std::thread appender_;
};

// The tokens that a pump told of, each to come once.
class Completions {
 public:
  std::shared_ptr<Wakeup> wakeup() const { return wakeup_; }
  uint64_t next_token() { return ++last_token_; }
  bool has(uint64_t token) {
    for (const uint64_t told : wakeup_->drain()) told_.push_back(told);
    return std::count(told_.begin(), told_.end(), token) > 0;
  }
  bool await(uint64_t token) {
    while (!has(token)) {
      if (!is_readable(wakeup_->fd(), kPollTimeoutMs)) return false;
    }
    return std::count(told_.begin(), told_.end(), token) == 1;
  }
  const std::vector<uint64_t>& in_order() {
    has(0);
    return told_;
  }
  size_t total() { return in_order().size(); }

 private:
  const std::shared_ptr<Wakeup> wakeup_ = std::make_shared<Wakeup>();
  std::vector<uint64_t> told_;
  uint64_t last_token_ = 0;
};

// A delivery to a client that this object is, too.
struct PumpedReader {
  PumpedReader(SocketPump& pump, Completions& completions, std::shared_ptr<StreamSession> session,
               uint64_t offset, Connection connection)
      : completions(completions),
        connection(std::move(connection)),
        token(completions.next_token()),
        delivery(pump.attach(std::move(session), offset, this->connection.server.get(),
                             completions.wakeup(), token)) {}

  bool is_over() { return completions.has(token); }
  // What it ended as; `running` when it does not end.
  DeliveryOutcome outcome() {
    return completions.await(token) ? delivery->outcome() : DeliveryOutcome::running;
  }
  // Reads all that was sent, also what comes while it waits for the end.
  DeliveryOutcome read_to_end() {
    while (!is_over()) {
      pollfd watched[] = {{connection.client.get(), POLLIN, 0},
                          {completions.wakeup()->fd(), POLLIN, 0}};
      if (::poll(watched, 2, kPollTimeoutMs) <= 0) return DeliveryOutcome::running;
      if (watched[0].revents != 0 && !client.read_some()) break;
    }
    const DeliveryOutcome ended = outcome();
    return client.read_raw(delivery->sent_bytes()) ? ended : DeliveryOutcome::running;
  }

  Completions& completions;
  Connection connection;
  Client client{connection.client};
  const uint64_t token;
  std::shared_ptr<Delivery> delivery;
};

// A pump, and those whom it serves.
struct PumpBench {
  explicit PumpBench(int64_t write_timeout_ns = kNoTimeoutNs, int64_t coalesce_ns = 0)
      : pump(std::make_unique<SocketPump>(write_timeout_ns, coalesce_ns)) {}

  std::unique_ptr<PumpedReader> attach(const std::shared_ptr<StreamSession>& session,
                                       uint64_t offset = 0,
                                       Connection connection = tcp_connection()) {
    return std::make_unique<PumpedReader>(*pump, completions, session, offset,
                                          std::move(connection));
  }

  // When this returns, all that was asked of the pump before was seen to once: it serves in order.
  void await_turn() {
    const LoneSession session;
    session->finalize(State::completed, "");
    REQUIRE(attach(session.session, 0, unix_connection())->outcome() == DeliveryOutcome::end);
    pump->collect();
  }

  Completions completions;
  std::unique_ptr<SocketPump> pump;
};

}  // namespace pyserve::test
