// The framing of chunks, and what is left of a frame after any part of it was sent.
#include "../../csrc/wire_frame.hpp"

#include <doctest/doctest.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/byte_ring.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

std::string hex(size_t number) {
  std::string text;
  for (; number > 0; number /= 16) text.insert(text.begin(), "0123456789abcdef"[number % 16]);
  return text;
}

std::string framed(const std::string& body) { return hex(body.size()) + "\r\n" + body + "\r\n"; }

// Fills one chunk of a pool of its own.
Piece make_piece(const std::string& body, const std::shared_ptr<ChunkPool>& pool) {
  ChunkRef chunk = pool->allocate(body.size());
  char* bytes = chunk->bytes();
  std::copy(body.begin(), body.end(), bytes);
  return {std::move(chunk), {bytes, body.size()}};
}

std::string left_after(const WireFrame& frame, size_t sent_bytes) {
  std::array<iovec, 3> spans;
  const size_t count = frame.spans_after(sent_bytes, spans);
  REQUIRE(count <= spans.size());
  std::string text;
  for (size_t i = 0; i < count; ++i) {
    REQUIRE_MESSAGE(spans[i].iov_len > 0, "an empty span");
    text.append(static_cast<const char*>(spans[i].iov_base), spans[i].iov_len);
  }
  return text;
}

constexpr size_t kCopyBelow = WireFrame::kCopyBelowBytes;
const size_t kSizes[] = {1, 2, 9, 10, 15, 16, 17, 255, 256, 300, 4095, 4096, 4097, 65'536};

TEST_CASE("the copy of what is left is the same bytes, in memory of its own") {
  test::Random random(2);
  for (const size_t size : kSizes) {
    CAPTURE(size);
    const auto pool = test::make_pool();
    auto whole = std::make_unique<WireFrame>(700, make_piece(random.text(size), pool));
    for (const size_t sent : {size_t{0}, size_t{1}, whole->size_bytes() / 2}) {
      const WireFrame rest(*whole, sent);
      CHECK(left_after(rest, 0) == left_after(*whole, sent));
      CHECK(left_after(rest, 1) == left_after(*whole, sent + 1));
      CHECK(rest.size_bytes() == whole->size_bytes() - sent);
      CHECK(rest.offset() == 700);
      CHECK(rest.body_bytes() == size);
    }
    const WireFrame rest(*whole, 1);
    whole.reset();
    CHECK(pool->used_bytes() == 0);
    CHECK(left_after(rest, 0).size() == rest.size_bytes());
  }
}

TEST_CASE("a frame is the size in hex, the bytes, and two line ends") {
  test::Random random(1);
  for (const size_t size : kSizes) {
    CAPTURE(size);
    const std::string body = random.text(size);
    const WireFrame frame(700, make_piece(body, test::make_pool()));
    CHECK(left_after(frame, 0) == framed(body));
    CHECK(frame.size_bytes() == framed(body).size());
    CHECK(frame.body_bytes() == size);
    CHECK(frame.offset() == 700);
  }
}

TEST_CASE("after any number of sent bytes exactly the others are left") {
  test::Random random(2);
  for (const size_t size : {size_t{1}, size_t{16}, size_t{300}, kCopyBelow - 1, kCopyBelow}) {
    CAPTURE(size);
    const std::string body = random.text(size);
    const std::string whole = framed(body);
    const WireFrame frame(0, make_piece(body, test::make_pool()));
    for (size_t sent = 0; sent <= whole.size(); ++sent) {
      REQUIRE(left_after(frame, sent) == whole.substr(sent));
    }
  }
}

TEST_CASE("the largest frame is right around each seam between its spans") {
  test::Random random(3);
  const std::string body = random.text(65'536);
  const std::string whole = framed(body);
  const WireFrame frame(0, make_piece(body, test::make_pool()));
  const size_t body_start = whole.find("\r\n") + 2;
  for (const size_t seam : {size_t{0}, body_start, body_start + body.size(), whole.size()}) {
    for (size_t sent = seam < 3 ? 0 : seam - 3; sent <= std::min(seam + 3, whole.size()); ++sent) {
      CAPTURE(sent);
      CHECK(left_after(frame, sent) == whole.substr(sent));
    }
  }
}

TEST_CASE("a short body is one span and holds none of the log's memory") {
  const auto pool = test::make_pool();
  const WireFrame frame(0, make_piece(std::string(kCopyBelow - 1, 'a'), pool));
  std::array<iovec, 3> spans;
  CHECK(frame.spans_after(0, spans) == 1);
  CHECK(pool->used_bytes() == 0);
}

TEST_CASE("a long body is not copied, and stays readable until its frame goes") {
  const auto pool = test::make_pool();
  Piece piece = make_piece(std::string(kCopyBelow, 'a'), pool);
  const char* const log = piece.bytes.data();
  {
    const WireFrame frame(0, std::move(piece));
    piece = {};
    std::array<iovec, 3> spans;
    REQUIRE(frame.spans_after(0, spans) == 3);
    CHECK(spans[1].iov_base == log);
    CHECK(pool->used_bytes() > 0);
  }
  CHECK(pool->used_bytes() == 0);
}

TEST_CASE("bytes that look like framing are bytes like any other") {
  const std::string body = std::string("\r\n0\r\n\r\n") + '\0' + "5\r\nabcde\r\n\xff";
  const WireFrame frame(0, make_piece(body, test::make_pool()));
  CHECK(left_after(frame, 0) == framed(body));
}

}  // namespace
}  // namespace pyserve
