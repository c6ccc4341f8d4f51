// The pump's thread, and everything that only it touches.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <queue>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "pump_inbox.hpp"

namespace pyserve {

// The readers of one session. Lists may name readers that are over, until the next retire().
struct PumpChannel {
  std::shared_ptr<StreamSession> session;
  std::vector<PumpReader*> idle;  // they have everything up to flushed_end
  size_t readers = 0;
  uint64_t flushed_end = 0;
  bool over = false;       // flushed_end is the end of a session that is over
  bool scheduled = false;  // a flush is
  int64_t not_before_ns = 0;
};

class PumpWorker {
 public:
  PumpWorker(std::shared_ptr<PumpInbox> inbox, int64_t write_timeout_ns, int64_t coalesce_ns);
  ~PumpWorker();

 private:
  using Key = uint64_t;
  using Due = std::pair<int64_t, Key>;

  static Key key_of(const StreamSession& session) { return reinterpret_cast<Key>(&session); }

  void start_thread();
  void run();
  void follow(PumpInbox::Orders& orders);
  void begin(std::shared_ptr<PumpReader> reader);
  void arm(Key key, PumpChannel& channel);
  void schedule(Key key, PumpChannel& channel);
  void flush_due();
  void flush(Key key, PumpChannel& channel);
  void serve_runnable();
  void serve(PumpReader& reader, PumpChannel& channel, std::shared_ptr<const WireFrame>& shared);
  bool next_frame(PumpReader& reader, const PumpChannel& channel,
                  std::shared_ptr<const WireFrame>& shared);
  ssize_t send_frame(PumpReader& reader);
  void block(PumpReader& reader);
  void end_stalled();
  void finish(PumpReader& reader, DeliveryOutcome outcome);
  void retire();
  void wait();
  int64_t timeout_ns();
  static void remove_over(std::vector<PumpReader*>& readers);

  const std::shared_ptr<PumpInbox> inbox_;
  const int64_t write_timeout_ns_;
  const int64_t stall_check_interval_ns_;
  const int64_t coalesce_ns_;
  const int epoll_;
  std::unordered_map<Key, PumpChannel> channels_;
  std::unordered_map<const Delivery*, std::shared_ptr<PumpReader>> readers_;
  std::vector<PumpReader*> runnable_;
  std::vector<PumpReader*> flushing_;  // of use only within flush(); kept for its memory
  std::vector<std::shared_ptr<PumpReader>> finished_;  // since the last retire()
  std::priority_queue<Due, std::vector<Due>, std::greater<>> due_;
  int64_t next_stall_check_ns_;
  std::thread thread_;
};

}  // namespace pyserve
