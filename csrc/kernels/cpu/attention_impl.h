// Causal attention over paged KV with an online softmax. Include attention_tile_impl.h before.
//
// The rows of a call share each load of K and V, in blocks that fit the registers. Yet a row's
// result holds only its own operations in a fixed order: scores over ascending head dimensions, one
// maximum, one rescaling and one sum per tile, values added over ascending positions. What a row
// may not see is never multiplied into it: scores of other positions are replaced, their values
// skipped, since that memory may hold anything.
#pragma once

namespace deinfer::cpu {
namespace {

inline constexpr int kSplitTiles = kKvSplit / kKvTile;

void scale_row(float* row, int n, Vec factor) {
  int j = 0;
  for (; j + kLanes <= n; j += kLanes) store(row + j, mul(load(row + j), factor));
  if (j < n) store_n(row + j, mul(load_n(row + j, n - j), factor), n - j);
}

/// Scores of one row, capped if there is a soft_cap, to exp(score - maximum), with the row's state
/// moved to the new maximum.
void softmax_row(float* scores, Range visible, float soft_cap, int v_dim, float* maximum,
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
    scale_row(output, v_dim, factor);
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
  const float* q;  // [rows, k_dim], scaled; also by 1 / soft_cap if there is one
  int heads;
  int k_group;  // heads that share K
  int v_group;
  std::ptrdiff_t k_head_stride;
  std::ptrdiff_t v_head_stride;
  const Range* sees;  // of each token; neither end falls from one to the next
  float soft_cap;
  int k_dim;
  int v_dim;
  AttentionState state;

  /// What a row sees of the tile at `base`; empty when end <= begin.
  Range visible(int row, int base) const {
    const Range& range = sees[row / heads];
    int begin = range.begin - base;
    int end = range.end - base;
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
  /// f(first row, rows, head of K or V) for the rows of [begin, end) that share a head with their
  /// neighbours.
  template <typename F>
  void for_each_run(int begin, int end, int group, F f) const {
    if (group == heads) return f(begin, end - begin, 0);
    for (int row = begin; row < end;) {
      const int head = row % heads / group;
      int count = 1;
      while (row + count < end && (row + count) % heads / group == head) ++count;
      f(row, count, head);
      row += count;
    }
  }
};

template <int kRows>
struct RowCount {};

/// f(RowCount<count>) for a count from 1 to kRows.
template <int kRows = kAttentionBlock, typename F>
void with_rows(int count, F f) {
  if constexpr (kRows > 1) {
    if (count < kRows) return with_rows<kRows - 1>(count, f);
  }
  f(RowCount<kRows>{});
}

/// Adds the values of a tile to the rows [row, row + kRows), which share V and have these weights.
template <typename T, int kRows>
void add_rows(const Rows& rows, int row, int base, const KvTile<T>& tile, std::ptrdiff_t v_offset,
              const float* weights) {
  const int v_dim = rows.v_dim;
  float* output = rows.state.output + std::ptrdiff_t{row} * v_dim;
  // Later rows see later positions: the joint part lies between the last begin and the first end.
  Range joint = {rows.visible(row + kRows - 1, base).begin, rows.visible(row, base).end};
  if (joint.end < joint.begin) joint.end = joint.begin;
  auto add_own = [&](int r, Range range) {
    if (range.begin >= range.end) return;
    add_all_values<T, 1>(weights + r * kKvTile, tile, v_offset, range, v_dim, 0,
                         output + std::ptrdiff_t{r} * v_dim);
  };
  for (int r = 0; r < kRows - 1; ++r) {
    Range own = rows.visible(row + r, base);
    add_own(r, {own.begin, own.end < joint.begin ? own.end : joint.begin});
  }
  if (joint.begin < joint.end) {
    add_all_values<T, kRows>(weights, tile, v_offset, joint, v_dim, 0, output);
  }
  for (int r = 1; r < kRows; ++r) {
    Range own = rows.visible(row + r, base);
    add_own(r, {own.begin > joint.end ? own.begin : joint.end, own.end});
  }
}

/// One tile for up to kAttentionBlock rows, of which the first and the last see some of it.
template <typename T>
void attend_block(const Rows& rows, int begin, int end, int base, const KvTile<T>& tile) {
  // A row's softmax looks at what it sees only.
  alignas(64) float scores[kAttentionBlock * kKvTile];
  rows.for_each_run(begin, end, rows.k_group, [&](int row, int count, int head) {
    const std::ptrdiff_t v_offset = row % rows.heads / rows.v_group * rows.v_head_stride;
    with_rows(count, [&]<int kRows>(RowCount<kRows>) {
      tile_scores<T, kRows>(rows.q + std::ptrdiff_t{row} * rows.k_dim, rows.k_dim, tile,
                            head * rows.k_head_stride, v_offset, rows.seen(row, row + kRows, base),
                            scores + (row - begin) * kKvTile);
    });
  });
  for (int row = begin; row < end; ++row) {
    if (rows.sees_none(row, base)) continue;  // a window of which other ranks have all
    softmax_row(scores + (row - begin) * kKvTile, rows.visible(row, base), rows.soft_cap,
                rows.v_dim, rows.state.maximum + row, rows.state.sum + row,
                rows.state.output + std::ptrdiff_t{row} * rows.v_dim);
  }
  rows.for_each_run(begin, end, rows.v_group, [&](int row, int count, int head) {
    with_rows(count, [&]<int kRows>(RowCount<kRows>) {
      add_rows<T, kRows>(rows, row, base, tile, head * rows.v_head_stride,
                         scores + (row - begin) * kKvTile);
    });
  });
}

/// Calls f(group, offset in the pool) for the groups of the tile at `base` that hold a position of
/// `range`, and for the others with the offset of the first of these.
template <typename F>
void for_each_group(const KvSideView& side, int base, Range range, F f) {
  for (int group = 0; group < kTileGroups; ++group) {
    bool seen = (group + 1) * kLanes > range.begin && group * kLanes < range.end;
    int position = base + (seen ? group : range.begin / kLanes) * kLanes - side.first_position;
    f(group, side.block_table[position / side.block_size] * side.block_stride +
                 static_cast<std::ptrdiff_t>(position % side.block_size) * side.dim);
  }
}

std::size_t attention_scratch(int rows, int k_dim) {
  auto floats = static_cast<std::size_t>(rows) * static_cast<std::size_t>(k_dim);
  return (floats + kLanes - 1) / kLanes * kLanes;
}

/// Empty states, and the queries scaled.
void begin_rows(const QueryView& query, int k_dim, int v_dim, float* scaled,
                const AttentionState& state) {
  const float scale = query.soft_cap != 0.0f ? query.scale / query.soft_cap : query.scale;
  for (int row = 0; row < query.tokens * query.heads; ++row) {
    const float* q = query.q + row / query.heads * query.token_stride +
                     std::ptrdiff_t{row % query.heads} * k_dim;
    float* to = scaled + std::ptrdiff_t{row} * k_dim;
    float* output = state.output + std::ptrdiff_t{row} * v_dim;
    for_each_chunk(k_dim, [&](int d, int count) {
      store_some(to + d, mul(load_some(q + d, count), broadcast(scale)), count);
    });
    for_each_chunk(v_dim, [&](int d, int count) { store_some(output + d, zero(), count); });
    state.maximum[row] = -kInfinity;
    state.sum[row] = 0.0f;
  }
}

template <typename T>
void attention_split(const QueryView& query, const KvView& kv, int split, float* scratch,
                     const AttentionState& state) {
  const int num_rows = query.tokens * query.heads;
  begin_rows(query, kv.k.dim, kv.v.dim, scratch, state);
  Range sees[kMaxAttentionRows];
  for (int i = 0; i < query.tokens; ++i) {
    const int position = query.first_position + i;
    const int first = query.window > 0 ? position - query.window + 1 : 0;
    sees[i] = {query.share.before(first > 0 ? first : 0), query.share.before(position + 1)};
  }
  const Rows rows = {scratch,          query.heads,      kv.k.group, kv.v.group,
                     kv.k.head_stride, kv.v.head_stride, sees,       query.soft_cap,
                     kv.k.dim,         kv.v.dim,         state};
  const T* k = static_cast<const T*>(kv.k.data);
  const T* v = static_cast<const T*>(kv.v.data);
  for (int t = 0; t < kSplitTiles; ++t) {
    const int base = split * kKvSplit + t * kKvTile;
    auto [row, end] = rows.seeing(num_rows, base);
    if (row >= end) continue;
    KvTile<T> tile;
    const Range seen = rows.seen(row, end, base);
    for_each_group(kv.k, base, seen, [&](int group, std::ptrdiff_t offset) {
      tile.next_k[group] = tile.k[group] = k + offset;
    });
    for_each_group(kv.v, base, seen,
                   [&](int group, std::ptrdiff_t offset) { tile.v[group] = v + offset; });
    const int next = base + kKvTile;
    auto [next_row, next_end] = rows.seeing(num_rows, next);
    if (next_row < next_end) {
      for_each_group(kv.k, next, rows.seen(next_row, next_end, next),
                     [&](int group, std::ptrdiff_t offset) { tile.next_k[group] = k + offset; });
    }
    const int count = end - row;
    const int blocks = (count + kAttentionBlock - 1) / kAttentionBlock;
    for (int block = 0; block < blocks; ++block) {
      attend_block<T>(rows, row + count * block / blocks, row + count * (block + 1) / blocks, base,
                      tile);
    }
  }
}

void attention_merge(const AttentionState& from, int rows, int v_dim, const AttentionState& into) {
  for (int row = 0; row < rows; ++row) {
    // An empty side must leave the other's bits alone.
    if (from.sum[row] == 0.0f) continue;
    const float* source = from.output + std::ptrdiff_t{row} * v_dim;
    float* target = into.output + std::ptrdiff_t{row} * v_dim;
    if (into.sum[row] == 0.0f) {
      for (int d = 0; d < v_dim; ++d) target[d] = source[d];
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
    for_each_chunk(v_dim, [&](int d, int count) {
      Vec added = mul(load_some(source + d, count), take);
      store_some(target + d, fma(load_some(target + d, count), keep, added), count);
    });
  }
}

template <typename Out>
void attention_finish(const AttentionState& state, int tokens, int heads, int v_dim, Out* out,
                      std::ptrdiff_t token_stride, std::ptrdiff_t head_stride) {
  for (int row = 0; row < tokens * heads; ++row) {
    const float* source = state.output + std::ptrdiff_t{row} * v_dim;
    Out* target = out + row / heads * token_stride + row % heads * head_stride;
    Vec sum = broadcast(state.sum[row]);
    for_each_chunk(v_dim, [&](int d, int count) {
      store_some(target + d, div(load_some(source + d, count), sum), count);
    });
  }
}

}  // namespace
}  // namespace deinfer::cpu
