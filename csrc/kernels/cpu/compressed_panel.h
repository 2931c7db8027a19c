// Panels of bf16 weights in 12 bits each, without loss.
//
// The exponents of the weights of a matrix are few: 16 of the 256 hold all but some 1e-5 to 1e-4 of
// a panel. A weight keeps its sign and mantissa and names its exponent by a 4-bit code; the others
// (outliers) are listed beside, in full. (Entropy coding of exponents, as in DFloat11, arXiv
// 2504.11651, saves one bit more, but cannot be undone at the speed of memory on a core.)
//
// A panel of 32 rows and k_pad columns:
//   header   the 16 exponents, then the outliers in ascending order
//   units    of 4 columns each, 192 bytes, for the vectors v0 .. v3 that panel_gemm_bf16 reads
//            (v0: columns 0, 1 of rows 0-15, v1: of rows 16-31; v2, v3: columns 2, 3):
//            32-bit words (v0 & M) | ror(v1 & M, 8) with M = 0x807f807f, the same of v2 and v3,
//            then 16-bit words of codes, those of v0 lowest
//   tail     the last two columns as bf16 where k_pad is not a multiple of 4
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/bf16.h"

namespace deinfer::cpu {

inline constexpr int kUnitColumns = 4;
inline constexpr int kUnitWeights = 128;
inline constexpr int kUnitBytes = 192;
inline constexpr int kNumExponents = 16;
inline constexpr int kOutlierColumns = 32;  // of a panel, per outlier that there is room for

/// A weight whose exponent has no code; its own is 0. The list ends with place kNoPlace.
struct Outlier {
  std::uint32_t place;  // in the panel as bf16: unit * kUnitWeights + place in the unit
  std::uint16_t bits;
  std::uint16_t unused;
};
inline constexpr std::uint32_t kNoPlace = 0xffffffff;

[[gnu::always_inline]] inline int unit_of(const Outlier& outlier) {
  return static_cast<int>(outlier.place / kUnitWeights);
}

struct PanelHeader {
  std::uint16_t exponents[kNumExponents];  // in place: bits 7 to 14 of a bf16

  const Outlier* outliers() const { return reinterpret_cast<const Outlier*>(this + 1); }
};

/// Outliers that a panel has room for.
[[gnu::always_inline]] inline int max_outliers(int k_pad) { return 3 + k_pad / kOutlierColumns; }

[[gnu::always_inline]] inline std::ptrdiff_t compressed_header_bytes(int k_pad) {
  const auto bytes =
      sizeof(PanelHeader) + (static_cast<std::size_t>(max_outliers(k_pad)) + 1) * sizeof(Outlier);
  return static_cast<std::ptrdiff_t>((bytes + 63) / 64 * 64);
}

/// Where the unit of column k, a multiple of kUnitColumns, begins in a panel, bytes.
[[gnu::always_inline]] inline std::ptrdiff_t compressed_offset(int k_pad, int k) {
  return compressed_header_bytes(k_pad) + std::ptrdiff_t{k / kUnitColumns} * kUnitBytes;
}

/// Bytes of a panel, a multiple of 64.
std::size_t compressed_panel_bytes(int k_pad);

/// Writes the panel [k_pad / 2][32][2] of bf16 in that form; 64-byte aligned. Returns false, and
/// leaves `out` undefined, when it has more outliers than there is room for.
bool compress_panel(const bf16* panel, int k_pad, std::byte* out);

/// Row `row` of a compressed panel: out[k], k <= k_pad, as fp32.
void read_compressed_row(const std::byte* panel, int k_pad, int row, int k, float* out);

}  // namespace deinfer::cpu
