#include "reference.h"

namespace deinfer::test {
namespace {

class RowsTest : public IsaTest {};

constexpr int kSizes[] = {1, 2, 15, 16, 17, 31, 32, 33, 127, 1000, 4096};

TEST_P(RowsTest, RmsNorm) {
  Random random(1);
  for (int n : kSizes) {
    SCOPED_TRACE(n);
    auto size = static_cast<std::size_t>(n);
    auto x = random.vector(size, 3.0f), gain = random.vector(size);
    double squares = 0;
    for (float v : x) squares += static_cast<double>(v) * v;
    double scale = 1.0 / std::sqrt(squares / n + 1e-5);
    std::vector<float> f32(size);
    std::vector<bf16> b16(size);
    kernels().rms_norm_f32(x.data(), gain.data(), n, 1e-5f, f32.data());
    kernels().rms_norm_bf16(x.data(), gain.data(), n, 1e-5f, b16.data());
    for (std::size_t j = 0; j < size; ++j) {
      double want = x[j] * scale * gain[j];
      EXPECT_NEAR(f32[j], want, 1e-6 * std::abs(want));
      EXPECT_EQ(b16[j].bits, to_bf16(f32[j]).bits);
    }
    std::vector<float> same(size);
    scalar().rms_norm_f32(x.data(), gain.data(), n, 1e-5f, same.data());
    EXPECT_TRUE(same_bits(same.data(), f32.data(), size * sizeof(float)));
    kernels().rms_norm_f32(x.data(), gain.data(), n, 1e-5f, x.data());  // in place
    EXPECT_TRUE(same_bits(x.data(), f32.data(), size * sizeof(float)));
  }
}

void expect_argmax(const cpu::KernelTable& kernels, const std::vector<float>& x) {
  float want = -kInf;
  int want_index = 0;
  for (std::size_t j = 0; j < x.size(); ++j) {
    if (x[j] > want) {
      want = x[j];
      want_index = static_cast<int>(j);
    }
  }
  float value = 0;
  int index = -1;
  kernels.argmax(x.data(), static_cast<int>(x.size()), &value, &index);
  EXPECT_EQ(value, want);
  EXPECT_EQ(index, want_index);
}

TEST_P(RowsTest, Argmax) {
  Random random(2);
  for (int n : kSizes) {
    SCOPED_TRACE(n);
    auto size = static_cast<std::size_t>(n);
    for (int repeat = 0; repeat < 20; ++repeat) {
      auto x = random.vector(size);
      expect_argmax(kernels(), x);
      for (float& v : x) v = static_cast<float>(random.below(3));  // ties
      expect_argmax(kernels(), x);
      for (float& v : x) v = -1.0f - static_cast<float>(random.below(3));  // all below padding
      expect_argmax(kernels(), x);
      for (float& v : x) v = random.below(2) == 0 ? kNan : random.normal();
      expect_argmax(kernels(), x);
      for (float& v : x) v = random.below(2) == 0 ? -kInf : kInf;
      expect_argmax(kernels(), x);
    }
    expect_argmax(kernels(), std::vector<float>(size, kNan));
    expect_argmax(kernels(), std::vector<float>(size, -kInf));
  }
}

TEST_P(RowsTest, ExpSum) {
  Random random(3);
  for (int n : kSizes) {
    SCOPED_TRACE(n);
    auto size = static_cast<std::size_t>(n);
    auto x = random.vector(size, 8.0f);
    x[size / 2] = -kInf;
    float shift = *std::max_element(x.begin(), x.end());
    if (shift == -kInf) shift = 0.0f;
    for (float scale : {1.0f, 0.7f, 5.0f}) {
      double want = 0;
      for (float v : x) want += std::exp((static_cast<double>(v) - shift) * scale);
      float got = kernels().exp_sum(x.data(), n, shift, scale);
      EXPECT_NEAR(got, want, 3e-6 * want);
      EXPECT_EQ(got, scalar().exp_sum(x.data(), n, shift, scale));
    }
  }
}

TEST_P(RowsTest, ExpIsAccurate) {
  float worst = 0;
  for (float x = -86.9f; x < 88.7f; x += 0.0137f) {
    double want = std::exp(static_cast<double>(x));
    double got = kernels().exp_sum(&x, 1, 0.0f, 1.0f);
    worst = std::max(worst, static_cast<float>(std::abs(got - want) / want));
  }
  EXPECT_LT(worst, 1.5e-7f);
  for (float x : {-87.5f, -88.0f, -90.0f, -1e4f, -3e38f, -kInf}) {
    EXPECT_EQ(kernels().exp_sum(&x, 1, 0.0f, 1.0f), 0.0f) << x;
  }
  for (float x : {88.73f, 89.0f, 1e4f, 3e38f, kInf}) {
    EXPECT_EQ(kernels().exp_sum(&x, 1, 0.0f, 1.0f), kInf) << x;
  }
  float zero = 0.0f;
  EXPECT_EQ(kernels().exp_sum(&zero, 1, 0.0f, 1.0f), 1.0f);
  float nan = kNan;
  EXPECT_TRUE(std::isnan(kernels().exp_sum(&nan, 1, 0.0f, 1.0f)));
}

DEINFER_FOR_EACH_ISA(RowsTest);

}  // namespace
}  // namespace deinfer::test
