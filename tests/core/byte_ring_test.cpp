#include "../../csrc/byte_ring.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "support.hpp"

namespace pyserve {
namespace {

using test::make_pool;
using test::Random;

constexpr size_t kFull = ChunkPool::kFullChunkBytes;

std::string contents(const ByteRing& ring) {
  std::string text;
  for (uint64_t at = ring.first_offset(); at < ring.end_offset();) {
    const Piece piece = ring.piece(at, SIZE_MAX);
    REQUIRE(!piece.bytes.empty());
    text += piece.bytes;
    at += piece.bytes.size();
  }
  return text;
}

// All bytes ever appended, in a string that forgets nothing.
struct Model {
  std::string all;
  uint64_t first = 0;

  std::string kept() const { return all.substr(first); }
  uint64_t line_end(uint64_t offset) const {
    const size_t found = all.find('\n', offset);
    return found == std::string::npos ? ByteRing::kNotFound : found;
  }
};

void compare_somewhere(const ByteRing& ring, const Model& model, Random& random) {
  REQUIRE(ring.first_offset() == model.first);
  REQUIRE(ring.end_offset() == model.all.size());
  REQUIRE(ring.size() == model.all.size() - model.first);
  const uint64_t offset = random.between(model.first, model.all.size());
  const size_t wanted = random.between(1, 2 * kFull);
  const Piece piece = ring.piece(offset, wanted);
  REQUIRE(piece.bytes.size() <= wanted);
  REQUIRE(piece.bytes.empty() == (offset == model.all.size()));
  REQUIRE(piece.bytes == std::string_view(model.all).substr(offset, piece.bytes.size()));
  REQUIRE(ring.find_line_end(offset) == model.line_end(offset));

  std::string there = model.all.substr(offset, random.below(3000));
  REQUIRE(ring.starts_with(offset, there));
  REQUIRE_FALSE(ring.starts_with(offset, model.all.substr(offset) + "x"));
  if (there.empty()) return;
  there[random.below(there.size())] ^= 1;
  REQUIRE_FALSE(ring.starts_with(offset, there));
}

TEST_CASE("a ring answers as a plain string does, whatever is appended and dropped") {
  const uint64_t rounds = test::soak() ? 400 : 40;
  for (uint64_t round = 0; round < rounds; ++round) {
    INFO("seed ", test::base_seed(), ", round ", round);
    Random random(round);
    const auto pool = make_pool();
    {
      ByteRing ring(pool);
      Model model;
      const uint64_t longest = random.one_in(3) ? 3 * kFull : random.between(1, 3000);
      for (int step = 0; step < 60; ++step) {
        const std::string more = random.text(random.below(longest));
        ring.append(more);
        model.all += more;
        if (random.one_in(3)) {
          model.first = random.between(model.first, model.all.size());
          ring.drop_to(model.first);
        }
        compare_somewhere(ring, model, random);
      }
      REQUIRE(contents(ring) == model.kept());
    }
    REQUIRE(pool->used_bytes() == 0);
  }
}

TEST_CASE("an empty ring has nothing to read") {
  ByteRing ring(make_pool());
  CHECK(ring.size() == 0);
  CHECK(ring.piece(0, 10).bytes.empty());
  CHECK(ring.find_line_end(0) == ByteRing::kNotFound);
  CHECK(ring.starts_with(0, ""));
  CHECK_FALSE(ring.starts_with(0, "a"));
  ring.append("");
  ring.drop_to(0);
  CHECK(ring.end_offset() == 0);
}

TEST_CASE("a line end is found on both sides of a chunk's border") {
  for (const size_t position : {0u, 1022u, 1023u, 1024u, 1025u, 2047u, 2048u, 65535u, 200000u}) {
    CAPTURE(position);
    ByteRing ring(make_pool());
    ring.append(std::string(position, 'x') + "\nend");
    CHECK(ring.find_line_end(0) == position);
    CHECK(ring.find_line_end(position) == position);
    CHECK(ring.find_line_end(position + 1) == ByteRing::kNotFound);
    CHECK(ring.starts_with(position, "\nend"));
    CHECK_FALSE(ring.starts_with(position, "\nend."));
  }
}

TEST_CASE("offsets go on after everything was dropped") {
  // 1024 fills the first chunk exactly, so that no chunk is left behind.
  for (const size_t length : {1u, 1023u, 1024u, 1025u, 3072u, 100000u}) {
    CAPTURE(length);
    ByteRing ring(make_pool());
    ring.append(std::string(length, 'x'));
    ring.drop_to(length);
    CHECK(ring.size() == 0);
    CHECK(ring.piece(length, 10).bytes.empty());
    ring.append("next");
    CHECK(ring.first_offset() == length);
    CHECK(contents(ring) == "next");
  }
}

TEST_CASE("a piece keeps its bytes, unchanged, when the ring drops them, goes on, and is gone") {
  Random random(1);
  const auto pool = make_pool();
  const std::string text = random.text(3 * kFull);
  std::vector<Piece> pieces;
  {
    ByteRing ring(pool);
    ring.append(text);
    for (uint64_t at = 0; at < text.size(); at += pieces.back().bytes.size()) {
      pieces.push_back(ring.piece(at, random.between(1, kFull)));
    }
    const void* const first_byte = pieces.front().bytes.data();
    CHECK(ring.piece(0, 1).bytes.data() == first_byte);
    ring.drop_to(text.size());
    // New chunks must not be the ones that the pieces still hold.
    ring.append(std::string(20 * kFull, '#'));
    ring.drop_to(ring.end_offset());
  }
  CHECK(pool->used_bytes() >= text.size());
  std::string joined;
  for (const Piece& piece : pieces) joined += piece.bytes;
  CHECK(joined == text);
  pieces.clear();
  CHECK(pool->used_bytes() == 0);
}

TEST_CASE("a piece outlives the pool's last owner") {
  std::optional<Piece> piece;
  {
    ByteRing ring(make_pool());
    ring.append(std::string(2 * kFull, 'x'));
    piece = ring.piece(kFull, kFull);
  }
  CHECK(piece->bytes.find_first_not_of('x') == std::string::npos);
}

TEST_CASE("memory follows the length of the log: at most twice of it, or one full chunk more") {
  const auto pool = make_pool();
  CHECK(ByteRing(pool).size() == 0);
  CHECK_MESSAGE(pool->used_bytes() == 0, "an empty ring holds no chunk");
  for (const size_t length : {1u, 100u, 1024u, 1025u, 5000u, 30000u, 65536u, 300000u, 5000000u}) {
    CAPTURE(length);
    ByteRing ring(pool);
    while (ring.size() < length) ring.append(std::string(std::min<size_t>(250, length), 'x'));
    CHECK(pool->used_bytes() >= ring.size());
    CHECK(pool->used_bytes() <= std::max<size_t>(1024, ring.size() + std::min(ring.size(), kFull)));
  }
  CHECK(pool->used_bytes() == 0);
}

TEST_CASE("memory does not grow while as much is dropped as is appended") {
  for (const size_t window : {500u, 4096u, 100000u}) {
    CAPTURE(window);
    const auto pool = make_pool();
    ByteRing ring(pool);
    size_t most = 0;
    for (int i = 0; i < 20000; ++i) {
      ring.append(std::string(250, 'x'));
      if (ring.size() > window) ring.drop_to(ring.end_offset() - window);
      most = std::max(most, pool->used_bytes());
    }
    CHECK(most <= 4 * window + 2048);
  }
}

}  // namespace
}  // namespace pyserve
