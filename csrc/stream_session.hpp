// One generation: a log of SSE bytes, its state, and the readers that wait for more of it.
//
//   queued ──start()──▶ streaming ──finalize()──▶ completed | failed
//      └───────────┬────────┴──────cancel()─────▶ cancelled
//
// A session ends once and never changes afterwards. The log's last line is the comment
// `: end completed`, `: end failed <reason>` or `: end cancelled`. A producer appends; readers come
// and go without touching it. Everything here may be called from any thread; one mutex for each
// session, never held while a hook or an observer runs.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "byte_ring.hpp"
#include "clock.hpp"
#include "fork_guard.hpp"
#include "news_listener.hpp"
#include "sse_framer.hpp"

namespace pyserve {

enum class State { queued, streaming, completed, failed, cancelled };

constexpr bool is_live(State state) { return state == State::queued || state == State::streaming; }

enum class AppendStatus {
  ok,
  ended,             // the session is over; nothing was appended
  event_too_large,   // and dropped; what came whole before it is in the log
  event_unfinished,  // append_event() in the middle of an event; nothing was appended
  over_budget,       // appended, but neither finished sessions nor this log had enough to give back
};

enum class ReadStatus {
  data,   // `piece` holds bytes
  wait,   // nothing new yet, the session is live
  end,    // everything was read and the session is over
  lost,   // the next byte was dropped from the front of the log
  ahead,  // the position is beyond the end of the log
};

struct ReadResult {
  ReadStatus status;
  Piece piece;
};

// How far a session has come.
struct SessionProgress {
  uint64_t end_offset;
  bool is_live;
};

// Stands in a key between a conversation and one of the further sessions it may hold beside its
// own: `X`, then `X` kSubkeySeparator `a`, in the order of these subkeys.
constexpr char kSubkeySeparator = '\x1f';

struct SessionKey {
  std::string owner;
  std::string conversation_id;
};

struct SessionOptions {
  std::string epoch;
  size_t max_session_bytes;
  int64_t heartbeat_interval_ns;
  // Called once when the session is cancelled, then `on_end` once for every kind of ending: outside
  // every lock, on the thread that ended it.
  std::function<void()> on_cancel;
  std::function<void()> on_end;
  // Of no meaning here; kept for whoever created the session, for as long as the log lives.
  std::string tag;
};

struct SessionSnapshot {
  State state;
  std::string reason;  // why it ended; empty while live and where there is nothing to tell
  uint64_t first_offset;
  uint64_t end_offset;
  uint64_t last_event_start;  // equal to last_event_end: no event yet
  uint64_t last_event_end;
  uint64_t pending_bytes;  // of an event that is not whole yet, not in the log
  uint64_t readers;
  int64_t unread_ns;  // since its last reader left, or since the start; 0 while it has readers
  int64_t started_unix_ms;
  int64_t ended_unix_ms;  // 0 while live
};

class StreamSession;

// What a session tells its manager; always called without the session's mutex.
class SessionObserver {
 public:
  virtual ~SessionObserver() = default;
  virtual void session_ended(StreamSession& session) = 0;
  virtual void reclaim_memory() = 0;
};

class StreamSession : public std::enable_shared_from_this<StreamSession> {
 public:
  // Charged to the budget for each session beside its log: the object, its key, its map entry.
  static constexpr size_t kOverheadBytes = 1024;

  StreamSession(SessionKey key, SessionOptions options, std::shared_ptr<ChunkPool> pool,
                std::shared_ptr<const Clock> clock, std::weak_ptr<SessionObserver> observer);
  ~StreamSession();

  const SessionKey& key() const { return key_; }
  const std::string& epoch() const { return epoch_; }
  const std::string& tag() const { return tag_; }

  // --- the producer's side

  // queued → streaming. False when it was not queued.
  bool start();
  // Upstream bytes, split anywhere. A queued session becomes a streaming one.
  AppendStatus append(std::string_view sse);
  // One event of `data` (each of its lines becomes a data line) and an optional name, which must
  // not hold a line end. `event_unfinished` in the middle of an event begun by append().
  AppendStatus append_event(std::string_view data, std::string_view event_name);
  // As append_event(), for what is told before the generation runs: queued stays queued.
  AppendStatus announce(std::string_view data, std::string_view event_name);
  // The upstream has no more: publishes an event that lacks only its blank line, drops one that
  // broke off.
  AppendStatus end_input();
  // Ends the session, `state` being completed (after end_input(), whose too large event makes it
  // failed, event_too_large) or failed, which drops an event that is not whole. `last_events` is
  // appended first, whole SSE events.
  // False when it had ended before.
  bool finalize(State state, std::string_view reason, std::string_view last_events = {});
  // Ends the session as finalize() does, drops an event that is not whole, and calls its on_cancel
  // hook. False when it had ended before.
  bool cancel(std::string_view reason = {}, std::string_view last_events = {});

  // --- the readers' side

  void attach_reader();
  void detach_reader();
  ReadResult read(uint64_t offset, size_t max_bytes) const;
  // Asks for one notify(token) as soon as read(offset) would not answer `wait`. False (and nothing
  // asked) when that is so already.
  bool notify_when_readable(uint64_t offset, const std::shared_ptr<NewsListener>& listener,
                            uint64_t token);
  void forget(const NewsListener& listener, uint64_t token);

  SessionProgress progress() const;
  SessionSnapshot snapshot() const;

  // --- the manager's side

  // Appends `: ping` if nothing was appended for the heartbeat interval. Returns the steady time of
  // the next one due, or -1 when the session is over.
  int64_t heartbeat();
  // Gives back memory, at least `bytes` where that many are in chunks before the one being filled.
  void shrink(uint64_t bytes);
  // Steady time of the ending; valid once the session is over.
  int64_t ended_ns() const;
  const ForkGuard& fork_guard() const { return fork_guard_; }

 private:
  struct Waiter {
    std::shared_ptr<NewsListener> listener;
    uint64_t token;
  };

  // The rest expects mutex_ to be held.
  bool feed(std::string_view input);
  bool publish_pending();
  void publish_event();
  void append_line(std::string_view line);
  void enforce_cap();
  void drop_at_least(uint64_t bytes);
  void account_framer();
  void wake_readers();
  bool end(State state, std::string_view reason, std::string_view last_events);

  void after_end(bool cancelled);
  AppendStatus feed_event(std::string_view data, std::string_view event_name);
  AppendStatus settle_append(bool whole);

  const SessionKey key_;
  const std::string epoch_;
  const std::string tag_;
  const size_t max_session_bytes_;
  const int64_t heartbeat_interval_ns_;
  const std::shared_ptr<ChunkPool> pool_;
  const std::shared_ptr<const Clock> clock_;
  const std::weak_ptr<SessionObserver> observer_;
  const int64_t started_unix_ms_;
  const ForkGuard fork_guard_;

  mutable std::mutex mutex_;  // guards all below
  State state_ = State::queued;
  std::string reason_;
  ByteRing ring_;
  SseFramer framer_;
  size_t framer_charged_bytes_ = 0;
  uint64_t last_event_start_ = 0;
  uint64_t last_event_end_ = 0;
  uint64_t readers_ = 0;
  int64_t last_read_ns_;  // when the last reader left
  std::vector<Waiter> waiters_;
  int64_t last_append_ns_;
  int64_t ended_ns_ = 0;
  int64_t ended_unix_ms_ = 0;
  std::function<void()> on_cancel_;
  std::function<void()> on_end_;
};

// A place in a session's log that moves forward as it is read. Counts as one reader while it lives.
// One thread at a time.
class SessionReader {
 public:
  SessionReader(std::shared_ptr<StreamSession> session, uint64_t offset);
  ~SessionReader();
  SessionReader(const SessionReader&) = delete;
  SessionReader& operator=(const SessionReader&) = delete;

  // As StreamSession::read at this place; moves on by what it returns.
  ReadResult read(size_t max_bytes);
  bool notify_when_readable(const std::shared_ptr<NewsListener>& listener, uint64_t token);
  void forget(const NewsListener& listener, uint64_t token);
  uint64_t offset() const { return offset_; }
  // Ends the reading early; further reads answer `end`.
  void detach();

 private:
  std::shared_ptr<StreamSession> session_;
  uint64_t offset_;
};

}  // namespace pyserve
