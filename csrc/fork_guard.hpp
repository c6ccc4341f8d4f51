// After fork() a child holds copies of mutexes that no thread of its own will ever unlock.
// Whatever takes a lock asks here first and refuses to work in a child.
#pragma once

#include <cstdint>

namespace pyserve {

class ForkGuard {
 public:
  ForkGuard();
  // True in a process forked after this guard was made. Costs one load; any thread may ask.
  bool forked() const;

 private:
  uint32_t generation_;
};

}  // namespace pyserve
