// Products of activations with weights, and what follows them while the results are in registers.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/mma.cuh"

namespace deinfer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
static_assert(kWarps == kSlices, "few tokens: a warp per slice");

/// Two values of a token, of rows `row` and `row + 8` of W.
struct Pair {
  float low, high;
};

__device__ __forceinline__ Pair with_bias(const LinearFactor& factor, int row, Pair y) {
  if (factor.bias != nullptr) {
    y.low += factor.bias[row];
    y.high += factor.bias[row + 8];
  }
  return y;
}

__device__ __forceinline__ Pair gated(const LinearSegment& segment, int row, Pair gate, Pair up) {
  gate = with_bias(segment.first, row, gate);
  up = with_bias(segment.second, row, up);
  if (segment.epilogue == LinearEpilogue::kGatedSilu) {
    return {silu(gate.low) * up.low, silu(gate.high) * up.high};
  }
  return {gelu_tanh(gate.low) * up.low, gelu_tanh(gate.high) * up.high};
}

__device__ __forceinline__ Pair rotated(const Rotation& rotation, int token, int j, Pair y) {
  const std::int64_t at = std::int64_t{token} * rotation.half + j;
  const float cos = rotation.cos[at];
  const float sin = rotation.sin[at];
  return {y.low * cos - y.high * sin, y.high * cos + y.low * sin};
}

/// Stores element `row` of q, k or v.
__device__ __forceinline__ void store_head_element(const LinearLaunch& args,
                                                   const LinearSegment& segment, int token,
                                                   int head, int d, float value) {
  const KvPool& kv = args.kv;
  if (segment.epilogue == LinearEpilogue::kQuery ||
      segment.epilogue == LinearEpilogue::kRotaryQuery) {
    const std::int64_t place = std::int64_t{token} * args.heads + head;
    store_bf16(segment.out, place * kv.head_width + d, value);
    return;
  }
  const int slot = args.slots[token];
  if (slot < 0) return;
  if (segment.epilogue == LinearEpilogue::kValue) {
    store_bf16(kv.v, value_offset(kv, slot, head, d), value);
  } else {
    store_bf16(kv.k, key_offset(kv, slot, head) + d, value);
  }
}

/// Stores an element of an output that is activations, or rows.
__device__ __forceinline__ void store_activation(const LinearSegment& segment, int token, int row,
                                                 float value) {
  if (segment.out_chunks == 0) {
    if (row < segment.n) store_bf16(segment.out, token * segment.ld + row, value);
    return;
  }
  if (row >= segment.out_rows) return;
  store_bf16(segment.out, activation_offset(token, segment.out_col + row, segment.out_chunks),
             value);
}

/// Where rows are of heads, the tile of W that makes a tile of them.
template <bool kHeads>
__device__ __forceinline__ int weight_tile(const LinearSegment& segment, int tile) {
  if (!kHeads) return tile;
  const int head = tile / segment.head_tiles;
  return head / segment.group * segment.head_tiles + tile % segment.head_tiles;
}

/// As finish(), of heads.
__device__ __forceinline__ void finish_head(const LinearLaunch& args, const LinearSegment& segment,
                                            int tile, int pair, int token, Pair y) {
  y = with_bias(segment.first, weight_tile<true>(segment, tile) * kTileRows + pair, y);
  const int d = tile % segment.head_tiles * kTileRows + pair;
  int col = tile * kTileRows + pair;  // with the padding
  int rows = segment.head_tiles * kTileRows;
  if (segment.out_chunks > 0) {
    rows = args.kv.head_dim;
    col = tile / segment.head_tiles * rows + d;
  }
  if (d < rows) store_activation(segment, token, col, y.low);
  if (d + 8 < rows) store_activation(segment, token, col + 8, y.high);
}

/// Rows 16 tile + pair and 8 rows further of y, for one token.
template <bool kHeads>
__device__ __forceinline__ void finish(const LinearLaunch& args, const LinearSegment& segment,
                                       int tile, int pair, int token, Pair y) {
  if (kHeads) return finish_head(args, segment, tile, pair, token, y);
  if (token < args.first_token) return;
  const int row = tile * kTileRows + pair;
  switch (segment.epilogue) {
    case LinearEpilogue::kRelu:
    case LinearEpilogue::kActivation:
      y = with_bias(segment.first, row, y);
      if (segment.epilogue == LinearEpilogue::kRelu) y = {fmaxf(y.low, 0.0f), fmaxf(y.high, 0.0f)};
      [[fallthrough]];
    case LinearEpilogue::kGatedSilu:
    case LinearEpilogue::kGatedGelu:
      store_activation(segment, token, row, y.low);
      store_activation(segment, token, row + 8, y.high);
      break;
    case LinearEpilogue::kHeads: break;  // finish_head()
    case LinearEpilogue::kAdd:
    case LinearEpilogue::kFloat: {
      y = with_bias(segment.first, row, y);
      float* out = static_cast<float*>(segment.out) + token * segment.ld;
      const bool adds = segment.epilogue == LinearEpilogue::kAdd;
      if (row < segment.n) {
        out[row] = adds ? out[row] + y.low : soft_capped(y.low, segment.soft_cap);
      }
      if (row + 8 < segment.n) {
        out[row + 8] = adds ? out[row + 8] + y.high : soft_capped(y.high, segment.soft_cap);
      }
      break;
    }
    case LinearEpilogue::kRotaryQuery:
    case LinearEpilogue::kRotaryKey: {
      y = with_bias(segment.first, row, y);
      const int tiles_of_head = rotary_tiles(args.kv.head_dim);
      const int head = tile / tiles_of_head;
      const int j = tile % tiles_of_head * 8 + pair;
      if (j >= args.rotation.half) break;  // padding
      y = rotated(args.rotation, token, j, y);
      store_head_element(args, segment, token, head, j, y.low);
      store_head_element(args, segment, token, head, j + args.rotation.half, y.high);
      break;
    }
    case LinearEpilogue::kQuery:
    case LinearEpilogue::kKey:
    case LinearEpilogue::kValue: {
      y = with_bias(segment.first, row, y);
      const int head_dim = args.kv.head_dim;
      if (row < segment.n) {
        store_head_element(args, segment, token, row / head_dim, row % head_dim, y.low);
      }
      if (row + 8 < segment.n) {
        store_head_element(args, segment, token, (row + 8) / head_dim, (row + 8) % head_dim,
                           y.high);
      }
      break;
    }
  }
}

/// acc[16 kRows, 8 kTokens] += W x over kAhead tiles of k, the weights of all of them loaded first.
/// `w` and `x` are this lane's part of the first tile of either.
template <int kAhead, int kRows, int kTokens>
__device__ __forceinline__ void multiply_tiles(const uint4* const (&w)[kRows], const uint4* x,
                                               std::int64_t x_stride, int chunk,
                                               float (&acc)[kRows][kTokens][4]) {
  uint4 a[kAhead][kRows][2];
#pragma unroll
  for (int c = 0; c < kAhead; ++c) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      a[c][i][0] = __ldg(w[i] + (chunk + c) * 2 * kWarp);
      a[c][i][1] = __ldg(w[i] + (chunk + c) * 2 * kWarp + kWarp);
    }
  }
#pragma unroll
  for (int c = 0; c < kAhead; ++c) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const uint4 b = x[j * x_stride + (chunk + c) * kWarp];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        mma_bf16(acc[i][j], a[c][i][0], b.x, b.y);
        mma_bf16(acc[i][j], a[c][i][1], b.z, b.w);
      }
    }
  }
}

/// The same over the tiles [begin, end).
template <int kAhead, int kRows, int kTokens>
__device__ __forceinline__ void multiply(const LinearFactor& factor, const uint4* const (&w)[kRows],
                                         const uint4* x, int begin, int end,
                                         float (&acc)[kRows][kTokens][4]) {
  const std::int64_t x_stride = std::int64_t{factor.x_chunks} * kWarp;
  int chunk = begin;
#pragma unroll 1
  for (; chunk + kAhead <= end; chunk += kAhead) {
    multiply_tiles<kAhead>(w, x, x_stride, chunk, acc);
  }
#pragma unroll 1
  for (; chunk < end; ++chunk) multiply_tiles<1>(w, x, x_stride, chunk, acc);
}

__device__ __forceinline__ const uint4* lane_weights(const LinearFactor& factor, int tile) {
  return static_cast<const uint4*>(factor.w) + std::int64_t{tile} * factor.chunks * (2 * kWarp) +
         lane_id();
}

/// What the rows of `tile` read of a tile of tokens.
template <bool kHeads>
__device__ __forceinline__ const uint4* lane_activations(const LinearSegment& segment,
                                                         const LinearFactor& factor, int tile,
                                                         int token_tile) {
  std::int64_t chunk = std::int64_t{token_tile} * factor.x_chunks;
  if (kHeads) chunk += tile / segment.head_tiles * factor.chunks;
  return static_cast<const uint4*>(factor.x) + chunk * kWarp + lane_id();
}

__device__ __forceinline__ bool is_gated(const LinearSegment& segment) {
  return segment.epilogue == LinearEpilogue::kGatedSilu ||
         segment.epilogue == LinearEpilogue::kGatedGelu;
}

/// One tile of rows for all tokens: each warp has a slice of k.
template <int kTokens, bool kHeads>
__global__ void __launch_bounds__(kThreads) linear_few_kernel(const LinearLaunch args) {
  constexpr int kCols = kTokens * kTileTokens;
  constexpr int kUnits = (8 * kCols + kThreads - 1) / kThreads;  // pairs of rows per thread
  __shared__ float parts[kSlices][kTileRows][kCols + 2];
  int tile = static_cast<int>(blockIdx.x);
  int which = 0;
  while (tile >= args.segments[which].tiles) tile -= args.segments[which++].tiles;
  const LinearSegment& segment = args.segments[which];
  const int slice = warp_id();
  const int row = lane_id() / 4;
  const int col = lane_id() % 4 * 2;

  auto product = [&](const LinearFactor& factor, Pair(&y)[kUnits]) {
    float acc[1][kTokens][4] = {};
    const int length = tiles_of(factor.chunks, kSlices);
    const int begin = slice * length;
    const int end = begin + length < factor.chunks ? begin + length : factor.chunks;
    const uint4* const w[1] = {lane_weights(factor, weight_tile<kHeads>(segment, tile))};
    const uint4* x = lane_activations<kHeads>(segment, factor, tile, 0);
    multiply<kTokens <= 4 ? 4 : 2>(factor, w, x, begin, end, acc);
    __syncthreads();  // the sums before have been read
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const int token = j * kTileTokens + col;
      parts[slice][row][token] = acc[0][j][0];
      parts[slice][row][token + 1] = acc[0][j][1];
      parts[slice][row + 8][token] = acc[0][j][2];
      parts[slice][row + 8][token + 1] = acc[0][j][3];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = static_cast<int>(threadIdx.x) + i * kThreads;
      if (unit >= 8 * kCols) break;
      y[i] = {0.0f, 0.0f};
      for (int part = 0; part < kSlices; ++part) {
        y[i].low += parts[part][unit % 8][unit / 8];
        y[i].high += parts[part][unit % 8 + 8][unit / 8];
      }
    }
  };

  Pair y[kUnits] = {};
  product(segment.first, y);
  if (!kHeads && is_gated(segment)) {
    Pair up[kUnits];
    product(segment.second, up);
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = static_cast<int>(threadIdx.x) + i * kThreads;
      if (unit >= 8 * kCols) break;
      y[i] = gated(segment, tile * kTileRows + unit % 8, y[i], up[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int unit = static_cast<int>(threadIdx.x) + i * kThreads;
    if (unit >= 8 * kCols) break;
    if (unit / 8 < args.m) finish<kHeads>(args, segment, tile, unit % 8, unit / 8, y[i]);
  }
}

constexpr int kManyTokenTiles = 8;  // of a warp
constexpr int kRowWarps = 4;
constexpr int kTokenWarps = kWarps / kRowWarps;
static_assert(kTokenWarps * kManyTokenTiles * kTileTokens == kTokenPadding, "what x has room for");

/// kRows tiles of rows for 64 tokens per warp: each warp has all of k, slice after slice.
template <int kRows, bool kGated, bool kHeads>
__global__ void __launch_bounds__(kThreads) linear_many_kernel(const LinearLaunch args) {
  int tile = static_cast<int>(blockIdx.x) * kRowWarps * kRows + warp_id() % kRowWarps * kRows;
  int which = 0;
  // Segments begin at whole groups of kRows tiles.
  while (which < args.num_segments && tile >= tiles_of(args.segments[which].tiles, kRows) * kRows) {
    tile -= tiles_of(args.segments[which++].tiles, kRows) * kRows;
  }
  if (which == args.num_segments) return;
  const LinearSegment& segment = args.segments[which];
  const int token_tile =
      (static_cast<int>(blockIdx.y) * kTokenWarps + warp_id() / kRowWarps) * kManyTokenTiles;
  if (token_tile * kTileTokens >= args.m) return;

  using Sums = float[kRows][kManyTokenTiles][4];
  auto product = [&](const LinearFactor& factor, Sums& total) {
    const uint4* w[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int last = segment.tiles - 1;
      w[i] = lane_weights(factor, weight_tile<kHeads>(segment, tile + i < last ? tile + i : last));
    }
    const uint4* x = lane_activations<kHeads>(segment, factor, tile, token_tile);
    const int length = tiles_of(factor.chunks, kSlices);
    for (int begin = 0; begin < factor.chunks; begin += length) {
      Sums acc = {};
      const int end = begin + length < factor.chunks ? begin + length : factor.chunks;
      multiply<1>(factor, w, x, begin, end, acc);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kManyTokenTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) total[i][j][e] += acc[i][j][e];
        }
      }
    }
  };

  Sums y = {};
  product(segment.first, y);
  Sums up = {};
  if (kGated) product(segment.second, up);
  const int pair = lane_id() / 4;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (tile + i >= segment.tiles) break;
#pragma unroll
    for (int j = 0; j < kManyTokenTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = (token_tile + j) * kTileTokens + lane_id() % 4 * 2 + e;
        Pair value = {y[i][j][e], y[i][j][e + 2]};
        if (kGated) {
          value =
              gated(segment, (tile + i) * kTileRows + pair, value, {up[i][j][e], up[i][j][e + 2]});
        }
        if (token < args.m) finish<kHeads>(args, segment, tile + i, pair, token, value);
      }
    }
  }
}

template <int kRows, bool kGated, bool kHeads>
int launch_many(const LinearLaunch& args, Stream stream) {
  int groups = 0;
  for (int i = 0; i < args.num_segments; ++i) groups += tiles_of(args.segments[i].tiles, kRows);
  const dim3 grid = grid_of(tiles_of(groups, kRowWarps), tiles_of(args.m, kTokenPadding));
  return launch(stream, grid, kThreads, linear_many_kernel<kRows, kGated, kHeads>, args);
}

template <bool kHeads>
int launch_few(const LinearLaunch& args, Stream stream) {
  int tiles = 0;
  for (int i = 0; i < args.num_segments; ++i) tiles += args.segments[i].tiles;
  const dim3 grid = grid_of(tiles);
  if (args.m <= 8) return launch(stream, grid, kThreads, linear_few_kernel<1, kHeads>, args);
  if (args.m <= 16) return launch(stream, grid, kThreads, linear_few_kernel<2, kHeads>, args);
  if (args.m <= 32) return launch(stream, grid, kThreads, linear_few_kernel<4, kHeads>, args);
  return launch(stream, grid, kThreads, linear_few_kernel<8, kHeads>, args);
}

}  // namespace

int load_linear_kernels() {
  return first_failure({load(linear_few_kernel<1, false>), load(linear_few_kernel<2, false>),
                        load(linear_few_kernel<4, false>), load(linear_few_kernel<8, false>),
                        load(linear_few_kernel<1, true>), load(linear_few_kernel<2, true>),
                        load(linear_few_kernel<4, true>), load(linear_few_kernel<8, true>),
                        load(linear_many_kernel<1, true, false>),
                        load(linear_many_kernel<2, false, false>),
                        load(linear_many_kernel<2, false, true>)});
}

int launch_linear(const LinearLaunch& args, Stream stream) {
  const LinearEpilogue epilogue = args.segments[0].epilogue;
  const bool few = args.m <= kFewTokens;
  if (epilogue == LinearEpilogue::kHeads) {
    return few ? launch_few<true>(args, stream) : launch_many<2, false, true>(args, stream);
  }
  if (few) return launch_few<false>(args, stream);
  if (epilogue == LinearEpilogue::kGatedSilu || epilogue == LinearEpilogue::kGatedGelu) {
    return launch_many<1, true, false>(args, stream);
  }
  return launch_many<2, false, false>(args, stream);
}

}  // namespace deinfer::cuda
