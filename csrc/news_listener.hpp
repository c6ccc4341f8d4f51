// Who is told when a session has something new.
#pragma once

#include <cstdint>

namespace pyserve {

class NewsListener {
 public:
  virtual ~NewsListener() = default;
  // Called with the session's mutex held, by any thread: must not block, nor call a session.
  virtual void notify(uint64_t token) = 0;
};

}  // namespace pyserve
