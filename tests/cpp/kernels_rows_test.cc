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

TEST_P(RowsTest, LayerNorm) {
  Random random(7);
  for (int n : kSizes) {
    SCOPED_TRACE(n);
    auto size = static_cast<std::size_t>(n);
    auto x = random.vector(size, 3.0f), gain = random.vector(size), bias = random.vector(size);
    for (float& v : x) v += 40.0f;  // a variance from the mean of squares would lose its bits
    double mean = 0, squares = 0;
    for (float v : x) mean += static_cast<double>(v) / n;
    for (float v : x) squares += (v - mean) * (v - mean);
    double scale = 1.0 / std::sqrt(squares / n + 1e-5);
    std::vector<float> f32(size);
    std::vector<bf16> b16(size);
    kernels().layer_norm_f32(x.data(), gain.data(), bias.data(), n, 1e-5f, f32.data());
    kernels().layer_norm_bf16(x.data(), gain.data(), bias.data(), n, 1e-5f, b16.data());
    for (std::size_t j = 0; j < size; ++j) {
      // The mean of numbers near 40 has an error of some units in their last place.
      double tolerance = 3e-5 * scale * std::abs(gain[j]) + 2e-6 * (1 + std::abs(bias[j]));
      EXPECT_NEAR(f32[j], (x[j] - mean) * scale * gain[j] + bias[j], tolerance);
      EXPECT_EQ(b16[j].bits, to_bf16(f32[j]).bits);
    }
    std::vector<float> same(size);
    scalar().layer_norm_f32(x.data(), gain.data(), bias.data(), n, 1e-5f, same.data());
    EXPECT_TRUE(same_bits(same.data(), f32.data(), size * sizeof(float)));
    kernels().layer_norm_f32(x.data(), gain.data(), bias.data(), n, 1e-5f, x.data());  // in place
    EXPECT_TRUE(same_bits(x.data(), f32.data(), size * sizeof(float)));
  }
}

TEST_P(RowsTest, CopyAndAdd) {
  Random random(8);
  for (int n : kSizes) {
    SCOPED_TRACE(n);
    auto size = static_cast<std::size_t>(n);
    auto x = random.vector(size), sum = random.vector(size);
    auto before = sum;
    std::vector<float> f32(size);
    std::vector<bf16> b16(size);
    kernels().copy_row_f32(x.data(), n, f32.data());
    kernels().copy_row_bf16(x.data(), n, b16.data());
    kernels().add_row(x.data(), n, sum.data());
    for (std::size_t j = 0; j < size; ++j) {
      EXPECT_EQ(f32[j], x[j]);
      EXPECT_EQ(b16[j].bits, to_bf16(x[j]).bits);
      EXPECT_EQ(sum[j], before[j] + x[j]);
    }
  }
}

TEST_P(RowsTest, GainsCentresAndScales) {
  Random random(9);
  for (int n : kSizes) {
    SCOPED_TRACE(n);
    auto size = static_cast<std::size_t>(n);
    auto x = random.vector(size), gain = random.vector(size);
    for (float& v : x) v += 4.0f;
    double mean = 0, squares = 0, distances = 0;
    for (float v : x) mean += static_cast<double>(v) / n;
    for (float v : x) squares += static_cast<double>(v) * v;
    for (float v : x) distances += (v - mean) * (v - mean);
    std::vector<float> gained(size), centred(size), scaled = x;
    std::vector<bf16> gained16(size), centred16(size);
    float statistics[2], statistics16[2];
    EXPECT_NEAR(kernels().apply_gain_f32(x.data(), gain.data(), n, gained.data()), squares,
                1e-6 * squares);
    kernels().apply_gain_bf16(x.data(), gain.data(), n, gained16.data());
    kernels().center_row_f32(x.data(), gain.data(), n, centred.data(), statistics);
    kernels().center_row_bf16(x.data(), gain.data(), n, centred16.data(), statistics16);
    kernels().scale_row(scaled.data(), n, 0.3f);
    EXPECT_TRUE(same_bits(statistics, statistics16, sizeof statistics));
    EXPECT_NEAR(statistics[0], mean, 4e-6);
    EXPECT_NEAR(statistics[1], distances, 1e-5 * distances + 1e-9);
    for (std::size_t j = 0; j < size; ++j) {
      EXPECT_EQ(gained[j], x[j] * gain[j]);
      EXPECT_EQ(gained16[j].bits, to_bf16(gained[j]).bits);
      EXPECT_NEAR(centred[j], (x[j] - mean) * gain[j], 4e-6 * std::abs(gain[j]) + 1e-6);
      EXPECT_EQ(centred16[j].bits, to_bf16(centred[j]).bits);
      EXPECT_EQ(scaled[j], x[j] * 0.3f);
    }
    kernels().apply_gain_f32(x.data(), gain.data(), n, x.data());  // in place
    EXPECT_EQ(x, gained);
  }
  float statistics[2];
  kernels().center_row_f32(nullptr, nullptr, 0, nullptr, statistics);
  EXPECT_EQ(statistics[0], 0.0f);
  EXPECT_EQ(statistics[1], 0.0f);
}

TEST_P(RowsTest, SumsOfParts) {
  Random random(10);
  constexpr int kParts = 3, kRows = 2;
  for (int n : kSizes) {
    SCOPED_TRACE(n);
    auto size = static_cast<std::size_t>(n);
    std::vector<std::vector<float>> parts;
    std::vector<const float*> pointers;
    for (int p = 0; p < kParts; ++p) parts.push_back(random.vector(size * kRows));
    for (const auto& part : parts) pointers.push_back(part.data());
    auto scale = random.vector(kRows), shifts = random.vector(kRows * kParts);
    auto gain = random.vector(size * kParts), bias = random.vector(size);
    std::vector<float> sums(size * kRows), centred(size * kRows);
    std::vector<bf16> sums16(size * kRows), centred16(size * kRows);
    kernels().sum_parts_f32(pointers.data(), kParts, n, kRows, n, scale.data(), sums.data(), n);
    kernels().sum_parts_bf16(pointers.data(), kParts, n, kRows, n, scale.data(), sums16.data(), n);
    const cpu::Centering centering{scale.data(), shifts.data(), gain.data(), n, bias.data()};
    kernels().sum_centered_parts_f32(pointers.data(), kParts, n, kRows, n, centering,
                                     centred.data(), n);
    kernels().sum_centered_parts_bf16(pointers.data(), kParts, n, kRows, n, centering,
                                      centred16.data(), n);
    for (std::size_t i = 0; i < size * kRows; ++i) {
      const std::size_t row = i / size, col = i % size;
      double sum = 0, corrected = 0;
      for (std::size_t p = 0; p < kParts; ++p) {
        sum += parts[p][i];
        corrected += parts[p][i] + static_cast<double>(shifts[row * kParts + p]) *
                                       static_cast<double>(gain[p * size + col]);
      }
      EXPECT_NEAR(sums[i], scale[row] * sum, 1e-5);
      EXPECT_NEAR(centred[i], scale[row] * corrected + bias[col], 1e-5);
      EXPECT_EQ(sums16[i].bits, to_bf16(sums[i]).bits);
      EXPECT_EQ(centred16[i].bits, to_bf16(centred[i]).bits);
    }
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

TEST_P(RowsTest, ExpIsAccurate) {
  auto exp_of = [&](float x) {
    float sum = 0;
    kernels().exp_blocks(&x, 1, 0.0f, 1.0f, &sum, nullptr);
    return sum;
  };
  float worst = 0;
  for (float x = -86.9f; x < 88.7f; x += 0.0137f) {
    double want = std::exp(static_cast<double>(x));
    double got = exp_of(x);
    worst = std::max(worst, static_cast<float>(std::abs(got - want) / want));
  }
  EXPECT_LT(worst, 1.5e-7f);
  for (float x : {-87.5f, -88.0f, -90.0f, -1e4f, -3e38f, -kInf}) {
    EXPECT_EQ(exp_of(x), 0.0f) << x;
  }
  for (float x : {88.73f, 89.0f, 1e4f, 3e38f, kInf}) {
    EXPECT_EQ(exp_of(x), kInf) << x;
  }
  EXPECT_EQ(exp_of(0.0f), 1.0f);
  EXPECT_EQ(exp_of(kNan), 0.0f) << "where weights are summed, NaN has none";
}

/// Row shapes of the kernels that skip NaN: noise, ties, and a mixture of special values.
std::vector<float> special_row(Random& random, std::size_t size, int shape) {
  std::vector<float> x = random.vector(size, 4.0f);
  constexpr float kSpecial[] = {kNan, kInf, -kInf, 0.0f, -0.0f, 1e-42f, 3e38f, -3e38f};
  for (float& v : x) {
    if (shape == 1) v = static_cast<float>(random.below(3));
    if (shape == 2 && random.below(2) == 0) v = kSpecial[random.below(8)];
  }
  return x;
}

TEST_P(RowsTest, SoftCap) {
  Random random(12);
  for (float cap : {1.0f, 30.0f}) {
    for (int n : kSizes) {
      SCOPED_TRACE(n);
      std::vector<float> x;
      for (int j = 0; j < n; ++j) {  // of all sizes, so that a relative error is one everywhere
        x.push_back(cap * std::pow(10.0f, -7.0f + 0.5f * static_cast<float>(random.below(20))) *
                    random.normal());
      }
      std::vector<float> out = x, same = x;
      kernels().soft_cap(out.data(), n, cap);
      for (std::size_t j = 0; j < x.size(); ++j) {
        double want = cap * std::tanh(static_cast<double>(x[j]) / cap);
        ASSERT_NEAR(out[j], want, 4e-7 * std::abs(want)) << x[j];
        ASSERT_LE(std::abs(out[j]), cap);
      }
      scalar().soft_cap(same.data(), n, cap);
      EXPECT_TRUE(same_bits(same.data(), out.data(), x.size() * sizeof(float)));
    }
  }
  std::vector<float> special = {kInf, -kInf, kNan, 0.0f, -0.0f, 3e38f, -3e38f};
  kernels().soft_cap(special.data(), static_cast<int>(special.size()), 30.0f);
  EXPECT_EQ(special[0], 30.0f);
  EXPECT_EQ(special[1], -30.0f);
  EXPECT_TRUE(std::isnan(special[2]));
  EXPECT_EQ(special[3], 0.0f);
  EXPECT_EQ(special[4], 0.0f);
  EXPECT_EQ(special[5], 30.0f);
  EXPECT_EQ(special[6], -30.0f);
}

TEST_P(RowsTest, SoftCapKeepsTheOrder) {
  std::vector<float> x;
  for (int j = 0; j < 20000; ++j) x.push_back(-60.0f + 0.006f * static_cast<float>(j));
  kernels().soft_cap(x.data(), static_cast<int>(x.size()), 30.0f);
  for (std::size_t j = 1; j < x.size(); ++j) ASSERT_GE(x[j], x[j - 1]) << j;
}

TEST_P(RowsTest, GroupMaxima) {
  Random random(4);
  for (int n : {1, 2, 15, 16, 17, 1000, 1023, 1024, 1025, 5000}) {
    for (int shape = 0; shape < 3; ++shape) {
      SCOPED_TRACE(testing::Message() << n << " shape " << shape);
      auto x = special_row(random, static_cast<std::size_t>(n), shape);
      auto groups = static_cast<std::size_t>((n + cpu::kMaximaSpan - 1) / cpu::kMaximaSpan) *
                    static_cast<std::size_t>(cpu::kLanes);
      std::vector<float> got(groups, kNan), same(groups), want(groups, -kInf);
      for (int j = 0; j < n; ++j) {
        float& group =
            want[static_cast<std::size_t>(j / cpu::kMaximaSpan * cpu::kLanes + j % cpu::kLanes)];
        if (x[static_cast<std::size_t>(j)] > group) group = x[static_cast<std::size_t>(j)];
      }
      kernels().group_maxima(x.data(), n, got.data());
      EXPECT_EQ(got, want);
      scalar().group_maxima(x.data(), n, same.data());
      EXPECT_TRUE(same_bits(got.data(), same.data(), groups * sizeof(float)));
    }
  }
}

TEST_P(RowsTest, Select) {
  Random random(5);
  for (int n : kSizes) {
    auto size = static_cast<std::size_t>(n);
    for (int shape = 0; shape < 3; ++shape) {
      auto x = special_row(random, size, shape);
      std::vector<std::int32_t> ids(size);
      for (std::size_t j = 0; j < size; ++j) ids[j] = static_cast<std::int32_t>(3 * j + 1);
      for (auto compare : {cpu::Compare::kAbove, cpu::Compare::kAtLeast, cpu::Compare::kBelow}) {
        for (float bound : {0.0f, 1.0f, -2.5f, kInf, -kInf, x[size / 2], kNan}) {
          SCOPED_TRACE(testing::Message() << n << " shape " << shape << " compare "
                                          << static_cast<int>(compare) << " bound " << bound);
          std::vector<float> want;
          std::vector<std::int32_t> want_places, want_ids;
          for (std::size_t j = 0; j < size; ++j) {
            bool takes = compare == cpu::Compare::kAbove     ? x[j] > bound
                         : compare == cpu::Compare::kAtLeast ? x[j] >= bound
                                                             : x[j] < bound;
            if (!takes) continue;
            want.push_back(x[j]);
            want_places.push_back(static_cast<std::int32_t>(j));
            want_ids.push_back(ids[j]);
          }
          // Exactly as long as promised: the sanitizers see a write after the end.
          std::vector<float> values(want.size());
          std::vector<std::int32_t> places(want.size());
          auto count = static_cast<int>(want.size());
          ASSERT_EQ(
              kernels().select(x.data(), nullptr, n, compare, bound, values.data(), places.data()),
              count);
          EXPECT_TRUE(same_bits(values.data(), want.data(), want.size() * sizeof(float)));
          EXPECT_EQ(places, want_places);
          // In place, behind an offset, and nothing touched behind the selected ones.
          std::vector<float> row(3, 7.0f);
          std::vector<std::int32_t> row_ids(3, 7);
          row.insert(row.end(), x.begin(), x.end());
          row_ids.insert(row_ids.end(), ids.begin(), ids.end());
          std::vector<std::int32_t> after(row_ids.begin() + 2 + count, row_ids.end());
          ASSERT_EQ(kernels().select(row.data() + 3, row_ids.data() + 3, n, compare, bound,
                                     row.data() + 2, row_ids.data() + 2),
                    count);
          EXPECT_TRUE(same_bits(row.data() + 2, want.data(), want.size() * sizeof(float)));
          row_ids.erase(row_ids.begin(), row_ids.begin() + 2);
          want_ids.insert(want_ids.end(), after.begin(), after.end());
          EXPECT_EQ(row_ids, want_ids);
        }
      }
    }
  }
}

TEST_P(RowsTest, ExpBlocks) {
  Random random(6);
  for (int n : {1, 2, 15, 16, 17, 255, 256, 257, 1000, 4096}) {
    SCOPED_TRACE(n);
    auto size = static_cast<std::size_t>(n);
    auto blocks = static_cast<std::size_t>((n + cpu::kSumBlock - 1) / cpu::kSumBlock);
    auto x = random.vector(size, 8.0f);
    for (float& v : x) v = std::min(v, 30.0f);
    x[size / 2] = -kInf;
    if (n > 2) x[size - 1] = kNan;
    x[0] = 30.0f;
    for (float scale : {1.0f, 0.03f, 3e38f}) {
      std::vector<float> sums(blocks), weights(size), same_sums(blocks), same_weights(size);
      kernels().exp_blocks(x.data(), n, 30.0f, scale, sums.data(), weights.data());
      for (std::size_t b = 0; b < blocks; ++b) {
        double sum = 0;
        for (std::size_t j = b * cpu::kSumBlock; j < std::min(size, (b + 1) * cpu::kSumBlock);
             ++j) {
          double want =
              std::isnan(x[j]) ? 0 : std::exp((x[j] - 30.0f) * static_cast<double>(scale));
          // The exponent is rounded, to 2^-24 of at most 90.
          EXPECT_NEAR(weights[j], want, 6e-6 * want + 3e-38);
          sum += want;
        }
        EXPECT_NEAR(sums[b], sum, 6e-6 * sum + 3e-38);
      }
      scalar().exp_blocks(x.data(), n, 30.0f, scale, same_sums.data(), same_weights.data());
      EXPECT_TRUE(same_bits(sums.data(), same_sums.data(), blocks * sizeof(float)));
      EXPECT_TRUE(same_bits(weights.data(), same_weights.data(), size * sizeof(float)));
      kernels().exp_blocks(x.data(), n, 30.0f, scale, same_sums.data(), nullptr);
      EXPECT_TRUE(same_bits(sums.data(), same_sums.data(), blocks * sizeof(float)));
    }
  }
}

DEINFER_FOR_EACH_ISA(RowsTest);

}  // namespace
}  // namespace deinfer::test
