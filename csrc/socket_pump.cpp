#include "socket_pump.hpp"

#include <fcntl.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "pump_inbox.hpp"
#include "pump_worker.hpp"

namespace pyserve {

SocketPump::SocketPump(int64_t write_timeout_ns, int64_t coalesce_ns)
    : inbox_(std::make_shared<PumpInbox>()),
      worker_(std::make_unique<PumpWorker>(inbox_, write_timeout_ns, coalesce_ns)) {}

void SocketPump::close() { worker_.reset(); }

SocketPump::~SocketPump() {
  // In a forked child there is no thread to join, and what it was doing stays half done: leak it.
  if (!fork_guard_.forked()) return;
  static_cast<void>(worker_.release());
  static_cast<void>(new std::shared_ptr<PumpInbox>(inbox_));
}

std::shared_ptr<Delivery> SocketPump::attach(std::shared_ptr<StreamSession> session,
                                             uint64_t offset, int socket,
                                             std::shared_ptr<Wakeup> done, uint64_t token) {
  if (!worker_) throw std::system_error(ESHUTDOWN, std::generic_category(), "SocketPump::attach");
  const int duplicate = ::fcntl(socket, F_DUPFD_CLOEXEC, 0);
  if (duplicate < 0) throw std::system_error(errno, std::generic_category(), "dup");
  auto reader =
      std::make_shared<PumpReader>(std::move(session), offset, duplicate, std::move(done), token);
  inbox_->give({reader, nullptr});
  return reader;
}

void SocketPump::detach(const Delivery& delivery) { inbox_->give({nullptr, &delivery}); }

void SocketPump::collect() { inbox_->take_retired(); }

}  // namespace pyserve
