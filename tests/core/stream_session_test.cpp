// States, endings and appending. What the log keeps: stream_session_log_test.cpp; those who read
// and wait: stream_session_readers_test.cpp.
#include "../../csrc/stream_session.hpp"

#include <doctest/doctest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/wakeup.hpp"
#include "framer_reference.hpp"
#include "support.hpp"

namespace pyserve {
namespace {

using test::LoneSession;
using test::read_all;
using test::reference_log;

struct Ending {
  const char* name;
  std::function<bool(StreamSession&)> end;
  State state;
  std::string reason;
  std::string last_line;
};

const Ending kEndings[] = {
    {"completed", [](StreamSession& s) { return s.finalize(State::completed, ""); },
     State::completed, "", ": end completed\n"},
    {"failed", [](StreamSession& s) { return s.finalize(State::failed, "upstream_lost"); },
     State::failed, "upstream_lost", ": end failed upstream_lost\n"},
    {"cancelled", [](StreamSession& s) { return s.cancel(); }, State::cancelled, "",
     ": end cancelled\n"},
    {"cancelled for a reason", [](StreamSession& s) { return s.cancel("replaced"); },
     State::cancelled, "replaced", ": end cancelled\n"},
};

TEST_CASE("a new session is queued and empty") {
  const LoneSession session;
  const SessionSnapshot snapshot = session->snapshot();
  CHECK(snapshot.state == State::queued);
  CHECK(snapshot.reason.empty());
  CHECK(snapshot.end_offset == 0);
  CHECK(snapshot.last_event_start == snapshot.last_event_end);
  CHECK(snapshot.started_unix_ms == session.clock->unix_ms());
  CHECK(snapshot.ended_unix_ms == 0);
  CHECK(session->key().owner == "owner");
  CHECK(session->key().conversation_id == "id");
  CHECK(session->tag() == "tag");
}

TEST_CASE("start makes a queued session a streaming one, once") {
  const LoneSession session;
  CHECK(session->start());
  CHECK(session->snapshot().state == State::streaming);
  CHECK_FALSE(session->start());
}

TEST_CASE("whatever is appended starts a queued session") {
  const LoneSession text, event;
  CHECK(text->append("dat") == AppendStatus::ok);
  CHECK(text->snapshot().state == State::streaming);
  CHECK(event->append_event("a", "") == AppendStatus::ok);
  CHECK(event->snapshot().state == State::streaming);
}

TEST_CASE("each ending, from queued and from streaming, leaves its state and its last line") {
  for (const Ending& ending : kEndings) {
    for (const bool started : {false, true}) {
      CAPTURE(ending.name);
      CAPTURE(started);
      const LoneSession session;
      if (started) session->append("data: a\n\n");
      session.clock->advance_ns(5 * kNanosPerSecond);
      CHECK(ending.end(*session));
      const SessionSnapshot snapshot = session->snapshot();
      CHECK(snapshot.state == ending.state);
      CHECK(snapshot.reason == ending.reason);
      CHECK(snapshot.ended_unix_ms == session.clock->unix_ms());
      CHECK(session->ended_ns() == session.clock->steady_ns());
      const std::string before = started ? reference_log({"data: a\n"}) : "";
      CHECK(read_all(*session) == before + ending.last_line);
    }
  }
}

TEST_CASE("a session ends once and never changes afterwards") {
  for (const Ending& first : kEndings) {
    CAPTURE(first.name);
    int ends = 0;
    const LoneSession session({}, {}, [&] { ++ends; });
    session->append("data: a\n\n");
    first.end(*session);
    const std::string log = read_all(*session);
    session.clock->advance_ns(10 * kNanosPerSecond);
    for (const Ending& second : kEndings) CHECK_FALSE(second.end(*session));
    CHECK(session->append("data: b\n\n") == AppendStatus::ended);
    CHECK(session->append_event("b", "") == AppendStatus::ended);
    CHECK_FALSE(session->start());
    CHECK(session->heartbeat() == -1);
    CHECK(read_all(*session) == log);
    CHECK(session->snapshot().state == first.state);
    CHECK(session->snapshot().reason == first.reason);
    CHECK(session->ended_ns() == 0);
    CHECK(ends == 1);
  }
}

TEST_CASE("only completed publishes an event that lacks nothing but its blank line") {
  for (const Ending& ending : kEndings) {
    for (const std::string pending : {"data: b\n", "data: b", "data: b\ndata: c"}) {
      CAPTURE(ending.name);
      CAPTURE(pending);
      const LoneSession session;
      session->append("data: a\n\n" + pending);
      ending.end(*session);
      std::vector<std::string> published{"data: a\n"};
      if (ending.state == State::completed && pending == "data: b\n") published.push_back(pending);
      CHECK(read_all(*session) == reference_log(published) + ending.last_line);
      CHECK(session->snapshot().pending_bytes == 0);
    }
  }
}

TEST_CASE("a completed session whose last event is larger than the cap has failed") {
  LoneSession::Limits limits;
  limits.max_session_bytes = 4096;
  // The line fits while it grows; with its id it does not.
  const std::string line = "data: " + std::string(4088, 'x') + "\n";
  const LoneSession input(limits);
  REQUIRE(input->append(line) == AppendStatus::ok);
  CHECK(input->end_input() == AppendStatus::event_too_large);

  const LoneSession session(limits);
  REQUIRE(session->append(line) == AppendStatus::ok);
  CHECK(session->finalize(State::completed, ""));
  CHECK(session->snapshot().state == State::failed);
  CHECK(session->snapshot().reason == "event_too_large");
  CHECK(read_all(*session) == ": end failed event_too_large\n");
}

TEST_CASE("last events stand whole before the last line, whatever was pending") {
  for (const std::string pending : {"", "data: b", "data: b\n", "data: b\r", ": x"}) {
    CAPTURE(pending);
    const LoneSession session;
    session->append("data: a\n\n" + pending);
    CHECK(session->finalize(State::failed, "why", "event: error\ndata: {}\n\ndata: cut off"));
    CHECK(read_all(*session) ==
          reference_log({"data: a\n", "event: error\ndata: {}\n"}) + ": end failed why\n");
  }
  const LoneSession completed;
  completed->append("data: a\n");
  CHECK(completed->finalize(State::completed, "", "data: [DONE]\n\n"));
  CHECK(read_all(*completed) ==
        reference_log({"data: a\n", "data: [DONE]\n"}) + ": end completed\n");
}

TEST_CASE("end_input publishes what is whole, drops what broke off, and ends nothing") {
  struct Example {
    std::string pending;
    bool published;
  };
  for (const Example& example : {Example{"data: b\n", true},
                                 {"data: b", false},
                                 {": x\n", false},
                                 {"data: b\ndata: c", false},
                                 {"", false}}) {
    CAPTURE(example.pending);
    const LoneSession session;
    const auto wakeup = std::make_shared<Wakeup>();
    session->append("data: a\n\n" + example.pending);
    CHECK(session->notify_when_readable(session->snapshot().end_offset, wakeup, 1));
    CHECK(session->end_input() == AppendStatus::ok);
    CHECK(session->end_input() == AppendStatus::ok);
    CHECK(wakeup->drain().size() == (example.published ? 1 : 0));
    CHECK(session->snapshot().pending_bytes == 0);
    CHECK(session->append("data: d\n\n") == AppendStatus::ok);
    std::vector<std::string> blocks{"data: a\n"};
    if (example.published) blocks.push_back(example.pending);
    blocks.push_back("data: d\n");
    CHECK(read_all(*session) == reference_log(blocks));
    session->cancel();
    CHECK(session->end_input() == AppendStatus::ended);
  }
}

TEST_CASE("append_event writes each line of its data as a data line") {
  struct Example {
    std::string data, name, lines;
  };
  const Example examples[] = {
      {"a", "", "data: a\n"},
      {"", "", "data: \n"},
      {"a", "delta", "event: delta\ndata: a\n"},
      {"a\nb", "", "data: a\ndata: b\n"},
      {"a\r\nb\rc\n", "", "data: a\ndata: b\ndata: c\ndata: \n"},
      {"\n\n", "", "data: \ndata: \ndata: \n"},
      {"id: 1\nretry: 2", "", "data: id: 1\ndata: retry: 2\n"},
  };
  for (const Example& example : examples) {
    CAPTURE(example.data);
    const LoneSession session;
    CHECK(session->append_event(example.data, example.name) == AppendStatus::ok);
    CHECK(read_all(*session) == reference_log({example.lines}));
  }
}

TEST_CASE("append_event does not fall into the middle of an appended event") {
  const LoneSession session;
  session->append("data: a\nda");
  CHECK(session->append_event("b", "") == AppendStatus::event_unfinished);
  session->append("ta: c\n\n");
  CHECK(session->append_event("b", "") == AppendStatus::ok);
  CHECK(read_all(*session) == reference_log({"data: a\ndata: c\n", "data: b\n"}));
}

TEST_CASE(
    "an event of the cap's size is kept, a larger one is refused and what came before stays") {
  const std::string filler = "data: " + std::string(5000, 'x') + "\n";
  const std::string log = reference_log({filler});
  for (const size_t cap : {log.size(), log.size() - 1}) {
    CAPTURE(cap);
    LoneSession::Limits limits;
    limits.max_session_bytes = cap;
    const LoneSession session(limits);
    const bool fits = cap == log.size();
    CHECK(session->append(filler + "\n") ==
          (fits ? AppendStatus::ok : AppendStatus::event_too_large));
    CHECK(read_all(*session) == (fits ? log : ""));
  }

  LoneSession::Limits limits;
  limits.max_session_bytes = 4096;
  const LoneSession session(limits);
  CHECK(session->append("data: a\n\ndata: " + std::string(5000, 'x')) ==
        AppendStatus::event_too_large);
  CHECK(session->append_event(std::string(5000, 'x'), "") == AppendStatus::event_too_large);
  CHECK(session->finalize(State::failed, "event_too_large", "data: {}\n\n"));
  CHECK(read_all(*session) ==
        reference_log({"data: a\n", "data: {}\n"}) + ": end failed event_too_large\n");
}

TEST_CASE("a snapshot shows where the last event stands and what is pending") {
  const LoneSession session;
  const std::string one = reference_log({"data: a\n"});
  const std::string two = reference_log({"data: a\n", "data: b\n"});
  session->append("data: a\n\ndata: b\n\n");
  SessionSnapshot snapshot = session->snapshot();
  CHECK(snapshot.last_event_start == one.size());
  CHECK(snapshot.last_event_end == two.size());
  CHECK(snapshot.pending_bytes == 0);
  session->append("data: c");
  CHECK(session->snapshot().pending_bytes == 7);
  session->finalize(State::completed, "");
  snapshot = session->snapshot();
  CHECK_MESSAGE(snapshot.last_event_end == two.size(), "the last line is no event");
  CHECK(snapshot.end_offset == two.size() + std::string(": end completed\n").size());
}

// --- hooks

TEST_CASE("on_cancel then on_end, each once; on_end alone where nothing was cancelled") {
  for (const Ending& ending : kEndings) {
    CAPTURE(ending.name);
    std::vector<std::string> calls;
    const LoneSession session(
        {}, [&] { calls.push_back("cancel"); }, [&] { calls.push_back("end"); });
    session->append("data: a\n\n");
    CHECK(calls.empty());
    ending.end(*session);
    session->cancel();
    const bool cancelled = ending.state == State::cancelled;
    CHECK(calls == (cancelled ? std::vector<std::string>{"cancel", "end"}
                              : std::vector<std::string>{"end"}));
  }
}

TEST_CASE("a hook finds its session ended and may use all of it") {
  for (const Ending& ending : kEndings) {
    CAPTURE(ending.name);
    LoneSession* in_hook = nullptr;
    int calls = 0;
    const auto hook = [&] {
      StreamSession& session = **in_hook;
      ++calls;
      CHECK(session.snapshot().state == ending.state);
      CHECK(read_all(session) == ending.last_line);
      CHECK_FALSE(session.cancel());
      CHECK_FALSE(session.finalize(State::completed, ""));
      CHECK(session.append("data: a\n\n") == AppendStatus::ended);
      const SessionReader reader(in_hook->session, 0);
      CHECK(session.snapshot().readers == 1);
    };
    LoneSession session({}, hook, hook);
    in_hook = &session;
    ending.end(*session);
    CHECK(calls == (ending.state == State::cancelled ? 2 : 1));
  }
}

TEST_CASE("what the hooks hold is let go of with the ending, or with the session") {
  for (const bool ended : {true, false}) {
    CAPTURE(ended);
    auto held = std::make_shared<int>(0);
    const std::weak_ptr<int> watched = held;
    auto session = std::make_unique<LoneSession>(LoneSession::Limits{}, [held] {}, [held] {});
    held.reset();
    CHECK_FALSE(watched.expired());
    if (ended) {
      (*session)->finalize(State::completed, "");
    } else {
      session.reset();
    }
    CHECK(watched.expired());
  }
}

}  // namespace
}  // namespace pyserve
