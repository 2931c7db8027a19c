#include "kernels/cpu/compressed_panel.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>

#include "kernels/cpu/kernel_table.h"

namespace deinfer::cpu {
namespace {

constexpr std::uint32_t kSignsAndMantissas = 0x807f807f;
constexpr std::uint8_t kNoCode = 0xff;
constexpr int kVectorWords = 16;  // of 32 bits, a pair of weights each

int exponent_of(bf16 weight) { return weight.bits >> 7 & 0xff; }

/// The `kNumExponents` most frequent exponents.
std::array<int, kNumExponents> frequent_exponents(const bf16* panel, std::size_t count) {
  // Of two neighbours the first seldom waits for the second's increment of the same counter.
  std::array<std::array<std::uint32_t, 256>, 2> counts = {};
  for (std::size_t i = 0; i < count; i += 2) {
    ++counts[0][static_cast<std::size_t>(exponent_of(panel[i]))];
    ++counts[1][static_cast<std::size_t>(exponent_of(panel[i + 1]))];
  }
  for (std::size_t e = 0; e < 256; ++e) counts[0][e] += counts[1][e];
  std::array<int, 256> order;
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + kNumExponents, order.end(), [&](int a, int b) {
    auto count_a = counts[0][static_cast<std::size_t>(a)];
    auto count_b = counts[0][static_cast<std::size_t>(b)];
    return count_a != count_b ? count_a > count_b : a < b;
  });
  std::array<int, kNumExponents> chosen;
  std::copy_n(order.begin(), kNumExponents, chosen.begin());
  return chosen;
}

/// Writes the unit of 128 weights; bits of `missing` say which have no code.
void compress_unit(const bf16* weights, const std::uint8_t* codes, std::byte* out,
                   std::array<std::uint64_t, 2>& missing) {
  std::uint32_t words[4][kVectorWords];
  std::memcpy(words, weights, sizeof words);
  std::uint32_t kept[2][kVectorWords];
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < kVectorWords; ++i) {
      kept[half][i] = (words[2 * half][i] & kSignsAndMantissas) |
                      std::rotr(words[2 * half + 1][i] & kSignsAndMantissas, 8);
    }
  }
  std::memcpy(out, kept, sizeof kept);
  std::uint16_t packed[2 * kVectorWords] = {};
  missing = {};
  for (int v = 0; v < 4; ++v) {
    for (int i = 0; i < 2 * kVectorWords; ++i) {
      const int place = v * 2 * kVectorWords + i;
      std::uint8_t code = codes[exponent_of(weights[place])];
      if (code == kNoCode) {
        missing[static_cast<std::size_t>(place / 64)] |= std::uint64_t{1} << (place % 64);
        code = 0;
      }
      packed[i] = static_cast<std::uint16_t>(packed[i] | code << (4 * v));
    }
  }
  std::memcpy(out + sizeof kept, packed, sizeof packed);
}

}  // namespace

std::size_t compressed_panel_bytes(int k_pad) {
  return static_cast<std::size_t>(compressed_header_bytes(k_pad)) +
         static_cast<std::size_t>(k_pad / kUnitColumns) * kUnitBytes +
         (k_pad % kUnitColumns == 0 ? 0 : kUnitWeights);
}

bool compress_panel(const bf16* panel, int k_pad, std::byte* out) {
  const auto count = static_cast<std::size_t>(k_pad) * kPanelRows;
  const std::array<int, kNumExponents> exponents = frequent_exponents(panel, count);
  std::array<std::uint8_t, 256> codes;
  codes.fill(kNoCode);
  PanelHeader header = {};
  for (std::size_t i = 0; i < exponents.size(); ++i) {
    codes[static_cast<std::size_t>(exponents[i])] = static_cast<std::uint8_t>(i);
    header.exponents[i] = static_cast<std::uint16_t>(exponents[i] << 7);
  }
  std::memcpy(out, &header, sizeof header);
  std::byte* outliers = out + sizeof header;
  int num_outliers = 0;
  auto add_outlier = [&](std::uint32_t place, std::uint16_t bits) {
    const Outlier outlier{place, bits, 0};
    std::memcpy(outliers, &outlier, sizeof outlier);
    outliers += sizeof outlier;
  };
  const std::ptrdiff_t header_bytes = compressed_header_bytes(k_pad);
  const int units = k_pad / kUnitColumns;
  for (int unit = 0; unit < units; ++unit) {
    const bf16* weights = panel + std::ptrdiff_t{unit} * kUnitWeights;
    std::array<std::uint64_t, 2> missing;
    compress_unit(weights, codes.data(), out + header_bytes + std::ptrdiff_t{unit} * kUnitBytes,
                  missing);
    for (int part = 0; part < 2; ++part) {
      for (std::uint64_t left = missing[static_cast<std::size_t>(part)]; left != 0;
           left &= left - 1) {
        if (num_outliers++ == max_outliers(k_pad)) return false;
        const int place = part * 64 + std::countr_zero(left);
        add_outlier(static_cast<std::uint32_t>(unit * kUnitWeights + place), weights[place].bits);
      }
    }
  }
  add_outlier(kNoPlace, 0);
  std::byte* tail = out + header_bytes + std::ptrdiff_t{units} * kUnitBytes;
  if (k_pad % kUnitColumns != 0) {
    std::memcpy(tail, panel + std::ptrdiff_t{units} * kUnitWeights, kUnitWeights);
  }
  return true;
}

void read_compressed_row(const std::byte* panel, int k_pad, int row, int k, float* out) {
  PanelHeader header;
  std::memcpy(&header, panel, sizeof header);
  const std::byte* units = panel + compressed_header_bytes(k_pad);
  const int coded = k_pad / kUnitColumns * kUnitColumns;
  for (int i = 0; i < k; ++i) {
    const std::byte* unit = units + std::ptrdiff_t{i / kUnitColumns} * kUnitBytes;
    bf16 weight;
    if (i < coded) {
      const int half = i % kUnitColumns / 2;
      const int vector = 2 * half + row / kLanes;
      const int word = row % kLanes;
      std::uint32_t kept;
      std::memcpy(&kept, unit + half * 64 + word * 4, sizeof kept);
      if (vector % 2 == 1) kept = std::rotl(kept, 8);
      std::uint16_t code;
      std::memcpy(&code, unit + 128 + (2 * word + i % 2) * 2, sizeof code);
      weight.bits = static_cast<std::uint16_t>((kept & kSignsAndMantissas) >> (i % 2 * 16) |
                                               header.exponents[code >> (4 * vector) & 0xf]);
    } else {
      std::memcpy(&weight, unit + (row * 2 + i % 2) * 2, sizeof weight);
    }
    out[i] = to_float(weight);
  }
  const auto* outlier = reinterpret_cast<const PanelHeader*>(panel)->outliers();
  for (; outlier->place != kNoPlace; ++outlier) {
    const auto place = static_cast<int>(outlier->place);
    const int column = place / (2 * kPanelRows) * 2 + place % 2;
    if (place / 2 % kPanelRows == row && column < k) out[column] = to_float(bf16{outlier->bits});
  }
}

}  // namespace deinfer::cpu
