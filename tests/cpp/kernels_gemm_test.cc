#include "kernels/cpu/packing.h"
#include "reference.h"

namespace deinfer::test {
namespace {

class GemmTest : public IsaTest {};

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == 4 ? DType::kFloat32 : DType::kBFloat16;

/// x[m, k] (rows padded to ldx, zeros beyond k) and packed weights of `rows` rows.
template <typename T, DType kPacked = kDTypeOf<T>>
struct GemmCase {
  GemmCase(int m_, int k_, int rows_, unsigned seed, int extra_ldx = 0)
      : m(m_), k(k_), rows(rows_) {
    Random random(seed);
    float scale = 1.0f / std::sqrt(static_cast<float>(k));
    weights = random.vector<T>(static_cast<std::size_t>(rows) * static_cast<std::size_t>(k), scale);
    packed = cpu::allocate_packed(kPacked, rows, k, rows == 16 ? 16 : cpu::kPanelRows);
    TensorView view{weights.data(), kDTypeOf<T>, rows, k, k};
    cpu::pack_rows(view, {}, 0, 1, packed);
    std::vector<float> row(static_cast<std::size_t>(k));
    for (int i = 0; i < rows; ++i) {  // as they are represented
      packed.read_row(i, row.data());
      dequantized.insert(dequantized.end(), row.begin(), row.end());
    }
    ldx = packed.k_pad + extra_ldx;
    x.assign(static_cast<std::size_t>(m) * static_cast<std::size_t>(ldx),
             TypeTraits<T>::from(0.0f));
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < k; ++j) at(i, j) = TypeTraits<T>::from(random.normal());
    }
  }
  T& at(int i, int j) { return x[static_cast<std::size_t>(i * ldx + j)]; }
  double weight(int row, int j) const { return dequantized[static_cast<std::size_t>(row * k + j)]; }

  /// c of the tokens [first, first + count); c is filled with NaN before.
  std::vector<float> run(const cpu::KernelTable& kernels, int first, int count) {
    Aligned<float> c(static_cast<std::size_t>(count) * cpu::kPanelRows, kNan);
    const T* input = x.data() + static_cast<std::ptrdiff_t>(first) * ldx;
    const T* panel = static_cast<const T*>(packed.panel(0));
    if constexpr (kPacked == DType::kInt8) {
      kernels.panel_gemm_int8(input, ldx, count, static_cast<const std::int8_t*>(packed.panel(0)),
                              packed.scales.data(), packed.k_pad, packed.panel(0), c.data());
    } else if constexpr (sizeof(T) == 4) {
      kernels.panel_gemm_f32(input, ldx, count, panel, rows, packed.k_pad, panel, c.data());
    } else {
      kernels.panel_gemm_bf16(input, ldx, count, panel, rows, packed.k_pad, panel, c.data());
    }
    return {c.data(), c.data() + static_cast<std::size_t>(count) * cpu::kPanelRows};
  }

  /// The same of all tokens, over parts of k that begin at `borders`.
  std::vector<float> run_in_parts(const cpu::KernelTable& kernels, std::vector<int> borders) {
    Aligned<float> c(static_cast<std::size_t>(m) * cpu::kPanelRows, kNan);
    borders.push_back(packed.k_pad);
    for (std::size_t i = 0; i + 1 < borders.size(); ++i) {
      const int begin = borders[i], count = borders[i + 1] - begin;
      const T* input = x.data() + begin;
      if constexpr (kPacked == DType::kInt8) {
        const auto* panel = static_cast<const std::int8_t*>(packed.panel(0)) + begin * rows;
        auto* gemm = i == 0 ? kernels.panel_gemm_int8 : kernels.panel_gemm_add_int8;
        const float* scales = i + 2 == borders.size() ? packed.scales.data() : nullptr;
        gemm(input, ldx, m, panel, scales, count, nullptr, c.data());
      } else {
        const T* panel = static_cast<const T*>(packed.panel(0)) + begin * rows;
        if constexpr (sizeof(T) == 4) {
          auto* gemm = i == 0 ? kernels.panel_gemm_f32 : kernels.panel_gemm_add_f32;
          gemm(input, ldx, m, panel, rows, count, nullptr, c.data());
        } else {
          auto* gemm = i == 0 ? kernels.panel_gemm_bf16 : kernels.panel_gemm_add_bf16;
          gemm(input, ldx, m, panel, rows, count, nullptr, c.data());
        }
      }
    }
    return {c.data(), c.data() + static_cast<std::size_t>(m) * cpu::kPanelRows};
  }

  int m, k, rows;
  std::ptrdiff_t ldx = 0;
  std::vector<T> weights;
  std::vector<float> dequantized;
  std::vector<T> x;
  cpu::PackedMatrix packed;
};

template <typename T, DType kPacked = kDTypeOf<T>>
void expect_matches_reference(const cpu::KernelTable& kernels, int m, int k, int rows) {
  SCOPED_TRACE(testing::Message() << "m=" << m << " k=" << k << " rows=" << rows);
  GemmCase<T, kPacked> test(m, k, rows, static_cast<unsigned>(m * 131 + k), m % 3 * 8);
  std::vector<float> c = test.run(kernels, 0, m);
  double worst = 0;
  for (int i = 0; i < m; i += m > 64 ? 37 : 1) {
    for (int row = 0; row < rows; ++row) {
      double sum = 0;
      for (int j = 0; j < k; ++j) sum += wide(test.at(i, j)) * test.weight(row, j);
      double error = c[static_cast<std::size_t>(i * cpu::kPanelRows + row)] - sum;
      worst = std::max(worst, std::abs(error));
    }
    for (int row = rows; row < cpu::kPanelRows; ++row) {
      EXPECT_TRUE(std::isnan(c[static_cast<std::size_t>(i * cpu::kPanelRows + row)]))
          << "column beyond the panel was written";
    }
  }
  EXPECT_LT(worst, kSumTolerance * std::sqrt(static_cast<double>(k)));
}

TEST_P(GemmTest, MatchesFp64) {
  for (int rows : {8, 16, 24, 32}) {
    for (int m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 37, 64}) {
      for (int k : {1, 7, 8, 114, 331}) {
        expect_matches_reference<float>(kernels(), m, k, rows);
        expect_matches_reference<bf16>(kernels(), m, k, rows);
      }
    }
    for (int k : {1023, 2101}) {  // several chunks
      expect_matches_reference<float>(kernels(), 19, k, rows);
      expect_matches_reference<bf16>(kernels(), 19, k, rows);
    }
    expect_matches_reference<float>(kernels(), 512, 40, rows);
    expect_matches_reference<bf16>(kernels(), 512, 40, rows);
  }
}

template <typename T, DType kPacked = kDTypeOf<T>>
void expect_batch_invariant(const cpu::KernelTable& kernels, int k, int rows) {
  constexpr int kTokens = 64;
  GemmCase<T, kPacked> test(kTokens, k, rows, 5);
  std::vector<float> all = test.run(kernels, 0, kTokens);
  for (int m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 31, 37, 63}) {
    for (int first : {0, 1, 5, kTokens - m}) {
      if (first + m > kTokens) continue;
      std::vector<float> part = test.run(kernels, first, m);
      for (int i = 0; i < m; ++i) {
        EXPECT_TRUE(same_bits(&part[static_cast<std::size_t>(i * cpu::kPanelRows)],
                              &all[static_cast<std::size_t>((first + i) * cpu::kPanelRows)],
                              static_cast<std::size_t>(rows) * sizeof(float)))
            << "m=" << m << " first=" << first << " token=" << i << " k=" << k;
      }
    }
  }
}

template <typename T, DType kPacked = kDTypeOf<T>>
void expect_parts_have_the_bits_of_the_whole(const cpu::KernelTable& kernels, int rows) {
  for (int k : {100, 1500}) {
    for (int m : {1, 5, 16, 33, 70}) {
      GemmCase<T, kPacked> test(m, k, rows, 7, 8);
      const std::vector<float> whole = test.run(kernels, 0, m);
      for (const std::vector<int>& borders : {std::vector<int>{0}, {0, 32}, {0, 64, 96}}) {
        const std::vector<float> parts = test.run_in_parts(kernels, borders);
        for (int i = 0; i < m; ++i) {
          EXPECT_TRUE(same_bits(&parts[static_cast<std::size_t>(i * cpu::kPanelRows)],
                                &whole[static_cast<std::size_t>(i * cpu::kPanelRows)],
                                static_cast<std::size_t>(rows) * sizeof(float)))
              << "m=" << m << " k=" << k << " token=" << i << " in " << borders.size();
        }
      }
    }
  }
}

TEST_P(GemmTest, PartsOfKHaveTheBitsOfTheWhole) {
  for (int rows : {16, 32}) {
    expect_parts_have_the_bits_of_the_whole<float>(kernels(), rows);
    expect_parts_have_the_bits_of_the_whole<bf16>(kernels(), rows);
  }
  expect_parts_have_the_bits_of_the_whole<bf16, DType::kInt8>(kernels(), 32);
}

TEST_P(GemmTest, BitsDoNotDependOnTheBatch) {
  for (int rows : {8, 16, 24, 32}) {
    for (int k : {61, 600, 1500}) {
      expect_batch_invariant<float>(kernels(), k, rows);
      expect_batch_invariant<bf16>(kernels(), k, rows);
    }
  }
}

template <typename T, DType kPacked = kDTypeOf<T>>
void expect_same_bits_as(const cpu::KernelTable& scalar, const cpu::KernelTable& kernels,
                         int rows = 32) {
  GemmCase<T, kPacked> test(11, 777, rows, 9);
  std::vector<float> a = test.run(scalar, 0, 11);
  std::vector<float> b = test.run(kernels, 0, 11);
  EXPECT_TRUE(same_bits(a.data(), b.data(), a.size() * sizeof(float)));
}

TEST_P(GemmTest, BitsDoNotDependOnTheInstructionSet) {
  for (int rows : {8, 16, 24, 32}) {
    expect_same_bits_as<float>(scalar(), kernels(), rows);
    // TDPBF16PS sums in another order (amx_gemm_impl.h); MatchesFp64 bounds what that does.
    if (GetParam() != Isa::kAmxBf16) expect_same_bits_as<bf16>(scalar(), kernels(), rows);
  }
  if (GetParam() != Isa::kAmxBf16) expect_same_bits_as<bf16, DType::kInt8>(scalar(), kernels());
}

TEST_P(GemmTest, Int8HasTheBitsOfTheBf16ProductOfItsIntegers) {
  for (int m : {1, 8, 9, 40, 80}) {
    for (int k : {7, 600, 1501}) {
      GemmCase<bf16, DType::kInt8> test(m, k, 32, static_cast<unsigned>(m + k));
      std::vector<bf16> integers(test.dequantized.size());
      for (int row = 0; row < 32; ++row) {
        for (int j = 0; j < k; ++j) {
          auto at = static_cast<std::size_t>(row * k + j);
          integers[at] = to_bf16(
              std::round(test.dequantized[at] / test.packed.scales[static_cast<std::size_t>(row)]));
        }
      }
      GemmCase<bf16> exact(m, k, 32, 1);
      cpu::pack_rows({integers.data(), DType::kBFloat16, 32, k, k}, {}, 0, 1, exact.packed);
      exact.x = test.x;
      exact.ldx = test.ldx;
      std::fill(test.packed.scales.begin(), test.packed.scales.end(), 1.0f);
      const std::vector<float> a = test.run(kernels(), 0, m);
      const std::vector<float> b = exact.run(kernels(), 0, m);
      EXPECT_TRUE(same_bits(a.data(), b.data(), a.size() * sizeof(float))) << "m=" << m << " " << k;
    }
  }
}

TEST_P(GemmTest, Int8MatchesFp64) {
  for (int m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 37}) {
    for (int k : {1, 7, 8, 114, 331, 2101}) {
      expect_matches_reference<bf16, DType::kInt8>(kernels(), m, k, 32);
    }
  }
  for (int k : {61, 1500}) expect_batch_invariant<bf16, DType::kInt8>(kernels(), k, 32);
}

TEST_P(GemmTest, NaNStaysInItsToken) {
  GemmCase<bf16> test(9, 64, 32, 3);
  std::vector<float> clean = test.run(kernels(), 0, 9);
  test.at(4, 10) = to_bf16(kNan);
  std::vector<float> c = test.run(kernels(), 0, 9);
  for (int i = 0; i < 9; ++i) {
    for (int row = 0; row < 32; ++row) {
      auto at = static_cast<std::size_t>(i * cpu::kPanelRows + row);
      if (i == 4) {
        EXPECT_TRUE(std::isnan(c[at]));
      } else {
        EXPECT_EQ(c[at], clean[at]);
      }
    }
  }
}

DEINFER_FOR_EACH_ISA(GemmTest);

}  // namespace
}  // namespace deinfer::test
