// The two clocks of a session: a steady one that decides, and the wall clock, which is only shown.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace pyserve {

constexpr int64_t kNanosPerSecond = 1'000'000'000;

class Clock {
 public:
  virtual ~Clock() = default;
  virtual int64_t steady_ns() const = 0;
  virtual int64_t unix_ms() const = 0;
};

class SystemClock final : public Clock {
 public:
  int64_t steady_ns() const override {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
  int64_t unix_ms() const override {
    return std::chrono::duration_cast<std::chrono::milliseconds>(
               std::chrono::system_clock::now().time_since_epoch())
        .count();
  }
};

// Moves only when told to, so that a test of a TTL takes no time. Both clocks advance together.
class ManualClock final : public Clock {
 public:
  int64_t steady_ns() const override { return now_ns_.load(std::memory_order_relaxed); }
  int64_t unix_ms() const override {
    return kStartUnixMs + now_ns_.load(std::memory_order_relaxed) / 1'000'000;
  }
  void advance_ns(int64_t delta_ns) { now_ns_.fetch_add(delta_ns, std::memory_order_relaxed); }

 private:
  static constexpr int64_t kStartUnixMs = 1'700'000'000'000;
  std::atomic<int64_t> now_ns_{0};
};

}  // namespace pyserve
