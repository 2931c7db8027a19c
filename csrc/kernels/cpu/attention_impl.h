// Causal attention over paged KV with an online softmax. Include math_impl.h before.
//
// The rows of a call share each load of K and V, in blocks that fit the registers. Yet a row's
// result holds only its own operations in a fixed order: scores over ascending head dimensions, one
// maximum, one rescaling and one sum per tile, values added over ascending positions. What a row
// may not see is never multiplied into it: scores of other positions are replaced, their values
// skipped, since that memory may hold anything.
#pragma once

namespace deinfer::cpu {
namespace {

inline constexpr int kTileGroups = kKvTile / kLanes;
inline constexpr int kSplitTiles = kKvSplit / kKvTile;

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

/// K and V of a tile by groups of 16 positions, and what to fetch meanwhile: while K is read, the
/// same places of V, and while V is read, those of the next tile's K. Blocks of 16 positions are
/// too short for the hardware to find the streams. A group that no row sees repeats another one.
template <typename T>
struct KvTile {
  const T* k[kTileGroups];  // [head_dim][16]
  const T* v[kTileGroups];  // [16][head_dim]
  const T* next_k[kTileGroups];
};

template <typename T>
inline constexpr int kVecsPerLine = 64 / (kLanes * static_cast<int>(sizeof(T)));

/// scores[kRows][kKvTile] = q . k of the groups that hold a position of `seen`, kVecs groups at a
/// time; the others' are left alone.
template <typename T, int kRows>
[[gnu::noinline]] void tile_scores(const float* q, int head_dim, const KvTile<T>& tile, Range seen,
                                   float* scores) {
  constexpr int kVecs = vectors_for(kRows, kTileGroups);
  const int first = seen.begin / (kVecs * kLanes) * kVecs;
  for (int group = first; group * kLanes < seen.end; group += kVecs) {
    const T* k[kVecs];
    Vec acc[kRows][kVecs];
#pragma GCC unroll 4
    for (int j = 0; j < kVecs; ++j) {
      k[j] = tile.k[group + j];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r][j] = zero();
    }
    const float* element = q;
    for (int d = 0; d < head_dim; ++d, ++element) {
      asm volatile("" : "+r"(element));  // or the compiler keeps a pointer per row
      Vec query[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) query[r] = broadcast(element[std::ptrdiff_t{r} * head_dim]);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) {
        __builtin_prefetch(tile.v[group + j] + d * kLanes, 0, 2);
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
[[gnu::noinline]] void add_values(const float* weights, const KvTile<T>& tile, Range range,
                                  int head_dim, int d0, int lanes, float* output) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      const float* p = output + r * head_dim + d0 + j * kLanes;
      acc[r][j] = kPartial ? load_n(p, lanes) : load(p);
    }
  }
  for (int position = range.begin; position < range.end;) {
    int group = position / kLanes;
    int stop = range.end < (group + 1) * kLanes ? range.end : (group + 1) * kLanes;
    const std::ptrdiff_t offset = (position % kLanes) * std::ptrdiff_t{head_dim} + d0;
    const T* v = tile.v[group] + offset;
    const T* next_k = tile.next_k[group] + offset;
    for (; position < stop; ++position, v += head_dim, next_k += head_dim) {
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
      float* p = output + r * head_dim + d0 + j * kLanes;
      kPartial ? store_n(p, acc[r][j], lanes) : store(p, acc[r][j]);
    }
  }
}

/// All head dimensions from d0 on, with the widest kernels first.
template <typename T, int kRows, int kVecs = vectors_for(kRows, 8)>
void add_all_values(const float* weights, const KvTile<T>& tile, Range range, int head_dim, int d0,
                    float* output) {
  for (; d0 + kVecs * kLanes <= head_dim; d0 += kVecs * kLanes) {
    add_values<T, kRows, kVecs, false>(weights, tile, range, head_dim, d0, kLanes, output);
  }
  if (d0 == head_dim) return;
  if constexpr (kVecs > 1) {
    add_all_values<T, kRows, kVecs / 2>(weights, tile, range, head_dim, d0, output);
  } else {
    add_values<T, kRows, 1, true>(weights, tile, range, head_dim, d0, head_dim - d0, output);
  }
}

void scale_row(float* row, int n, Vec factor) {
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) store(row + j, mul(load(row + j), factor));
  if (j < n) store_n(row + j, mul(load_n(row + j, n - j), factor), n - j);
}

/// Scores of one row, capped if there is a soft_cap, to exp(score - maximum), with the row's state
/// moved to the new maximum.
void softmax_row(float* scores, Range visible, float soft_cap, int head_dim, float* maximum,
                 float* sum, float* output) {
  Vec s[kTileGroups];
  Vec largest = broadcast(-kInfinity);
#pragma GCC unroll 4
  for (int j = 0; j < kTileGroups; ++j) {
    s[j] = load(scores + j * kLanes);
    if (soft_cap != 0.0f) s[j] = mul(broadcast(soft_cap), tanh(s[j]));
    if (visible.begin > 0 || visible.end < kKvTile) {
      s[j] = keep_range(s[j], visible.begin - j * kLanes, visible.end - j * kLanes, -kInfinity);
    }
    largest = max(s[j], largest);
  }
  float tile_maximum = reduce_max(largest);
  float new_maximum = tile_maximum > *maximum ? tile_maximum : *maximum;
  if (new_maximum != *maximum) {
    Vec factor = exp(broadcast(*maximum - new_maximum));
    alignas(64) float first[kLanes];
    store(first, factor);
    *sum *= first[0];
    scale_row(output, head_dim, factor);
    *maximum = new_maximum;
  }
#pragma GCC unroll 4
  for (int j = 0; j < kTileGroups; ++j) {
    s[j] = exp(sub(s[j], broadcast(new_maximum)));
    store(scores + j * kLanes, s[j]);
  }
  *sum += reduce_add(add(add(s[0], s[1]), add(s[2], s[3])));
}

/// A call's rows and their state.
struct Rows {
  const float* q;  // [rows, head_dim], scaled; also by 1 / soft_cap if there is one
  int group;
  int first_position;
  int window;
  float soft_cap;
  int head_dim;
  AttentionState state;

  /// What a row sees of the tile at `base`; empty when end <= begin.
  Range visible(int row, int base) const {
    int position = first_position + row / group;
    int begin = window > 0 ? position - window + 1 - base : -base;
    int end = position + 1 - base;
    return {begin > 0 ? begin : 0, end < kKvTile ? end : kKvTile};
  }
  bool sees_none(int row, int base) const {
    Range range = visible(row, base);
    return range.begin >= range.end;
  }
  /// The rows that see some of the tile: those that do not come first or last.
  Range seeing(int num_rows, int base) const {
    int begin = 0;
    int end = num_rows;
    while (end > 0 && sees_none(end - 1, base)) --end;
    while (begin < end && sees_none(begin, base)) ++begin;
    return {begin, end};
  }
  /// What the rows [begin, end) of seeing() see together.
  Range seen(int begin, int end, int base) const {
    return {visible(begin, base).begin, visible(end - 1, base).end};
  }
};

/// One tile for the rows [row, row + kRows), which all see some of it.
template <typename T, int kRows>
void attend_block(const Rows& rows, int row, int base, const KvTile<T>& tile) {
  alignas(64) float scores[kRows * kKvTile];  // a row's softmax looks at what it sees only
  const int head_dim = rows.head_dim;
  float* output = rows.state.output + std::ptrdiff_t{row} * head_dim;
  tile_scores<T, kRows>(rows.q + std::ptrdiff_t{row} * head_dim, head_dim, tile,
                        rows.seen(row, row + kRows, base), scores);
  for (int r = 0; r < kRows; ++r) {
    softmax_row(scores + r * kKvTile, rows.visible(row + r, base), rows.soft_cap, head_dim,
                rows.state.maximum + row + r, rows.state.sum + row + r, output + r * head_dim);
  }
  // Later rows see later positions: the joint part lies between the last begin and the first end.
  Range joint = {rows.visible(row + kRows - 1, base).begin, rows.visible(row, base).end};
  if (joint.end < joint.begin) joint.end = joint.begin;
  auto add_own = [&](int r, Range range) {
    if (range.begin >= range.end) return;
    add_all_values<T, 1>(scores + r * kKvTile, tile, range, head_dim, 0, output + r * head_dim);
  };
  for (int r = 0; r < kRows - 1; ++r) {
    Range own = rows.visible(row + r, base);
    add_own(r, {own.begin, own.end < joint.begin ? own.end : joint.begin});
  }
  if (joint.begin < joint.end) {
    add_all_values<T, kRows>(scores, tile, joint, head_dim, 0, output);
  }
  for (int r = 1; r < kRows; ++r) {
    Range own = rows.visible(row + r, base);
    add_own(r, {own.begin > joint.end ? own.begin : joint.end, own.end});
  }
}

template <typename T, int kRows = kAttentionBlock>
void run_block(int count, const Rows& rows, int row, int base, const KvTile<T>& tile) {
  if constexpr (kRows > 1) {
    if (count < kRows) return run_block<T, kRows - 1>(count, rows, row, base, tile);
  }
  attend_block<T, kRows>(rows, row, base, tile);
}

/// Calls f(group, K and V's offset in the pool) for the groups of the tile at `base` that hold a
/// position of `range`, and for the others with the offset of the first of these.
template <typename F>
void for_each_group(const KvView& kv, int base, Range range, F f) {
  for (int group = 0; group < kTileGroups; ++group) {
    bool seen = (group + 1) * kLanes > range.begin && group * kLanes < range.end;
    int position = base + (seen ? group : range.begin / kLanes) * kLanes;
    f(group, kv.block_table[position / kv.block_size] * kv.block_stride +
                 static_cast<std::ptrdiff_t>(position % kv.block_size) * kv.head_dim);
  }
}

std::size_t attention_scratch(int rows, int head_dim) {
  auto floats = static_cast<std::size_t>(rows) * static_cast<std::size_t>(head_dim);
  return (floats + kLanes - 1) / kLanes * kLanes;
}

template <typename T>
void attention_split(const QueryView& query, const KvView& kv, int split, float* scratch,
                     const AttentionState& state) {
  const int head_dim = kv.head_dim;
  const int num_rows = query.tokens * query.group;
  const float scale = query.soft_cap != 0.0f ? query.scale / query.soft_cap : query.scale;
  for (int row = 0; row < num_rows; ++row) {
    const float* q = query.q + row / query.group * query.token_stride +
                     std::ptrdiff_t{row % query.group} * head_dim;
    float* scaled = scratch + std::ptrdiff_t{row} * head_dim;
    float* output = state.output + std::ptrdiff_t{row} * head_dim;
    for_each_chunk(head_dim, [&](int d, int count) {
      store_some(scaled + d, mul(load_some(q + d, count), broadcast(scale)), count);
      store_some(output + d, zero(), count);
    });
    state.maximum[row] = -kInfinity;
    state.sum[row] = 0.0f;
  }
  Rows rows = {scratch,  query.group, query.first_position, query.window, query.soft_cap,
               head_dim, state};
  for (int t = 0; t < kSplitTiles; ++t) {
    const int base = split * kKvSplit + t * kKvTile;
    auto [row, end] = rows.seeing(num_rows, base);
    if (row >= end) continue;
    KvTile<T> tile;
    for_each_group(kv, base, rows.seen(row, end, base), [&](int group, std::ptrdiff_t offset) {
      tile.k[group] = static_cast<const T*>(kv.k) + offset;
      tile.v[group] = static_cast<const T*>(kv.v) + offset;
      tile.next_k[group] = tile.k[group];
    });
    const int next = base + kKvTile;
    auto [next_row, next_end] = rows.seeing(num_rows, next);
    if (next_row < next_end) {
      Range seen = rows.seen(next_row, next_end, next);
      for_each_group(kv, next, seen, [&](int group, std::ptrdiff_t offset) {
        tile.next_k[group] = static_cast<const T*>(kv.k) + offset;
      });
    }
    const int count = end - row;
    const int blocks = (count + kAttentionBlock - 1) / kAttentionBlock;
    for (int block = 0; block < blocks; ++block) {
      int from = count * block / blocks;
      int to = count * (block + 1) / blocks;
      run_block<T>(to - from, rows, row + from, base, tile);
    }
  }
}

void attention_merge(const AttentionState& from, int rows, int head_dim,
                     const AttentionState& into) {
  for (int row = 0; row < rows; ++row) {
    // An empty side must leave the other's bits alone.
    if (from.sum[row] == 0.0f) continue;
    const float* source = from.output + std::ptrdiff_t{row} * head_dim;
    float* target = into.output + std::ptrdiff_t{row} * head_dim;
    if (into.sum[row] == 0.0f) {
      for (int d = 0; d < head_dim; ++d) target[d] = source[d];
      into.maximum[row] = from.maximum[row];
      into.sum[row] = from.sum[row];
      continue;
    }
    float a = into.maximum[row];
    float b = from.maximum[row];
    float maximum = a > b ? a : b;
    Vec keep = exp(broadcast(a - maximum));
    Vec take = exp(broadcast(b - maximum));
    Vec sum = fma(broadcast(into.sum[row]), keep, mul(broadcast(from.sum[row]), take));
    store_n(into.sum + row, sum, 1);
    into.maximum[row] = maximum;
    for_each_chunk(head_dim, [&](int d, int count) {
      Vec added = mul(load_some(source + d, count), take);
      store_some(target + d, fma(load_some(target + d, count), keep, added), count);
    });
  }
}

template <typename Out>
void attention_finish(const AttentionState& state, int tokens, int group, int head_dim, Out* out,
                      std::ptrdiff_t token_stride) {
  for (int row = 0; row < tokens * group; ++row) {
    const float* source = state.output + std::ptrdiff_t{row} * head_dim;
    Out* target = out + row / group * token_stride + std::ptrdiff_t{row % group} * head_dim;
    Vec sum = broadcast(state.sum[row]);
    for_each_chunk(head_dim, [&](int d, int count) {
      store_some(target + d, div(load_some(source + d, count), sum), count);
    });
  }
}

}  // namespace
}  // namespace deinfer::cpu
