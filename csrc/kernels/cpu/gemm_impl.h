// Tokens times one panel of packed weights. Include a simd_*.h before.
//
// A step is one vector of weights per 16 rows: one k of fp32, or a pair of k of bf16 or int8.
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
  static constexpr int kPhases = 1;  // multiply-adds per step and 16 rows
  template <int kPhase, int kVecs>
  static void weights(const float* w, Vec (&out)[kVecs]) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) out[j] = load(w + j * kLanes);
  }
  template <int kPhase>
  static Vec input(const float* x) {
    return broadcast(*x);
  }
  static Vec dot(Vec acc, const Vec& w, const Vec& x) { return fma(w, x, acc); }
};

struct DotBf16 {
  using Element = bf16;
  using Weight = bf16;
  using Operand = Pairs;
  static constexpr int kElements = 2;
  static constexpr int kMaxTokens = kGemmTokensBf16;
  static constexpr int kPhases = kPairPhases;
  template <int kPhase, int kVecs>
  static void weights(const bf16* w, Pairs (&out)[kVecs]) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) out[j] = load_pairs<kPhase>(w + j * kLanes * kElements);
  }
  template <int kPhase>
  static Pairs input(const bf16* x) {
    return broadcast_pair<kPhase>(x);
  }
  static Vec dot(Vec acc, const Pairs& w, const Pairs& x) { return pair_dot(acc, w, x); }
};

/// Expands the weights in registers; the products are those of DotBf16, bit for bit.
struct DotInt8 : DotBf16 {
  using Weight = std::int8_t;
  template <int kPhase, int kVecs>
  static void weights(const std::int8_t* w, Pairs (&out)[kVecs]) {
    load_int8_pairs<kPhase>(w, out);
  }
};

inline constexpr int kStepUnroll = 4;    // steps are a multiple of it, since k_pad is one of 8
inline constexpr int kChunkSteps = 512;  // 64 KiB of a panel, which the passes read from L2
inline constexpr int kLineBytes = 64;
// Measured on Zen 4: while one pass is bound by memory the hardware streamer alone is fastest; from
// about 7 multiply-adds per vector on, and with the expansion of int8 from the first, fetching into
// L2 this far ahead hides the arithmetic.
template <typename Dot>
inline constexpr int kPrefetchMinTokens =
    sizeof(typename Dot::Weight) == 1 ? 1 : (6 + Dot::kPhases) / Dot::kPhases;
inline constexpr int kPrefetchAhead = 8192;

/// Cache lines of weights per step.
template <typename Dot, int kVecs>
inline constexpr int kStepLines =
    kVecs * kLanes * Dot::kElements * static_cast<int>(sizeof(typename Dot::Weight)) / kLineBytes;

/// One phase of one step; w is at its weights, x at its input of token 0.
template <typename Dot, int kPhase, int kVecs, int kTokens>
[[gnu::always_inline]] inline void add_phase(const typename Dot::Element* x, std::ptrdiff_t ldx,
                                             const typename Dot::Weight* w,
                                             Vec (&acc)[kTokens][kVecs]) {
  typename Dot::Operand weights[kVecs];
  Dot::template weights<kPhase>(w, weights);
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) {
    auto input = Dot::template input<kPhase>(x + i * ldx);
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) acc[i][j] = Dot::dot(acc[i][j], weights[j], input);
  }
}

/// kTokens tokens times kVecs * 16 rows over some steps, in registers; from zero if `first`, else
/// on top of c. Fetches kPrefetch lines from `prefetch` on per step. The arguments are scalars
/// because the copy of a struct reads 32 bytes that 8-byte stores have just written, which waits
/// until all loads before it are done: 200 ns per panel without a request to memory.
template <typename Dot, int kVecs, int kTokens, int kPrefetch>
[[gnu::noinline]] void micro_kernel(const typename Dot::Element* x, std::ptrdiff_t ldx,
                                    const typename Dot::Weight* w, int steps, bool first,
                                    const char* prefetch, float* c) {
  Vec acc[kTokens][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      acc[i][j] = first ? zero() : load(c + i * kPanelRows + j * kLanes);
    }
  }
  for (int step = 0; step < steps; step += kStepUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kStepUnroll; ++u) {
      // Keeps the loads in address order, as reordered ones make the hardware lose the stream; and
      // hides x, of which the compiler would else keep an address per token and step.
      asm volatile("" : "+r"(x) : : "memory");
#pragma GCC unroll 2
      for (int j = 0; j < kPrefetch; ++j) {
        __builtin_prefetch(prefetch + (u * kPrefetch + j) * kLineBytes, 0, 2);  // to L2
      }
      const auto* weights = w + u * kVecs * kLanes * Dot::kElements;
      add_phase<Dot, 0, kVecs, kTokens>(x, ldx, weights, acc);
      if constexpr (Dot::kPhases == 2) {
        asm volatile("" : "+r"(x) : : "memory");  // loads again, as registers are few
        add_phase<Dot, 1, kVecs, kTokens>(x, ldx, weights, acc);
      }
      x += Dot::kElements;
    }
    w += kStepUnroll * kVecs * kLanes * Dot::kElements;
    prefetch += kStepUnroll * kPrefetch * kLineBytes;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) store(c + i * kPanelRows + j * kLanes, acc[i][j]);
  }
}

/// The kernel for `tokens` tokens, of 1 to kTokens, and `lines` lines of prefetch, of 0 to 2.
template <typename Dot, int kVecs, int kTokens = Dot::kMaxTokens>
auto* micro_kernel_for(int tokens, int lines) {
  if constexpr (kTokens > 1) {
    if (tokens < kTokens) return micro_kernel_for<Dot, kVecs, kTokens - 1>(tokens, lines);
  }
  switch (lines) {
    case 0: return micro_kernel<Dot, kVecs, kTokens, 0>;
    case 1: return micro_kernel<Dot, kVecs, kTokens, 1>;
    default: return micro_kernel<Dot, kVecs, kTokens, 2>;
  }
}

/// m tokens times some steps of weights in balanced passes. `next` is what is read after these
/// weights, next_lines its cache lines per step.
template <typename Dot, int kVecs>
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
      if (m >= kPrefetchMinTokens<Dot>) lines = kStepLines<Dot, kVecs>;
      prefetch = reinterpret_cast<const char*>(w) + kPrefetchAhead;
    } else if (next != nullptr) {  // each pass fetches its slice of what is read next
      lines = (next_lines + passes - 1) / passes;
      std::ptrdiff_t begin = std::ptrdiff_t{pass} * steps * lines * kLineBytes;
      if (begin >= kChunkSteps * next_lines * kLineBytes) lines = 0;
      prefetch = static_cast<const char*>(next) + begin;
    }
    auto* kernel = micro_kernel_for<Dot, kVecs>(tokens, lines);
    kernel(x + token * ldx, ldx, w, steps, first, prefetch, c + std::ptrdiff_t{token} * kPanelRows);
  }
}

/// From zero, or with kAdd on top of c.
template <typename Dot, int kVecs, bool kAdd>
void multiply_panel(const typename Dot::Element* x, std::ptrdiff_t ldx, int m,
                    const typename Dot::Weight* panel, int k_pad, const void* next, float* c) {
  constexpr std::ptrdiff_t kStepWeights = kVecs * kLanes * Dot::kElements;
  const int steps = k_pad / Dot::kElements;
  const int chunk = m <= Dot::kMaxTokens ? steps : kChunkSteps;
  for (int step = 0; step < steps; step += chunk) {
    const int count = steps - step < chunk ? steps - step : chunk;
    const auto* w = panel + step * kStepWeights;
    const void* after = step + count == steps ? next : w + count * kStepWeights;
    multiply_chunk<Dot, kVecs>(x + std::ptrdiff_t{step} * Dot::kElements, ldx, m, w, count,
                               !kAdd && step == 0, after, kStepLines<Dot, kVecs>, c);
  }
}

template <typename Dot, bool kAdd = false>
void panel_gemm(const typename Dot::Element* x, std::ptrdiff_t ldx, int m,
                const typename Dot::Weight* panel, int rows, int k_pad, const void* next,
                float* c) {
  if (rows == kPanelRows) {
    multiply_panel<Dot, kPanelRows / kLanes, kAdd>(x, ldx, m, panel, k_pad, next, c);
  } else {
    multiply_panel<Dot, 1, kAdd>(x, ldx, m, panel, k_pad, next, c);
  }
}

/// Several passes read the weights several times, so they are expanded once, chunk by chunk, in
/// memory that stays in L2.
template <bool kAdd>
void multiply_expanded(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                       int k_pad, const void* next, float* c) {
  constexpr int kVecs = kPanelRows / kLanes;
  constexpr std::ptrdiff_t kStepWeights = kPanelRows * DotBf16::kElements;
  alignas(64) bf16 expanded[kChunkSteps * kStepWeights];
  const int steps = k_pad / DotBf16::kElements;
  for (int step = 0; step < steps; step += kChunkSteps) {
    const int count = steps - step < kChunkSteps ? steps - step : kChunkSteps;
    const auto* w = panel + step * kStepWeights;
    for (int i = 0; i < count; ++i) expand_int8(w + i * kStepWeights, expanded + i * kStepWeights);
    const void* after = step + count == steps ? next : w + count * kStepWeights;
    multiply_chunk<DotBf16, kVecs>(x + std::ptrdiff_t{step} * DotBf16::kElements, ldx, m, expanded,
                                   count, !kAdd && step == 0, after, kStepLines<DotInt8, kVecs>, c);
  }
}

template <bool kAdd = false>
void panel_gemm_int8(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                     const float* scale, int k_pad, const void* next, float* c) {
  if (m <= DotInt8::kMaxTokens) {
    multiply_panel<DotInt8, kPanelRows / kLanes, kAdd>(x, ldx, m, panel, k_pad, next, c);
  } else {
    multiply_expanded<kAdd>(x, ldx, m, panel, k_pad, next, c);
  }
  if (scale == nullptr) return;
  const Vec scales[] = {load(scale), load(scale + kLanes)};
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < 2; ++j) {
      float* out = c + i * kPanelRows + j * kLanes;
      store(out, mul(load(out), scales[j]));
    }
  }
}

}  // namespace
}  // namespace deinfer::cpu
