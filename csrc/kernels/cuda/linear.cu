// Products of activations with weights, bf16 or int8.
#include "kernels/cuda/linear_epilogues.cuh"
#include "kernels/cuda/mma.cuh"

namespace deinfer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
static_assert(kWarps == kSlices, "few tokens: a warp per slice");

/// acc[16 kRows, 8 kTokens] += W x over kAhead tiles of k, the weights of all of them loaded first.
/// `w` and `x` are this lane's part of the first tile of either.
template <int kAhead, bool kInt8, int kRows, int kTokens>
__device__ __forceinline__ void multiply_tiles(const uint4* const (&w)[kRows], const uint4* x,
                                               std::int64_t x_stride, int chunk,
                                               float (&acc)[kRows][kTokens][4]) {
  WeightTile<kInt8> tiles[kAhead][kRows];
#pragma unroll
  for (int c = 0; c < kAhead; ++c) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) tiles[c][i] = load_tile<kInt8>(w[i], chunk + c);
  }
#pragma unroll
  for (int c = 0; c < kAhead; ++c) {
    uint4 a[kRows][2];
#pragma unroll
    for (int i = 0; i < kRows; ++i) operands(tiles[c][i], a[i]);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) {
      const uint4 b = x[j * x_stride + (chunk + c) * kWarp];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        mma_bf16(acc[i][j], a[i][0], b.x, b.y);
        mma_bf16(acc[i][j], a[i][1], b.z, b.w);
      }
    }
  }
}

/// The same over the tiles [begin, end).
template <int kAhead, bool kInt8, int kRows, int kTokens>
__device__ __forceinline__ void multiply(const LinearFactor& factor, const uint4* const (&w)[kRows],
                                         const uint4* x, int begin, int end,
                                         float (&acc)[kRows][kTokens][4]) {
  const std::int64_t x_stride = std::int64_t{factor.x_chunks} * kWarp;
  int chunk = begin;
#pragma unroll 1
  for (; chunk + kAhead <= end; chunk += kAhead) {
    multiply_tiles<kAhead, kInt8>(w, x, x_stride, chunk, acc);
  }
#pragma unroll 1
  for (; chunk < end; ++chunk) multiply_tiles<1, kInt8>(w, x, x_stride, chunk, acc);
}

/// This lane's part of the tiles of k of a tile of rows.
template <bool kInt8>
__device__ __forceinline__ const uint4* row_weights(const LinearFactor& factor, int tile) {
  return lane_weights<kInt8>(factor.w, std::int64_t{tile} * factor.chunks);
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

/// Tiles of k that a warp loads at once: of int8 weights 4 spill at 16 tokens.
template <int kTokens, bool kInt8>
constexpr int kAheadOf = kTokens > 4 ? 2 : (kInt8 && kTokens == 2 ? 3 : 4);

/// One tile of rows for all tokens: each warp has a slice of k.
template <int kTokens, bool kHeads, bool kInt8>
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
    const uint4* const w[1] = {row_weights<kInt8>(factor, weight_tile<kHeads>(segment, tile))};
    const uint4* x = lane_activations<kHeads>(segment, factor, tile, 0);
    multiply<kAheadOf<kTokens, kInt8>, kInt8>(factor, w, x, begin, end, acc);
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
      y[i] = gated<kInt8>(segment, tile * kTileRows + unit % 8, y[i], up[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int unit = static_cast<int>(threadIdx.x) + i * kThreads;
    if (unit >= 8 * kCols) break;
    if (unit / 8 < args.m) finish<kHeads, kInt8>(args, segment, tile, unit % 8, unit / 8, y[i]);
  }
}

constexpr int kManyTokenTiles = 8;  // of a warp
constexpr int kRowWarps = 4;
constexpr int kTokenWarps = kWarps / kRowWarps;
static_assert(kTokenWarps * kManyTokenTiles * kTileTokens == kTokenPadding, "what x has room for");

/// kRows tiles of rows for 64 tokens per warp: each warp has all of k, slice after slice.
template <int kRows, bool kGated, bool kHeads, bool kInt8>
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
      const int own = tile + i < last ? tile + i : last;
      w[i] = row_weights<kInt8>(factor, weight_tile<kHeads>(segment, own));
    }
    const uint4* x = lane_activations<kHeads>(segment, factor, tile, token_tile);
    const int length = tiles_of(factor.chunks, kSlices);
    for (int begin = 0; begin < factor.chunks; begin += length) {
      Sums acc = {};
      const int end = begin + length < factor.chunks ? begin + length : factor.chunks;
      multiply<1, kInt8>(factor, w, x, begin, end, acc);
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
          value = gated<kInt8>(segment, (tile + i) * kTileRows + pair, value,
                               {up[i][j][e], up[i][j][e + 2]});
        }
        if (token < args.m) finish<kHeads, kInt8>(args, segment, tile + i, pair, token, value);
      }
    }
  }
}

template <int kRows, bool kGated, bool kHeads, bool kInt8>
int launch_many(const LinearLaunch& args, Stream stream) {
  int groups = 0;
  for (int i = 0; i < args.num_segments; ++i) groups += tiles_of(args.segments[i].tiles, kRows);
  const dim3 grid = grid_of(tiles_of(groups, kRowWarps), tiles_of(args.m, kTokenPadding));
  return launch(stream, grid, kThreads, linear_many_kernel<kRows, kGated, kHeads, kInt8>, args);
}

template <bool kHeads, bool kInt8>
int launch_few(const LinearLaunch& args, Stream stream) {
  int tiles = 0;
  for (int i = 0; i < args.num_segments; ++i) tiles += args.segments[i].tiles;
  const dim3 grid = grid_of(tiles);
  auto run = [&](auto kernel) { return launch(stream, grid, kThreads, kernel, args); };
  if (args.m <= 8) return run(linear_few_kernel<1, kHeads, kInt8>);
  if (args.m <= 16) return run(linear_few_kernel<2, kHeads, kInt8>);
  if (args.m <= 32) return run(linear_few_kernel<4, kHeads, kInt8>);
  return run(linear_few_kernel<8, kHeads, kInt8>);
}

template <bool kInt8>
int launch_any(const LinearLaunch& args, Stream stream) {
  const LinearSegment& first = args.segments[0];
  const bool few = args.m <= kFewTokens;
  if (first.epilogue == LinearEpilogue::kHeads) {
    return few ? launch_few<true, kInt8>(args, stream)
               : launch_many<2, false, true, kInt8>(args, stream);
  }
  if (few) return launch_few<false, kInt8>(args, stream);
  if (is_gated(first)) return launch_many<1, true, false, kInt8>(args, stream);
  return launch_many<2, false, false, kInt8>(args, stream);
}

template <bool kHeads, bool kInt8>
int load_few() {
  return first_failure(
      {load(linear_few_kernel<1, kHeads, kInt8>), load(linear_few_kernel<2, kHeads, kInt8>),
       load(linear_few_kernel<4, kHeads, kInt8>), load(linear_few_kernel<8, kHeads, kInt8>)});
}

template <bool kInt8>
int load_any() {
  return first_failure({load_few<false, kInt8>(), load_few<true, kInt8>(),
                        load(linear_many_kernel<1, true, false, kInt8>),
                        load(linear_many_kernel<2, false, false, kInt8>),
                        load(linear_many_kernel<2, false, true, kInt8>)});
}

}  // namespace

int load_linear_kernels() { return first_failure({load_any<false>(), load_any<true>()}); }

int launch_linear(const LinearLaunch& args, Stream stream) {
  bool int8 = false;
  for (int i = 0; i < args.num_segments; ++i) int8 |= args.segments[i].first.scales != nullptr;
  return int8 ? launch_any<true>(args, stream) : launch_any<false>(args, stream);
}

}  // namespace deinfer::cuda
