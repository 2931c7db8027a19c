// From tiles of products to rows of memory, and into the KV cache. Include math_impl.h before.
#pragma once

namespace deinfer::cpu {
namespace {

template <typename T>
inline Vec load_some(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <typename T>
inline void store_some(T* p, Vec v, int n) {
  n == kLanes ? store(p, v) : store_n(p, v, n);
}

/// The bias of a tile's columns in registers.
struct TileBias {
  TileBias(const float* bias, int cols) : present(bias != nullptr) {
    if (!present) return;
    half[0] = load_some(bias, cols < kLanes ? cols : kLanes);
    if (cols > kLanes) half[1] = load_some(bias + kLanes, cols - kLanes);
  }
  Vec apply(Vec v, int j) const { return present ? add(v, half[j]) : v; }

  Vec half[2] = {zero(), zero()};
  bool present;
};

/// f(offset into the tile, offset into the output row, half, lanes) for the vectors of `cols`
/// columns of m tokens. Tile memory beyond the columns is not touched.
template <typename F>
inline void for_each_vector(int m, int cols, F f) {
  for (int i = 0; i < m; ++i) {
    f(i, 0, cols < kLanes ? cols : kLanes);
    if (cols > kLanes) f(i, 1, cols - kLanes);
  }
}

template <typename Out>
void store_tile(const float* c, int m, int cols, const float* bias, Out* out, std::ptrdiff_t ldo) {
  TileBias tile_bias(bias, cols);
  for_each_vector(m, cols, [&](int i, int j, int n) {
    Vec v = tile_bias.apply(load(c + i * kPanelRows + j * kLanes), j);
    store_some(out + i * ldo + j * kLanes, v, n);
  });
}

void add_tile(const float* c, int m, int cols, const float* bias, float* out, std::ptrdiff_t ldo) {
  TileBias tile_bias(bias, cols);
  for_each_vector(m, cols, [&](int i, int j, int n) {
    float* row = out + i * ldo + j * kLanes;
    Vec v = tile_bias.apply(load(c + i * kPanelRows + j * kLanes), j);
    store_some(row, add(load_some(row, n), v), n);
  });
}

template <Vec (*kActivation)(Vec), typename Out>
void gated_mul(const float* gate, const float* up, int m, int cols, const float* gate_bias,
               const float* up_bias, Out* out, std::ptrdiff_t ldo) {
  TileBias g_bias(gate_bias, cols);
  TileBias u_bias(up_bias, cols);
  for_each_vector(m, cols, [&](int i, int j, int n) {
    Vec g = g_bias.apply(load(gate + i * kPanelRows + j * kLanes), j);
    Vec u = u_bias.apply(load(up + i * kPanelRows + j * kLanes), j);
    store_some(out + i * ldo + j * kLanes, mul(kActivation(g), u), n);
  });
}

template <typename Out>
void relu(const float* c, int m, int cols, const float* bias, Out* out, std::ptrdiff_t ldo) {
  TileBias tile_bias(bias, cols);
  for_each_vector(m, cols, [&](int i, int j, int n) {
    Vec v = tile_bias.apply(load(c + i * kPanelRows + j * kLanes), j);
    store_some(out + i * ldo + j * kLanes, max(zero(), v), n);  // v when it is NaN
  });
}

void rope_tile(float* c, int m, const float* bias, const float* cos, const float* sin,
               std::ptrdiff_t ld) {
  TileBias tile_bias(bias, kPanelRows);
  for (int i = 0; i < m; ++i) {
    Vec a = tile_bias.apply(load(c + i * kPanelRows), 0);
    Vec b = tile_bias.apply(load(c + i * kPanelRows + kLanes), 1);
    Vec cosine = load(cos + i * ld);
    Vec sine = load(sin + i * ld);
    store(c + i * kPanelRows, sub(mul(a, cosine), mul(b, sine)));
    store(c + i * kPanelRows + kLanes, add(mul(b, cosine), mul(a, sine)));
  }
}

void argmax_tile(const float* c, int m, int cols, const float* bias, int first, float* best,
                 int* index) {
  TileBias tile_bias(bias, cols);
  for_each_vector(m, cols, [&](int i, int j, int n) {
    Vec v = tile_bias.apply(load(c + i * kPanelRows + j * kLanes), j);
    v = keep_range(v, 0, n, -kInfinity);
    if (at_least_lanes(v, broadcast(best[i])) == 0) return;
    float largest = reduce_max(max(v, broadcast(best[i])));  // max passes over NaN in v
    int place = first + j * kLanes + __builtin_ctz(equal_lanes(v, broadcast(largest)));
    if (largest == best[i] && place >= index[i]) return;
    best[i] = largest;
    index[i] = place;
  });
}

template <typename T>
void write_k(const float* values, int cols, int d0, int head_dim, int offset, void* block) {
  T* out = static_cast<T*>(block) + std::ptrdiff_t{offset / kLanes} * kLanes * head_dim +
           std::ptrdiff_t{d0} * kLanes + offset % kLanes;
  for (int j = 0; j < cols; j += kLanes) {
    int n = cols - j < kLanes ? cols - j : kLanes;
    alignas(64) T converted[kLanes];
    store(converted, load_some(values + j, n));
    for (int i = 0; i < n; ++i) out[(j + i) * kLanes] = converted[i];
  }
}

template <typename T>
void write_v(const float* values, int cols, int d0, int head_dim, int offset, void* block) {
  T* out = static_cast<T*>(block) + std::ptrdiff_t{offset} * head_dim + d0;
  for (int j = 0; j < cols; j += kLanes) {
    int n = cols - j < kLanes ? cols - j : kLanes;
    store_some(out + j, load_some(values + j, n), n);
  }
}

}  // namespace
}  // namespace deinfer::cpu
