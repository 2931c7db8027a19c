// int8 weights by AMX tiles (amx_int8_impl.h) on the software model of the tiles: the bits of the
// bf16 product of the same integers. The machine code is tested in kernels_gemm_test where the CPU
// has AMX.
#include "kernels/cpu/amx_int8_impl.h"

#include <cmath>

#include "amx_model.h"
#include "kernels/cpu/packing.h"
#include "kernels/cpu/simd_scalar.h"
#include "reference.h"

namespace deinfer::test {
namespace {

struct Tiles : TileModel {
  static void expand(const std::int8_t* from, bf16* to) { cpu::expand_int8(from, to); }
};

/// x[m, k_pad] and one panel of int8 weights, also as the bf16 integers that they are.
struct Int8Case {
  Int8Case(int m_, int k) : m(m_) {
    Random random(static_cast<unsigned>(m * 131 + k));
    auto size = static_cast<std::size_t>(cpu::kPanelRows * k);
    std::vector<float> weights = random.vector<float>(size, 1.0f);
    packed = cpu::allocate_packed(DType::kInt8, cpu::kPanelRows, k, cpu::kPanelRows);
    exact = cpu::allocate_packed(DType::kBFloat16, cpu::kPanelRows, k, cpu::kPanelRows);
    cpu::pack_rows({weights.data(), DType::kFloat32, cpu::kPanelRows, k, k}, {}, 0, 1, packed);
    std::vector<float> integers(size);
    for (int row = 0; row < cpu::kPanelRows; ++row) {
      float* at = integers.data() + std::ptrdiff_t{row} * k;
      packed.read_row(row, at);
      for (int j = 0; j < k; ++j)
        at[j] = std::round(at[j] / packed.scales[static_cast<std::size_t>(row)]);
    }
    cpu::pack_rows({integers.data(), DType::kFloat32, cpu::kPanelRows, k, k}, {}, 0, 1, exact);
    ldx = packed.k_pad + 16;
    x = random.vector<bf16>(static_cast<std::size_t>(m * ldx), 1.0f);
    for (int i = 0; i < m; ++i) {
      for (auto j = static_cast<std::ptrdiff_t>(k); j < ldx; ++j) {
        x[static_cast<std::size_t>(i * ldx + j)] = to_bf16(j < packed.k_pad ? 0.0f : kNan);
      }
    }
  }

  template <bool kAdd>
  std::vector<float> int8(float before) {
    Aligned<float> c(static_cast<std::size_t>(m * cpu::kPanelRows), before);
    Tiles tiles;
    cpu::amx_panel_gemm_int8<kAdd>(tiles, x.data(), ldx, m,
                                   static_cast<const std::int8_t*>(packed.panel(0)), packed.k_pad,
                                   c.data());
    EXPECT_EQ(tiles.fault(), nullptr);
    EXPECT_FALSE(tiles.in_use());
    return {c.data(), c.data() + m * cpu::kPanelRows};
  }
  template <bool kAdd>
  std::vector<float> bf16_product(float before) {
    Aligned<float> c(static_cast<std::size_t>(m * cpu::kPanelRows), before);
    Tiles tiles;
    cpu::amx_panel_gemm<kAdd>(tiles, x.data(), ldx, m, static_cast<const bf16*>(exact.panel(0)),
                              cpu::kPanelRows, exact.k_pad, nullptr, c.data());
    return {c.data(), c.data() + m * cpu::kPanelRows};
  }

  int m;
  std::ptrdiff_t ldx = 0;
  std::vector<bf16> x;
  cpu::PackedMatrix packed, exact;
};

TEST(AmxInt8, HasTheBitsOfTheBf16ProductOfItsIntegers) {
  for (int m : {1, 15, 16, 17, 31, 32, 33, 48, 64, 70}) {
    for (int k : {3, 32, 250, 256, 263, 520}) {
      SCOPED_TRACE(testing::Message() << "m=" << m << " k=" << k);
      Int8Case test(m, k);
      const std::vector<float> a = test.int8<false>(kNan);
      const std::vector<float> b = test.bf16_product<false>(kNan);
      EXPECT_TRUE(same_bits(a.data(), b.data(), a.size() * sizeof(float)));
    }
  }
}

TEST(AmxInt8, AddsToEverySumOnce) {
  for (int m : {1, 17, 32, 47, 65}) {
    SCOPED_TRACE(testing::Message() << "m=" << m);
    Int8Case test(m, 300);
    const std::vector<float> a = test.int8<true>(1000.0f);
    const std::vector<float> b = test.bf16_product<true>(1000.0f);
    EXPECT_TRUE(same_bits(a.data(), b.data(), a.size() * sizeof(float)));
  }
}

}  // namespace
}  // namespace deinfer::test
