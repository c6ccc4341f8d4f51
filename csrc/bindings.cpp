// The extension module pyserve._core; the only file that knows Python. Its types are written down
// in pyserve/_core.pyi, its behaviour in the headers.
//
// The GIL is kept for what takes microseconds and given up for a large append. No mutex of the core
// is ever held while the GIL is wanted, so that keeping it cannot deadlock.

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <stdexcept>
#include <system_error>

#include "session_manager.hpp"
#include "wakeup.hpp"
#ifdef PYSERVE_SOCKET_PUMP
#include "socket_pump.hpp"
#endif

namespace py = pybind11;

namespace pyserve {
namespace {

// Under it, waiting for the GIL again would cost more than the copy that it is given up for.
constexpr size_t kReleaseGilAboveBytes = 64 * 1024;

class ForkedProcessError : public std::runtime_error {
 public:
  ForkedProcessError()
      : std::runtime_error(
            "this StreamSessionManager was made before fork(): make one in the child process") {}
};

class SessionEndedError : public std::runtime_error {
 public:
  SessionEndedError() : std::runtime_error("the session is over: nothing can be appended") {}
};

class EventTooLargeError : public std::runtime_error {
 public:
  EventTooLargeError() : std::runtime_error("an event is larger than max_session_bytes") {}
};

class EventUnfinishedError : public std::runtime_error {
 public:
  EventUnfinishedError()
      : std::runtime_error("append() left an event without its blank line: end it first") {}
};

class OffsetLostError : public std::runtime_error {
 public:
  OffsetLostError() : std::runtime_error("the next byte was dropped from the front of the log") {}
};

class OffsetAheadError : public std::runtime_error {
 public:
  OffsetAheadError() : std::runtime_error("the position is beyond the end of the log") {}
};

// Every call that takes a lock passes here first.
template <typename T>
T& unforked(T& guarded) {
  if (guarded.fork_guard().forked()) throw ForkedProcessError();
  return guarded;
}

const char* state_name(State state) {
  switch (state) {
    case State::queued: return "queued";
    case State::streaming: return "streaming";
    case State::completed: return "completed";
    case State::failed: return "failed";
    case State::cancelled: return "cancelled";
  }
  throw std::logic_error("unknown state");
}

State final_state(const std::string& name) {
  if (name == "completed") return State::completed;
  if (name == "failed") return State::failed;
  throw py::value_error("state must be 'completed' or 'failed', not '" + name + "'");
}

void raise_unless_ok(AppendStatus status) {
  switch (status) {
    case AppendStatus::ok: return;
    case AppendStatus::ended: throw SessionEndedError();
    case AppendStatus::event_too_large: throw EventTooLargeError();
    case AppendStatus::event_unfinished: throw EventUnfinishedError();
    case AppendStatus::over_budget: throw MemoryBudgetError();
  }
}

void append(StreamSession& session, const py::bytes& sse) {
  const std::string_view view = sse;
  if (view.size() <= kReleaseGilAboveBytes) return raise_unless_ok(session.append(view));
  AppendStatus status;
  {
    const py::gil_scoped_release release;
    status = session.append(view);
  }
  raise_unless_ok(status);
}

// Holds the session's reader and, beside it, the session for the fork check.
class BoundReader {
 public:
  BoundReader(std::shared_ptr<StreamSession> session, uint64_t offset)
      : session_(session), reader_(std::move(session), offset) {}

  // Bytes; none at the end; no object when there is nothing yet.
  std::optional<py::bytes> read(size_t max_bytes) {
    unforked(*session_);
    const ReadResult result = reader_.read(max_bytes);
    switch (result.status) {
      case ReadStatus::wait: return std::nullopt;
      case ReadStatus::lost: throw OffsetLostError();
      case ReadStatus::ahead: throw OffsetAheadError();
      case ReadStatus::data:
      case ReadStatus::end: break;
    }
    // Copied without any lock: the piece keeps its bytes alive.
    return py::bytes(result.piece.bytes.data(), result.piece.bytes.size());
  }

  bool notify_when_readable(const std::shared_ptr<Wakeup>& wakeup, uint64_t token) {
    unforked(*session_);
    return reader_.notify_when_readable(wakeup, token);
  }

  void forget(const Wakeup& wakeup, uint64_t token) {
    unforked(*session_);
    reader_.forget(wakeup, token);
  }

  void detach() { reader_.detach(); }
  uint64_t offset() const { return reader_.offset(); }

 private:
  std::shared_ptr<StreamSession> session_;
  SessionReader reader_;
};

double seconds(int64_t unix_ms) { return static_cast<double>(unix_ms) / 1e3; }

// Bounded to 30 years, so that no sum of times overflows.
int64_t nanos(double seconds) {
  return static_cast<int64_t>(std::min(seconds, 1e9) * kNanosPerSecond);
}

std::optional<double> tick(StreamSessionManager& manager) {
  const int64_t due_in_ns = unforked(manager).tick();
  if (due_in_ns < 0) return std::nullopt;
  return static_cast<double>(due_in_ns) / kNanosPerSecond;
}

void bind_session(py::module_& m) {
  py::class_<SessionSnapshot>(m, "SessionSnapshot")
      .def_property_readonly("state", [](const SessionSnapshot& s) { return state_name(s.state); })
      .def_property_readonly("is_live", [](const SessionSnapshot& s) { return is_live(s.state); })
      .def_readonly("reason", &SessionSnapshot::reason)
      .def_readonly("first_offset", &SessionSnapshot::first_offset)
      .def_readonly("end_offset", &SessionSnapshot::end_offset)
      .def_readonly("last_event_start", &SessionSnapshot::last_event_start)
      .def_readonly("last_event_end", &SessionSnapshot::last_event_end)
      .def_readonly("pending_bytes", &SessionSnapshot::pending_bytes)
      .def_readonly("readers", &SessionSnapshot::readers)
      .def_property_readonly("unread_s",
                             [](const SessionSnapshot& s) {
                               return static_cast<double>(s.unread_ns) / kNanosPerSecond;
                             })
      .def_property_readonly("started_at",
                             [](const SessionSnapshot& s) { return seconds(s.started_unix_ms); })
      .def_property_readonly("completed_at",
                             [](const SessionSnapshot& s) { return seconds(s.ended_unix_ms); });

  py::class_<BoundReader>(m, "SessionReader")
      .def("read", &BoundReader::read, py::arg("max_bytes"))
      .def("notify_when_readable", &BoundReader::notify_when_readable, py::arg("wakeup"),
           py::arg("token"))
      .def("forget", &BoundReader::forget, py::arg("wakeup"), py::arg("token"))
      .def("detach", &BoundReader::detach)
      .def_property_readonly("offset", &BoundReader::offset);

  py::class_<StreamSession, std::shared_ptr<StreamSession>>(m, "StreamSession")
      .def_property_readonly("owner", [](const StreamSession& s) { return s.key().owner; })
      .def_property_readonly("conversation_id",
                             [](const StreamSession& s) { return s.key().conversation_id; })
      .def_property_readonly("epoch", &StreamSession::epoch)
      .def_property_readonly("tag", [](const StreamSession& s) { return py::bytes(s.tag()); })
      .def("start", [](StreamSession& s) { return unforked(s).start(); })
      .def(
          "append", [](StreamSession& s, const py::bytes& sse) { return append(unforked(s), sse); },
          py::arg("sse"))
      .def(
          "append_event",
          [](StreamSession& s, std::string_view data, std::string_view event) {
            raise_unless_ok(unforked(s).append_event(data, event));
          },
          py::arg("data"), py::arg("event") = "")
      .def(
          "announce",
          [](StreamSession& s, std::string_view data, std::string_view event) {
            raise_unless_ok(unforked(s).announce(data, event));
          },
          py::arg("data"), py::arg("event") = "")
      .def("end_input",
           [](StreamSession& s) {
             const AppendStatus status = unforked(s).end_input();
             if (status == AppendStatus::event_too_large) throw EventTooLargeError();
           })
      .def(
          "finalize",
          [](StreamSession& s, const std::string& state, std::string_view reason,
             std::string_view last_events) {
            return unforked(s).finalize(final_state(state), reason, last_events);
          },
          py::arg("state"), py::arg("reason") = "", py::arg("last_events") = py::bytes())
      .def(
          "cancel",
          [](StreamSession& s, std::string_view reason, std::string_view last_events) {
            return unforked(s).cancel(reason, last_events);
          },
          py::arg("reason") = "cancelled", py::arg("last_events") = py::bytes())
      .def(
          "attach",
          [](std::shared_ptr<StreamSession> s, uint64_t offset) {
            unforked(*s);
            return std::make_unique<BoundReader>(std::move(s), offset);
          },
          py::arg("offset"))
      .def("snapshot", [](const StreamSession& s) { return unforked(s).snapshot(); });
}

void bind_manager(py::module_& m) {
  using Manager = StreamSessionManager;
  py::class_<Manager, std::shared_ptr<Manager>>(m, "StreamSessionManager")
      .def(py::init([](size_t max_session_bytes, size_t max_total_bytes, double ttl_s,
                       double heartbeat_interval_s, std::shared_ptr<Clock> clock) {
             if (!clock) clock = std::make_shared<SystemClock>();
             return std::make_shared<Manager>(
                 ManagerOptions{max_session_bytes, max_total_bytes, nanos(ttl_s),
                                nanos(heartbeat_interval_s)},
                 std::move(clock));
           }),
           py::kw_only(), py::arg("max_session_bytes"), py::arg("max_total_bytes"),
           py::arg("ttl_s"), py::arg("heartbeat_interval_s"),
           py::arg("clock") = std::shared_ptr<Clock>())
      .def(
          "create_or_replace",
          [](Manager& m, std::string owner, std::string id, std::function<void()> on_cancel,
             std::function<void()> on_end, std::string tag) {
            return unforked(m).create_or_replace({std::move(owner), std::move(id)},
                                                 std::move(on_cancel), std::move(on_end),
                                                 std::move(tag));
          },
          py::arg("owner"), py::arg("conversation_id"), py::arg("on_cancel") = nullptr,
          py::arg("on_end") = nullptr, py::arg("tag") = py::bytes())
      .def(
          "get",
          [](Manager& m, std::string owner, std::string id) {
            return unforked(m).get({std::move(owner), std::move(id)});
          },
          py::arg("owner"), py::arg("conversation_id"))
      .def(
          "newest",
          [](Manager& m, std::string owner, std::string id) {
            return unforked(m).newest({std::move(owner), std::move(id)});
          },
          py::arg("owner"), py::arg("conversation_id"))
      .def(
          "lookup",
          [](Manager& m, const std::string& owner, const std::vector<std::string>& ids) {
            return unforked(m).lookup(owner, ids);
          },
          py::arg("owner"), py::arg("conversation_ids"))
      .def(
          "evict",
          [](Manager& m, std::string owner, std::string id, std::string_view epoch) {
            return unforked(m).evict({std::move(owner), std::move(id)}, epoch);
          },
          py::arg("owner"), py::arg("conversation_id"), py::arg("epoch") = "")
      .def("tick", &tick)
      .def("live_sessions", [](const Manager& m) { return unforked(m).live_sessions(); })
      .def("__len__", [](const Manager& m) { return unforked(m).session_count(); })
      .def_property_readonly("used_bytes", &Manager::used_bytes);
}

#ifdef PYSERVE_SOCKET_PUMP
const char* outcome_name(DeliveryOutcome outcome) {
  switch (outcome) {
    case DeliveryOutcome::running: return "running";
    case DeliveryOutcome::end: return "end";
    case DeliveryOutcome::lost: return "lost";
    case DeliveryOutcome::gone: return "gone";
    case DeliveryOutcome::stalled: return "stalled";
    case DeliveryOutcome::detached: return "detached";
  }
  throw std::logic_error("unknown outcome");
}

void bind_pump(py::module_& m) {
  py::class_<Delivery, std::shared_ptr<Delivery>>(m, "Delivery")
      .def_property_readonly("outcome", [](const Delivery& d) { return outcome_name(d.outcome()); })
      .def_property_readonly("sent_bytes", &Delivery::sent_bytes);

  py::class_<SocketPump>(m, "SocketPump")
      .def(py::init([](double write_timeout_s, double coalesce_s) {
             return std::make_unique<SocketPump>(nanos(write_timeout_s), nanos(coalesce_s));
           }),
           py::kw_only(), py::arg("write_timeout_s"), py::arg("coalesce_s"))
      .def(
          "attach",
          [](SocketPump& pump, std::shared_ptr<StreamSession> session, uint64_t offset, int socket,
             std::shared_ptr<Wakeup> done, uint64_t token) {
            if (offset > unforked(*session).progress().end_offset) throw OffsetAheadError();
            return unforked(pump).attach(std::move(session), offset, socket, std::move(done),
                                         token);
          },
          py::arg("session"), py::arg("offset"), py::arg("socket"), py::arg("done"),
          py::arg("token"))
      .def(
          "detach",
          [](SocketPump& pump, const Delivery& delivery) { unforked(pump).detach(delivery); },
          py::arg("delivery"))
      .def("collect", [](SocketPump& pump) { unforked(pump).collect(); })
      .def("close", [](SocketPump& pump) { unforked(pump).close(); });
}
#endif

}  // namespace
}  // namespace pyserve

PYBIND11_MODULE(_core, m) {
  using namespace pyserve;
  m.doc() = "The C++ core of pyserve: sessions, their logs, and the wake-ups of their readers.";

  py::register_exception<ForkedProcessError>(m, "ForkedProcessError", PyExc_RuntimeError);
  py::register_exception<MemoryBudgetError>(m, "MemoryBudgetError", PyExc_RuntimeError);
  py::register_exception<SessionEndedError>(m, "SessionEndedError", PyExc_RuntimeError);
  py::register_exception<EventTooLargeError>(m, "EventTooLargeError", PyExc_ValueError);
  py::register_exception<EventUnfinishedError>(m, "EventUnfinishedError", PyExc_RuntimeError);
  py::register_exception<OffsetLostError>(m, "OffsetLostError", PyExc_RuntimeError);
  py::register_exception<OffsetAheadError>(m, "OffsetAheadError", PyExc_RuntimeError);

  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const std::system_error& error) {
      errno = error.code().value();
      PyErr_SetFromErrno(PyExc_OSError);
    }
  });

  py::class_<Clock, std::shared_ptr<Clock>>(m, "Clock");
  py::class_<SystemClock, Clock, std::shared_ptr<SystemClock>>(m, "SystemClock").def(py::init<>());
  py::class_<ManualClock, Clock, std::shared_ptr<ManualClock>>(m, "ManualClock")
      .def(py::init<>())
      .def(
          "advance", [](ManualClock& clock, double seconds) { clock.advance_ns(nanos(seconds)); },
          py::arg("seconds"));

  py::class_<Wakeup, std::shared_ptr<Wakeup>>(m, "Wakeup")
      .def(py::init<>())
      .def_property_readonly("fd", &Wakeup::fd)
      .def("drain", &Wakeup::drain)
      .def("close", &Wakeup::close);

  bind_session(m);
  bind_manager(m);
#ifdef PYSERVE_SOCKET_PUMP
  bind_pump(m);
#endif
}
