// fp64 references of the CPU kernels, random data, and one tolerance per data type.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "base/bf16.h"
#include "base/cpu_features.h"
#include "kernels/cpu/kernel_table.h"

namespace deinfer::test {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInf = std::numeric_limits<float>::infinity();

/// Element types of weights, activations and caches.
template <typename T>
struct TypeTraits;
template <>
struct TypeTraits<float> {
  static float from(float v) { return v; }
  static double wide(float v) { return v; }
  static constexpr double kTolerance = 2e-6;  // of a result, relative to the scale of its terms
};
template <>
struct TypeTraits<bf16> {
  static bf16 from(float v) { return to_bf16(v); }
  static double wide(bf16 v) { return to_float(v); }
  static constexpr double kTolerance = 4e-3;  // half a unit in the last place of bf16
};

/// Exact sums are compared at this tolerance whatever the operands' type.
inline constexpr double kSumTolerance = TypeTraits<float>::kTolerance;

template <typename T>
double wide(T v) {
  return TypeTraits<T>::wide(v);
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  float normal() { return distribution_(engine_); }
  int below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }

  template <typename T = float>
  std::vector<T> vector(std::size_t count, float scale = 1.0f) {
    std::vector<T> out(count);
    for (T& v : out) v = TypeTraits<T>::from(scale * normal());
    return out;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> distribution_;
};

/// A vector whose first element is 64-byte aligned.
template <typename T>
class Aligned {
 public:
  explicit Aligned(std::size_t count, T fill = T{}) : memory_(count + 64 / sizeof(T), fill) {
    auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    data_ = memory_.data() + (64 - address % 64) % 64 / sizeof(T);
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  T* data() { return data_; }
  T& operator[](std::size_t i) { return data_[i]; }

 private:
  std::vector<T> memory_;
  T* data_;
};

inline bool same_bits(const void* a, const void* b, std::size_t bytes) {
  return bytes == 0 || std::memcmp(a, b, bytes) == 0;
}

inline double silu(double x) { return x / (1.0 + std::exp(-x)); }
/// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), where 1 + tanh(u) does not cancel.
inline double gelu_tanh(double x) {
  double u = std::sqrt(2.0 / std::numbers::pi) * (x + 0.044715 * x * x * x);
  return x / (1.0 + std::exp(-2.0 * u));
}

/// A test body per instruction set; those that this CPU lacks are skipped.
class IsaTest : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override {
    std::vector<Isa> supported = detect_isas();
    if (std::find(supported.begin(), supported.end(), GetParam()) == supported.end()) {
      GTEST_SKIP() << "this CPU lacks " << isa_name(GetParam());
    }
  }
  const cpu::KernelTable& kernels() const { return cpu::kernels_for(GetParam()); }
  const cpu::KernelTable& scalar() const { return cpu::kernels_for(Isa::kScalar); }
};

inline std::string isa_test_name(const testing::TestParamInfo<Isa>& info) {
  return std::string(isa_name(info.param));
}

#define DEINFER_FOR_EACH_ISA(Fixture)                                                           \
  INSTANTIATE_TEST_SUITE_P(                                                                     \
      AllIsas, Fixture,                                                                         \
      testing::Values(Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmxBf16), \
      isa_test_name)

}  // namespace deinfer::test
