#include "stream_session.hpp"

#include <algorithm>
#include <utility>

namespace pyserve {
namespace {

constexpr std::string_view kHeartbeat = ": ping\n";

std::string end_line(State state, std::string_view reason) {
  if (state == State::completed) return ": end completed\n";
  if (state == State::cancelled) return ": end cancelled\n";
  return ": end failed " + std::string(reason) + "\n";
}

// The SSE text of one event. CR, LF and CRLF in `data` all separate its lines.
std::string format_event(std::string_view data, std::string_view event_name) {
  std::string text;
  text.reserve(data.size() + event_name.size() + 24);
  if (!event_name.empty()) text.append("event: ").append(event_name).push_back('\n');
  for (;;) {
    const size_t end = data.find_first_of("\r\n");
    text.append("data: ").append(data.substr(0, end)).push_back('\n');
    if (end == std::string_view::npos) break;
    const bool crlf = data.substr(end, 2) == "\r\n";
    data.remove_prefix(end + (crlf ? 2 : 1));
  }
  text.push_back('\n');
  return text;
}

}  // namespace

StreamSession::StreamSession(SessionKey key, SessionOptions options,
                             std::shared_ptr<ChunkPool> pool, std::shared_ptr<const Clock> clock,
                             std::weak_ptr<SessionObserver> observer)
    : key_(std::move(key)),
      epoch_(std::move(options.epoch)),
      tag_(std::move(options.tag)),
      max_session_bytes_(options.max_session_bytes),
      heartbeat_interval_ns_(options.heartbeat_interval_ns),
      pool_(std::move(pool)),
      clock_(std::move(clock)),
      observer_(std::move(observer)),
      started_unix_ms_(clock_->unix_ms()),
      ring_(pool_),
      framer_(epoch_, options.max_session_bytes),
      last_read_ns_(clock_->steady_ns()),
      last_append_ns_(last_read_ns_),
      on_cancel_(std::move(options.on_cancel)),
      on_end_(std::move(options.on_end)) {
  pool_->charge(kOverheadBytes);
}

StreamSession::~StreamSession() { pool_->discharge(kOverheadBytes + framer_charged_bytes_); }

// --- the producer's side

bool StreamSession::start() {
  const std::lock_guard lock(mutex_);
  if (state_ != State::queued) return false;
  state_ = State::streaming;
  return true;
}

AppendStatus StreamSession::append(std::string_view sse) {
  bool whole;
  {
    const std::lock_guard lock(mutex_);
    if (!is_live(state_)) return AppendStatus::ended;
    state_ = State::streaming;
    whole = feed(sse);
  }
  return settle_append(whole);
}

AppendStatus StreamSession::append_event(std::string_view data, std::string_view event_name) {
  start();
  return feed_event(data, event_name);
}

AppendStatus StreamSession::announce(std::string_view data, std::string_view event_name) {
  return feed_event(data, event_name);
}

AppendStatus StreamSession::feed_event(std::string_view data, std::string_view event_name) {
  const std::string text = format_event(data, event_name);
  bool whole;
  {
    const std::lock_guard lock(mutex_);
    if (!is_live(state_)) return AppendStatus::ended;
    if (framer_.pending_bytes() > 0) return AppendStatus::event_unfinished;
    whole = feed(text);
  }
  return settle_append(whole);
}

AppendStatus StreamSession::end_input() {
  const std::lock_guard lock(mutex_);
  if (!is_live(state_)) return AppendStatus::ended;
  return publish_pending() ? AppendStatus::ok : AppendStatus::event_too_large;
}

// False when the event is larger than the log may be.
bool StreamSession::publish_pending() {
  const SseFramer::Status status = framer_.finish(ring_.end_offset());
  if (status == SseFramer::Status::event) {
    publish_event();
    last_append_ns_ = clock_->steady_ns();
    wake_readers();
  }
  framer_.discard();
  account_framer();
  return status != SseFramer::Status::event_too_large;
}

// False when an event is larger than the log may be.
bool StreamSession::feed(std::string_view input) {
  const uint64_t end_before = ring_.end_offset();
  SseFramer::Status status;
  while ((status = framer_.consume(input, ring_.end_offset())) == SseFramer::Status::event) {
    publish_event();
  }
  if (status == SseFramer::Status::event_too_large) framer_.discard();
  enforce_cap();
  account_framer();
  if (ring_.end_offset() != end_before) {
    last_append_ns_ = clock_->steady_ns();
    wake_readers();
  }
  return status != SseFramer::Status::event_too_large;
}

void StreamSession::publish_event() {
  last_event_start_ = ring_.end_offset();
  ring_.append(framer_.event());
  last_event_end_ = ring_.end_offset();
  enforce_cap();
}

void StreamSession::append_line(std::string_view line) {
  ring_.append(line);
  enforce_cap();
  wake_readers();
}

void StreamSession::account_framer() {
  const size_t held = framer_.capacity_bytes();
  if (held > framer_charged_bytes_) {
    pool_->charge(held - framer_charged_bytes_);
  } else {
    pool_->discharge(framer_charged_bytes_ - held);
  }
  framer_charged_bytes_ = held;
}

bool StreamSession::finalize(State state, std::string_view reason, std::string_view last_events) {
  {
    const std::lock_guard lock(mutex_);
    if (!end(state, reason, last_events)) return false;
  }
  after_end(false);
  return true;
}

bool StreamSession::cancel(std::string_view reason, std::string_view last_events) {
  {
    const std::lock_guard lock(mutex_);
    if (!end(State::cancelled, reason, last_events)) return false;
  }
  after_end(true);
  return true;
}

bool StreamSession::end(State state, std::string_view reason, std::string_view last_events) {
  if (!is_live(state_)) return false;
  if (state == State::completed && !publish_pending()) {
    state = State::failed;
    reason = "event_too_large";
  }
  framer_.discard();
  if (!last_events.empty()) feed(last_events);
  framer_.release();
  account_framer();
  state_ = state;
  reason_ = reason;
  ended_ns_ = clock_->steady_ns();
  ended_unix_ms_ = clock_->unix_ms();
  append_line(end_line(state, reason));
  return true;
}

void StreamSession::after_end(bool cancelled) {
  // Moved out, so that whatever the hooks hold is let go of with the ending.
  std::function<void()> on_cancel, on_end;
  {
    const std::lock_guard lock(mutex_);
    on_cancel = std::exchange(on_cancel_, nullptr);
    on_end = std::exchange(on_end_, nullptr);
  }
  if (const auto observer = observer_.lock()) observer->session_ended(*this);
  if (cancelled && on_cancel) on_cancel();
  if (on_end) on_end();
}

// --- dropping from the front

void StreamSession::enforce_cap() {
  const uint64_t held = ring_.size() + framer_.pending_bytes();
  if (held > max_session_bytes_) drop_at_least(held - max_session_bytes_);
}

// Walks from boundary to boundary: each byte is looked at once in its life, so a drop costs what
// was appended. A boundary is where a block begins: after a blank line, or after a heartbeat, which
// stands between two events.
void StreamSession::drop_at_least(uint64_t bytes) {
  const uint64_t target = std::min(ring_.first_offset() + bytes, ring_.end_offset());
  uint64_t boundary = ring_.first_offset();
  uint64_t line_start = boundary;
  while (boundary < target) {
    const uint64_t line_end = ring_.find_line_end(line_start);
    if (line_end == ByteRing::kNotFound) break;
    const bool blank = line_end == line_start;
    const bool heartbeat = line_start == boundary &&
                           line_end + 1 - line_start == kHeartbeat.size() &&
                           ring_.starts_with(line_start, kHeartbeat);
    line_start = line_end + 1;
    if (blank || heartbeat) boundary = line_start;
  }
  ring_.drop_to(boundary);
}

// Keeps the budget after an append. Finished sessions go first; then the one that grows gives up
// its own oldest bytes; and where that isn't enough, it must end.
AppendStatus StreamSession::settle_append(bool whole) {
  if (!whole) return AppendStatus::event_too_large;
  if (pool_->excess_bytes() == 0) return AppendStatus::ok;
  if (const auto observer = observer_.lock()) observer->reclaim_memory();
  if (const size_t excess = pool_->excess_bytes()) shrink(excess);
  return pool_->excess_bytes() == 0 ? AppendStatus::ok : AppendStatus::over_budget;
}

void StreamSession::shrink(uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  uint64_t freed_bytes = 0;
  while (freed_bytes < bytes) {
    const size_t chunk_bytes = ring_.droppable_chunk_bytes();
    if (chunk_bytes == 0) break;
    drop_at_least(ring_.oldest_chunk_end() - ring_.first_offset());
    freed_bytes += chunk_bytes;
  }
}

// --- the readers' side

void StreamSession::attach_reader() {
  const std::lock_guard lock(mutex_);
  ++readers_;
}

void StreamSession::detach_reader() {
  const std::lock_guard lock(mutex_);
  if (--readers_ == 0) last_read_ns_ = clock_->steady_ns();
}

ReadResult StreamSession::read(uint64_t offset, size_t max_bytes) const {
  const std::lock_guard lock(mutex_);
  if (offset < ring_.first_offset()) return {ReadStatus::lost, {}};
  if (offset > ring_.end_offset()) return {ReadStatus::ahead, {}};
  if (offset < ring_.end_offset()) return {ReadStatus::data, ring_.piece(offset, max_bytes)};
  return {is_live(state_) ? ReadStatus::wait : ReadStatus::end, {}};
}

bool StreamSession::notify_when_readable(uint64_t offset,
                                         const std::shared_ptr<NewsListener>& listener,
                                         uint64_t token) {
  const std::lock_guard lock(mutex_);
  if (offset != ring_.end_offset() || !is_live(state_)) return false;
  waiters_.push_back({listener, token});
  return true;
}

void StreamSession::forget(const NewsListener& listener, uint64_t token) {
  const std::lock_guard lock(mutex_);
  const auto same = [&](const Waiter& w) {
    return w.listener.get() == &listener && w.token == token;
  };
  waiters_.erase(std::remove_if(waiters_.begin(), waiters_.end(), same), waiters_.end());
}

void StreamSession::wake_readers() {
  for (const Waiter& waiter : waiters_) waiter.listener->notify(waiter.token);
  waiters_.clear();
}

SessionProgress StreamSession::progress() const {
  const std::lock_guard lock(mutex_);
  return {ring_.end_offset(), is_live(state_)};
}

SessionSnapshot StreamSession::snapshot() const {
  const std::lock_guard lock(mutex_);
  return {state_,
          reason_,
          ring_.first_offset(),
          ring_.end_offset(),
          last_event_start_,
          last_event_end_,
          framer_.pending_bytes(),
          readers_,
          readers_ > 0 ? 0 : clock_->steady_ns() - last_read_ns_,
          started_unix_ms_,
          ended_unix_ms_};
}

// --- the manager's side

int64_t StreamSession::heartbeat() {
  const std::lock_guard lock(mutex_);
  if (!is_live(state_)) return -1;
  const int64_t now_ns = clock_->steady_ns();
  if (now_ns - last_append_ns_ >= heartbeat_interval_ns_) {
    append_line(kHeartbeat);
    last_append_ns_ = now_ns;
  }
  return last_append_ns_ + heartbeat_interval_ns_;
}

int64_t StreamSession::ended_ns() const {
  const std::lock_guard lock(mutex_);
  return ended_ns_;
}

// --- a reader

SessionReader::SessionReader(std::shared_ptr<StreamSession> session, uint64_t offset)
    : session_(std::move(session)), offset_(offset) {
  session_->attach_reader();
}

SessionReader::~SessionReader() { detach(); }

void SessionReader::detach() {
  if (!session_) return;
  if (!session_->fork_guard().forked()) session_->detach_reader();
  session_.reset();
}

ReadResult SessionReader::read(size_t max_bytes) {
  if (!session_) return {ReadStatus::end, {}};
  ReadResult result = session_->read(offset_, max_bytes);
  offset_ += result.piece.bytes.size();
  return result;
}

bool SessionReader::notify_when_readable(const std::shared_ptr<NewsListener>& listener,
                                         uint64_t token) {
  return session_ && session_->notify_when_readable(offset_, listener, token);
}

void SessionReader::forget(const NewsListener& listener, uint64_t token) {
  if (session_) session_->forget(listener, token);
}

}  // namespace pyserve
