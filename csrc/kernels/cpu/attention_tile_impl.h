// Products of the rows of an attention call with one tile of K and of V. Include math_impl.h
// before.
#pragma once

namespace deinfer::cpu {
namespace {

inline constexpr int kTileGroups = kKvTile / kLanes;

/// The largest power of two of vectors, up to `most`, that `rows` rows can hold in registers.
constexpr int vectors_for(int rows, int most) {
  int vectors = most;
  while (vectors > 1 && vectors * rows > kAttentionVectors) vectors /= 2;
  return vectors;
}

/// Positions [begin, end) of a tile, relative to its first.
struct Range {
  int begin;
  int end;
};

/// K and V of a tile, of their first heads, by groups of 16 positions, and what to fetch meanwhile:
/// while K is read, the same places of V, and while V is read, those of the next tile's K. Blocks
/// of 16 positions are too short for the hardware to find the streams. A group that no row sees
/// repeats another one.
template <typename T>
struct KvTile {
  const T* k[kTileGroups];  // [k_dim][16]
  const T* v[kTileGroups];  // [16][v_dim]
  const T* next_k[kTileGroups];
};

template <typename T>
inline constexpr int kVecsPerLine = 64 / (kLanes * static_cast<int>(sizeof(T)));

/// scores[kRows][kKvTile] = q . k of the groups that hold a position of `seen`, kVecs groups at a
/// time; the others' are left alone. The heads' K and V begin at the offsets in the tile.
template <typename T, int kRows>
[[gnu::noinline]] void tile_scores(const float* q, int k_dim, const KvTile<T>& tile,
                                   std::ptrdiff_t k_offset, std::ptrdiff_t v_offset, Range seen,
                                   float* scores) {
  constexpr int kVecs = vectors_for(kRows, kTileGroups);
  const int first = seen.begin / (kVecs * kLanes) * kVecs;
  for (int group = first; group * kLanes < seen.end; group += kVecs) {
    const T* k[kVecs];
    Vec acc[kRows][kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      k[j] = tile.k[group + j] + k_offset;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r][j] = zero();
    }
    const float* element = q;
    for (int d = 0; d < k_dim; ++d, ++element) {
      asm volatile("" : "+r"(element));  // or the compiler keeps a pointer per row
      Vec query[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) query[r] = broadcast(element[std::ptrdiff_t{r} * k_dim]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        __builtin_prefetch(tile.v[group + j] + v_offset + d * kLanes, 0, 2);
        Vec keys = load(k[j] + d * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r][j] = fma(keys, query[r], acc[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        store(scores + r * kKvTile + (group + j) * kLanes, acc[r][j]);
      }
    }
  }
}

/// output[r][d0 ...] += sum over positions of weights[r][position] * v[position][d0 ...] for kVecs
/// vectors of head dimensions; `lanes` of the only one when kPartial.
template <typename T, int kRows, int kVecs, bool kPartial>
[[gnu::noinline]] void add_values(const float* weights, const KvTile<T>& tile,
                                  std::ptrdiff_t v_offset, Range range, int v_dim, int d0,
                                  int lanes, float* output) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      const float* p = output + r * v_dim + d0 + j * kLanes;
      acc[r][j] = kPartial ? load_n(p, lanes) : load(p);
    }
  }
  for (int position = range.begin; position < range.end;) {
    int group = position / kLanes;
    int stop = range.end < (group + 1) * kLanes ? range.end : (group + 1) * kLanes;
    const std::ptrdiff_t offset = (position % kLanes) * std::ptrdiff_t{v_dim} + d0;
    const T* v = tile.v[group] + v_offset + offset;
    const T* next_k = tile.next_k[group] + offset;
    for (; position < stop; ++position, v += v_dim, next_k += v_dim) {
      Vec weight[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) weight[r] = broadcast(weights[r * kKvTile + position]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        if (j % kVecsPerLine<T> == 0) __builtin_prefetch(next_k + j * kLanes, 0, 2);
        Vec value = kPartial ? load_n(v + j * kLanes, lanes) : load(v + j * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r][j] = fma(value, weight[r], acc[r][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      float* p = output + r * v_dim + d0 + j * kLanes;
      kPartial ? store_n(p, acc[r][j], lanes) : store(p, acc[r][j]);
    }
  }
}

/// All head dimensions from d0 on, with the widest kernels first.
template <typename T, int kRows, int kVecs = vectors_for(kRows, 8)>
void add_all_values(const float* weights, const KvTile<T>& tile, std::ptrdiff_t v_offset,
                    Range range, int v_dim, int d0, float* output) {
  for (; d0 + kVecs * kLanes <= v_dim; d0 += kVecs * kLanes) {
    add_values<T, kRows, kVecs, false>(weights, tile, v_offset, range, v_dim, d0, kLanes, output);
  }
  if (d0 == v_dim) return;
  if constexpr (kVecs > 1) {
    add_all_values<T, kRows, kVecs / 2>(weights, tile, v_offset, range, v_dim, d0, output);
  } else {
    add_values<T, kRows, 1, true>(weights, tile, v_offset, range, v_dim, d0, v_dim - d0, output);
  }
}

}  // namespace
}  // namespace deinfer::cpu
