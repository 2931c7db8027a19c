// Tokens times one panel of packed weights. Include a simd_*.h before.
//
// A step is a vector of weights per 16 rows, and half a vector for 8 rows left: one k of fp32, or a
// pair of k of bf16 or int8. Sums of 8 rows left are half a vector too, so two tokens share one.
// Every output is one accumulator that takes the steps in ascending order, whatever m, the pass or
// the chunk, so its bits depend on its own inputs only.
#pragma once

namespace deinfer::cpu {
namespace {

struct DotF32 {
  using Element = float;
  using Weight = float;
  using Operand = Vec;
  static constexpr int kElements = 1;  // of k per step
  static constexpr int kMaxTokens = kGemmTokensF32;
  static constexpr int kPhases = 1;  // multiply-adds per step and vector
  static constexpr bool kInputsFirst = kFloatInputsFirst;
  template <int kPhase>
  static Vec half_weights(const float* w) {
    return load_halves(w, w);
  }
  template <int kPhase, int kVecs>
  static void weights(const float* w, Vec (&out)[kVecs]) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) out[j] = load(w + j * kLanes);
  }
  template <int kPhase>
  static Vec input(const float* x) {
    return broadcast(*x);
  }
  static Vec dot(const Vec& acc, const Vec& w, const Vec& x) { return fma(w, x, acc); }
};

struct DotBf16 {
  using Element = bf16;
  using Weight = bf16;
  using Operand = Pairs;
  static constexpr int kElements = 2;
  static constexpr int kMaxTokens = kGemmTokensBf16;
  static constexpr int kPhases = kPairPhases;
  static constexpr bool kInputsFirst = false;
  template <int kPhase>
  static Pairs half_weights(const bf16* w) {
    return load_pairs_twice<kPhase>(w);
  }
  template <int kPhase, int kVecs>
  static void weights(const bf16* w, Pairs (&out)[kVecs]) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) out[j] = load_pairs<kPhase>(w + j * kLanes * kElements);
  }
  template <int kPhase>
  static Pairs input(const bf16* x) {
    return broadcast_pair<kPhase>(x);
  }
  static Vec dot(const Vec& acc, const Pairs& w, const Pairs& x) { return pair_dot(acc, w, x); }
};

/// Expands the weights in registers; the products are those of DotBf16, bit for bit.
struct DotInt8 : DotBf16 {
  using Weight = std::int8_t;
  template <int kPhase, int kVecs>
  static void weights(const std::int8_t* w, Pairs (&out)[kVecs]) {
    load_int8_pairs<kPhase>(w, out);
  }
};

inline constexpr int kPanelHalves = kPanelRows / kHalfLanes;
inline constexpr int kStepUnroll = 4;
inline constexpr int kChunkSteps = 512;  // 64 KiB of a panel, which the passes read from L2
inline constexpr int kLineBytes = 64;
// Measured on Zen 4: while one pass is bound by memory the hardware streamer alone is fastest; from
// about 7 multiply-adds per vector on, and with the expansion of int8 from the first, fetching into
// L2 this far ahead hides the arithmetic.
template <typename Dot>
inline constexpr int kPrefetchMinTokens =
    sizeof(typename Dot::Weight) == 1 ? 1 : (6 + Dot::kPhases) / Dot::kPhases;
inline constexpr int kPrefetchAhead = 8192;

/// Weights per step of a panel of kHalves * 8 rows.
template <typename Dot, int kHalves>
inline constexpr int kStepWeights = kHalves * kHalfLanes * Dot::kElements;

/// Cache lines of weights per step, rounded up.
template <typename Dot, int kHalves>
inline constexpr int kStepLines =
    (kStepWeights<Dot, kHalves> * static_cast<int>(sizeof(typename Dot::Weight)) + kLineBytes - 1) /
    kLineBytes;

/// The outputs of kTokens tokens and kHalves * 8 rows in registers.
template <int kHalves, int kTokens>
struct Sums {
  static constexpr int kVecs = kHalves / 2;
  Vec vec[kTokens][kVecs == 0 ? 1 : kVecs];
  Vec halves[(kTokens + 1) / 2];  // of tokens 2i and 2i + 1; the last of an odd number is alone
};

/// The sums in c[kTokens, kPanelRows]; zeros if `first`.
template <int kHalves, int kTokens>
[[gnu::always_inline]] inline void load_sums(const float* c, bool first,
                                             Sums<kHalves, kTokens>& sums) {
  constexpr int kVecs = kHalves / 2;
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) {
    const float* row = c + i * kPanelRows;
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sums.vec[i][j] = first ? zero() : load(row + j * kLanes);
    if (kHalves % 2 == 1 && i % 2 == 0) {
      const float* low = row + kVecs * kLanes;
      const float* high = i + 1 < kTokens ? low + kPanelRows : low;
      sums.halves[i / 2] = first ? zero() : load_halves(low, high);
    }
  }
}
template <int kHalves, int kTokens>
[[gnu::always_inline]] inline void store_sums(const Sums<kHalves, kTokens>& sums, float* c) {
  constexpr int kVecs = kHalves / 2;
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) {
    float* row = c + i * kPanelRows;
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) store(row + j * kLanes, sums.vec[i][j]);
    if constexpr (kHalves % 2 == 1) {
      float* half = row + kVecs * kLanes;
      i % 2 == 0 ? store_low_half(half, sums.halves[i / 2])
                 : store_high_half(half, sums.halves[i / 2]);
    }
  }
}

/// As add_phase, but the inputs of all tokens are read before any weights, of which one register at
/// a time is then enough.
template <typename Dot, int kPhase, int kHalves, int kTokens>
[[gnu::always_inline]] inline void add_inputs_first(const float* x, std::ptrdiff_t ldx,
                                                    const typename Dot::Weight* w,
                                                    Sums<kHalves, kTokens>& sums) {
  constexpr int kVecs = kHalves / 2;
  Vec inputs[kTokens];
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) inputs[i] = Dot::template input<kPhase>(x + i * ldx);
#pragma GCC unroll 2
  for (int j = 0; j < kVecs; ++j) {
    fma_tokens<kPhase>(w + j * kLanes * Dot::kElements, inputs, j, sums.vec);
  }
  if constexpr (kHalves % 2 == 1) {
    const Vec weights = Dot::template half_weights<kPhase>(w + kVecs * kLanes * Dot::kElements);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i += 2) {
      const int second = i + 1 < kTokens ? i + 1 : i;
      sums.halves[i / 2] = fma(weights, join_halves(inputs[i], inputs[second]), sums.halves[i / 2]);
    }
  }
}

/// One phase of one step; w is at its weights, x at its input of token 0.
template <typename Dot, int kPhase, int kHalves, int kTokens>
[[gnu::always_inline]] inline void add_phase(const typename Dot::Element* x, std::ptrdiff_t ldx,
                                             const typename Dot::Weight* w,
                                             Sums<kHalves, kTokens>& sums) {
  if constexpr (Dot::kInputsFirst) return add_inputs_first<Dot, kPhase>(x, ldx, w, sums);
  constexpr int kVecs = kHalves / 2;
  using Operand = typename Dot::Operand;
  Operand weights[kVecs == 0 ? 1 : kVecs];
  Operand half_weights;
  if constexpr (kVecs > 0) Dot::template weights<kPhase>(w, weights);
  if constexpr (kHalves % 2 == 1) {
    half_weights = Dot::template half_weights<kPhase>(w + kVecs * kLanes * Dot::kElements);
  }
  Operand before;  // of the token before
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) {
    const Operand input = Dot::template input<kPhase>(x + i * ldx);
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sums.vec[i][j] = Dot::dot(sums.vec[i][j], weights[j], input);
    if (kHalves % 2 == 1 && (i % 2 == 1 || i + 1 == kTokens)) {
      const Operand both = i % 2 == 1 ? join_halves(before, input) : input;
      sums.halves[i / 2] = Dot::dot(sums.halves[i / 2], half_weights, both);
    }
    before = input;
  }
}

/// One step, and kPrefetch lines from `prefetch` on.
template <typename Dot, int kPrefetch, int kHalves, int kTokens>
[[gnu::always_inline]] inline void add_step(const typename Dot::Element*& x, std::ptrdiff_t ldx,
                                            const typename Dot::Weight* w, const char* prefetch,
                                            Sums<kHalves, kTokens>& sums) {
  // Keeps the loads in address order, as reordered ones make the hardware lose the stream; and
  // hides x, of which the compiler would else keep an address per token and step.
  asm volatile("" : "+r"(x) : : "memory");
#pragma GCC unroll 2
  for (int j = 0; j < kPrefetch; ++j) {
    __builtin_prefetch(prefetch + j * kLineBytes, 0, 2);  // to L2
  }
  add_phase<Dot, 0>(x, ldx, w, sums);
  if constexpr (Dot::kPhases == 2) {
    asm volatile("" : "+r"(x) : : "memory");  // loads again, as registers are few
    add_phase<Dot, 1>(x, ldx, w, sums);
  }
  x += Dot::kElements;
}

/// kTokens tokens times kHalves * 8 rows over some steps, in registers; from zero if `first`, else
/// on top of c. Fetches kPrefetch lines from `prefetch` on per step, or with kEvery > 1, a divisor
/// of kStepUnroll, so many in every kEvery-th step. The arguments are scalars
/// because the copy of a struct reads 32 bytes that 8-byte stores have just written, which waits
/// until all loads before it are done: 200 ns per panel without a request to memory.
template <typename Dot, int kHalves, int kTokens, int kPrefetch, int kEvery = 1>
[[gnu::noinline]] void micro_kernel(const typename Dot::Element* x, std::ptrdiff_t ldx,
                                    const typename Dot::Weight* w, int steps, bool first,
                                    const char* prefetch, float* c) {
  Sums<kHalves, kTokens> sums;
  load_sums(c, first, sums);
  constexpr int kWeights = kStepWeights<Dot, kHalves>;
  int step = 0;
  for (; step + kStepUnroll <= steps; step += kStepUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kStepUnroll; ++u) {
      if (u % kEvery == 0) {
        add_step<Dot, kPrefetch>(x, ldx, w + u * kWeights,
                                 prefetch + u / kEvery * kPrefetch * kLineBytes, sums);
      } else {
        add_step<Dot, 0>(x, ldx, w + u * kWeights, nullptr, sums);
      }
    }
    w += kStepUnroll * kWeights;
    prefetch += kStepUnroll / kEvery * kPrefetch * kLineBytes;
  }
  for (; step < steps; ++step, w += kWeights) add_step<Dot, 0>(x, ldx, w, nullptr, sums);
  store_sums(sums, c);
}

/// The kernel for `tokens` tokens, of 1 to kTokens, and `lines` lines of prefetch, of 0 to 2.
template <typename Dot, int kHalves, int kTokens = Dot::kMaxTokens>
auto* micro_kernel_for(int tokens, int lines) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return micro_kernel_for<Dot, kHalves, kTokens - 1>(tokens, lines);
  }
  switch (lines) {
    case 0: return micro_kernel<Dot, kHalves, kTokens, 0>;
    case 1: return micro_kernel<Dot, kHalves, kTokens, 1>;
    default: return micro_kernel<Dot, kHalves, kTokens, 2>;
  }
}

/// m tokens times some steps of weights in balanced passes. `next` is what is read after these
/// weights, next_lines its cache lines per step.
template <typename Dot, int kHalves>
void multiply_chunk(const typename Dot::Element* x, std::ptrdiff_t ldx, int m,
                    const typename Dot::Weight* w, int steps, bool first, const void* next,
                    int next_lines, float* c) {
  const int passes = (m + Dot::kMaxTokens - 1) / Dot::kMaxTokens;
  for (int pass = 0; pass < passes; ++pass) {
    int token = static_cast<int>(std::int64_t{m} * pass / passes);
    int tokens = static_cast<int>(std::int64_t{m} * (pass + 1) / passes) - token;
    int lines = 0;
    const char* prefetch = nullptr;
    if (passes == 1) {
      if (m >= kPrefetchMinTokens<Dot>) lines = kStepLines<Dot, kHalves>;
      prefetch = reinterpret_cast<const char*>(w) + kPrefetchAhead;
    } else if (next != nullptr) {  // each pass fetches its slice of what is read next
      lines = (next_lines + passes - 1) / passes;
      std::ptrdiff_t begin = std::ptrdiff_t{pass} * steps * lines * kLineBytes;
      if (begin >= kChunkSteps * next_lines * kLineBytes) lines = 0;
      prefetch = static_cast<const char*>(next) + begin;
    }
    auto* kernel = micro_kernel_for<Dot, kHalves>(tokens, lines);
    kernel(x + token * ldx, ldx, w, steps, first, prefetch, c + std::ptrdiff_t{token} * kPanelRows);
  }
}

/// From zero, or with kAdd on top of c.
template <typename Dot, int kHalves, bool kAdd>
void multiply_panel(const typename Dot::Element* x, std::ptrdiff_t ldx, int m,
                    const typename Dot::Weight* panel, int k_pad, const void* next, float* c) {
  constexpr std::ptrdiff_t kWeights = kStepWeights<Dot, kHalves>;
  const int steps = k_pad / Dot::kElements;
  const int chunk = m <= Dot::kMaxTokens ? steps : kChunkSteps;
  for (int step = 0; step < steps; step += chunk) {
    const int count = steps - step < chunk ? steps - step : chunk;
    const auto* w = panel + step * kWeights;
    const void* after = step + count == steps ? next : w + count * kWeights;
    multiply_chunk<Dot, kHalves>(x + std::ptrdiff_t{step} * Dot::kElements, ldx, m, w, count,
                                 !kAdd && step == 0, after, kStepLines<Dot, kHalves>, c);
  }
}

template <typename Dot, bool kAdd = false>
void panel_gemm(const typename Dot::Element* x, std::ptrdiff_t ldx, int m,
                const typename Dot::Weight* panel, int rows, int k_pad, const void* next,
                float* c) {
  switch (rows / kHalfLanes) {
    case 1: return multiply_panel<Dot, 1, kAdd>(x, ldx, m, panel, k_pad, next, c);
    case 2: return multiply_panel<Dot, 2, kAdd>(x, ldx, m, panel, k_pad, next, c);
    case 3: return multiply_panel<Dot, 3, kAdd>(x, ldx, m, panel, k_pad, next, c);
    default: return multiply_panel<Dot, kPanelHalves, kAdd>(x, ldx, m, panel, k_pad, next, c);
  }
}

/// Several passes read the weights several times, so they are expanded once, chunk by chunk, in
/// memory that stays in L2.
template <bool kAdd>
void multiply_expanded(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                       int k_pad, const void* next, float* c) {
  constexpr std::ptrdiff_t kWeights = kStepWeights<DotBf16, kPanelHalves>;
  alignas(64) bf16 expanded[kChunkSteps * kWeights];
  const int steps = k_pad / DotBf16::kElements;
  for (int step = 0; step < steps; step += kChunkSteps) {
    const int count = steps - step < kChunkSteps ? steps - step : kChunkSteps;
    const auto* w = panel + step * kWeights;
    for (int i = 0; i < count; ++i) expand_int8(w + i * kWeights, expanded + i * kWeights);
    const void* after = step + count == steps ? next : w + count * kWeights;
    multiply_chunk<DotBf16, kPanelHalves>(x + std::ptrdiff_t{step} * DotBf16::kElements, ldx, m,
                                          expanded, count, !kAdd && step == 0, after,
                                          kStepLines<DotInt8, kPanelHalves>, c);
  }
}

/// c[i, j] *= scale[j].
inline void scale_columns(const float* scale, int m, float* c) {
  const Vec scales[] = {load(scale), load(scale + kLanes)};
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < 2; ++j) {
      float* out = c + i * kPanelRows + j * kLanes;
      store(out, mul(load(out), scales[j]));
    }
  }
}

template <bool kAdd = false>
void panel_gemm_int8(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                     const float* scale, int k_pad, const void* next, float* c) {
  if (m <= DotInt8::kMaxTokens) {
    multiply_panel<DotInt8, kPanelHalves, kAdd>(x, ldx, m, panel, k_pad, next, c);
  } else {
    multiply_expanded<kAdd>(x, ldx, m, panel, k_pad, next, c);
  }
  if (scale != nullptr) scale_columns(scale, m, c);
}

}  // namespace
}  // namespace deinfer::cpu
