#include "session_manager.hpp"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <unordered_set>
#include <utility>

namespace pyserve {
namespace {

// Creation time in milliseconds, base 36, larger than any this process gave out before.
std::string next_epoch(int64_t unix_ms) {
  static std::atomic<int64_t> last{0};
  int64_t previous = last.load(std::memory_order_relaxed);
  int64_t next;
  do {
    next = std::max(unix_ms, previous + 1);
  } while (!last.compare_exchange_weak(previous, next, std::memory_order_relaxed));
  std::string digits;
  for (; next > 0; next /= 36) {
    digits.push_back("0123456789abcdefghijklmnopqrstuvwxyz"[next % 36]);
  }
  std::reverse(digits.begin(), digits.end());
  return digits;
}

// Numbers without leading zeros.
bool is_younger(const std::string& epoch, const std::string& than) {
  return epoch.size() != than.size() ? epoch.size() > than.size() : epoch > than;
}

bool has_prefix(const SessionKey& key, const std::string& owner, const std::string& prefix) {
  return key.owner == owner && key.conversation_id.compare(0, prefix.size(), prefix) == 0;
}

}  // namespace

StreamSessionManager::StreamSessionManager(ManagerOptions options,
                                           std::shared_ptr<const Clock> clock)
    : options_(options),
      clock_(std::move(clock)),
      pool_(std::make_shared<ChunkPool>(options.max_total_bytes)) {}

StreamSessionManager::SessionPtr StreamSessionManager::create_or_replace(
    SessionKey key, std::function<void()> on_cancel, std::function<void()> on_end,
    std::string tag) {
  SessionPtr created, replaced;
  {
    const std::lock_guard lock(mutex_);
    make_room(StreamSession::kOverheadBytes);
    if (pool_->used_bytes() + StreamSession::kOverheadBytes > pool_->budget_bytes()) {
      throw MemoryBudgetError();
    }
    SessionOptions options{
        next_epoch(clock_->unix_ms()), options_.max_session_bytes, options_.heartbeat_interval_ns,
        std::move(on_cancel),          std::move(on_end),          std::move(tag)};
    created =
        std::make_shared<StreamSession>(key, std::move(options), pool_, clock_, weak_from_this());
    const auto [at, inserted] = sessions_.try_emplace(std::move(key));
    if (!inserted && at->second.finished) finished_.erase(at->second.place);
    replaced = std::exchange(at->second, Entry{created}).session;
    heartbeats_.push({clock_->steady_ns() + options_.heartbeat_interval_ns, created});
  }
  if (replaced) replaced->cancel("replaced");
  return created;
}

StreamSessionManager::SessionPtr StreamSessionManager::get(const SessionKey& key) {
  const std::lock_guard lock(mutex_);
  collect_expired(clock_->steady_ns());
  const auto at = sessions_.find(key);
  return at == sessions_.end() ? nullptr : at->second.session;
}

std::vector<StreamSessionManager::SessionPtr> StreamSessionManager::lookup(
    const std::string& owner, const std::vector<std::string>& conversation_ids) {
  std::vector<SessionPtr> found;
  std::unordered_set<const StreamSession*> seen;
  const auto add = [&](const SessionPtr& session) {
    if (seen.insert(session.get()).second) found.push_back(session);
  };
  const std::lock_guard lock(mutex_);
  collect_expired(clock_->steady_ns());
  for (const std::string& id : conversation_ids) {
    if (const auto at = sessions_.find({owner, id}); at != sessions_.end()) {
      add(at->second.session);
    }
    for (const std::string& prefix : {id + kSubkeySeparator, id + "::"}) {
      for (auto at = sessions_.lower_bound({owner, prefix});
           at != sessions_.end() && has_prefix(at->first, owner, prefix); ++at) {
        add(at->second.session);
      }
    }
  }
  return found;
}

StreamSessionManager::SessionPtr StreamSessionManager::newest(const SessionKey& key) {
  const std::lock_guard lock(mutex_);
  collect_expired(clock_->steady_ns());
  SessionPtr found;
  if (const auto at = sessions_.find(key); at != sessions_.end()) found = at->second.session;
  const std::string prefix = key.conversation_id + kSubkeySeparator;
  const std::string behind = key.conversation_id + static_cast<char>(kSubkeySeparator + 1);
  const auto at = sessions_.lower_bound({key.owner, behind});
  if (at == sessions_.begin()) return found;
  const auto& [last_key, last] = *std::prev(at);
  if (!has_prefix(last_key, key.owner, prefix)) return found;
  return found && is_younger(found->epoch(), last.session->epoch()) ? found : last.session;
}

StreamSessionManager::SessionPtr StreamSessionManager::evict(const SessionKey& key,
                                                             std::string_view epoch) {
  const std::lock_guard lock(mutex_);
  const auto at = sessions_.find(key);
  if (at == sessions_.end()) return nullptr;
  if (!epoch.empty() && at->second.session->epoch() != epoch) return nullptr;
  return erase(at);
}

StreamSessionManager::SessionPtr StreamSessionManager::evict_and_cancel(const SessionKey& key,
                                                                        std::string_view epoch) {
  SessionPtr session = evict(key, epoch);
  if (session) session->cancel("cancelled");
  return session;
}

int64_t StreamSessionManager::tick() {
  // Before the lock, so that it is let go of after it: this may be the last reference to a live
  // session that was evicted, and its hooks could run anything when they go with it.
  std::vector<SessionPtr> beaten;
  const std::lock_guard lock(mutex_);
  const int64_t now_ns = clock_->steady_ns();
  collect_expired(now_ns);
  send_heartbeats(now_ns, beaten);
  return next_due_in(now_ns);
}

void StreamSessionManager::send_heartbeats(int64_t now_ns, std::vector<SessionPtr>& beaten) {
  while (!heartbeats_.empty() && heartbeats_.top().due_ns <= now_ns) {
    SessionPtr session = heartbeats_.top().session.lock();
    heartbeats_.pop();
    if (!session) continue;
    const int64_t due_ns = session->heartbeat();
    if (due_ns >= 0) heartbeats_.push({due_ns, session});
    beaten.push_back(std::move(session));
  }
}

int64_t StreamSessionManager::next_due_in(int64_t now_ns) const {
  int64_t due_ns = INT64_MAX;
  if (!heartbeats_.empty()) due_ns = heartbeats_.top().due_ns;
  if (!finished_.empty()) {
    const SessionPtr& oldest = sessions_.find(finished_.front())->second.session;
    due_ns = std::min(due_ns, oldest->ended_ns() + options_.ttl_ns);
  }
  return due_ns == INT64_MAX ? -1 : std::max<int64_t>(due_ns - now_ns, 0);
}

std::vector<StreamSessionManager::SessionPtr> StreamSessionManager::live_sessions() const {
  std::vector<SessionPtr> live;
  const std::lock_guard lock(mutex_);
  for (const auto& [key, entry] : sessions_) {
    if (!entry.finished) live.push_back(entry.session);
  }
  return live;
}

size_t StreamSessionManager::session_count() const {
  const std::lock_guard lock(mutex_);
  return sessions_.size();
}

void StreamSessionManager::session_ended(StreamSession& session) {
  const std::lock_guard lock(mutex_);
  const auto at = sessions_.find(session.key());
  // It may have been evicted or replaced meanwhile.
  if (at == sessions_.end() || at->second.session.get() != &session) return;
  at->second.finished = true;
  at->second.place = finished_.insert(finished_.end(), session.key());
}

void StreamSessionManager::reclaim_memory() {
  const std::lock_guard lock(mutex_);
  make_room(0);
}

StreamSessionManager::SessionPtr StreamSessionManager::erase(EntryMap::iterator at) {
  if (at->second.finished) finished_.erase(at->second.place);
  SessionPtr session = std::move(at->second.session);
  sessions_.erase(at);
  return session;
}

void StreamSessionManager::collect_expired(int64_t now_ns) {
  while (!finished_.empty()) {
    const auto oldest = sessions_.find(finished_.front());
    if (oldest->second.session->ended_ns() + options_.ttl_ns > now_ns) break;
    erase(oldest);
  }
}

// Evicts finished sessions, oldest first, until `bytes` more fit into the budget or none is left.
void StreamSessionManager::make_room(size_t bytes) {
  while (!finished_.empty() && pool_->used_bytes() + bytes > pool_->budget_bytes()) {
    erase(sessions_.find(finished_.front()));
  }
}

}  // namespace pyserve
