// Matrices of other programs, row after row, on their way into the tiles of layout.h.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"

namespace deinfer::cuda {
namespace {

constexpr int kThreads = 256;

/// Two neighbouring elements of a row, zero beyond the matrix.
__device__ __forceinline__ unsigned load_pair(const TileLaunch& args, int row, int col) {
  const auto* x = static_cast<const __nv_bfloat16*>(args.from) + std::int64_t{row} * args.ld;
  const bool inside = row < args.rows;
  return pack_bf16(inside && col < args.cols ? __bfloat162float(x[col]) : 0.0f,
                   inside && col + 1 < args.cols ? __bfloat162float(x[col + 1]) : 0.0f);
}

/// A block per tile, of weights or of activations.
template <bool kWeights>
__global__ void __launch_bounds__(kThreads) tile_kernel(const TileLaunch args) {
  constexpr int kRows = kWeights ? kTileRows : kTileTokens;
  constexpr int kPairs = kTileCols / 2;
  const int pair = static_cast<int>(threadIdx.x);
  if (pair >= kRows * kPairs) return;
  const int tile = static_cast<int>(blockIdx.x) / args.chunks;
  const int chunk = static_cast<int>(blockIdx.x) % args.chunks;
  const int row = tile * kRows + pair / kPairs;
  const int col = chunk * kTileCols + pair % kPairs * 2;
  const unsigned bits = load_pair(args, row, col);
  const std::int64_t place =
      kWeights ? weight_offset(row, col, args.chunks) : activation_offset(row, col, args.chunks);
  memcpy(static_cast<__nv_bfloat16*>(args.out) + place, &bits, sizeof bits);
}

__global__ void __launch_bounds__(kThreads)
    widen_kernel(const void* from, int n, int padded, float* out) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i < padded) out[i] = from != nullptr && i < n ? load_bf16(from, i) : 0.0f;
}

}  // namespace

int launch_tile_weights(const TileLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.tiles * args.chunks), kThreads, tile_kernel<true>, args);
}

int launch_tile_activations(const TileLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.tiles * args.chunks), kTileTokens * kTileCols / 2,
                tile_kernel<false>, args);
}

int launch_widen(const void* from, int n, int padded, float* out, Stream stream) {
  return launch(stream, grid_of(tiles_of(padded, kThreads)), kThreads, widen_kernel, from, n,
                padded, out);
}

}  // namespace deinfer::cuda
