// What several test files share: randomness that can be repeated, and small readers of a log.
#pragma once

#include <poll.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>

#include "../../csrc/chunk_pool.hpp"
#include "../../csrc/stream_session.hpp"

namespace pyserve::test {

constexpr int kPollTimeoutMs = 60'000;  // reached only by a wake-up that was lost

inline bool soak() {
  const char* wanted = std::getenv("PYSERVE_SOAK");
  return wanted && std::string(wanted) == "1";
}

inline uint64_t base_seed() {
  const char* wanted = std::getenv("PYSERVE_TEST_SEED");
  return wanted ? std::strtoull(wanted, nullptr, 10) : 20240607;
}

class Random {
 public:
  // `stream` tells apart the users of one base seed (threads, rounds).
  explicit Random(uint64_t stream) : engine_(base_seed() * 0x9E3779B97F4A7C15u + stream) {}

  // In [0, bound).
  uint64_t below(uint64_t bound) { return engine_() % bound; }
  // In [low, high].
  uint64_t between(uint64_t low, uint64_t high) { return low + below(high - low + 1); }
  bool one_in(uint64_t n) { return below(n) == 0; }

  // Letters, with a line end here and there.
  std::string text(size_t length) {
    std::string made(length, '\0');
    uint64_t bits = 0;
    for (size_t i = 0; i < length; ++i, bits >>= 4) {
      if (i % 16 == 0) bits = engine_();
      made[i] = "abcdefghijklmno\n"[bits & 15];
    }
    return made;
  }

 private:
  std::mt19937_64 engine_;
};

inline std::shared_ptr<ChunkPool> make_pool(size_t budget_bytes = size_t{1} << 30) {
  return std::make_shared<ChunkPool>(budget_bytes);
}

// All that the log holds from `offset` on.
inline std::string read_all(const StreamSession& session, uint64_t offset = 0) {
  std::string text;
  for (;;) {
    const ReadResult result = session.read(offset + text.size(), SIZE_MAX);
    if (result.status != ReadStatus::data) return text;
    text += result.piece.bytes;
  }
}

// A session of its own, without a manager. Its epoch is "e".
struct LoneSession {
  struct Limits {
    size_t max_session_bytes = size_t{1} << 30;
    size_t budget_bytes = size_t{1} << 30;
  };

  explicit LoneSession(Limits limits, std::function<void()> on_cancel = {},
                       std::function<void()> on_end = {},
                       std::weak_ptr<SessionObserver> observer = {})
      : pool(make_pool(limits.budget_bytes)),
        session(std::make_shared<StreamSession>(
            SessionKey{"owner", "id"},
            SessionOptions{"e", limits.max_session_bytes, kNanosPerSecond, std::move(on_cancel),
                           std::move(on_end), "tag"},
            pool, clock, std::move(observer))) {}
  LoneSession() : LoneSession(Limits{}) {}

  StreamSession* operator->() const { return session.get(); }
  StreamSession& operator*() const { return *session; }

  std::shared_ptr<ManualClock> clock = std::make_shared<ManualClock>();
  std::shared_ptr<ChunkPool> pool;
  std::shared_ptr<StreamSession> session;
};

inline bool is_readable(int fd, int timeout_ms = 0) {
  pollfd watched{fd, POLLIN, 0};
  return ::poll(&watched, 1, timeout_ms) == 1 && (watched.revents & POLLIN) != 0;
}

}  // namespace pyserve::test
