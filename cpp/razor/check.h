// SPDX-License-Identifier: Apache-2.0
// Argument checks: `<argument>: expected <what>, got <actual>`, thrown before anything is touched.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#if defined(__GNUC__)
#define RAZOR_API __attribute__((visibility("default")))
#else
#define RAZOR_API
#endif

namespace razor {

// Arrives in Python as ValueError.
class RAZOR_API Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

namespace detail {
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}
}  // namespace detail
}  // namespace razor

// RAZOR_CHECK(condition, "query: expected 4 dimensions, got ", n)
#define RAZOR_CHECK(condition, ...)                       \
  do {                                                    \
    if (!(condition)) ::razor::detail::fail(__VA_ARGS__); \
  } while (false)
