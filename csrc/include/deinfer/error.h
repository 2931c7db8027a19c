// The one exception type that leaves deinfer.
#pragma once

#include <stdexcept>
#include <string>

#include "deinfer/export.h"

namespace deinfer {
inline namespace DEINFER_ABI {

/// What went wrong; Python sees ValueError, NotImplementedError, MemoryError, RuntimeError.
enum class ErrorCode {
  kInvalidArgument,  // the caller's input is wrong; the message names the operand and its value
  kUnsupported,      // valid, but this build or version cannot do it
  kOutOfMemory,      // memory or KV blocks do not suffice
  kInternal,         // a bug or a failed worker
};

class DEINFER_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace DEINFER_ABI
}  // namespace deinfer
