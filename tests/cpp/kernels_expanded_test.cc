// Products of inputs that were widened beforehand have the bits of those of bf16 inputs, whatever
// the number of tokens, the rows, the type of the weights or the parts of k.
#include "kernels/cpu/packing.h"
#include "reference.h"

namespace deinfer::test {
namespace {

class ExpandedGemm : public IsaTest {
 protected:
  void SetUp() override {
    IsaTest::SetUp();
    if (kernels().expand_inputs == nullptr) {
      GTEST_SKIP() << isa_name(kernels().isa) << " multiplies bf16 as it is";
    }
  }
  std::vector<int> columns() const {  // short, of a chunk, of one more pair, of several chunks
    return thorough() ? std::vector<int>{1, 6, 62, 190, 192, 193, 600, 1501}
                      : std::vector<int>{6, 193, 600};
  }
  std::vector<int> tokens() const {
    return thorough() ? std::vector<int>{1, 2, 3, 4, 5, 7, 31, 32, 33, 64, 131}
                      : std::vector<int>{1, 2, 5, 31, 33};
  }

 private:
  bool thorough() const { return kernels().isa != Isa::kScalar; }
};

/// Weights of one panel and inputs, and their product by both ways.
struct Product {
  Product(int m_, int k, int rows_, DType dtype, bool compressed = false)
      : m(m_), rows(rows_), ldx((k + 15) / 16 * 16 + 32) {
    Random random(static_cast<unsigned>(m * 131 + k * 7 + rows));
    auto weights =
        random.vector<bf16>(static_cast<std::size_t>(rows) * static_cast<std::size_t>(k), 1.0f);
    for (std::size_t i = 0; i < weights.size(); i += 1301) weights[i] = to_bf16(1e-20f);
    packed = cpu::allocate_packed(dtype, rows, k, rows == 16 ? 16 : cpu::kPanelRows, nullptr,
                                  compressed);
    cpu::pack_rows({weights.data(), DType::kBFloat16, rows, k, k}, {}, 0, 1, packed);
    x.assign(static_cast<std::size_t>(m * ldx), to_bf16(0.0f));
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < k; ++j) {
        x[static_cast<std::size_t>(i * ldx + j)] = to_bf16(random.normal());
      }
    }
  }

  template <typename T>
  const T* panel() const {
    return static_cast<const T*>(packed.panel(0));
  }
  std::size_t size() const { return static_cast<std::size_t>(m) * cpu::kPanelRows; }

  std::vector<float> plain(const cpu::KernelTable& kernels) const {
    Aligned<float> c(size(), kNan);
    const int k_pad = packed.k_pad;
    if (packed.is_compressed(0)) {
      kernels.panel_gemm_compressed(x.data(), ldx, m, panel<std::byte>(), k_pad, 0, k_pad, nullptr,
                                    c.data());
    } else if (packed.dtype == DType::kInt8) {
      kernels.panel_gemm_int8(x.data(), ldx, m, panel<std::int8_t>(), packed.scales.data(), k_pad,
                              nullptr, c.data());
    } else {
      kernels.panel_gemm_bf16(x.data(), ldx, m, panel<bf16>(), rows, k_pad, nullptr, c.data());
    }
    return {c.data(), c.data() + size()};
  }
  /// Over parts of k that begin at `borders`.
  std::vector<float> expanded(const cpu::KernelTable& kernels, std::vector<int> borders) const {
    Aligned<float> c(size(), kNan);
    borders.push_back(packed.k_pad);
    for (std::size_t i = 0; i + 1 < borders.size(); ++i) {
      const int begin = borders[i], end = borders[i + 1], count = end - begin;
      const auto floats = static_cast<std::size_t>(kernels.expanded_inputs_size(m, count));
      Aligned<float> inputs(floats, kNan);
      kernels.expand_inputs(x.data() + begin, ldx, m, count, inputs.data());
      if (packed.is_compressed(0)) {
        kernels.panel_gemm_expanded_compressed(inputs.data(), m, panel<std::byte>(), packed.k_pad,
                                               begin, end, panel<std::byte>(), c.data());
      } else if (packed.dtype == DType::kInt8) {
        const float* scales = i + 2 == borders.size() ? packed.scales.data() : nullptr;
        kernels.panel_gemm_expanded_int8(inputs.data(), m, panel<std::int8_t>() + begin * rows,
                                         scales, count, panel<std::int8_t>(), i > 0, c.data());
      } else {
        kernels.panel_gemm_expanded_bf16(inputs.data(), m, panel<bf16>() + begin * rows, rows,
                                         count, panel<bf16>(), i > 0, c.data());
      }
    }
    return {c.data(), c.data() + size()};
  }
  void expect_same_bits(const cpu::KernelTable& kernels) const {
    SCOPED_TRACE(testing::Message() << "m=" << m << " k=" << packed.k << " rows=" << rows << " of "
                                    << dtype_name(packed.dtype));
    const std::vector<float> expected = plain(kernels);
    EXPECT_TRUE(same_bits(expanded(kernels, {0}).data(), expected.data(), size() * sizeof(float)));
    if (packed.k_pad <= 96) return;
    EXPECT_TRUE(
        same_bits(expanded(kernels, {0, 32, 96}).data(), expected.data(), size() * sizeof(float)));
  }

  int m, rows;
  std::ptrdiff_t ldx;
  cpu::PackedMatrix packed;
  std::vector<bf16> x;
};

TEST_P(ExpandedGemm, HasTheBitsOfBf16Inputs) {
  for (int rows : {8, 16, 24, 32}) {
    for (int k : columns()) {
      for (int m : tokens()) Product(m, k, rows, DType::kBFloat16).expect_same_bits(kernels());
    }
  }
}

TEST_P(ExpandedGemm, HasTheBitsOfBf16InputsWithInt8Weights) {
  for (int k : columns()) {
    for (int m : tokens()) Product(m, k, 32, DType::kInt8).expect_same_bits(kernels());
  }
}

TEST_P(ExpandedGemm, HasTheBitsOfBf16InputsWithCompressedWeights) {
  if (kernels().panel_gemm_expanded_compressed == nullptr) {
    GTEST_SKIP() << isa_name(kernels().isa) << " has no kernel for compressed weights";
  }
  for (int k : columns()) {
    for (int m : tokens()) {
      const Product compressed(m, k, 32, DType::kBFloat16, true);
      ASSERT_TRUE(compressed.packed.is_compressed(0));
      compressed.expect_same_bits(kernels());
      const Product plain(m, k, 32, DType::kBFloat16);
      EXPECT_TRUE(same_bits(compressed.plain(kernels()).data(), plain.plain(kernels()).data(),
                            plain.size() * sizeof(float)));
    }
  }
}

DEINFER_FOR_EACH_ISA(ExpandedGemm);

}  // namespace
}  // namespace deinfer::test
