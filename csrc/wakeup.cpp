#include "wakeup.hpp"

#include <fcntl.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/eventfd.h>
#endif

#include <cerrno>
#include <system_error>
#include <utility>

namespace pyserve {
namespace {

// Reads or writes of 8 bytes on these descriptors never block and fail only when there is nothing
// to read or the other side is full: in both cases the reader is awake already.
template <typename Transfer>
void transfer_retrying(Transfer transfer) {
  while (transfer() < 0 && errno == EINTR) {
  }
}

}  // namespace

Wakeup::Wakeup() {
#ifdef __linux__
  read_fd_ = write_fd_ = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (read_fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
#else
  int ends[2];
  if (::pipe(ends) != 0) throw std::system_error(errno, std::generic_category(), "pipe");
  for (const int end : ends) {
    ::fcntl(end, F_SETFL, O_NONBLOCK);
    ::fcntl(end, F_SETFD, FD_CLOEXEC);
  }
  read_fd_ = ends[0];
  write_fd_ = ends[1];
#endif
}

Wakeup::~Wakeup() {
  if (!fork_guard_.forked()) close();
}

void Wakeup::notify(uint64_t token) {
  const std::lock_guard lock(mutex_);
  if (write_fd_ < 0) return;
  tokens_.push_back(token);
  if (signalled_) return;
  signalled_ = true;
  const uint64_t one = 1;
  transfer_retrying([&] { return ::write(write_fd_, &one, sizeof one); });
}

std::vector<uint64_t> Wakeup::drain() {
  const std::lock_guard lock(mutex_);
  if (read_fd_ < 0) return {};
  uint64_t count;
  transfer_retrying([&] { return ::read(read_fd_, &count, sizeof count); });
  signalled_ = false;
  return std::exchange(tokens_, {});
}

void Wakeup::close() {
  const std::lock_guard lock(mutex_);
  if (read_fd_ < 0) return;
  ::close(read_fd_);
  if (write_fd_ != read_fd_) ::close(write_fd_);
  read_fd_ = write_fd_ = -1;
  tokens_.clear();
}

}  // namespace pyserve
