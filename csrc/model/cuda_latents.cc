// What CudaDecoder does where the KV cache keeps latents instead of K or V: their pools, queries
// that have taken in U of the keys, attention, U of the values. On the CPU: ops/latent_kv.cc.
#include <algorithm>
#include <numeric>

#include "base/bf16.h"
#include "model/cuda_decoder.h"

namespace deinfer {

using cuda::check_launch;
using cuda::kTileCols;
using cuda::kTileRows;
using cuda::KvPool;
using cuda::LinearLaunch;
using cuda::LinearSegment;

namespace {

cuda::HeadFactor head_factor(const CudaLinear& linear, int kv_heads) {
  return {linear.u.data.as<void>(), linear.u.bias.as<float>(), linear.u.tiles / kv_heads,
          linear.u.chunks(), linear.u.scales.as<float>()};
}

/// A product of every head with its own part of x, `chunks` tiles of columns each.
LinearLaunch head_products(int m, int heads, int kv_heads, const CudaMatrix& matrix,
                           const void* x) {
  LinearLaunch launch;
  launch.m = m;
  launch.num_segments = 1;
  LinearSegment& segment = launch.segments[0];
  segment.first = matrix.factor(x, heads * matrix.chunks());
  segment.epilogue = cuda::LinearEpilogue::kHeads;
  segment.head_tiles = matrix.tiles / kv_heads;
  segment.group = heads / kv_heads;
  segment.tiles = heads * segment.head_tiles;
  segment.n = segment.tiles * kTileRows;
  return launch;
}

}  // namespace

std::uint64_t CudaDecoder::dense_kv_token_bytes() const {
  return std::uint64_t{2} * sizeof(bf16) *
         static_cast<std::uint64_t>(kv_heads_ * cuda::head_width(config_.head_dim));
}

KvBytes CudaDecoder::kv_token_bytes(int layer) const {
  const CudaLayer& weights = weights_.layers[static_cast<std::size_t>(layer)];
  auto bytes = [&](KvForm form, int rank) {
    return form == KvForm::kDense
               ? dense_kv_token_bytes() / 2
               : static_cast<std::uint64_t>(cuda::latent_width(rank)) * sizeof(bf16);
  };
  KvBytes sides{bytes(weights.kv.k, weights.key.rank), bytes(weights.kv.v, weights.value.rank)};
  if (keeps_key_scales(weights)) sides.k += sizeof(float);
  return sides;
}

bool CudaDecoder::keeps_key_scales(const CudaLayer& layer) const {
  return layer.kv.k == KvForm::kRebuilt && config_.qk_norm == QkNormKind::kFull;
}

KvPool CudaDecoder::key_pool(int layer) const {
  const CudaLayer& weights = weights_.layers[static_cast<std::size_t>(layer)];
  if (weights.kv.k == KvForm::kDense) return kv_pool(layer);
  return {k_[static_cast<std::size_t>(layer)].as<void>(),
          nullptr,
          block_size_,
          1,
          weights.key.rank,
          cuda::latent_width(weights.key.rank)};
}

KvPool CudaDecoder::value_pool(int layer) const {
  const CudaLayer& weights = weights_.layers[static_cast<std::size_t>(layer)];
  if (weights.kv.v == KvForm::kDense) return kv_pool(layer);
  auto* data = v_[static_cast<std::size_t>(layer)].as<void>();
  const bool rebuilds = weights.kv.v == KvForm::kRebuilt;
  return {rebuilds ? data : nullptr,
          rebuilds ? nullptr : data,
          block_size_,
          1,
          weights.value.rank,
          cuda::latent_width(weights.value.rank)};
}

/// z of the keys and values that are latent, which follow that of the queries in z_.
void CudaDecoder::store_latents(int m, int layer) {
  const CudaLayer& weights = weights_.layers[static_cast<std::size_t>(layer)];
  cuda::LatentWriteLaunch launch;
  launch.z = z_.data.as<void>();
  launch.z_chunks = z_.chunks;
  launch.m = m;
  launch.slots = inputs(step_.offsets().slots);
  if (weights.kv.k != KvForm::kDense) {
    launch.sides[0] = {weights.query.z_chunks(), key_pool(layer)};
  }
  if (weights.kv.v != KvForm::kDense) {
    launch.sides[1] = {weights.query.z_chunks() + weights.key.z_chunks(), value_pool(layer)};
  }
  check_launch(cuda::launch_latent_write(launch, stream_.get()), "writing of latents");
}

void CudaDecoder::attend_to_latents(int m, int layer) {
  const CudaLayer& weights = weights_.layers[static_cast<std::size_t>(layer)];
  const bool absorbs_values = weights.kv.v == KvForm::kAbsorbed;
  cuda::LatentAttentionLaunch launch;
  launch.common = attention_launch(layer);
  launch.query_width = launch.head_width = cuda::head_width(config_.head_dim);
  launch.head_dim = config_.head_dim;
  launch.totals = latent_totals_.as<float>();
  launch.common.blocks = latent_blocks_;
  launch.keys = key_pool(layer);
  launch.values = value_pool(layer);
  if (weights.kv.k == KvForm::kAbsorbed) {
    const int width = cuda::head_columns(weights.key.rank);
    LinearLaunch absorb =
        head_products(m, heads_, kv_heads_, weights.key.u, head_queries_.data.as<void>());
    absorb.segments[0].out = absorbed_query_.as<void>();
    absorb.segments[0].ld = std::int64_t{heads_} * width;
    run_linear(absorb);
    launch.common.q = absorbed_query_.as<void>();
    launch.query_width = width;
  }
  if (weights.kv.k == KvForm::kRebuilt) {
    launch.key_factor = head_factor(weights.key, kv_heads_);
    const std::size_t rope = kind_rope_[static_cast<std::size_t>(config_.attention_of(layer))];
    if (!ropes_.empty()) {
      const Angles& all = all_angles_[rope];
      launch.rotation = {all.cos.as<float>(), all.sin.as<float>(), config_.head_dim / 2};
    }
    launch.key_gain = weights.key_norm.gain.as<float>();
    launch.key_eps = weights.key_norm.eps;
    launch.key_scales = key_scales_[static_cast<std::size_t>(layer)].as<float>();
  }
  if (weights.kv.v == KvForm::kRebuilt) {
    launch.value_factor = head_factor(weights.value, kv_heads_);
  }
  KvPool& outputs = launch.common.kv;
  outputs.kv_heads = step_.attention(layer_attention_[static_cast<std::size_t>(layer)]).kv_heads;
  if (absorbs_values) {
    outputs.head_dim = outputs.head_width = cuda::head_columns(weights.value.rank);
    launch.common.out = latent_outputs_.data.as<void>();
    launch.common.out_chunks = heads_ * outputs.head_dim / kTileCols;
  }
  check_launch(cuda::launch_latent_attention(launch, stream_.get()), "attention to latents");
  if (!absorbs_values) return;
  LinearLaunch expand =
      head_products(m, heads_, kv_heads_, weights.value.u, latent_outputs_.data.as<void>());
  expand.kv.head_dim = config_.head_dim;
  expand.segments[0].out = attended_.data.as<void>();
  expand.segments[0].out_chunks = attended_.chunks;
  run_linear(expand);
}

void CudaDecoder::allocate_for_latents() {
  int query_columns = 0, value_columns = 0;
  bool any = false;
  all_angles_.resize(ropes_.size());
  for (int i = 0; i < config_.num_layers; ++i) {
    const CudaLayer& layer = weights_.layers[static_cast<std::size_t>(i)];
    any |= layer.kv.any_latent();
    if (layer.kv.k == KvForm::kAbsorbed) {
      query_columns = std::max(query_columns, cuda::head_columns(layer.key.rank));
    }
    if (layer.kv.v == KvForm::kAbsorbed) {
      value_columns = std::max(value_columns, cuda::head_columns(layer.value.rank));
    }
    if (layer.kv.k == KvForm::kRebuilt && !ropes_.empty()) {
      make_angles(kind_rope_[static_cast<std::size_t>(config_.attention_of(i))]);
    }
  }
  const auto rows = static_cast<std::size_t>(padded_tokens(limits_.max_tokens) * heads_);
  if (any) latent_totals_ = zeroed(cuda::latent_totals_bytes(latent_blocks_));
  if (query_columns > 0) {
    head_queries_ = activations(heads_ * cuda::head_columns(config_.head_dim));
    absorbed_query_ = zeroed(rows * static_cast<std::size_t>(query_columns) * sizeof(bf16));
  }
  if (value_columns > 0) latent_outputs_ = activations(heads_ * value_columns);
}

/// Of every position that a sequence can have.
void CudaDecoder::make_angles(std::size_t rope) {
  Angles& angles = all_angles_[rope];
  if (angles.cos.size() > 0) return;
  const int half = config_.head_dim / 2;
  const auto count = static_cast<std::size_t>(limits_.max_model_len);
  std::vector<int> positions(count);
  std::iota(positions.begin(), positions.end(), 0);
  cuda::DeviceBuffer on_device(count * sizeof(int));
  stream_.upload(on_device.as<void>(), positions.data(), on_device.size());
  angles.cos = cuda::DeviceBuffer(count * static_cast<std::size_t>(half) * sizeof(float));
  angles.sin = cuda::DeviceBuffer(angles.cos.size());
  check_launch(
      cuda::launch_rope(
          {on_device.as<int>(), limits_.max_model_len, frequencies_[rope].as<float>(), half,
           ropes_[rope].attention_scaling(), angles.cos.as<float>(), angles.sin.as<float>()},
          stream_.get()),
      "rope");
  stream_.synchronize();
}

}  // namespace deinfer
