#include "reference.h"

namespace deinfer::test {
namespace {

constexpr int kTokens = 5;
constexpr int kLdo = 45;

class EpilogueTest : public IsaTest {
 protected:
  EpilogueTest() : random_(11), tile_(kTokens * 32), up_(kTokens * 32) {
    for (std::size_t i = 0; i < kTokens * 32; ++i) {
      tile_[i] = 3.0f * random_.normal();
      up_[i] = random_.normal();
    }
    bias_ = random_.vector(32);
    up_bias_ = random_.vector(32);
  }

  /// Runs body(cols, bias or null) with arrays of exactly cols elements.
  template <typename F>
  void for_each_shape(F body) {
    for (int cols = 1; cols <= 32; ++cols) {
      std::vector<float> bias(bias_.begin(), bias_.begin() + cols);
      std::vector<float> up_bias(up_bias_.begin(), up_bias_.begin() + cols);
      SCOPED_TRACE(testing::Message() << "cols=" << cols);
      body(cols, nullptr, nullptr);
      body(cols, bias.data(), up_bias.data());
    }
  }
  double value(int i, int j, const float* bias) {
    return static_cast<double>(tile_[static_cast<std::size_t>(i * 32 + j)]) +
           (bias == nullptr ? 0.0 : bias[j]);
  }
  double up_value(int i, int j, const float* bias) {
    return static_cast<double>(up_[static_cast<std::size_t>(i * 32 + j)]) +
           (bias == nullptr ? 0.0 : bias[j]);
  }

  /// Checks out[kTokens, cols] and that nothing else was written.
  template <typename T, typename F>
  void expect_tile(const std::vector<T>& out, const std::vector<T>& before, int cols, F want) {
    for (int i = 0; i < kTokens; ++i) {
      for (int j = 0; j < kLdo; ++j) {
        auto at = static_cast<std::size_t>(i * kLdo + j);
        if (j >= cols) {
          ASSERT_TRUE(same_bits(&out[at], &before[at], sizeof(T))) << i << ", " << j;
        } else {
          double w = want(i, j);
          ASSERT_NEAR(wide(out[at]), w, TypeTraits<T>::kTolerance * (std::abs(w) + 0.5))
              << i << ", " << j;
        }
      }
    }
  }

  Random random_;
  Aligned<float> tile_;
  Aligned<float> up_;
  std::vector<float> bias_;
  std::vector<float> up_bias_;
};

TEST_P(EpilogueTest, Store) {
  for_each_shape([&](int cols, const float* bias, const float*) {
    auto want = [&](int i, int j) { return value(i, j, bias); };
    auto f32 = random_.vector<float>(kTokens * kLdo);
    auto before = f32;
    kernels().store_f32(tile_.data(), kTokens, cols, bias, f32.data(), kLdo);
    expect_tile(f32, before, cols, want);
    auto b16 = random_.vector<bf16>(kTokens * kLdo);
    auto before16 = b16;
    kernels().store_bf16(tile_.data(), kTokens, cols, bias, b16.data(), kLdo);
    expect_tile(b16, before16, cols, want);
  });
}

TEST_P(EpilogueTest, HalfTileEndsWithItsColumns) {
  // The last token's second half is the end of the tile memory: nothing may be read behind it.
  std::vector<float> out(kTokens * kLdo);
  kernels().store_f32(tile_.data() + 16, kTokens, 16, nullptr, out.data(), kLdo);
  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < 16; ++j) {
      EXPECT_EQ(out[static_cast<std::size_t>(i * kLdo + j)],
                tile_[static_cast<std::size_t>(i * 32 + 16 + j)]);
    }
  }
}

TEST_P(EpilogueTest, Add) {
  for_each_shape([&](int cols, const float* bias, const float*) {
    auto out = random_.vector<float>(kTokens * kLdo);
    auto before = out;
    kernels().add_f32(tile_.data(), kTokens, cols, bias, out.data(), kLdo);
    expect_tile(out, before, cols, [&](int i, int j) {
      return before[static_cast<std::size_t>(i * kLdo + j)] + value(i, j, bias);
    });
  });
}

/// f(gate) * up for an f of float64.
struct Gated {
  decltype(cpu::KernelTable::silu_mul_f32) to_f32;
  decltype(cpu::KernelTable::silu_mul_bf16) to_bf16;
  double (*exact)(double);
};

Gated silu_of(const cpu::KernelTable& kernels) {
  return {kernels.silu_mul_f32, kernels.silu_mul_bf16, silu};
}
Gated gelu_of(const cpu::KernelTable& kernels) {
  return {kernels.gelu_tanh_mul_f32, kernels.gelu_tanh_mul_bf16, gelu_tanh};
}

TEST_P(EpilogueTest, GatedMul) {
  for (const Gated& gated : {silu_of(kernels()), gelu_of(kernels())}) {
    for_each_shape([&](int cols, const float* bias, const float* up_bias) {
      auto want = [&](int i, int j) {
        return gated.exact(value(i, j, bias)) * up_value(i, j, up_bias);
      };
      auto f32 = random_.vector<float>(kTokens * kLdo);
      auto before = f32;
      gated.to_f32(tile_.data(), up_.data(), kTokens, cols, bias, up_bias, f32.data(), kLdo);
      expect_tile(f32, before, cols, want);
      auto b16 = random_.vector<bf16>(kTokens * kLdo);
      auto before16 = b16;
      gated.to_bf16(tile_.data(), up_.data(), kTokens, cols, bias, up_bias, b16.data(), kLdo);
      expect_tile(b16, before16, cols, want);
    });
  }
}

TEST_P(EpilogueTest, GatesOfExtremeValues) {
  std::vector<float> x = {0.0f,  -0.0f,  1e-30f, -1e-30f, 20.0f, -20.0f, 80.0f, -80.0f,
                          90.0f, -90.0f, 1e4f,   -1e4f,   3e38f, -3e38f, kInf,  kNan};
  Aligned<float> gate(32, 0.0f);
  Aligned<float> up(32, 1.0f);
  std::copy(x.begin(), x.end(), gate.data());
  for (const Gated& gated : {silu_of(kernels()), gelu_of(kernels())}) {
    std::vector<float> out(16);
    gated.to_f32(gate.data(), up.data(), 1, 16, nullptr, nullptr, out.data(), 16);
    for (std::size_t i = 0; i + 2 < 16; ++i) {
      double want = gated.exact(x[i]);
      EXPECT_NEAR(out[i], want, 4e-7 * std::abs(want) + 1e-37) << x[i];
    }
    EXPECT_EQ(out[14], kInf);
    EXPECT_TRUE(std::isnan(out[15]));
  }
}

TEST_P(EpilogueTest, GeluIsExactInItsTail) {
  // The error of the exponent, about that of its size, is all that is added to that of silu.
  Aligned<float> gate(32);
  Aligned<float> up(32, 1.0f);
  std::vector<float> out(32);
  for (int block = 0; block < 64; ++block) {
    for (int j = 0; j < 32; ++j) {
      gate[static_cast<std::size_t>(j)] = -7.0f + 0.0061f * static_cast<float>(32 * block + j);
    }
    kernels().gelu_tanh_mul_f32(gate.data(), up.data(), 1, 32, nullptr, nullptr, out.data(), 32);
    for (std::size_t j = 0; j < 32; ++j) {
      double x = gate[j];
      double exponent = 1.6 * std::abs(x + 0.0447 * x * x * x);
      ASSERT_NEAR(out[j], gelu_tanh(x), (3e-7 + 1.8e-7 * exponent) * std::abs(gelu_tanh(x))) << x;
    }
  }
}

TEST_P(EpilogueTest, BitsOfGatesDoNotDependOnTheInstructionSet) {
  Aligned<float> gate(32 * 512);
  Aligned<float> up(32 * 512, 1.0f);
  for (std::size_t i = 0; i < 32 * 512; ++i) gate[i] = 20.0f * random_.normal();
  std::vector<float> a(32 * 512), b(32 * 512);
  for (auto gated : {silu_of, gelu_of}) {
    gated(scalar()).to_f32(gate.data(), up.data(), 512, 32, nullptr, nullptr, a.data(), 32);
    gated(kernels()).to_f32(gate.data(), up.data(), 512, 32, nullptr, nullptr, b.data(), 32);
    EXPECT_TRUE(same_bits(a.data(), b.data(), a.size() * sizeof(float)));
  }
}

TEST_P(EpilogueTest, Relu) {
  for_each_shape([&](int cols, const float* bias, const float*) {
    auto want = [&](int i, int j) { return std::max(value(i, j, bias), 0.0); };
    auto f32 = random_.vector<float>(kTokens * kLdo);
    auto before = f32;
    kernels().relu_f32(tile_.data(), kTokens, cols, bias, f32.data(), kLdo);
    expect_tile(f32, before, cols, want);
    auto b16 = random_.vector<bf16>(kTokens * kLdo);
    auto before16 = b16;
    kernels().relu_bf16(tile_.data(), kTokens, cols, bias, b16.data(), kLdo);
    expect_tile(b16, before16, cols, want);
  });
  tile_[0] = kNan;
  tile_[1] = -kInf;
  std::vector<float> out(2);
  kernels().relu_f32(tile_.data(), 1, 2, nullptr, out.data(), 2);
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[1], 0.0f);
}

TEST_P(EpilogueTest, Rope) {
  constexpr std::ptrdiff_t kLd = 19;
  std::vector<float> cosines, sines;
  for (std::ptrdiff_t i = 0; i < kTokens * kLd; ++i) {
    float angle = random_.normal();
    cosines.push_back(std::cos(angle));
    sines.push_back(std::sin(angle));
  }
  const float* some_bias = bias_.data();
  for (const float* bias : {static_cast<const float*>(nullptr), some_bias}) {
    Aligned<float> c(kTokens * 32);
    std::copy(tile_.data(), tile_.data() + kTokens * 32, c.data());
    kernels().rope_tile(c.data(), kTokens, bias, cosines.data(), sines.data(), kLd);
    for (int i = 0; i < kTokens; ++i) {
      for (int j = 0; j < 16; ++j) {
        double cosine = cosines[static_cast<std::size_t>(i * kLd + j)];
        double sine = sines[static_cast<std::size_t>(i * kLd + j)];
        double a = value(i, j, bias), b = value(i, 16 + j, bias);
        EXPECT_NEAR(c[static_cast<std::size_t>(i * 32 + j)], a * cosine - b * sine, 1e-5);
        EXPECT_NEAR(c[static_cast<std::size_t>(i * 32 + 16 + j)], b * cosine + a * sine, 1e-5);
      }
    }
  }
}

template <typename T>
void expect_cache_writes(const cpu::KernelTable& kernels, Random& random) {
  auto write_k = sizeof(T) == 4 ? kernels.write_k_f32 : kernels.write_k_bf16;
  auto write_v = sizeof(T) == 4 ? kernels.write_v_f32 : kernels.write_v_bf16;
  constexpr int kBlock = 48;
  for (auto [head_dim, cols, d0] :
       {std::array{4, 4, 0}, {24, 8, 16}, {80, 32, 48}, {64, 16, 32}, {40, 7, 5}, {64, 25, 1}}) {
    for (int offset : {0, 15, 16, 47}) {
      auto size = static_cast<std::size_t>(kBlock * head_dim);
      auto k = random.vector<T>(size), v = random.vector<T>(size);
      auto k_want = k, v_want = v;
      auto values = random.vector(static_cast<std::size_t>(cols));
      for (int j = 0; j < cols; ++j) {
        T element = TypeTraits<T>::from(values[static_cast<std::size_t>(j)]);
        k_want[static_cast<std::size_t>((offset / 16 * head_dim + d0 + j) * 16 + offset % 16)] =
            element;
        v_want[static_cast<std::size_t>(offset * head_dim + d0 + j)] = element;
      }
      write_k(values.data(), cols, d0, head_dim, offset, k.data());
      write_v(values.data(), cols, d0, head_dim, offset, v.data());
      EXPECT_TRUE(same_bits(k.data(), k_want.data(), size * sizeof(T)));
      EXPECT_TRUE(same_bits(v.data(), v_want.data(), size * sizeof(T)));
    }
  }
}

TEST_P(EpilogueTest, CacheWrites) {
  expect_cache_writes<float>(kernels(), random_);
  expect_cache_writes<bf16>(kernels(), random_);
}

TEST_P(EpilogueTest, RoundsToBf16LikeTheLibrary) {
  Aligned<float> c(32);
  std::vector<float> special = {1.00390625f, 1.01171875f, -1.0039064f, kInf,
                                -kInf,       3.4e38f,     -0.0f,       1e-30f};
  std::copy(special.begin(), special.end(), c.data());
  for (std::size_t j = special.size(); j < 32; ++j) c[j] = random_.normal();
  c[31] = kNan;
  std::vector<bf16> out(32);
  kernels().store_bf16(c.data(), 1, 32, nullptr, out.data(), 32);
  for (std::size_t j = 0; j < 32; ++j) EXPECT_EQ(out[j].bits, to_bf16(c[j]).bits) << j;
}

TEST_P(EpilogueTest, ArgmaxTile) {
  tile_[2 * 32 + 3] = kNan;
  for (int j = 0; j < 32; ++j) tile_[static_cast<std::size_t>(3 * 32 + j)] = j % 5 == 4 ? 9 : 1;
  for_each_shape([&](int cols, const float* bias, const float*) {
    std::vector<float> best(kTokens, 0.25f);
    std::vector<int> index(kTokens, 7);
    kernels().argmax_tile(tile_.data(), kTokens, cols, bias, 6400, best.data(), index.data());
    kernels().argmax_tile(tile_.data(), kTokens, cols, bias, 640, best.data(), index.data());
    // The lower of equal columns wins, though it comes later.
    for (int i = 0; i < kTokens; ++i) {
      float want = 0.25f;
      int want_index = 7;
      for (int j = 0; j < cols; ++j) {
        float v = tile_[static_cast<std::size_t>(i * 32 + j)] + (bias == nullptr ? 0 : bias[j]);
        if (v > want) {
          want = v;
          want_index = 640 + j;
        }
      }
      EXPECT_EQ(best[static_cast<std::size_t>(i)], want) << i;
      EXPECT_EQ(index[static_cast<std::size_t>(i)], want_index) << i;
    }
  });
}

DEINFER_FOR_EACH_ISA(EpilogueTest);

}  // namespace
}  // namespace deinfer::test
