// What the load client is asked to do.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

namespace bench {

constexpr const char* kLoadUsage = R"(load_client --port PORT --get PATH [options]

Reads event streams over HTTP/1.1, each reader over a connection of its own, checks every byte, and
prints one line of JSON. "{}" in a path, a header or the body stands for the number of the stream.
"attached" is printed when all readers have their heads.

  --readers N      connections at once; reader i reads stream i % streams (1)
  --streams N      (1)
  --batches N      how often all readers come, one batch after the other (1)
  --events N       events of each stream; a reader that gets another number has failed (any)
  --first-seq N    the first event's number (0)
  --leave-after N  readers leave after so many events instead of reading to the end
  --stalled SHARE  share of the readers that read nothing after the head (0)
  --post PATH      the first reader of each stream starts it with a POST to PATH; the others follow
  --body TEXT      body of the POST
  --header LINE    header line of every request; may come several times
  --foreign        the events are not the bench's: count them, and compare the bodies of one stream
  --timeout S      give up after so many seconds (60)
)";

struct LoadOptions {
  uint64_t port = 0;
  std::string get_path;
  std::string post_path;
  std::string body;
  std::vector<std::string> headers;
  uint64_t readers = 1;
  uint64_t streams = 1;
  uint64_t batches = 1;
  uint64_t events = 0;
  uint64_t first_seq = 0;
  uint64_t leave_after = 0;
  double stalled_share = 0;
  double timeout_s = 60;
  bool is_foreign = false;
};

[[noreturn]] inline void refuse(const std::string& why) {
  std::fprintf(stderr, "load_client: %s\n\n%s", why.c_str(), kLoadUsage);
  std::exit(2);
}

// Puts `value` where the option `name` belongs; false if there is no such option.
inline bool set_option(LoadOptions& options, const std::string& name, const char* value) {
  const std::map<std::string, uint64_t*> counts{{"--port", &options.port},
                                                {"--readers", &options.readers},
                                                {"--streams", &options.streams},
                                                {"--batches", &options.batches},
                                                {"--events", &options.events},
                                                {"--first-seq", &options.first_seq},
                                                {"--leave-after", &options.leave_after}};
  const std::map<std::string, double*> fractions{{"--stalled", &options.stalled_share},
                                                 {"--timeout", &options.timeout_s}};
  const std::map<std::string, std::string*> texts{
      {"--get", &options.get_path}, {"--post", &options.post_path}, {"--body", &options.body}};
  if (const auto found = counts.find(name); found != counts.end()) {
    *found->second = std::strtoull(value, nullptr, 10);
  } else if (const auto found = fractions.find(name); found != fractions.end()) {
    *found->second = std::strtod(value, nullptr);
  } else if (const auto found = texts.find(name); found != texts.end()) {
    *found->second = value;
  } else if (name == "--header") {
    options.headers.emplace_back(value);
  } else {
    return false;
  }
  return true;
}

inline LoadOptions parse_load_options(int argc, char** argv) {
  LoadOptions options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--foreign") {
      options.is_foreign = true;
    } else if (i + 1 == argc || !set_option(options, name, argv[++i])) {
      refuse("unknown option, or no value: " + name);
    }
  }
  if (options.port == 0 || (options.get_path.empty() && options.post_path.empty())) {
    refuse("--port and --get or --post are needed");
  }
  if (options.streams == 0 || options.readers == 0) refuse("at least one stream and one reader");
  return options;
}

// `text` with every "{}" replaced by `number`.
inline std::string filled(std::string text, uint64_t number) {
  const std::string digits = std::to_string(number);
  for (size_t at = 0; (at = text.find("{}", at)) != std::string::npos; at += digits.size()) {
    text.replace(at, 2, digits);
  }
  return text;
}

// The request of reader `index`.
inline std::string request_of(const LoadOptions& options, uint64_t index) {
  const bool posts = !options.post_path.empty() && index < options.streams;
  std::string request = posts ? "POST " + options.post_path : "GET " + options.get_path;
  request += " HTTP/1.1\r\nHost: 127.0.0.1:" + std::to_string(options.port) + "\r\n";
  for (const std::string& header : options.headers) request += header + "\r\n";
  request = filled(std::move(request), index % options.streams);
  if (!posts) return request + "\r\n";
  const std::string body = filled(options.body, index % options.streams);
  return request +
         "Content-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) +
         "\r\n\r\n" + body;
}

}  // namespace bench
