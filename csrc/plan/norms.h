// The norms of a decoder's layers, as far as they decide what ranks exchange.
#pragma once

#include <cstdint>

namespace deinfer {

enum class NormKind : std::uint8_t {
  kNone,   // y = x
  kRms,    // y = x / sqrt(mean(x^2) + eps) * gain
  kLayer,  // y = (x - mean(x)) / sqrt(variance(x) + eps) * gain + bias
};

/// RMSNorm of queries and keys before the rotation.
enum class QkNormKind : std::uint8_t {
  kNone,
  kPerHead,  // every head for itself, weights [head_dim]
  kFull,     // all heads of a token together, weights [heads * head_dim]
};

struct LayerNorms {
  NormKind input = NormKind::kRms;    // of what a block reads
  NormKind output = NormKind::kNone;  // of what a block adds to the residual stream
  QkNormKind qk = QkNormKind::kNone;
};

/// Numbers per token from which ranks that have some columns of a row each learn about all of it:
/// their sum of squares; or their mean and the sum of squared distances to it.
constexpr int statistics_columns(NormKind kind) {
  return kind == NormKind::kNone ? 0 : kind == NormKind::kRms ? 1 : 2;
}

}  // namespace deinfer
