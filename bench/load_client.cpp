// Reads event streams as fast as they come and checks every byte. See load_options.hpp.

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "load_reader.hpp"

namespace bench {
namespace {

// More that are not answered yet could overflow a server's queue of connections.
constexpr size_t kMostAttaching = 64;
constexpr size_t kReceiveBytes = 256 * 1024;
constexpr size_t kMostErrorsTold = 5;

class LoadClient {
 public:
  explicit LoadClient(LoadOptions options)
      : options_(std::move(options)),
        epoll_(checked(epoll_create1(0), "epoll_create1")),
        deadline_ns_(steady_now_ns() + static_cast<int64_t>(options_.timeout_s * 1e9)),
        buffer_(kReceiveBytes) {}

  int run() {
    for (uint64_t batch = 0; batch < options_.batches && errors_.empty(); ++batch) run_batch();
    print();
    return errors_.empty() ? 0 : 1;
  }

 private:
  void run_batch() {
    const int64_t begin_ns = steady_now_ns();
    opened_ = heads_ = over_ = 0;
    readers_.clear();
    if (!options_.post_path.empty()) digests_.clear();  // every generation has its own bytes
    while (over_ < options_.readers && errors_.size() < kMostErrorsTold) {
      open_more();
      std::array<epoll_event, 256> ready{};
      const int count = epoll_wait(epoll_, ready.data(), static_cast<int>(ready.size()), 100);
      for (int i = 0; i < count; ++i) serve(*static_cast<LoadReader*>(ready[i].data.ptr));
      if (steady_now_ns() > deadline_ns_) {
        errors_.push_back("timeout: " + std::to_string(over_) + " readers of " +
                          std::to_string(options_.readers) + " are over");
      }
      if (!errors_.empty() && count <= 0) break;
    }
    batch_.add(steady_now_ns() - begin_ns);
  }

  void open_more() {
    while (opened_ < options_.readers && opened_ - heads_ < kMostAttaching) {
      const bool follows = !options_.post_path.empty() && opened_ >= options_.streams;
      if (follows && heads_ < options_.streams) return;  // what it follows has not begun
      readers_.push_back(std::make_unique<LoadReader>(options_, opened_));
      readers_.back()->open(epoll_);
      ++opened_;
    }
  }

  void serve(LoadReader& reader) {
    if (reader.is_over()) return;
    const bool had_head = reader.has_head();
    bool failed = false;
    try {
      reader.on_ready(epoll_, buffer_, findings_);
    } catch (const std::runtime_error& error) {
      errors_.push_back("reader " + std::to_string(reader.index()) + ": " + error.what());
      reader.close();
      failed = true;
    }
    if (!had_head && reader.has_head()) on_head(reader);
    if (failed || reader.is_over()) {
      ++over_;
      if (options_.is_foreign) note_digest(reader);
    }
  }

  void on_head(LoadReader& reader) {
    if (++heads_ == options_.readers && !told_) {
      told_ = true;
      std::puts("attached");
      std::fflush(stdout);
    }
    const auto before = static_cast<uint64_t>(options_.stalled_share * double(reader.index()));
    const auto with = static_cast<uint64_t>(options_.stalled_share * double(reader.index() + 1));
    if (before != with && !reader.is_over()) {
      reader.stall(epoll_);
      ++stalled_;
      ++over_;
    }
  }

  void note_digest(const LoadReader& reader) {
    digests_[reader.index() % options_.streams].insert(reader.digest());
    if (digests_[reader.index() % options_.streams].size() > 1) {
      errors_.push_back("reader " + std::to_string(reader.index()) + " got other bytes");
    }
  }

  void print() const {
    std::string errors;
    for (const std::string& error : errors_) {
      std::string clean;
      for (const char c : error) clean += c == '"' || c == '\\' || c < ' ' ? '\'' : c;
      errors += (errors.empty() ? "\"" : ", \"") + clean + "\"";
    }
    rusage used{};
    getrusage(RUSAGE_SELF, &used);
    const double cpu_s = double(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                         double(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    std::printf(
        "{\"errors\": [%s], \"stalled\": %zu, \"events\": %zu, \"body_bytes\": %zu, "
        "\"seconds\": %.6f, \"latency_us\": %s, \"first_byte_us\": %s, \"first_event_us\": %s, "
        "\"event_gap_us\": %s, \"batch_us\": %s, \"client_cpu_s\": %.6f}\n",
        errors.c_str(), size_t(stalled_), size_t(findings_.events), size_t(findings_.body_bytes),
        double(findings_.last_event_ns - findings_.begin_ns) / 1e9,
        findings_.latency.json().c_str(), findings_.first_byte.json().c_str(),
        findings_.first_event.json().c_str(), findings_.event_gap.json().c_str(),
        batch_.json().c_str(), cpu_s);
  }

  const LoadOptions options_;
  const int epoll_;
  const int64_t deadline_ns_;
  std::vector<char> buffer_;
  std::vector<std::unique_ptr<LoadReader>> readers_;
  uint64_t opened_ = 0, heads_ = 0, over_ = 0, stalled_ = 0;
  bool told_ = false;
  std::vector<std::string> errors_;
  std::map<uint64_t, std::set<uint64_t>> digests_;
  Findings findings_;
  Histogram batch_;
};

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  bench::raise_descriptor_limit();
  return bench::LoadClient(bench::parse_load_options(argc, argv)).run();
}
