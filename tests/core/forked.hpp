// Questions that only a forked child can answer.
#pragma once

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>

namespace pyserve::test {

constexpr unsigned kChildTimeoutSeconds = 60;  // reached only by a child that hangs

// What `in_child` returns in a forked child. Nothing of the child's survives: no test output, no
// destructors, no leak check.
template <typename Question>
bool answer_of_child(Question in_child) {
  // What is still buffered would be written by the child, too.
  std::cout.flush();
  std::fflush(nullptr);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::alarm(kChildTimeoutSeconds);
    ::_exit(in_child() ? 1 : 0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(WIFEXITED(status));
  return WEXITSTATUS(status) == 1;
}

}  // namespace pyserve::test
