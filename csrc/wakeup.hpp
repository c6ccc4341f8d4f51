// Tells one event loop which of its readers have news, through one file descriptor.
//
// However many readers are notified before the loop comes to drain(), the descriptor is written to
// once. An eventfd where there is one, elsewhere a pipe.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "fork_guard.hpp"
#include "news_listener.hpp"

namespace pyserve {

class Wakeup final : public NewsListener {
 public:
  // Throws std::system_error when no descriptor is left.
  Wakeup();
  ~Wakeup() override;
  Wakeup(const Wakeup&) = delete;
  Wakeup& operator=(const Wakeup&) = delete;

  // Readable while tokens are waiting. For the event loop's selector.
  int fd() const { return read_fd_; }

  // Any thread may call it, under any other lock: this lock is innermost and never waits for I/O.
  void notify(uint64_t token) override;

  // The loop's thread: the tokens since the last call, in the order of their news.
  std::vector<uint64_t> drain();

  // The loop's thread, when the loop goes away. Later notifications do nothing.
  void close();

 private:
  const ForkGuard fork_guard_;
  std::mutex mutex_;  // guards all below
  std::vector<uint64_t> tokens_;
  bool signalled_ = false;
  int read_fd_ = -1;
  int write_fd_ = -1;  // the same as read_fd_ for an eventfd
};

}  // namespace pyserve
