// What the core costs beside what it descends from and beside a bare copy, in one run.
//
//   erase_front: a vector from whose front the overflow is erased, as llama.cpp's stream buffer
//   does copy:        memcpy of the same bytes into one place, the least that an append can cost

#include <benchmark/benchmark.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "session_manager.hpp"

namespace {

using namespace pyserve;

constexpr size_t kCapBytes = 4 << 20;
constexpr size_t kEventBytes = 240;

std::string event() { return "data: " + std::string(kEventBytes - 8, 'x') + "\n\n"; }

std::shared_ptr<StreamSessionManager> make_manager() {
  return std::make_shared<StreamSessionManager>(
      ManagerOptions{kCapBytes, size_t{1} << 30, 300 * kNanosPerSecond, kNanosPerSecond},
      std::make_shared<SystemClock>());
}

void report_events(benchmark::State& state, int64_t events_each) {
  state.SetItemsProcessed(state.iterations() * events_each);
}

void append_copy(benchmark::State& state) {
  const std::string text = event();
  std::vector<char> target(kCapBytes);
  size_t at = 0;
  for (auto _ : state) {
    std::memcpy(target.data() + at, text.data(), text.size());
    at = at + 2 * text.size() > target.size() ? 0 : at + text.size();
    benchmark::ClobberMemory();
  }
  report_events(state, 1);
}
BENCHMARK(append_copy);

void append_ring(benchmark::State& state) {
  const std::string text = event();
  ByteRing ring(std::make_shared<ChunkPool>(size_t{1} << 30));
  for (auto _ : state) {
    ring.append(text);
    if (ring.size() > kCapBytes) ring.drop_to(ring.first_offset() + text.size());
  }
  report_events(state, 1);
}
BENCHMARK(append_ring);

void append_erase_front(benchmark::State& state) {
  const std::string text = event();
  std::vector<char> buffer(kCapBytes - kCapBytes % text.size());
  for (auto _ : state) {
    buffer.insert(buffer.end(), text.begin(), text.end());
    buffer.erase(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(text.size()));
    benchmark::ClobberMemory();
  }
  report_events(state, 1);
}
BENCHMARK(append_erase_front);

void framer(benchmark::State& state) {
  std::string block;
  for (int i = 0; i < state.range(0); ++i) block += event();
  SseFramer framer("m3x9k2ab", kCapBytes);
  uint64_t offset = 0;
  for (auto _ : state) {
    std::string_view input = block;
    while (framer.consume(input, offset) == SseFramer::Status::event) {
      offset += framer.event().size();
    }
  }
  report_events(state, state.range(0));
}
BENCHMARK(framer)->Arg(1)->Arg(64);

// The whole way of an event into the log: framed, numbered, appended, the prefix dropped at the
// cap.
void session_append(benchmark::State& state) {
  std::string block;
  for (int i = 0; i < state.range(0); ++i) block += event();
  const auto manager = make_manager();
  const auto session = manager->create_or_replace({"", "bench"}, {}, {}, {});
  for (auto _ : state) session->append(block);
  report_events(state, state.range(0));
}
BENCHMARK(session_append)->Arg(1)->Arg(64);

void session_read(benchmark::State& state) {
  const auto manager = make_manager();
  const auto session = manager->create_or_replace({"", "bench"}, {}, {}, {});
  const std::string text = event();
  while (session->snapshot().end_offset < kCapBytes - 2 * kEventBytes) session->append(text);
  int64_t bytes = 0;
  for (auto _ : state) {
    SessionReader reader(session, session->snapshot().first_offset);
    for (;;) {
      const ReadResult result = reader.read(64 * 1024);
      if (result.status != ReadStatus::data) break;
      benchmark::DoNotOptimize(result.piece.bytes.data());
      bytes += static_cast<int64_t>(result.piece.bytes.size());
    }
  }
  state.SetBytesProcessed(bytes);
}
BENCHMARK(session_read);

void create_and_evict(benchmark::State& state) {
  const auto manager = make_manager();
  for (int i = 0; i < 100'000; ++i) {
    manager->create_or_replace({"", "other " + std::to_string(i)}, {}, {}, {});
  }
  for (auto _ : state) {
    manager->create_or_replace({"", "bench"}, {}, {}, {});
    manager->evict({"", "bench"});
  }
}
BENCHMARK(create_and_evict);

}  // namespace
