// Counts of durations in buckets about 3 % wide: cheap enough for millions of them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

namespace bench {

class Histogram {
 public:
  void add(int64_t nanoseconds) {
    const auto value = static_cast<uint64_t>(std::max<int64_t>(nanoseconds, 0));
    ++counts_[bucket_of(value)];
    ++total_;
    max_ = std::max(max_, value);
  }

  // The duration that `share` of all do not exceed.
  double microseconds(double share) const {
    auto left = static_cast<uint64_t>(share * static_cast<double>(total_));
    for (size_t bucket = 0; bucket < counts_.size(); ++bucket) {
      if (counts_[bucket] > left) {
        return static_cast<double>(std::min(value_of(bucket), max_)) / 1000.0;
      }
      left -= counts_[bucket];
    }
    return static_cast<double>(max_) / 1000.0;
  }

  std::string json() const {
    if (total_ == 0) return "null";
    return "{\"p50\": " + std::to_string(microseconds(0.5)) +
           ", \"p99\": " + std::to_string(microseconds(0.99)) +
           ", \"max\": " + std::to_string(static_cast<double>(max_) / 1000.0) + "}";
  }

 private:
  static constexpr unsigned kFineBits = 5;  // 32 buckets for each power of two
  static constexpr uint64_t kFine = 1u << kFineBits;

  static size_t bucket_of(uint64_t value) {
    if (value < kFine) return static_cast<size_t>(value);
    const auto shift = 63u - static_cast<unsigned>(__builtin_clzll(value)) - kFineBits;
    return static_cast<size_t>((shift + 1) * kFine + (value >> shift) - kFine);
  }

  // The middle of a bucket.
  static uint64_t value_of(size_t bucket) {
    if (bucket < kFine) return bucket;
    const uint64_t shift = bucket / kFine - 1;
    return ((bucket % kFine + kFine) << shift) + ((uint64_t{1} << shift) >> 1);
  }

  std::array<uint64_t, (64 - kFineBits + 1) * kFine> counts_{};
  uint64_t total_ = 0;
  uint64_t max_ = 0;
};

}  // namespace bench
