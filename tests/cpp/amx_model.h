// The AMX tile instructions in software, as Intel's manual (SDM, volume 2) defines them: faults,
// shapes from the tile configuration, and TDPBF16PS with its order of rounding.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/cpu/amx_gemm_impl.h"

namespace deinfer::test {

/// The tile state of a thread. Offers runtime tile numbers to the instruction decoder of
/// amx_trap.h and, as the Tiles of amx_panel_gemm, constant ones.
class TileModel {
 public:
  /// What the first instruction that should have raised #UD or #GP did wrong; null if none did.
  const char* fault() const { return fault_; }
  bool in_use() const { return configured_; }
  int configurations() const { return configurations_; }
  const std::vector<const char*>& prefetched() const { return prefetched_; }

  void configure(const cpu::TileConfig& config) {
    ++configurations_;
    tiles_ = {};
    check(config.palette == 1 && config.start_row == 0, "LDTILECFG: palette or start row");
    for (std::uint8_t byte : config.reserved) check(byte == 0, "LDTILECFG: reserved byte");
    for (std::size_t t = 0; t < 16; ++t) {
      const int rows = config.rows[t];
      const int bytes = config.row_bytes[t];
      check(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0), "LDTILECFG: shape");
      check(t < 8 || rows == 0, "LDTILECFG: tiles beyond the palette");
      if (t >= 8) continue;
      tiles_[t].rows = rows;
      tiles_[t].bytes = bytes;
    }
    configured_ = true;
  }
  void release() {
    tiles_ = {};
    configured_ = false;
  }
  static void copy_padded(const bf16* from, int count, bf16* to, int capacity) {
    for (int i = 0; i < capacity; ++i) to[i] = i < count ? from[i] : bf16{};
  }
  void prefetch(const void* p) { prefetched_.push_back(static_cast<const char*>(p)); }

  void zero(int t) {
    if (valid(t)) tile(t).data = {};
  }
  void load(int t, const void* memory, std::ptrdiff_t stride) {
    if (!valid(t)) return;
    Tile& to = tile(t);
    to.data = {};
    for (int row = 0; row < to.rows; ++row) {
      std::memcpy(to.row(row), static_cast<const char*>(memory) + row * stride, to.size());
    }
  }
  void store(int t, void* memory, std::ptrdiff_t stride) {
    if (!valid(t)) return;
    Tile& from = tile(t);
    for (int row = 0; row < from.rows; ++row) {
      std::memcpy(static_cast<char*>(memory) + row * stride, from.row(row), from.size());
    }
  }
  /// TDPBF16PS c, a, b.
  void multiply(int c, int a, int b) {
    if (!valid(c) || !valid(a) || !valid(b)) return;
    check(c != a && c != b && a != b, "TDPBF16PS: a tile twice");
    check(tile(c).bytes == tile(b).bytes && tile(c).rows == tile(a).rows &&
              tile(a).bytes / 4 == tile(b).rows,
          "TDPBF16PS: shapes do not fit");
    const int pairs = tile(a).bytes / 4;
    for (int i = 0; i < tile(c).rows; ++i) {
      for (int j = 0; j < tile(c).bytes / 4; ++j) {
        float even = 0;
        float odd = 0;
        for (int k = 0; k < pairs; ++k) {
          even = multiply_add(element(a, i, 2 * k), element(b, k, 2 * j), even);
          odd = multiply_add(element(a, i, 2 * k + 1), element(b, k, 2 * j + 1), odd);
        }
        float sum;
        char* at = tile(c).row(i) + j * 4;
        std::memcpy(&sum, at, sizeof sum);
        sum = flush(flush(sum) + flush(even + odd));
        std::memcpy(at, &sum, sizeof sum);
      }
    }
  }

  template <int kTile>
  void zero() {
    zero(kTile);
  }
  template <int kTile>
  void load(const void* memory, std::ptrdiff_t stride) {
    load(kTile, memory, stride);
  }
  template <int kTile>
  void store(void* memory, std::ptrdiff_t stride) {
    store(kTile, memory, stride);
  }
  template <int kC, int kA, int kB>
  void multiply() {
    multiply(kC, kA, kB);
  }

 private:
  struct Tile {
    int rows = 0;
    int bytes = 0;  // of a row
    std::array<char, 1024> data{};
    char* row(int i) { return data.data() + i * 64; }
    std::size_t size() const { return static_cast<std::size_t>(bytes); }
  };

  /// Denormals in and out are zeros of their sign.
  static float flush(float v) {
    return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v;
  }
  static float multiply_add(float x, float y, float sum) { return flush(std::fma(x, y, sum)); }
  float element(int t, int row, int index) {
    std::uint16_t bits;
    std::memcpy(&bits, tile(t).row(row) + index * 2, sizeof bits);
    return flush(std::bit_cast<float>(std::uint32_t{bits} << 16));
  }
  Tile& tile(int t) { return tiles_[static_cast<std::size_t>(t)]; }
  void check(bool ok, const char* what) {
    if (!ok && fault_ == nullptr) fault_ = what;
  }
  bool valid(int t) {
    bool ok = configured_ && 0 <= t && t < 8 && tile(t).rows > 0 && tile(t).bytes % 4 == 0;
    check(ok, "a tile that is not configured");
    return ok;
  }

  std::array<Tile, 8> tiles_;
  bool configured_ = false;
  int configurations_ = 0;
  const char* fault_ = nullptr;
  std::vector<const char*> prefetched_;
};

}  // namespace deinfer::test
