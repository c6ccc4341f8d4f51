// (owner, conversation id) → session; the memory budget, epochs, heartbeats and collection.
//
// Lock order: the manager's mutex, then a session's, then a wakeup's. Sessions call back into the
// manager only while they hold no lock. Any thread may call anything.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "chunk_pool.hpp"
#include "clock.hpp"
#include "stream_session.hpp"

namespace pyserve {

// Only live sessions are left and together they fill the budget: a new one has no room.
class MemoryBudgetError : public std::runtime_error {
 public:
  MemoryBudgetError() : std::runtime_error("the memory budget is used up by live sessions") {}
};

struct ManagerOptions {
  size_t max_session_bytes;  // of each log
  size_t max_total_bytes;    // of all logs together
  int64_t ttl_ns;            // how long a log is kept after its session's end
  int64_t heartbeat_interval_ns;
};

class StreamSessionManager final : public SessionObserver,
                                   public std::enable_shared_from_this<StreamSessionManager> {
 public:
  using SessionPtr = std::shared_ptr<StreamSession>;

  StreamSessionManager(ManagerOptions options, std::shared_ptr<const Clock> clock);

  // A new session under `key`. A live one that was there is cancelled with reason `replaced` after
  // the new one took its place; a finished one's log is dropped. Throws MemoryBudgetError.
  SessionPtr create_or_replace(SessionKey key, std::function<void()> on_cancel,
                               std::function<void()> on_end, std::string tag);

  // The session under this key unless its TTL has passed, else nullptr. O(log sessions).
  SessionPtr get(const SessionKey& key);

  // The youngest of the conversation's own session and the last one of its subkeys, else nullptr.
  // O(log sessions).
  SessionPtr newest(const SessionKey& key);

  // For each id X in turn: X and its subkeys, then all that begins with `X::`; each session once.
  // O(ids × log sessions + found).
  std::vector<SessionPtr> lookup(const std::string& owner,
                                 const std::vector<std::string>& conversation_ids);

  // Takes the session out, so that nobody can attach any more; with an `epoch` only if it is that
  // one's. Readers that are attached keep it alive. evict leaves a live session running,
  // evict_and_cancel stops it. Answer what was taken out, or nullptr.
  SessionPtr evict(const SessionKey& key, std::string_view epoch = {});
  SessionPtr evict_and_cancel(const SessionKey& key, std::string_view epoch = {});

  // Heartbeats that are due and logs whose TTL has passed. Returns the nanoseconds until there is
  // work again, or -1 when there is no session.
  int64_t tick();

  std::vector<SessionPtr> live_sessions() const;
  size_t session_count() const;
  size_t used_bytes() const { return pool_->used_bytes(); }
  const ForkGuard& fork_guard() const { return fork_guard_; }

  void session_ended(StreamSession& session) override;
  void reclaim_memory() override;

 private:
  struct KeyLess {
    bool operator()(const SessionKey& a, const SessionKey& b) const {
      const int order = a.owner.compare(b.owner);
      return order != 0 ? order < 0 : a.conversation_id < b.conversation_id;
    }
  };
  using FinishedList = std::list<SessionKey>;
  struct Entry {
    SessionPtr session;
    bool finished = false;
    FinishedList::iterator place{};  // in finished_, when finished
  };
  using EntryMap = std::map<SessionKey, Entry, KeyLess>;
  struct Heartbeat {
    int64_t due_ns;
    std::weak_ptr<StreamSession> session;
    bool operator>(const Heartbeat& other) const { return due_ns > other.due_ns; }
  };

  // The rest expects mutex_ to be held. A finished session may be destroyed under it: its hooks,
  // which could run anything when they are let go of, went with its ending.
  SessionPtr erase(EntryMap::iterator at);
  void collect_expired(int64_t now_ns);
  void make_room(size_t bytes);
  void send_heartbeats(int64_t now_ns, std::vector<SessionPtr>& beaten);
  int64_t next_due_in(int64_t now_ns) const;

  const ManagerOptions options_;
  const std::shared_ptr<const Clock> clock_;
  const std::shared_ptr<ChunkPool> pool_;
  const ForkGuard fork_guard_;

  mutable std::mutex mutex_;  // guards all below
  EntryMap sessions_;
  FinishedList finished_;  // oldest ending first: the order of collection
  std::priority_queue<Heartbeat, std::vector<Heartbeat>, std::greater<>> heartbeats_;
};

}  // namespace pyserve
