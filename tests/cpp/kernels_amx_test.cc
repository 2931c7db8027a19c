// panel_gemm_bf16 by AMX tiles. The template runs on a software model of the tiles; the machine
// code of isa_amx_bf16.cc runs on the CPU or, where that lacks AMX, with each AMX instruction
// trapped and executed by the same model.
#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <numeric>
#include <set>

#include "amx_model.h"
#include "amx_trap.h"
#include "deinfer/error.h"
#include "kernels/cpu/packing.h"
#include "reference.h"

namespace deinfer::test {
namespace {

constexpr std::ptrdiff_t kC = cpu::kPanelRows;

bool supported(Isa isa) {
  std::vector<Isa> isas = detect_isas();
  return std::find(isas.begin(), isas.end(), isa) != isas.end();
}

/// Memory between pages that fault, flush with the one behind it (or, `at_front`, before it).
template <typename T>
class Guarded {
 public:
  Guarded(std::size_t count, bool at_front) {
    constexpr std::size_t kPage = 4096;
    const std::size_t bytes = count * sizeof(T);
    const std::size_t inner = (bytes + kPage - 1) / kPage * kPage;
    size_ = inner + 2 * kPage;
    void* all = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    all_ = static_cast<char*>(all);
    mprotect(all_ + kPage, inner, PROT_READ | PROT_WRITE);
    data_ = reinterpret_cast<T*>(all_ + kPage + (at_front ? 0 : inner - bytes));
  }
  ~Guarded() { munmap(all_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  T* data() { return data_; }

 private:
  char* all_ = nullptr;
  std::size_t size_ = 0;
  T* data_ = nullptr;
};

enum class Backend { kModel, kMachineCode };

/// x[m, k] and W[n, k] with real packing. x rows are ldx apart, zero in [k, k_pad) and NaN beyond.
struct AmxCase {
  AmxCase(int m_, int k_, int n_, int panel_rows) : m(m_), k(k_), n(n_) {
    Random random(static_cast<unsigned>(m * 7919 + k * 131 + n));
    float scale = 1.0f / std::sqrt(static_cast<float>(k));
    weights = random.vector<bf16>(static_cast<std::size_t>(n * k), scale);
    packed = cpu::allocate_packed(DType::kBFloat16, n, k, panel_rows);
    TensorView view{weights.data(), DType::kBFloat16, n, k, k};
    cpu::pack_rows(view, {}, 0, packed.num_panels(), packed);
    ldx = packed.k_pad + m % 3 * 8;
    x.assign(static_cast<std::size_t>(m * ldx), to_bf16(kNan));
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < packed.k_pad; ++j) at(i, j) = to_bf16(j < k ? random.normal() : 0.0f);
    }
  }
  bf16& at(int i, int j) { return x[static_cast<std::size_t>(i * ldx + j)]; }
  const bf16* panel(int p) const { return static_cast<const bf16*>(packed.panel(p)); }
  double exact(int i, int row) {
    double sum = 0;
    for (int j = 0; j < k && row < n; ++j) {
      sum += wide(at(i, j)) * wide(weights[static_cast<std::size_t>(row * k + j)]);
    }
    return sum;
  }

  int m, k, n;
  std::ptrdiff_t ldx = 0;
  std::vector<bf16> weights;
  std::vector<bf16> x;
  cpu::PackedMatrix packed;
};

class AmxTest : public testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    if (GetParam() == Backend::kModel || supported(Isa::kAmxBf16)) return;
    // Around the tiles the compiler uses the vectors of AVX-512.
    if (!supported(Isa::kAvx512Bf16)) GTEST_SKIP() << "this CPU lacks avx512_bf16";
  }

  /// panel_gemm_bf16; expects no fault, one configuration and no tiles in use after.
  void gemm(const bf16* x, std::ptrdiff_t ldx, int m, const bf16* panel, int rows, int k_pad,
            const void* next, float* c) {
    if (GetParam() == Backend::kModel) {
      TileModel model;
      cpu::amx_panel_gemm(model, x, ldx, m, panel, rows, k_pad, next, c);
      expect_sound(model);
    } else if (supported(Isa::kAmxBf16)) {
      machine_code_(x, ldx, m, panel, rows, k_pad, next, c);
    } else {
      AmxTrap trap;
      machine_code_(x, ldx, m, panel, rows, k_pad, next, c);
      expect_sound(trap.model());
      EXPECT_GT(trap.instructions(), 5);
    }
  }

  /// c[count, 32] of the tokens [first, first + count) and one panel, NaN where nothing is written.
  std::vector<float> run(const AmxCase& test, int panel, int first, int count) {
    Aligned<float> c(static_cast<std::size_t>(count * kC), kNan);
    gemm(test.x.data() + first * test.ldx, test.ldx, count, test.panel(panel),
         test.packed.rows_of(panel), test.packed.k_pad, nullptr, c.data());
    return {c.data(), c.data() + count * kC};
  }

  void expect_matches_fp64(int m, int k, int n, int panel_rows) {
    SCOPED_TRACE(testing::Message()
                 << "m=" << m << " k=" << k << " n=" << n << " panel_rows=" << panel_rows);
    AmxCase test(m, k, n, panel_rows);
    double worst = 0;
    for (int p = 0; p < test.packed.num_panels(); ++p) {
      std::vector<float> c = run(test, p, 0, m);
      const int rows = test.packed.rows_of(p);
      for (int i = 0; i < m; ++i) {
        for (int row = 0; row < kC; ++row) {
          const float got = c[static_cast<std::size_t>(i * kC + row)];
          if (row < rows) {
            double error = std::abs(got - test.exact(i, p * panel_rows + row));
            worst = std::isnan(error) ? kInf : std::max(worst, error);
          } else {
            ASSERT_TRUE(std::isnan(got)) << "column " << row << " is beyond the panel";
          }
        }
      }
    }
    EXPECT_LT(worst, kSumTolerance * std::sqrt(static_cast<double>(k)));
  }

 private:
  static void expect_sound(const TileModel& model) {
    EXPECT_EQ(model.fault(), nullptr) << model.fault();
    EXPECT_EQ(model.configurations(), 1);
    EXPECT_FALSE(model.in_use());
  }

  decltype(cpu::KernelTable::panel_gemm_bf16) machine_code_ =
      cpu::kernels_for(Isa::kAmxBf16).panel_gemm_bf16;
};

TEST_P(AmxTest, MatchesFp64ForEveryM) {
  for (int m = 1; m <= 70; ++m) {
    expect_matches_fp64(m, 72, 48, 32);
    expect_matches_fp64(m, 56, 16, 16);
  }
  expect_matches_fp64(512, 40, 32, 32);
}

TEST_P(AmxTest, MatchesFp64ForEveryK) {
  for (int k = 2; k <= 520; k += k < 80 ? 2 : 22) {
    expect_matches_fp64(3, k, 32, 32);
    expect_matches_fp64(19, k, 24, 32);
  }
  for (int k : {1, 7, 31, 33, 61, 114, 331, 4099}) {
    expect_matches_fp64(2, k, 16, 32);
    expect_matches_fp64(33, k, 32, 32);
  }
}

TEST_P(AmxTest, MatchesFp64ForEveryN) {
  for (int n = 1; n <= 100; ++n) {
    for (int panel_rows : {16, 32}) expect_matches_fp64(n % 40 + 1, 40, n, panel_rows);
  }
}

TEST_P(AmxTest, BitsDependNeitherOnMNorOnThePosition) {
  constexpr int kTokens = 70;
  for (int rows : {8, 16, 24, 32}) {
    for (int k : {61, 96}) {
      AmxCase test(kTokens, k, rows, 32);
      std::vector<float> all = run(test, 0, 0, kTokens);
      for (int m = 1; m < kTokens; ++m) {
        for (int first : {0, 1, 5, kTokens - m}) {
          if (first + m > kTokens) continue;
          std::vector<float> part = run(test, 0, first, m);
          for (int i = 0; i < m; ++i) {
            ASSERT_TRUE(same_bits(&part[static_cast<std::size_t>(i * kC)],
                                  &all[static_cast<std::size_t>((first + i) * kC)],
                                  static_cast<std::size_t>(rows) * sizeof(float)))
                << "m=" << m << " first=" << first << " token=" << i << " k=" << k;
          }
        }
      }
    }
  }
}

TEST_P(AmxTest, TouchesOnlyItsOperands) {
  for (int rows : {8, 16, 24, 32}) {
    for (int k : {2, 24, 32, 58, 104, 160}) {
      for (int m : {1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65}) {
        for (bool at_front : {false, true}) {
          AmxCase test(m, k, rows, 32);
          const auto x_count = static_cast<std::size_t>((m - 1) * test.ldx + test.packed.k_pad);
          const auto w_count = static_cast<std::size_t>(rows * test.packed.k_pad);
          Guarded<bf16> x(x_count, at_front);
          Guarded<bf16> w(w_count, at_front);
          Guarded<float> c(static_cast<std::size_t>(m * kC), at_front);
          std::copy_n(test.x.data(), x_count, x.data());
          std::copy_n(test.panel(0), w_count, w.data());
          std::fill_n(c.data(), m * kC, kNan);
          // Its page behind faults, which prefetching must not care about.
          gemm(x.data(), test.ldx, m, w.data(), rows, test.packed.k_pad, w.data() + w_count,
               c.data());
          std::vector<float> expected = run(test, 0, 0, m);
          EXPECT_TRUE(same_bits(c.data(), expected.data(), expected.size() * sizeof(float)));
          EXPECT_TRUE(same_bits(x.data(), test.x.data(), x_count * sizeof(bf16)));
          EXPECT_TRUE(same_bits(w.data(), test.panel(0), w_count * sizeof(bf16)));
        }
      }
    }
  }
}

TEST_P(AmxTest, WhatLiesBeyondKAddsNothing) {
  for (int rows : {8, 16, 24, 32}) {
    for (int k : {8, 16, 24, 40, 48, 58}) {
      AmxCase cut(5, k, rows, 32);
      // The same numbers with zeros up to whole steps.
      const int whole = (k + 31) / 32 * 32;
      AmxCase padded(5, whole, rows, 32);
      for (int i = 0; i < 5; ++i) {
        for (int j = 0; j < whole; ++j) padded.at(i, j) = j < k ? cut.at(i, j) : bf16{0};
      }
      std::vector<bf16> panel(static_cast<std::size_t>(rows * whole), bf16{0});
      std::copy_n(cut.panel(0), rows * k, panel.data());
      std::vector<float> a = run(cut, 0, 0, 5);
      Aligned<float> b(static_cast<std::size_t>(5 * kC), kNan);
      gemm(padded.x.data(), padded.ldx, 5, panel.data(), rows, whole, nullptr, b.data());
      EXPECT_TRUE(same_bits(a.data(), b.data(), a.size() * sizeof(float))) << "k=" << k;
    }
  }
}

TEST_P(AmxTest, NaNStaysInItsToken) {
  AmxCase test(37, 56, 32, 32);
  std::vector<float> clean = run(test, 0, 0, 37);
  for (int poisoned : {0, 15, 20, 22, 36}) {
    for (int place : {10, 55}) {
      AmxCase dirty(37, 56, 32, 32);
      dirty.at(poisoned, place) = to_bf16(kNan);
      std::vector<float> c = run(dirty, 0, 0, 37);
      for (int i = 0; i < 37; ++i) {
        for (int row = 0; row < 32; ++row) {
          const auto at = static_cast<std::size_t>(i * kC + row);
          EXPECT_TRUE(i == poisoned ? std::isnan(c[at]) : c[at] == clean[at])
              << "token " << i << " row " << row;
        }
      }
    }
  }
}

TEST_P(AmxTest, SumsInTheDocumentedOrder) {
  AmxCase test(1, 64, 16, 16);
  std::fill(test.x.begin(), test.x.end(), bf16{0});
  std::vector<bf16> panel(16 * 64, to_bf16(1.0f));
  auto first_output = [&] {
    Aligned<float> c(static_cast<std::size_t>(kC), kNan);
    gemm(test.x.data(), test.ldx, 1, panel.data(), 16, 64, nullptr, c.data());
    return c[0];
  };
  // The even chain loses its 1 beside 2^24, the odd one keeps 1 + 1. In one chain, from whichever
  // end, some other number of ones survives.
  test.at(0, 0) = to_bf16(0x1p24f);
  for (int j : {1, 2, 3}) test.at(0, j) = to_bf16(1.0f);
  EXPECT_EQ(first_output(), 0x1p24f + 2);
  // The next step starts from zero: its ones reach 4 before they meet 2^24.
  for (int j : {32, 34, 36, 38}) test.at(0, j) = to_bf16(1.0f);
  EXPECT_EQ(first_output(), 0x1p24f + 6);
  // Denormals count as zero, in x and as a result.
  std::fill(test.x.begin(), test.x.end(), bf16{0});
  test.at(0, 0) = bf16{0x0040};
  panel[0] = to_bf16(0x1p100f);
  EXPECT_EQ(first_output(), 0.0f);
  test.at(0, 0) = to_bf16(0x1p-120f);
  panel[0] = to_bf16(0x1p-10f);
  EXPECT_EQ(first_output(), 0.0f);
}

/// Also on a real AMX, where it says whether the hardware does what the manual and the model do.
class AmxMachineCodeTest : public AmxTest {};

TEST_P(AmxMachineCodeTest, HasTheBitsOfTheModel) {
  for (int m : {1, 9, 16, 23, 32, 50}) {
    for (int k : {24, 64, 331}) {
      AmxCase test(m, k, 48, 32);
      for (int p = 0; p < 2; ++p) {
        std::vector<float> a = run(test, p, 0, m);
        Aligned<float> b(static_cast<std::size_t>(m * kC), kNan);
        TileModel model;
        cpu::amx_panel_gemm(model, test.x.data(), test.ldx, m, test.panel(p),
                            test.packed.rows_of(p), test.packed.k_pad, nullptr, b.data());
        EXPECT_TRUE(same_bits(a.data(), b.data(), a.size() * sizeof(float)));
      }
    }
  }
}

std::string backend_name(const testing::TestParamInfo<Backend>& info) {
  return info.param == Backend::kModel ? "model" : "machine_code";
}

INSTANTIATE_TEST_SUITE_P(Backends, AmxTest, testing::Values(Backend::kModel, Backend::kMachineCode),
                         backend_name);
INSTANTIATE_TEST_SUITE_P(Backends, AmxMachineCodeTest, testing::Values(Backend::kMachineCode),
                         backend_name);

/// Offsets of the lines that a call prefetches, in the panel and in `next` (0 bytes: null).
struct Prefetched {
  Prefetched(int m, int k, int rows, std::size_t next_bytes) {
    AmxCase test(m, k, rows, rows);
    std::vector<char> next(next_bytes);
    panel_bytes = rows * test.packed.k_pad * 2;
    const auto* panel = reinterpret_cast<const char*>(test.panel(0));
    std::vector<float> c(static_cast<std::size_t>(m * kC));
    TileModel model;
    cpu::amx_panel_gemm(model, test.x.data(), test.ldx, m, test.panel(0), rows, test.packed.k_pad,
                        next_bytes == 0 ? nullptr : next.data(), c.data());
    for (const char* line : model.prefetched()) {
      // The arrays are larger than what a step fetches, so a line belongs to only one of them.
      bool in_next = next_bytes > 0 && line >= next.data() && line < next.data() + next_bytes;
      bool fresh = in_next ? of_next.insert(line - next.data()).second
                           : of_panel.insert(line - panel).second;
      EXPECT_TRUE(fresh) << "a line is fetched twice";
    }
  }
  std::set<std::ptrdiff_t> of_panel, of_next;
  int panel_bytes = 0;
};

TEST(AmxPrefetch, OneBlockFetchesAheadInThePanelAndThenTheNext) {
  for (int m : {1, 16, 32}) {
    for (int rows : {16, 32}) {
      Prefetched all(m, 1024, rows, 1 << 20);
      ASSERT_FALSE(all.of_panel.empty());
      EXPECT_EQ(*all.of_panel.begin(), 8192);
      EXPECT_EQ(*all.of_panel.rbegin(), all.panel_bytes - 64);
      EXPECT_EQ(all.of_panel.size(), static_cast<std::size_t>(all.panel_bytes - 8192) / 64);
      EXPECT_EQ(*all.of_next.begin(), 0);
      EXPECT_EQ(*all.of_next.rbegin(), 8192 - 64);
      EXPECT_EQ(all.of_next.size(), 8192u / 64);
      Prefetched without(m, 1024, rows, 0);
      EXPECT_EQ(without.of_panel, all.of_panel);
    }
  }
}

TEST(AmxPrefetch, LaterBlocksFetchTheNextPanelInSlices) {
  for (int m : {33, 96, 128, 512}) {
    for (int k : {1024, 8192}) {  // panels of 64 and 512 KiB, of which 256 are fetched
      if (m > 96 && k > 1024) continue;
      Prefetched all(m, k, 32, 1 << 20);
      const int wanted = std::min(all.panel_bytes, cpu::kAmxNextBytes);
      ASSERT_FALSE(all.of_next.empty());
      EXPECT_EQ(*all.of_next.begin(), 0);
      EXPECT_GE(*all.of_next.rbegin(), wanted - 64);
      EXPECT_EQ(*all.of_next.rbegin(), static_cast<std::ptrdiff_t>(all.of_next.size() - 1) * 64);
      EXPECT_LE(*all.of_next.rbegin(), wanted + wanted / 2);
    }
  }
}

TEST(AmxIsa, SharesTheOtherKernelsWithAvx512Bf16) {
  const cpu::KernelTable& amx = cpu::kernels_for(Isa::kAmxBf16);
  const cpu::KernelTable& avx = cpu::kernels_for(Isa::kAvx512Bf16);
  EXPECT_EQ(amx.isa, Isa::kAmxBf16);
  EXPECT_NE(amx.panel_gemm_bf16, avx.panel_gemm_bf16);
  EXPECT_NE(amx.panel_gemm_int8, avx.panel_gemm_int8);
  EXPECT_EQ(amx.panel_gemm_f32, avx.panel_gemm_f32);
  EXPECT_EQ(amx.store_bf16, avx.store_bf16);
  EXPECT_EQ(amx.attention_split_bf16, avx.attention_split_bf16);
  EXPECT_EQ(amx.exp_blocks, avx.exp_blocks);
}

TEST(AmxIsa, IsTheDefaultWhereItRunsAndRefusedWhereTheCpuLacksIt) {
  const char* wanted = std::getenv("DEINFER_CPU_ISA");
  const std::string before = wanted == nullptr ? "" : wanted;
  setenv("DEINFER_CPU_ISA", "amx_bf16", 1);
  if (supported(Isa::kAmxBf16)) {
    EXPECT_EQ(select_isa(), Isa::kAmxBf16);
    EXPECT_EQ(detect_isas().back(), Isa::kAmxBf16);
  } else {
    try {
      select_isa();
      ADD_FAILURE() << "selected an instruction set that this CPU lacks";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      EXPECT_NE(std::string(error.what()).find("amx_bf16"), std::string::npos);
    }
  }
  unsetenv("DEINFER_CPU_ISA");
  EXPECT_EQ(select_isa(), detect_isas().back());
  EXPECT_EQ(select_isa() == Isa::kAmxBf16, supported(Isa::kAmxBf16));
  setenv("DEINFER_CPU_ISA", before.c_str(), 1);
}

}  // namespace
}  // namespace deinfer::test
