// Rotary angles of every position, for keys that are rebuilt long after their tokens.
#pragma once

#include <cstddef>

#include "base/buffer.h"
#include "model/rope.h"
#include "ops/lowrank_linear.h"

namespace deinfer {

class PositionAngles {
 public:
  /// Rows of `cols` pairs for up to max_model_len positions. Their memory is taken when they are
  /// computed.
  PositionAngles(const Rope& rope, int cols, int max_model_len)
      : rope_(rope),
        cols_(cols),
        cos_(bytes(cols, max_model_len)),
        sin_(bytes(cols, max_model_len)) {}

  /// Computes those of the positions [0, count), if they are not there yet.
  void reach(int count) {
    for (; count_ < count; ++count_) {
      const std::ptrdiff_t at = std::ptrdiff_t{count_} * cols_;
      rope_.angles(count_, cos_.as<float>() + at, sin_.as<float>() + at);
    }
  }
  RotaryAngles view() const { return {cos_.as<float>(), sin_.as<float>(), cols_}; }

 private:
  static std::size_t bytes(int cols, int positions) {
    return static_cast<std::size_t>(cols) * static_cast<std::size_t>(positions) * sizeof(float);
  }

  Rope rope_;
  int cols_;
  int count_ = 0;
  Buffer cos_, sin_;
};

}  // namespace deinfer
