// Error raising with operand names and values.
#pragma once

#include <sstream>
#include <string>

#include "deinfer/error.h"

namespace deinfer {

/// Concatenates its arguments as by operator<<.
template <typename... Args>
std::string str_cat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

template <typename... Args>
[[noreturn]] void fail(ErrorCode code, const Args&... args) {
  throw Error(code, str_cat(args...));
}

/// Throws kInvalidArgument with the concatenated message unless `ok`.
template <typename... Args>
void check_argument(bool ok, const Args&... args) {
  if (!ok) fail(ErrorCode::kInvalidArgument, args...);
}

}  // namespace deinfer
