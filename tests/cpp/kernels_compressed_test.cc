// Weights in 12 bits (compressed_panel.h): no bit of them is lost, and products have the bits of
// those of the same weights in 16.
#include <functional>
#include <limits>
#include <utility>

#include "deinfer/error.h"
#include "kernels/cpu/compressed_panel.h"
#include "kernels/cpu/packing.h"
#include "reference.h"

namespace deinfer::test {
namespace {

using Element = std::function<float(Random&, int row, int column)>;

/// W[n, k] in bf16, packed in both forms.
struct Matrices {
  Matrices(int n, int k, const Element& element, unsigned seed = 1) {
    Random random(seed);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < k; ++j) weights.push_back(to_bf16(element(random, i, j)));
    }
    TensorView view{weights.data(), DType::kBFloat16, n, k, k};
    plain = cpu::allocate_packed(DType::kBFloat16, n, k, cpu::kPanelRows);
    compressed = cpu::allocate_packed(DType::kBFloat16, n, k, cpu::kPanelRows, nullptr, true);
    for (auto* matrix : {&plain, &compressed}) {
      cpu::pack_rows(view, {}, 0, matrix->num_panels(), *matrix);
    }
  }
  int compressed_panels() const {
    int count = 0;
    for (int i = 0; i < compressed.num_panels(); ++i) count += compressed.is_compressed(i);
    return count;
  }
  void expect_same_rows() const {
    std::vector<float> a(static_cast<std::size_t>(plain.k)), b = a;
    for (int row = 0; row < plain.n; ++row) {
      plain.read_row(row, a.data());
      compressed.read_row(row, b.data());
      ASSERT_TRUE(same_bits(a.data(), b.data(), a.size() * sizeof(float))) << "row " << row;
    }
  }

  std::vector<bf16> weights;
  cpu::PackedMatrix plain, compressed;
};

float normal(Random& random, int, int) { return random.normal(); }

/// Of a panel of k columns, about as many outliers as there is room for, some of them neighbours.
Element with_outliers(int k) {
  return [k](Random& random, int row, int column) {
    const int place = row % 32 * k + column;
    if (place % 1229 == 0) return 1e-20f * random.normal();
    if (column == k - 3 && row % 32 == 5) return std::numeric_limits<float>::infinity();
    return random.normal() + (random.normal() < 0 ? 3.0f : -3.0f);
  };
}

TEST(CompressedPanel, LosesNoBit) {
  for (int k : {2, 4, 7, 64, 258, 576, 1030}) {
    for (int n : {32, 33, 56, 64}) {
      SCOPED_TRACE(testing::Message() << "n=" << n << " k=" << k);
      Matrices(n, k, normal).expect_same_rows();
      Matrices(n, k, with_outliers(k)).expect_same_rows();
    }
  }
}

TEST(CompressedPanel, KeepsZerosSubnormalsInfinitiesAndNans) {
  const float specials[] = {0.0f,    -0.0f, 1e-40f, -1e-39f, std::numeric_limits<float>::infinity(),
                            3.4e38f, kNan,  -1e30f, 1e-30f};
  Matrices matrices(64, 640, [&](Random& random, int row, int column) {
    const int place = row * 640 + column;
    return place % 2111 == 0 ? specials[place / 2111 % std::size(specials)] : random.normal();
  });
  EXPECT_EQ(matrices.compressed_panels(), 2);
  matrices.expect_same_rows();
}

TEST(CompressedPanel, TakesThreeQuartersOfTheMemory) {
  Matrices matrices(1024, 1024, normal);
  EXPECT_EQ(matrices.compressed_panels(), 32);
  EXPECT_LT(static_cast<double>(matrices.compressed.bytes()),
            0.76 * static_cast<double>(matrices.plain.bytes()));
  EXPECT_EQ(matrices.compressed.bytes(), matrices.compressed.panel_bytes());
}

TEST(CompressedPanel, PanelsWithTooManyExponentsStayAsTheyWere) {
  Matrices matrices(96, 256, [](Random& random, int row, int column) {
    if (row / 32 == 1) return std::ldexp(random.normal(), (row * 7 + column) % 60 - 30);
    return random.normal();
  });
  EXPECT_EQ(matrices.compressed_panels(), 2);
  EXPECT_FALSE(matrices.compressed.is_compressed(1));
  matrices.expect_same_rows();
  EXPECT_EQ(matrices.compressed.bytes(), matrices.compressed.panel_bytes() + 32 * 256 * 2);
}

TEST(CompressedPanel, CanBePackedAgain) {
  Matrices wide(32, 64, [](Random& random, int row, int column) {
    return std::ldexp(random.normal(), (row + column) % 60 - 30);
  });
  EXPECT_EQ(wide.compressed_panels(), 0);
  Matrices even(32, 64, normal);
  cpu::pack_rows({even.weights.data(), DType::kBFloat16, 32, 64, 64}, {}, 0, 1, wide.compressed);
  EXPECT_EQ(wide.compressed_panels(), 1);
  wide.plain = std::move(even.plain);
  wide.expect_same_rows();
}

TEST(CompressedPanel, OnlyBf16InPanelsOf32) {
  EXPECT_THROW(cpu::allocate_packed(DType::kFloat32, 32, 8, 32, nullptr, true), Error);
  EXPECT_THROW(cpu::allocate_packed(DType::kInt8, 32, 8, 32, nullptr, true), Error);
  EXPECT_THROW(cpu::allocate_packed(DType::kBFloat16, 32, 8, 16, nullptr, true), Error);
}

TEST(CompressedPanel, IsChosenWhereItsPanelsOccupyAllThreads) {
  EXPECT_EQ(cpu::choose_panel_rows(1024, 2, true), 32);
  EXPECT_EQ(cpu::choose_panel_rows(96, 2, true), 32);  // 3 panels: 2 of 12 bits are 3 of 16 rows
  EXPECT_EQ(cpu::choose_panel_rows(96, 2, false), 16);
  EXPECT_EQ(cpu::choose_panel_rows(32, 2, true), 16);
  EXPECT_EQ(cpu::choose_panel_rows(32, 1, true), 32);
}

class CompressedGemm : public IsaTest {};

TEST_P(CompressedGemm, HasTheBitsOfTheSameWeightsUncompressed) {
  const cpu::KernelTable& kernels = this->kernels();
  if (kernels.panel_gemm_compressed == nullptr) {
    GTEST_SKIP() << isa_name(kernels.isa) << " has no such kernel";
  }
  for (int k : {2, 6, 64, 130, 576, 1026, 2304}) {
    for (const Element& element : {Element(normal), with_outliers(k)}) {
      Matrices matrices(32, k, element, static_cast<unsigned>(k));
      ASSERT_EQ(matrices.compressed_panels(), 1);
      const int k_pad = matrices.plain.k_pad;
      const auto* plain = static_cast<const bf16*>(matrices.plain.panel(0));
      const auto* compressed = static_cast<const std::byte*>(matrices.compressed.panel(0));
      for (int m : {1, 2, 3, 5, 8, 9, 13, 16, 17, 40, 131}) {
        SCOPED_TRACE(testing::Message() << "m=" << m << " k=" << k);
        const std::ptrdiff_t ldx = k_pad + 8;
        Random random(static_cast<unsigned>(m));
        auto x = random.vector<bf16>(static_cast<std::size_t>(m * ldx), 1.0f);
        const std::size_t size = static_cast<std::size_t>(m) * cpu::kPanelRows;
        Aligned<float> expected(size, kNan), whole(size, kNan), parts(size, kNan);
        kernels.panel_gemm_bf16(x.data(), ldx, m, plain, 32, k_pad, nullptr, expected.data());
        kernels.panel_gemm_compressed(x.data(), ldx, m, compressed, k_pad, 0, k_pad, compressed,
                                      whole.data());
        EXPECT_TRUE(same_bits(whole.data(), expected.data(), size * sizeof(float)));
        const int borders[] = {0, k_pad / 3 / 32 * 32, k_pad * 2 / 3 / 32 * 32, k_pad};
        for (int i = 0; i < 3; ++i) {
          if (borders[i] == borders[i + 1]) continue;
          kernels.panel_gemm_compressed(x.data() + borders[i], ldx, m, compressed, k_pad,
                                        borders[i], borders[i + 1], nullptr, parts.data());
        }
        EXPECT_TRUE(same_bits(parts.data(), expected.data(), size * sizeof(float)));
      }
    }
  }
}

DEINFER_FOR_EACH_ISA(CompressedGemm);

}  // namespace
}  // namespace deinfer::test
