// The native tests of csrc/, without Python: one file for each file there, and race_test.cpp, which
// is meant for ThreadSanitizer.
//
//   PYSERVE_TEST_SEED=N   another seed for everything that is random
//   PYSERVE_SOAK=1        the large counts instead of the sample
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
