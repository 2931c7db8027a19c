// What follows a product of linear.cu while the results are in registers: scales, bias, activation,
// rotation, and where the results go.
#pragma once

#include "kernels/cuda/weights.cuh"

namespace deinfer::cuda {

/// Two values of a token, of rows `row` and `row + 8` of W.
struct Pair {
  float low, high;
};

/// Sums of products with rows `row` and `row` + 8, with their scales and biases.
template <bool kInt8>
__device__ __forceinline__ Pair complete(const LinearFactor& factor, int row, Pair y) {
  y = {scaled<kInt8>(y.low, factor.scales, row), scaled<kInt8>(y.high, factor.scales, row + 8)};
  if (factor.bias != nullptr) {
    y.low += factor.bias[row];
    y.high += factor.bias[row + 8];
  }
  return y;
}

constexpr bool is_gated(const LinearSegment& segment) {
  return segment.epilogue == LinearEpilogue::kGatedSilu ||
         segment.epilogue == LinearEpilogue::kGatedGelu;
}

template <bool kInt8>
__device__ __forceinline__ Pair gated(const LinearSegment& segment, int row, Pair gate, Pair up) {
  gate = complete<kInt8>(segment.first, row, gate);
  up = complete<kInt8>(segment.second, row, up);
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
template <bool kInt8>
__device__ __forceinline__ void finish_head(const LinearLaunch& args, const LinearSegment& segment,
                                            int tile, int pair, int token, Pair y) {
  y = complete<kInt8>(segment.first, weight_tile<true>(segment, tile) * kTileRows + pair, y);
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
template <bool kHeads, bool kInt8>
__device__ __forceinline__ void finish(const LinearLaunch& args, const LinearSegment& segment,
                                       int tile, int pair, int token, Pair y) {
  if (kHeads) return finish_head<kInt8>(args, segment, tile, pair, token, y);
  if (token < args.first_token) return;
  const int row = tile * kTileRows + pair;
  switch (segment.epilogue) {
    case LinearEpilogue::kRelu:
    case LinearEpilogue::kActivation:
      y = complete<kInt8>(segment.first, row, y);
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
      y = complete<kInt8>(segment.first, row, y);
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
      y = complete<kInt8>(segment.first, row, y);
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
      y = complete<kInt8>(segment.first, row, y);
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

}  // namespace deinfer::cuda
