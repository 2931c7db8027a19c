// The bytes of packed linears: a header, then per linear V, U (or W) and bias, each from a multiple
// of 64 bytes on. Offsets follow from the header's shapes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "deinfer/ops.h"
#include "ops/linear.h"
#include "ops/z_exchange.h"

namespace deinfer {

struct PackedHeader {
  static constexpr std::array<char, 8> kMagic = {'d', 'e', 'i', 'n', 'f', 'e', 'r', 0};
  static constexpr std::uint32_t kVersion = 1;  // of the layout, panels included

  struct Linear {
    std::int32_t n = 0;
    std::int32_t rank = 0;          // 0: dense
    std::int32_t v_panel_rows = 0;  // 32 or 16
    std::int32_t u_panel_rows = 0;
    std::int32_t has_bias = 0;
  };

  std::array<char, 8> magic = kMagic;
  std::uint32_t version = kVersion;
  std::uint32_t dtype = 0;
  std::uint64_t bytes = 0;  // in all
  std::int32_t count = 0;
  std::int32_t k = 0;
  std::array<Linear, kMaxLinears> linears;
  std::uint32_t checksum = 0;  // of what stands before
};
inline constexpr std::size_t kPackedHeaderBytes = 128;
inline constexpr std::size_t kPackedAlignment = 64;
constexpr std::size_t packed_aligned(std::size_t bytes) {
  return (bytes + kPackedAlignment - 1) / kPackedAlignment * kPackedAlignment;
}
static_assert(sizeof(PackedHeader) <= kPackedHeaderBytes);

/// The linears that lie behind a header, in borrowed memory.
using LinearGroup = std::array<LowRankLinear, kMaxLinears>;

/// The header of these linears; checks their shapes and dtypes.
PackedHeader make_header(std::span<const LinearWeights> linears, DType dtype, int threads);

/// Fills `group` with views of the memory behind `header`, which stands at its begin; returns the
/// bytes in all.
std::size_t lay_out(const PackedHeader& header, const void* memory, LinearGroup& group);

/// Throws kInvalidArgument unless packed linears may lie there.
void check_aligned(const void* memory);

inline const PackedHeader& header_of(const PackedLinears& packed) {
  return *static_cast<const PackedHeader*>(packed.memory());
}

}  // namespace deinfer
