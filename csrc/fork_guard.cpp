#include "fork_guard.hpp"

#include <pthread.h>

#include <atomic>

namespace pyserve {
namespace {

std::atomic<uint32_t> fork_generation{0};

uint32_t current_generation() {
  // Registered once for each process image; the handler runs in the child before fork() returns.
  static const int registered = pthread_atfork(
      nullptr, nullptr, [] { fork_generation.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return fork_generation.load(std::memory_order_relaxed);
}

}  // namespace

ForkGuard::ForkGuard() : generation_(current_generation()) {}

bool ForkGuard::forked() const {
  return generation_ != fork_generation.load(std::memory_order_relaxed);
}

}  // namespace pyserve
