// What passes between the pump's thread and all others: readers, orders, news.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <iterator>
#include <memory>
#include <mutex>
#include <system_error>
#include <utility>
#include <vector>

#include "news_listener.hpp"
#include "socket_pump.hpp"
#include "wire_frame.hpp"

namespace pyserve {

struct PumpReader final : Delivery {
  enum class Place { idle, runnable, blocked, over };

  std::shared_ptr<StreamSession> session;
  std::shared_ptr<Wakeup> done;
  uint64_t token;
  int socket;

  // From here on the pump's thread only.
  uint64_t offset;  // where the next frame begins
  Place place = Place::runnable;
  std::shared_ptr<const WireFrame> frame;  // on its way
  size_t frame_sent_bytes = 0;
  // When the client last took something, as far as was looked, and how much it had taken then.
  int64_t progress_ns = 0;
  int64_t taken_bytes = 0;

  PumpReader(std::shared_ptr<StreamSession> session, uint64_t offset, int socket,
             std::shared_ptr<Wakeup> done, uint64_t token)
      : session(std::move(session)),
        done(std::move(done)),
        token(token),
        socket(socket),
        offset(offset) {}

  void end(DeliveryOutcome outcome) {
    place = Place::over;
    frame.reset();
    outcome_.store(outcome, std::memory_order_release);
  }

  // Only the pump's thread writes, so that it needs no atomic addition.
  void add_sent(size_t bytes) {
    sent_bytes_.store(sent_bytes() + bytes, std::memory_order_relaxed);
  }
};

// What other threads want of the pump's. Never calls a session while it is locked.
class PumpInbox final : public NewsListener {
 public:
  struct Order {
    std::shared_ptr<PumpReader> attach;  // or else
    const Delivery* detach;
  };
  struct Orders {
    std::vector<Order> orders;  // in the order they were given
    std::vector<uint64_t> news;
    bool stop = false;
  };

  PumpInbox() : event_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
    if (event_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
  }
  ~PumpInbox() override { ::close(event_); }

  void notify(uint64_t token) override {
    const std::lock_guard lock(mutex_);
    waiting_.news.push_back(token);
    kick();
  }

  void give(Order order) {
    const std::lock_guard lock(mutex_);
    waiting_.orders.push_back(std::move(order));
    kick();
  }

  void stop() {
    const std::lock_guard lock(mutex_);
    waiting_.stop = true;
    kick();
  }

  // Readers that are over, until collect() lets go of them.
  void retire(std::vector<std::shared_ptr<PumpReader>>& readers) {
    const std::lock_guard lock(mutex_);
    std::move(readers.begin(), readers.end(), std::back_inserter(retired_));
  }

  std::vector<std::shared_ptr<PumpReader>> take_retired() {
    const std::lock_guard lock(mutex_);
    return std::exchange(retired_, {});
  }

  // The pump's thread. `taken` must be empty; swapped, so that no memory is asked for.
  void take(Orders& taken) {
    const std::lock_guard lock(mutex_);
    asleep_ = false;
    std::swap(waiting_, taken);
  }

  // False when there is something to take: don't sleep.
  bool fall_asleep() {
    const std::lock_guard lock(mutex_);
    asleep_ = waiting_.orders.empty() && waiting_.news.empty() && !waiting_.stop;
    return asleep_;
  }

  int event() const { return event_; }

 private:
  // The descriptor is watched for edges, so that nobody needs to read it.
  void kick() {
    if (!asleep_) return;
    asleep_ = false;
    const uint64_t one = 1;
    while (::write(event_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

  const int event_;
  std::mutex mutex_;  // guards all below
  Orders waiting_;
  std::vector<std::shared_ptr<PumpReader>> retired_;
  bool asleep_ = false;
};

}  // namespace pyserve
