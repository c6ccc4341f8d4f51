#include "../../csrc/sse_framer.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "framer_reference.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using namespace std::string_literals;
using test::Random;
using test::reference_blocks;
using test::reference_end;
using test::reference_event;
using test::reference_log;
using Status = SseFramer::Status;

constexpr size_t kNoLimit = size_t{1} << 30;
constexpr size_t kWindow = 4096;  // the framer looks for line ends in steps of this size

struct Framed {
  std::string log;
  bool too_large = false;

  bool operator==(const Framed& other) const {
    return log == other.log && too_large == other.too_large;
  }
};

// As a session does it: each event is numbered from the end of the log so far.
class Upstream {
 public:
  explicit Upstream(size_t limit = kNoLimit) : framer_("e", limit) {}

  void send(std::string_view input) {
    Status status;
    while (!framed_.too_large &&
           (status = framer_.consume(input, framed_.log.size())) != Status::need_more) {
      take(status);
    }
  }
  void finish() { take(framer_.finish(framed_.log.size())); }

  const Framed& framed() const { return framed_; }
  const SseFramer& framer() const { return framer_; }

 private:
  void take(Status status) {
    if (status == Status::event) framed_.log += framer_.event();
    if (status == Status::event_too_large) framed_.too_large = true;
  }

  SseFramer framer_;
  Framed framed_;
};

enum class Last { open, finished };

Framed frame_parts(std::string_view input, const std::vector<size_t>& cuts, Last last,
                   size_t limit) {
  Upstream upstream(limit);
  size_t from = 0;
  for (const size_t cut : cuts) {
    upstream.send(input.substr(from, cut - from));
    from = cut;
  }
  upstream.send(input.substr(from));
  if (last == Last::finished && !upstream.framed().too_large) upstream.finish();
  return upstream.framed();
}

Framed frame(std::string_view input, Last last = Last::open, size_t limit = kNoLimit) {
  return frame_parts(input, {}, last, limit);
}

std::vector<size_t> every_byte(std::string_view input) {
  std::vector<size_t> cuts;
  for (size_t i = 1; i < input.size(); ++i) cuts.push_back(i);
  return cuts;
}

// Whole, byte by byte, and cut in two at each place: the same.
void check_every_split(std::string_view input, const Framed& expected, Last last = Last::open,
                       size_t limit = kNoLimit) {
  CHECK_MESSAGE(frame(input, last, limit).log == expected.log, "whole");
  CHECK_MESSAGE(frame(input, last, limit).too_large == expected.too_large, "whole");
  CHECK_MESSAGE(frame_parts(input, every_byte(input), last, limit) == expected, "byte by byte");
  for (size_t cut = 0; cut <= input.size(); ++cut) {
    const bool same = frame_parts(input, {cut}, last, limit) == expected;
    if (!same) FAIL_CHECK("cut at " << cut);
  }
}

struct Example {
  const char* promise;
  std::string input;
  std::vector<std::string> blocks;  // the lines of each event that comes out, without ours
};

const Example kExamples[] = {
    {"an event ends at LF LF", "data: a\n\n", {"data: a\n"}},
    {"an event ends at CRLF CRLF", "data: a\r\n\r\n", {"data: a\n"}},
    {"an event ends at CR CR", "data: a\r\r", {"data: a\n"}},
    {"LF CRLF is two line ends", "data: a\n\r\ndata: b\n\n", {"data: a\n", "data: b\n"}},
    {"CRLF LF is two line ends", "data: a\r\n\ndata: b\n\n", {"data: a\n", "data: b\n"}},
    {"CR CRLF is two line ends", "data: a\r\r\ndata: b\n\n", {"data: a\n", "data: b\n"}},
    {"LF CR is two line ends", "data: a\n\rdata: b\n\r", {"data: a\n", "data: b\n"}},
    {"line ends mix within an event",
     "event: m\rdata: a\r\ndata: b\n\r\n",
     {"event: m\ndata: a\ndata: b\n"}},
    {"only LF and CR end a line",
     "data: a\v\f\x1c\x1d\x1e\xc2\x85\xe2\x80\xa8\xe2\x80\xa9z\n\n",
     {"data: a\v\f\x1c\x1d\x1e\xc2\x85\xe2\x80\xa8\xe2\x80\xa9z\n"}},
    {"a NUL is a byte like others", "data: a\0b\n\n"s, {"data: a\0b\n"s}},

    {"a byte order mark at the start is dropped",
     "\xEF\xBB\xBF"
     "data: a\n\n",
     {"data: a\n"}},
    {"one mark, not two",
     "\xEF\xBB\xBF\xEF\xBB\xBF"
     "data: a\n\n",
     {}},
    {"half a mark is no mark",
     "\xEF\xBB"
     "data: a\n\ndata: b\n\n",
     {"data: b\n"}},
    {"a mark alone is a blank line", "\xEF\xBB\xBF\ndata: a\n\n", {"data: a\n"}},
    {"a mark before a foreign id", "\xEF\xBB\xBFid: 1\ndata: a\n\n", {"data: a\n"}},
    {"a mark later is kept",
     "data: a\n\n\xEF\xBB\xBF"
     "data: b\ndata: c\n\n",
     {"data: a\n",
      "\xEF\xBB\xBF"
      "data: b\ndata: c\n"}},

    {"a foreign id is dropped", "id: 1\ndata: a\n\n", {"data: a\n"}},
    {"a foreign id is dropped wherever it stands",
     "id: 1\ndata: a\nid:2\ndata: b\nid\n\n",
     {"data: a\ndata: b\n"}},
    {"a foreign retry is dropped", "retry: 5\ndata: a\nretry\n\n", {"data: a\n"}},
    {"fields that only begin like it are kept",
     "idx: 1\nids\nretry-after: 2\n id: 3\nID: 4\ndata: a\n\n",
     {"idx: 1\nids\nretry-after: 2\n id: 3\nID: 4\ndata: a\n"}},
    {"a block of only an id is dropped", "id: 1\n\ndata: a\n\n", {"data: a\n"}},
    {"a block of only a retry is dropped", "retry: 1\n\ndata: a\n\n", {"data: a\n"}},

    {"a comment alone is dropped", ":\n\n: ping\n\n:\n: x\n\ndata: a\n\n", {"data: a\n"}},
    {"a comment in an event is kept", ": x\ndata: a\n: y\n\n", {": x\ndata: a\n: y\n"}},
    {"a block without data is dropped", "event: x\nfoo: bar\n\ndata: a\n\n", {"data: a\n"}},
    {"blank lines alone are nothing", "\n\n\r\n\r\rdata: a\n\n\n\n\n", {"data: a\n"}},

    {"data without a colon is data", "data\n\n", {"data\n"}},
    {"data without a value is data", "data:\n\n", {"data:\n"}},
    {"spacing is kept", "data:a\ndata:  b \n\n", {"data:a\ndata:  b \n"}},
    {"fields that only begin like data are none", "data : a\n\ndatax: a\n\n Data: a\n\n", {}},
    {"order and names are kept",
     "data: a\nevent: x\nunknown: y\ndata: b\n\n",
     {"data: a\nevent: x\nunknown: y\ndata: b\n"}},
    {"an event that is not whole is kept back", "data: a\n\ndata: b\n", {"data: a\n"}},
    {"no input, no output", "", {}},
};

TEST_CASE("what comes out does not depend on where the input is split") {
  for (const Example& example : kExamples) {
    CAPTURE(example.promise);
    const Framed expected{reference_log(example.blocks)};
    check_every_split(example.input, expected);
    CHECK_MESSAGE(reference_blocks(example.input, false) == example.blocks, "the reference agrees");
  }
}

TEST_CASE("the first event also carries retry, every event its id as its last line") {
  CHECK(frame("data: a\n\ndata: b\n\n").log ==
        "data: a\nretry: 1000\nid: e-30\n\n"
        "data: b\nid: e-48\n\n");
}

TEST_CASE("lines and events longer than the scan window come out whole") {
  for (size_t length = kWindow - 7; length <= kWindow + 9; ++length) {
    CAPTURE(length);
    const std::string line = "data: " + std::string(length, 'x');
    for (const std::string& line_end : {"\n"s, "\r\n"s, "\r"s}) {
      const std::string input = line + line_end + line + line_end + line_end + "data: b" + line_end;
      const std::string expected = reference_log({line + "\n" + line + "\n"});
      const std::vector<size_t> cuts{kWindow - 1, kWindow, length + 7, 2 * kWindow};
      // In parentheses: a failure should not print them.
      CHECK((frame(input).log == expected));
      CHECK((frame_parts(input, cuts, Last::open, kNoLimit).log == expected));
    }
  }
}

TEST_CASE("the end of the input publishes an event whose last line is complete, else drops it") {
  const Example examples[] = {
      {"a complete last line", "data: a\n", {"data: a\n"}},
      {"a complete last line, CRLF", "data: a\r\n", {"data: a\n"}},
      {"a complete last line, CR", "data: a\r", {"data: a\n"}},
      {"an incomplete line", "data: a", {}},
      {"an incomplete second line", "data: a\ndata: b", {}},
      {"an incomplete line that would be dropped", "data: a\nid: 1", {}},
      {"nothing pending", "data: a\n\n", {"data: a\n"}},
      {"a dropped field last", "data: a\nid: 1\n", {"data: a\n"}},
      {"only a comment", ": x\n", {}},
      {"only an id", "id: 1\n", {}},
      {"no data", "event: x\n", {}},
      {"nothing", "", {}},
  };
  for (const Example& example : examples) {
    CAPTURE(example.promise);
    check_every_split(example.input, {reference_log(example.blocks)}, Last::finished);
  }
}

TEST_CASE("finish and discard leave nothing of the block") {
  Upstream upstream;
  upstream.send("data: a\ndata: b");
  CHECK(upstream.framer().pending_bytes() == 15);
  upstream.finish();
  CHECK(upstream.framer().pending_bytes() == 0);
  upstream.send("data: c\n");
  upstream.finish();
  upstream.finish();
  CHECK(upstream.framed().log == reference_log({"data: c\n"}));

  SseFramer framer("e", kNoLimit);
  std::string_view input = "data: a\ndat";
  CHECK(framer.consume(input, 0) == Status::need_more);
  framer.discard();
  CHECK(framer.pending_bytes() == 0);
  input = "a: b\n\ndata: c\n\n";
  REQUIRE(framer.consume(input, 0) == Status::event);
  CHECK(framer.event() == reference_log({"data: c\n"}));
}

TEST_CASE("the id is the offset at which its own event ends, around every power of ten") {
  const std::string input = "data: a\n\n";
  uint64_t power = 1;
  for (int exponent = 0; exponent < 20; ++exponent, power *= 10) {
    for (uint64_t offset = power < 60 ? 0 : power - 60; offset < power + 5; ++offset) {
      SseFramer framer("e", kNoLimit);
      std::string_view rest = input;
      REQUIRE(framer.consume(rest, offset) == Status::event);
      REQUIRE(framer.event() == reference_event("data: a\n", true, "e", offset));
      const std::string id = "\nid: e-" + std::to_string(offset + framer.event().size()) + "\n\n";
      REQUIRE(framer.event().substr(framer.event().size() - id.size()) == id);
    }
  }
}

TEST_CASE("where two end offsets would be right, the smaller is taken") {
  int twofold = 0;
  uint64_t power = 1;
  for (int exponent = 0; exponent < 20; ++exponent, power *= 10) {
    for (uint64_t bare = power < 30 ? 0 : power - 30; bare < power + 3; ++bare) {
      for (const uint64_t length : {uint64_t{0}, uint64_t{1}, bare / 2, bare}) {
        const uint64_t offset = bare - std::min(bare, length);
        const uint64_t end = end_offset_with_digits(offset, bare - offset);
        REQUIRE(end == reference_end(offset, bare - offset));
        twofold += std::to_string(end + 1).size() == end + 1 - bare;
      }
    }
  }
  CHECK_MESSAGE(twofold > 0, "cases with two solutions were among them");
}

TEST_CASE("an event may be as large as the limit, with its id, and not a byte larger") {
  for (const size_t payload : {1u, 100u, 4080u, 4096u, 4100u, 20000u}) {
    CAPTURE(payload);
    const std::string line = "data: " + std::string(payload, 'x') + "\n";
    const std::string event = reference_log({line});
    for (const Last last : {Last::open, Last::finished}) {
      const std::string input = last == Last::open ? line + "\n" : line;
      CHECK(frame(input, last, event.size()) == Framed{event, false});
      CHECK(frame(input, last, event.size() - 1) == Framed{"", true});
    }
  }
}

TEST_CASE("an unfinished block may grow to the limit, and not a byte further") {
  for (const size_t limit : {64u, 4095u, 4096u, 4097u, 10000u}) {
    for (const std::string& start :
         {"data: "s, ": "s, "id: "s, "retry: "s, "data: a\nid: "s, ""s}) {
      CAPTURE(limit);
      CAPTURE(start);
      const std::string at_limit = start + std::string(limit - start.size(), 'x');
      CHECK(frame(at_limit, Last::open, limit) == Framed{"", false});
      CHECK(frame(at_limit + "x", Last::open, limit) == Framed{"", true});
      CHECK(frame_parts(at_limit + "x", every_byte(at_limit), Last::open, limit) ==
            Framed{"", true});
    }
  }
}

TEST_CASE("events before one that is too large come out, wherever the input is split") {
  const std::string input =
      "data: a\n\ndata: b\n\ndata: " + std::string(60, 'x') + "\n\ndata: c\n\n";
  check_every_split(input, {reference_log({"data: a\n", "data: b\n"}), true}, Last::open, 60);
}

TEST_CASE("the buffer of a huge event is not kept") {
  Upstream upstream;
  upstream.send("data: " + std::string(1'000'000, 'x') + "\n\n");
  CHECK(upstream.framer().pending_bytes() == 0);
  upstream.send("data: a\n");
  CHECK(upstream.framer().pending_bytes() == 8);
  CHECK(upstream.framer().capacity_bytes() <= 64 * 1024);
}

std::string random_stream(Random& random) {
  static const std::string tokens[] = {"\n",         "\n",
                                       "\n\n",       "\r",
                                       "\r\n",       "\r\n\r\n",
                                       "data",       "data:",
                                       "data: a",    "data: {\"x\": 1}\n\n",
                                       "id",         "id: 7",
                                       "id: 7\n",    "retry",
                                       "retry: 9\n", ":",
                                       ": ping\n",   ": ping\n\n",
                                       "event: x\n", " ",
                                       "x",          "\xEF\xBB\xBF",
                                       "\xEF",       std::string(1, '\0'),
                                       "idx",        "datax: y"};
  std::string stream = random.one_in(4) ? "\xEF\xBB\xBF" : "";
  for (uint64_t left = random.below(60); left > 0; --left) {
    stream += tokens[random.below(std::size(tokens))];
    if (random.one_in(50)) stream += std::string(random.below(6000), 'y');
  }
  return stream;
}

std::vector<size_t> random_cuts(std::string_view input, Random& random) {
  std::vector<size_t> cuts;
  const uint64_t longest = random.between(1, 200);
  for (size_t at = 0; (at += random.between(0, longest)) < input.size();) cuts.push_back(at);
  return cuts;
}

TEST_CASE("random streams become what the slow reference makes of them") {
  const uint64_t rounds = test::soak() ? 50'000 : 4'000;
  for (uint64_t round = 0; round < rounds; ++round) {
    Random random(round);
    const std::string input = random_stream(random);
    const Last last = random.one_in(2) ? Last::open : Last::finished;
    const Framed expected{reference_log(reference_blocks(input, last == Last::finished))};
    const auto cuts = random_cuts(input, random);
    INFO("seed ", test::base_seed(), ", round ", round, ", input ", input);
    REQUIRE(frame(input, last).log == expected.log);
    REQUIRE(frame_parts(input, cuts, last, kNoLimit).log == expected.log);
    REQUIRE(frame_parts(input, every_byte(input), last, kNoLimit).log == expected.log);

    const size_t limit = random.between(20, 200);
    const Framed limited = frame(input, last, limit);
    REQUIRE(expected.log.compare(0, limited.log.size(), limited.log) == 0);
    REQUIRE((limited.too_large || limited.log == expected.log));
    REQUIRE(frame_parts(input, cuts, last, limit) == limited);
    REQUIRE(frame_parts(input, every_byte(input), last, limit) == limited);
  }
}

}  // namespace
}  // namespace pyserve
