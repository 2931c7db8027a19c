// The product by AMX tiles; the other kernels of this instruction set, and its table, stand in the
// translation unit of AVX-512-BF16.
#include <immintrin.h>

#include "kernels/cpu/amx_int8_impl.h"
#include "kernels/cpu/isa_tables.h"
#include "kernels/cpu/simd_avx512_bf16.h"

namespace deinfer::cpu {
namespace {

/// The tile registers of this thread. The intrinsics paste their operands into assembly, hence the
/// literals, and do not tell g++ 12 that they read memory, hence flush().
struct AmxTiles {
  /// What was written before is in memory.
  static void flush() { asm volatile("" : : : "memory"); }

  static void configure(const TileConfig& config) {
    flush();
    _tile_loadconfig(&config);
  }
  static void release() { _tile_release(); }
  static void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
  static void copy_padded(const bf16* from, int count, bf16* to, int capacity) {
    constexpr int kVector = 32;
    for (int i = 0; i < capacity; i += kVector) {
      const int left = count - i < 0 ? 0 : count - i;
      const __mmask32 mask = left < kVector ? (__mmask32{1} << left) - 1 : ~__mmask32{0};
      _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(mask, from + i));
    }
  }
  static void expand(const std::int8_t* from, bf16* to) { expand_int8(from, to); }

  template <int kTile>
  static void zero() {
    static_assert(kTileC <= kTile && kTile < kTileA);
    if constexpr (kTile == 0) _tile_zero(0);
    if constexpr (kTile == 1) _tile_zero(1);
    if constexpr (kTile == 2) _tile_zero(2);
    if constexpr (kTile == 3) _tile_zero(3);
  }
  template <int kTile>
  static void load(const void* p, std::ptrdiff_t stride) {
    static_assert(0 <= kTile && kTile < 8);
    flush();
    if constexpr (kTile == 0) _tile_loadd(0, p, stride);
    if constexpr (kTile == 1) _tile_loadd(1, p, stride);
    if constexpr (kTile == 2) _tile_loadd(2, p, stride);
    if constexpr (kTile == 3) _tile_loadd(3, p, stride);
    if constexpr (kTile == 4) _tile_loadd(4, p, stride);
    if constexpr (kTile == 5) _tile_loadd(5, p, stride);
    if constexpr (kTile == 6) _tile_loadd(6, p, stride);
    if constexpr (kTile == 7) _tile_loadd(7, p, stride);
  }
  template <int kTile>
  static void store(void* p, std::ptrdiff_t stride) {
    static_assert(kTileC <= kTile && kTile < kTileA);
    if constexpr (kTile == 0) _tile_stored(0, p, stride);
    if constexpr (kTile == 1) _tile_stored(1, p, stride);
    if constexpr (kTile == 2) _tile_stored(2, p, stride);
    if constexpr (kTile == 3) _tile_stored(3, p, stride);
  }
  template <int kC, int kA, int kB>
  static void multiply() {
    static_assert(kC == 2 * (kA - kTileA) + (kB - kTileB));
    if constexpr (kC == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (kC == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kC == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (kC == 3) _tile_dpbf16ps(3, 5, 7);
  }
};

}  // namespace

void amx_panel_gemm_bf16(const bf16* x, std::ptrdiff_t ldx, int m, const bf16* panel, int rows,
                         int k_pad, const void* next, float* c) {
  AmxTiles tiles;
  amx_panel_gemm(tiles, x, ldx, m, panel, rows, k_pad, next, c);
}

void amx_panel_gemm_add_bf16(const bf16* x, std::ptrdiff_t ldx, int m, const bf16* panel, int rows,
                             int k_pad, const void* next, float* c) {
  AmxTiles tiles;
  amx_panel_gemm<true>(tiles, x, ldx, m, panel, rows, k_pad, next, c);
}

void amx_panel_gemm_int8(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                         int k_pad, float* c) {
  AmxTiles tiles;
  amx_panel_gemm_int8<false>(tiles, x, ldx, m, panel, k_pad, c);
}

void amx_panel_gemm_add_int8(const bf16* x, std::ptrdiff_t ldx, int m, const std::int8_t* panel,
                             int k_pad, float* c) {
  AmxTiles tiles;
  amx_panel_gemm_int8<true>(tiles, x, ldx, m, panel, k_pad, c);
}

}  // namespace deinfer::cpu
