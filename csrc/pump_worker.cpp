#include "pump_worker.hpp"

#include <linux/sockios.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <system_error>

#include "clock.hpp"

namespace pyserve {
namespace {

constexpr size_t kMaxFrameBytes = 64 * 1024;
// What one reader may be sent before it is another's turn.
constexpr size_t kTurnBytes = 4 * kMaxFrameBytes;
constexpr int kMaxEvents = 256;
constexpr int kStallChecksPerTimeout = 4;

int64_t now_ns() { return SystemClock().steady_ns(); }

// Bytes that the kernel holds for the client: sent and not acknowledged, or not sent yet.
int unread_bytes(int socket) {
  int bytes = 0;
  return ::ioctl(socket, SIOCOUTQ, &bytes) == 0 ? bytes : 0;
}

// epoll_wait with a timeout in nanoseconds where the kernel has that (5.11); -1 waits for ever.
int wait_for_events(int epoll, std::array<epoll_event, kMaxEvents>& events, int64_t timeout_ns) {
#ifdef SYS_epoll_pwait2
  struct {
    int64_t seconds, nanoseconds;
  } timeout{timeout_ns / kNanosPerSecond, timeout_ns % kNanosPerSecond};
  const long found = ::syscall(SYS_epoll_pwait2, epoll, events.data(), kMaxEvents,
                               timeout_ns < 0 ? nullptr : &timeout, nullptr, sizeof(sigset_t));
  if (found >= 0 || errno == EINTR) return std::max(static_cast<int>(found), 0);
#endif
  const int64_t timeout_ms =
      timeout_ns < 0 ? -1 : std::min<int64_t>((timeout_ns + 999'999) / 1'000'000, INT_MAX);
  return std::max(::epoll_wait(epoll, events.data(), kMaxEvents, static_cast<int>(timeout_ms)), 0);
}

}  // namespace

PumpWorker::PumpWorker(std::shared_ptr<PumpInbox> inbox, int64_t write_timeout_ns,
                       int64_t coalesce_ns)
    : inbox_(std::move(inbox)),
      write_timeout_ns_(write_timeout_ns),
      stall_check_interval_ns_(write_timeout_ns / kStallChecksPerTimeout),
      coalesce_ns_(coalesce_ns),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      next_stall_check_ns_(now_ns() + stall_check_interval_ns_) {
  if (epoll_ < 0) throw std::system_error(errno, std::generic_category(), "epoll_create1");
  epoll_event event{};
  event.events = EPOLLIN | EPOLLET;
  ::epoll_ctl(epoll_, EPOLL_CTL_ADD, inbox_->event(), &event);
  start_thread();
}

// Signals are Python's business: they must not interrupt, or be handled on, this thread.
void PumpWorker::start_thread() {
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { run(); });
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    ::close(epoll_);
    throw;
  }
  ::pthread_setname_np(thread_.native_handle(), "pyserve-pump");
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

PumpWorker::~PumpWorker() {
  inbox_->stop();
  thread_.join();
  for (const auto& entry : readers_) finish(*entry.second, DeliveryOutcome::detached);
  retire();
  ::close(epoll_);
}

void PumpWorker::run() {
  PumpInbox::Orders orders;
  for (;;) {
    inbox_->take(orders);
    const bool stop = orders.stop;
    follow(orders);
    if (stop) return;
    flush_due();
    serve_runnable();
    end_stalled();
    retire();
    wait();
  }
}

// Leaves `orders` empty: a reader must be held by this thread only until it is retired.
void PumpWorker::follow(PumpInbox::Orders& orders) {
  for (PumpInbox::Order& order : orders.orders) {
    if (order.attach) {
      begin(std::move(order.attach));
    } else if (const auto at = readers_.find(order.detach); at != readers_.end()) {
      finish(*at->second, DeliveryOutcome::detached);
    }
  }
  for (const Key key : orders.news) {
    if (const auto at = channels_.find(key); at != channels_.end()) schedule(key, at->second);
  }
  orders.orders.clear();
  orders.news.clear();
}

void PumpWorker::begin(std::shared_ptr<PumpReader> adopted) {
  PumpReader& reader = *adopted;
  reader.progress_ns = now_ns();
  readers_.emplace(&reader, std::move(adopted));
  const Key key = key_of(*reader.session);
  const auto [at, is_new] = channels_.try_emplace(key);
  PumpChannel& channel = at->second;
  ++channel.readers;
  if (is_new) {
    channel.session = reader.session;
    const SessionProgress now = channel.session->progress();
    channel.flushed_end = now.end_offset;
    channel.over = !now.is_live;
    arm(key, channel);
  }
  epoll_event event{};
  event.events = EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.ptr = &reader;
  if (::epoll_ctl(epoll_, EPOLL_CTL_ADD, reader.socket, &event) != 0) {
    finish(reader, DeliveryOutcome::gone);
  } else {
    runnable_.push_back(&reader);
  }
}

// --- flushes

// Hear of what comes after flushed_end.
void PumpWorker::arm(Key key, PumpChannel& channel) {
  if (channel.over) return;
  if (!channel.session->notify_when_readable(channel.flushed_end, inbox_, key)) {
    schedule(key, channel);
  }
}

// An end is never held back: where flushes are spaced, a waiting channel goes on listening for it.
void PumpWorker::schedule(Key key, PumpChannel& channel) {
  int64_t due_ns = channel.not_before_ns;
  if (coalesce_ns_ > 0) {
    SessionProgress now = channel.session->progress();
    while (now.is_live && !channel.session->notify_when_readable(now.end_offset, inbox_, key)) {
      now = channel.session->progress();
    }
    if (!now.is_live) due_ns = 0;
  }
  if (channel.scheduled && due_ns != 0) return;
  channel.scheduled = true;
  due_.push({due_ns, key});
}

void PumpWorker::flush_due() {
  const int64_t now = now_ns();
  while (!due_.empty() && due_.top().first <= now) {
    const Key key = due_.top().second;
    due_.pop();
    const auto at = channels_.find(key);
    if (at != channels_.end() && at->second.scheduled) flush(key, at->second);
  }
}

void PumpWorker::flush(Key key, PumpChannel& channel) {
  const int64_t started_ns = now_ns();
  channel.scheduled = false;
  const SessionProgress now = channel.session->progress();
  channel.flushed_end = now.end_offset;
  channel.over = !now.is_live;
  std::shared_ptr<const WireFrame> shared;
  // Taken out: whoever was served goes back.
  flushing_.clear();
  flushing_.swap(channel.idle);
  for (PumpReader* reader : flushing_) {
    if (reader->place == PumpReader::Place::idle) serve(*reader, channel, shared);
  }
  const int64_t ended_ns = now_ns();
  channel.not_before_ns = std::max(ended_ns + (ended_ns - started_ns), started_ns + coalesce_ns_);
  arm(key, channel);
}

// --- readers

void PumpWorker::serve_runnable() {
  std::vector<PumpReader*> turn;
  turn.swap(runnable_);
  for (PumpReader* reader : turn) {
    if (reader->place != PumpReader::Place::runnable) continue;
    std::shared_ptr<const WireFrame> own;
    serve(*reader, channels_.at(key_of(*reader->session)), own);
  }
}

// Sends until the reader has what was flushed, is blocked, over, or has had its turn. `shared` is
// the frame that was made last, which the next reader may want, too.
void PumpWorker::serve(PumpReader& reader, PumpChannel& channel,
                       std::shared_ptr<const WireFrame>& shared) {
  size_t sent_bytes = 0;
  while (reader.frame || reader.offset < channel.flushed_end) {
    if (!reader.frame && !next_frame(reader, channel, shared)) {
      return finish(reader, DeliveryOutcome::lost);
    }
    const ssize_t sent = send_frame(reader);
    if (sent < 0) {
      const bool full = errno == EAGAIN || errno == EWOULDBLOCK;
      return full ? block(reader) : finish(reader, DeliveryOutcome::gone);
    }
    sent_bytes += static_cast<size_t>(sent);
    if (sent_bytes >= kTurnBytes) {
      reader.place = PumpReader::Place::runnable;
      return runnable_.push_back(&reader);
    }
  }
  if (channel.over) return finish(reader, DeliveryOutcome::end);
  reader.place = PumpReader::Place::idle;
  channel.idle.push_back(&reader);
}

// False when the next byte was dropped from the log.
bool PumpWorker::next_frame(PumpReader& reader, const PumpChannel& channel,
                            std::shared_ptr<const WireFrame>& shared) {
  if (!shared || shared->offset() != reader.offset) {
    const size_t wanted = std::min<uint64_t>(kMaxFrameBytes, channel.flushed_end - reader.offset);
    ReadResult result = channel.session->read(reader.offset, wanted);
    if (result.status != ReadStatus::data) return false;
    shared = std::make_shared<const WireFrame>(reader.offset, std::move(result.piece));
  }
  reader.frame = shared;
  reader.frame_sent_bytes = 0;
  return true;
}

// As send(2). A frame that is sent whole moves the reader on.
ssize_t PumpWorker::send_frame(PumpReader& reader) {
  std::array<iovec, 3> spans;
  msghdr message{};
  message.msg_iov = spans.data();
  message.msg_iovlen = reader.frame->spans_after(reader.frame_sent_bytes, spans);
  ssize_t sent;
  do {
    sent = ::sendmsg(reader.socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0) return sent;
  reader.add_sent(static_cast<size_t>(sent));
  reader.frame_sent_bytes += static_cast<size_t>(sent);
  if (reader.frame_sent_bytes == reader.frame->size_bytes()) {
    reader.offset += reader.frame->body_bytes();
    reader.frame.reset();
  }
  return sent;
}

// Until its socket takes more. What is left to send is copied: a client that takes nothing must not
// hold the log's memory, which is the generation's.
void PumpWorker::block(PumpReader& reader) {
  reader.place = PumpReader::Place::blocked;
  reader.frame = std::make_shared<const WireFrame>(*reader.frame, reader.frame_sent_bytes);
  reader.frame_sent_bytes = 0;
}

// A slow client frees room too rarely for its socket to be reported as writable each time, and one
// that is dead may have room for a long time yet: what counts is what its kernel has acknowledged.
// (TCP_USER_TIMEOUT is no help: it also ends clients that read slowly out of a small buffer.)
void PumpWorker::end_stalled() {
  const int64_t now = now_ns();
  if (now < next_stall_check_ns_) return;
  next_stall_check_ns_ = now + stall_check_interval_ns_;
  for (const auto& [_, reader] : readers_) {
    const int unread = unread_bytes(reader->socket);
    const int64_t taken = static_cast<int64_t>(reader->sent_bytes()) - unread;
    if (unread == 0 || taken > reader->taken_bytes) {
      reader->taken_bytes = taken;
      reader->progress_ns = now;
    } else if (now - reader->progress_ns >= write_timeout_ns_ + stall_check_interval_ns_) {
      finish(*reader, DeliveryOutcome::stalled);
    }
  }
}

void PumpWorker::finish(PumpReader& reader, DeliveryOutcome outcome) {
  if (reader.place == PumpReader::Place::over) return;
  reader.end(outcome);
  finished_.push_back(readers_.at(&reader));
}

// Forgets who has finished, once no list can name them any more.
void PumpWorker::retire() {
  if (finished_.empty()) return;
  std::unordered_set<PumpChannel*> thinned;
  std::vector<std::pair<std::shared_ptr<Wakeup>, uint64_t>> done;
  for (const std::shared_ptr<PumpReader>& reader : finished_) {
    // Before close(): the caller's own descriptor keeps the socket, and with it its events, alive.
    ::epoll_ctl(epoll_, EPOLL_CTL_DEL, reader->socket, nullptr);
    ::close(reader->socket);
    const Key key = key_of(*reader->session);
    PumpChannel& channel = channels_.at(key);
    thinned.insert(&channel);
    if (--channel.readers == 0) {
      channel.session->forget(*inbox_, key);
      thinned.erase(&channel);
      channels_.erase(key);
    }
    done.emplace_back(reader->done, reader->token);
    readers_.erase(reader.get());
  }
  for (PumpChannel* channel : thinned) remove_over(channel->idle);
  inbox_->retire(finished_);
  finished_.clear();
  for (const auto& [wakeup, token] : done) wakeup->notify(token);
}

void PumpWorker::remove_over(std::vector<PumpReader*>& readers) {
  const auto is_over = [](const PumpReader* reader) {
    return reader->place == PumpReader::Place::over;
  };
  readers.erase(std::remove_if(readers.begin(), readers.end(), is_over), readers.end());
}

// --- sleep

void PumpWorker::wait() {
  std::array<epoll_event, kMaxEvents> events;
  const int found = wait_for_events(epoll_, events, timeout_ns());
  for (int i = 0; i < found; ++i) {
    if (events[i].data.ptr == nullptr) continue;
    PumpReader& reader = *static_cast<PumpReader*>(events[i].data.ptr);
    if (events[i].events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) {
      finish(reader, DeliveryOutcome::gone);
    } else if (reader.place == PumpReader::Place::blocked) {
      reader.place = PumpReader::Place::runnable;
      runnable_.push_back(&reader);
    }
  }
}

int64_t PumpWorker::timeout_ns() {
  if (!runnable_.empty() || !inbox_->fall_asleep()) return 0;
  int64_t wake_ns = due_.empty() ? INT64_MAX : due_.top().first;
  if (!readers_.empty()) wake_ns = std::min(wake_ns, next_stall_check_ns_);
  return wake_ns == INT64_MAX ? -1 : std::max<int64_t>(wake_ns - now_ns(), 0);
}

}  // namespace pyserve
