// Writes sessions' bytes to sockets on one thread of its own, without Python: from the moment a
// reader is attached until its delivery is over, only the pump writes to its socket.
//
// What travels is HTTP/1.1 chunks, one for each frame:
//
//     1f4\r\n <500 bytes of the log> \r\n 3c\r\n <60 bytes> \r\n ...
//
// A frame is made once and shared by all readers that stand at its offset. The head of the answer
// and the last chunk (`0\r\n\r\n`) are the caller's.
//
// The readers of one session form a channel. A flush takes the channel to the session's present
// end; news that comes meanwhile waits for the next flush, which begins no sooner than the last one
// took (pacing by duty). So an event is sent at once where there is room, and under load several
// travel in one frame. A reader that is behind, or blocked, goes on by itself up to the last flush.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "fork_guard.hpp"
#include "stream_session.hpp"
#include "wakeup.hpp"

namespace pyserve {

enum class DeliveryOutcome {
  running,
  end,       // the session is over and the kernel has all of it
  lost,      // the next byte was dropped from the front of the log
  gone,      // the client closed, half-closed or reset
  stalled,   // the client took nothing for the write timeout
  detached,  // detach() was called, or the pump was destroyed
};

// One reader that the pump serves. Any thread may ask.
class Delivery {
 public:
  virtual ~Delivery() = default;
  DeliveryOutcome outcome() const { return outcome_.load(std::memory_order_acquire); }
  // Bytes that went to the socket, framing included; exact once the outcome is known.
  uint64_t sent_bytes() const { return sent_bytes_.load(std::memory_order_relaxed); }

 protected:
  std::atomic<DeliveryOutcome> outcome_{DeliveryOutcome::running};
  std::atomic<uint64_t> sent_bytes_{0};
};

class PumpInbox;
class PumpWorker;

// Any thread may call any of it.
class SocketPump {
 public:
  // `write_timeout_ns`: how long a client may take nothing while bytes wait for it.
  // `coalesce_ns`: the least time between two flushes of one session; 0 leaves it to the pacing.
  // Throws std::system_error when no descriptor or thread is left.
  SocketPump(int64_t write_timeout_ns, int64_t coalesce_ns);
  // As close().
  ~SocketPump();
  SocketPump(const SocketPump&) = delete;
  SocketPump& operator=(const SocketPump&) = delete;

  // Sends the session's bytes from `offset` on, to its end, on a duplicate of `socket`: a connected
  // stream socket, non-blocking, with nothing of the caller's waiting to be sent. When the delivery
  // is over `done` is notified with `token`; the caller's socket stays open.
  // Throws std::system_error when no descriptor is left; nothing was begun then.
  std::shared_ptr<Delivery> attach(std::shared_ptr<StreamSession> session, uint64_t offset,
                                   int socket, std::shared_ptr<Wakeup> done, uint64_t token);

  // Ends a delivery soon, wherever it stands: a frame may be half sent, so that the connection is
  // of no further use. No effect on one that is over.
  void detach(const Delivery& delivery);

  // Lets go of the sessions of deliveries that are over. These may be the last references, and a
  // session's hooks may be anything: so that happens on the caller's thread, never on the pump's.
  void collect();

  // Ends what still runs as `detached`, and the thread. No other call may be running, and of later
  // ones attach() throws std::system_error and the others do nothing.
  void close();

  const ForkGuard& fork_guard() const { return fork_guard_; }

 private:
  const ForkGuard fork_guard_;
  const std::shared_ptr<PumpInbox> inbox_;
  std::unique_ptr<PumpWorker> worker_;
};

}  // namespace pyserve
