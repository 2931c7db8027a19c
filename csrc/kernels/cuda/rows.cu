// What happens to rows of tokens between products: embedding, norms, angles, q and k with norms,
// the most likely token.
#include "kernels/cuda/weights.cuh"

namespace deinfer::cuda {
namespace {

constexpr int kThreads = 256;

/// A block per row.
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormLaunch args) {
  const int i = args.first_row + static_cast<int>(blockIdx.x);
  const float* x = args.x + (args.rows != nullptr ? args.rows[blockIdx.x] : i) * args.ld;
  const int first = static_cast<int>(threadIdx.x);
  const bool is_part = args.statistics != nullptr;
  float mean = 0.0f;
  float scale = 1.0f;
  if (args.kind == 2) {
    float sum = 0.0f;
    for (int j = first; j < args.n; j += kThreads) sum += x[j];
    sum = block_sum<kThreads>(sum);
    mean = args.n > 0 ? sum / static_cast<float>(args.n) : 0.0f;
  }
  if (args.squares != nullptr) {
    scale = 1.0f / sqrtf(args.squares[i] / static_cast<float>(args.width) + args.eps);
  } else if (args.kind != 0) {
    float sum = 0.0f;
    for (int j = first; j < args.n; j += kThreads) sum += (x[j] - mean) * (x[j] - mean);
    const float squares = block_sum<kThreads>(sum);
    if (!is_part) {
      scale = 1.0f / sqrtf(squares / static_cast<float>(args.n) + args.eps);
    } else if (first == 0) {
      float* own = args.statistics + std::int64_t{i} * args.statistics_ld;
      if (args.kind == 2) *own++ = mean;
      *own = squares;
    }
  }
  for (int j = first; j < args.n; j += kThreads) {
    float y = (x[j] - mean) * scale;
    if (args.gain != nullptr) y *= args.gain[j];
    if (args.bias != nullptr) y += args.bias[j];
    const std::int64_t row = i;
    if (args.out != nullptr) store_bf16(args.out, activation_offset(i, j, args.out_chunks), y);
    if (args.out_float != nullptr) args.out_float[row * args.out_ld + j] = y;
    if (args.add_to != nullptr) args.add_to[row * args.ld + j] += y;
  }
  if (args.out == nullptr) return;
  for (int j = args.n + first; j < args.out_chunks * kTileCols; j += kThreads) {
    store_bf16(args.out, activation_offset(i, j, args.out_chunks), 0.0f);
  }
}

__global__ void __launch_bounds__(kThreads) embed_kernel(const EmbedLaunch args) {
  const int i = args.first_row + static_cast<int>(blockIdx.x);
  const int row = args.indices[i] + args.offset;
  const bool found = row >= 0 && row < args.table_rows;
  float* x = args.x + i * args.ld;
  for (int j = static_cast<int>(threadIdx.x); j < args.cols; j += kThreads) {
    float value = 0.0f;
    if (found) value = args.scale * load_weight(args.table, args.scales, row, j, args.chunks);
    x[j] = args.adds ? x[j] + value : value;
  }
}

__global__ void __launch_bounds__(kThreads) rope_kernel(const RopeLaunch args) {
  const int i = static_cast<int>(blockIdx.x);
  const auto position = static_cast<float>(args.positions[i]);
  for (int j = static_cast<int>(threadIdx.x); j < args.half; j += kThreads) {
    const float angle = position * args.frequencies[j];
    const std::int64_t at = std::int64_t{i} * args.half + j;
    args.cos[at] = cosf(angle) * args.scaling;
    args.sin[at] = sinf(angle) * args.scaling;
  }
}

/// A block per token: first the queries' heads, then the keys', then the values'; a warp per head.
__global__ void __launch_bounds__(kThreads) qk_norm_kernel(const QkNormLaunch args) {
  const int token = static_cast<int>(blockIdx.x);
  const KvPool& kv = args.kv;
  const int half = args.rotation.half;
  for (int side = 0; side < 2; ++side) {
    const bool keys = side == 1;
    if (keys && args.k == nullptr) break;
    const bool only_scale = keys && args.key_scales != nullptr;
    const int heads = keys ? kv.kv_heads : args.heads;
    const int n = only_scale ? args.key_cols : heads * kv.head_dim;
    const float* x = (keys ? args.k : args.q) + std::int64_t{token} * n;
    const float* gain = keys ? args.key_gain : args.query_gain;
    const float eps = keys ? args.key_eps : args.query_eps;
    float scale = 1.0f;
    if (args.squares != nullptr) {
      const int width = keys ? args.key_width : args.query_width;
      const float sum = args.squares[2 * token + side];
      scale = 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
    } else if (args.all_heads) {
      float sum = 0.0f;
      for (int j = static_cast<int>(threadIdx.x); j < n; j += kThreads) sum += x[j] * x[j];
      const auto width = static_cast<float>(heads * kv.head_dim);  // n may have padding
      scale = 1.0f / sqrtf(block_sum<kThreads>(sum) / width + eps);
    }
    const int slot = args.slots[token];
    if (only_scale) {
      if (threadIdx.x == 0 && slot >= 0) args.key_scales[slot] = scale;
      break;
    }
    for (int head = warp_id(); head < heads; head += kThreads / kWarp) {
      const float* row = x + head * kv.head_dim;
      const float* weights = args.all_heads ? gain + head * kv.head_dim : gain;
      if (gain != nullptr && !args.all_heads) {
        float sum = 0.0f;
        for (int j = lane_id(); j < kv.head_dim; j += kWarp) sum += row[j] * row[j];
        scale = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(kv.head_dim) + eps);
      }
      if (keys && slot < 0) continue;
      void* out = keys ? kv.k : args.out;
      const std::int64_t place =
          keys ? key_offset(kv, slot, head) : (std::int64_t{token} * heads + head) * kv.head_width;
      auto normed = [&](int j) { return gain != nullptr ? row[j] * scale * weights[j] : row[j]; };
      if (half == 0) {
        for (int j = lane_id(); j < kv.head_dim; j += kWarp) store_bf16(out, place + j, normed(j));
      }
      for (int j = lane_id(); j < half; j += kWarp) {
        const std::int64_t at = std::int64_t{token} * half + j;
        const float cos = args.rotation.cos[at];
        const float sin = args.rotation.sin[at];
        const float low = normed(j);
        const float high = normed(j + half);
        store_bf16(out, place + j, low * cos - high * sin);
        store_bf16(out, place + j + half, high * cos + low * sin);
      }
    }
  }
  const int slot = args.slots[token];
  if (args.v == nullptr || slot < 0) return;
  const int n = kv.kv_heads * kv.head_dim;
  for (int j = static_cast<int>(threadIdx.x); j < n; j += kThreads) {
    store_bf16(kv.v, value_offset(kv, slot, j / kv.head_dim, j % kv.head_dim),
               args.v[std::int64_t{token} * n + j]);
  }
}

/// f(gate) * up, as the epilogues of gated products.
__global__ void __launch_bounds__(kThreads) activate_kernel(const ActivateLaunch args) {
  const int i = static_cast<int>(blockIdx.x);
  for (int j = static_cast<int>(threadIdx.x); j < args.n; j += kThreads) {
    const std::int64_t at = i * args.ld + j;
    const float up = args.up[at];
    float y = fmaxf(up, 0.0f);
    if (args.kind == LinearEpilogue::kGatedSilu) y = silu(args.gate[at]) * up;
    if (args.kind == LinearEpilogue::kGatedGelu) y = gelu_tanh(args.gate[at]) * up;
    store_bf16(args.out, activation_offset(i, j, args.out_chunks), y);
  }
}

/// A block per row.
__global__ void __launch_bounds__(kThreads) argmax_kernel(const ArgmaxLaunch args) {
  const float* logits = args.logits + std::int64_t{blockIdx.x} * args.vocabulary;
  const Best best = block_best<kThreads>(largest_of<kThreads>(logits, args.vocabulary));
  if (threadIdx.x != 0) return;
  if (args.tokens != nullptr) args.tokens[blockIdx.x] = best.index;
  if (args.candidates != nullptr) {
    args.candidates[blockIdx.x] = {best.value, args.first_token + best.index};
  }
}

}  // namespace

int load_row_kernels() {
  return first_failure({load(norm_kernel), load(embed_kernel), load(rope_kernel),
                        load(qk_norm_kernel), load(activate_kernel), load(argmax_kernel)});
}

int launch_norm(const NormLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.m), kThreads, norm_kernel, args);
}

int launch_embed(const EmbedLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.m), kThreads, embed_kernel, args);
}

int launch_rope(const RopeLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.m), kThreads, rope_kernel, args);
}

int launch_qk_norm(const QkNormLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.m), kThreads, qk_norm_kernel, args);
}

int launch_activate(const ActivateLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.m), kThreads, activate_kernel, args);
}

int launch_argmax(const ArgmaxLaunch& args, Stream stream) {
  return launch(stream, grid_of(args.rows), kThreads, argmax_kernel, args);
}

}  // namespace deinfer::cuda
