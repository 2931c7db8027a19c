// What CudaDecoder launches for the layers of a model.
#include <algorithm>

#include "model/cuda_decoder.h"
#include "model/decoder_weights.h"

namespace deinfer {

using cuda::check_launch;
using cuda::LinearEpilogue;
using cuda::LinearLaunch;

namespace {

/// Numbers between the rows of statistics that ranks contribute.
constexpr int kStatisticsLd = 4;

}  // namespace

void CudaDecoder::run_linear(const LinearLaunch& launch) const {
  bool any = false;
  for (int i = 0; i < launch.num_segments; ++i) any |= launch.segments[i].tiles > 0;
  if (!any || launch.m <= launch.first_token) return;  // this rank has nothing of it
  check_launch(cuda::launch_linear(launch, stream_.get()), "linear");
}

void CudaDecoder::run_norm(const cuda::NormLaunch& launch) const {
  if (launch.m > 0) check_launch(cuda::launch_norm(launch, stream_.get()), "norm");
}

cuda::NormLaunch CudaDecoder::norm_launch(int m, const CudaNorm& norm,
                                          const cuda::DeviceBuffer& x) const {
  const Range columns = own_columns();
  const Range rows = own_rows(m);
  cuda::NormLaunch launch;
  launch.x = x.as<float>();
  launch.ld = columns.size();
  launch.first_row = rows.begin;
  launch.m = rows.size();
  launch.n = columns.size();
  launch.kind = static_cast<int>(norm.kind);
  launch.eps = norm.eps;
  launch.gain = norm.gain.size() == 0 ? nullptr : norm.gain.as<float>() + columns.begin;
  launch.bias = norm.bias.size() == 0 ? nullptr : norm.bias.as<float>() + columns.begin;
  return launch;
}

cuda::KvPool CudaDecoder::kv_pool(int layer) const {
  const auto index = static_cast<std::size_t>(layer);
  return {k_[index].as<void>(), v_[index].as<void>(),
          block_size_,          kv_heads_,
          config_.head_dim,     cuda::head_width(config_.head_dim)};
}

std::size_t CudaDecoder::angles_before(std::size_t rope) const {
  return rope * static_cast<std::size_t>(padded_tokens(limits_.max_tokens) * config_.head_dim / 2);
}

cuda::Rotation CudaDecoder::rotation(std::size_t rope) const {
  if (ropes_.empty()) return {};
  const std::size_t offset = angles_before(rope);
  return {cos_.as<float>() + offset, sin_.as<float>() + offset, config_.head_dim / 2};
}

void CudaDecoder::add_to_residual(int m, const Activations& x, const CudaLinear& linear,
                                  const CudaNorm& norm) {
  const Input input{&x, nullptr, nullptr};
  const CudaLinear* const linears[] = {&linear};
  inner(m, input, linears);
  const bool normalizes = norm.kind != NormKind::kNone;
  float* out = normalizes ? branch_.as<float>() : residual_.as<float>();
  const int ld = own_columns().size();
  if (linear.exchange(kind_).after_u != Exchange::kNone) {
    exchange_output(m, linear, input, 0,
                    normalizes ? cuda::ReduceSink::kFloat : cuda::ReduceSink::kAdd, out, ld);
  } else {
    LinearLaunch launch = outer_launch(own_rows(m), linear, input, 0);
    cuda::LinearSegment& segment = launch.segments[0];
    segment.epilogue = normalizes ? LinearEpilogue::kFloat : LinearEpilogue::kAdd;
    segment.out = out + std::int64_t{own_rows(m).begin - launch.first_token} * ld;
    segment.ld = ld;
    run_linear(launch);
  }
  if (normalizes) add_branch(m, norm);
}

void CudaDecoder::sum_squares(int m, int count, const char* name) {
  cuda::ReduceLaunch sum;
  sum.rows = m;
  sum.cols = count;
  sum.ld = kStatisticsLd;
  sum.out = squares_.as<void>();
  sum.out_ld = count;
  reduce(Collective::kAllReduce, m,
         static_cast<std::size_t>(m) * static_cast<std::size_t>(count) * sizeof(float), name, sum);
}

/// residual_ += norm(branch_).
void CudaDecoder::add_branch(int m, const CudaNorm& norm) {
  cuda::NormLaunch add = norm_launch(m, norm, branch_);
  if (layout() == ResidualLayout::kHiddenShards) {
    cuda::NormLaunch part = add;
    part.statistics = floats_to_send();
    part.statistics_ld = kStatisticsLd;
    run_norm(part);
    sum_squares(m, 1, "squares of what a block adds");
    add.squares = squares_.as<float>();
    add.width = config_.hidden_size;
  }
  add.add_to = residual_.as<float>();
  run_norm(add);
}

void CudaDecoder::project_qkv(int m, int index) {
  const CudaLayer& layer = weights_.layers[static_cast<std::size_t>(index)];
  const CudaLinear* const linears[] = {&layer.query, &layer.key, &layer.value};
  const Input input = normed(m, layer.attention_norm, linears);
  LinearLaunch launch;
  launch.m = m;
  launch.heads = heads_;
  launch.rotation = rotation(kind_rope_[static_cast<std::size_t>(config_.attention_of(index))]);
  launch.kv = kv_pool(index);
  launch.slots = inputs(step_.offsets().slots);
  if (layer.query.exchange(kind_).after_u != Exchange::kNone) {
    float* const outs[] = {raw_query_.as<float>(), raw_key_.as<float>(), raw_value_.as<float>()};
    for (int i = 0; i < 3; ++i) {
      inner(m, input, Linears(linears + i, 1));
      exchange_output(m, *linears[i], input, 0, cuda::ReduceSink::kFloat, outs[i], linears[i]->u.n);
    }
    return normalize_qk(m, index, launch, true);
  }
  inner(m, input, linears);
  if (layer.kv.any_latent()) store_latents(m, index);
  const bool rotates = rotates_tiles(config_);
  const bool normalizes = config_.qk_norm != QkNormKind::kNone;
  int z_chunk = 0;
  auto add = [&](const CudaLinear& linear, bool is_wanted, LinearEpilogue epilogue,
                 const cuda::DeviceBuffer* out) {
    if (is_wanted) {
      cuda::LinearSegment& segment = launch.segments[launch.num_segments++];
      segment.first = outer(linear, input, z_chunk);
      segment.n = linear.u.n;
      segment.tiles = linear.u.tiles;
      segment.epilogue = epilogue;
      segment.ld = linear.u.n;
      if (out != nullptr) segment.out = out->as<void>();
    }
    z_chunk += linear.z_chunks();
  };
  // Of latents, only a norm over all heads wants k now.
  const bool wants_keys = layer.kv.k == KvForm::kDense || keeps_key_scales(layer);
  const bool wants_values = layer.kv.v == KvForm::kDense;
  if (normalizes) {
    add(layer.query, true, LinearEpilogue::kFloat, &raw_query_);
    add(layer.key, wants_keys, LinearEpilogue::kFloat, &raw_key_);
  } else {
    add(layer.query, true, rotates ? LinearEpilogue::kRotaryQuery : LinearEpilogue::kQuery,
        &query_);
    if (layer.kv.k == KvForm::kAbsorbed) {
      cuda::LinearSegment& query = launch.segments[0];
      query.epilogue = LinearEpilogue::kActivation;
      query.out = head_queries_.data.as<void>();
      query.out_chunks = head_queries_.chunks;
    }
    add(layer.key, wants_keys, rotates ? LinearEpilogue::kRotaryKey : LinearEpilogue::kKey,
        nullptr);
  }
  add(layer.value, wants_values, LinearEpilogue::kValue, nullptr);
  run_linear(launch);
  if (normalizes) normalize_qk(m, index, launch, false);
}

/// Norms, rotation and storage of q and k (and v) that have been computed as they are; of latent
/// keys no more than the factor of their norm.
void CudaDecoder::normalize_qk(int m, int index, const LinearLaunch& launch, bool has_v) {
  const CudaLayer& layer = weights_.layers[static_cast<std::size_t>(index)];
  const bool only_scales = keeps_key_scales(layer);
  cuda::QkNormLaunch norm;
  norm.q = raw_query_.as<float>();
  if (layer.kv.k == KvForm::kDense || only_scales) norm.k = raw_key_.as<float>();
  if (has_v) norm.v = raw_value_.as<float>();
  norm.m = m;
  norm.heads = heads_;
  norm.query_gain = layer.query_norm.gain.as<float>();
  norm.key_gain = layer.key_norm.gain.as<float>();
  norm.all_heads = config_.qk_norm == QkNormKind::kFull;
  norm.query_eps = layer.query_norm.eps;
  norm.key_eps = layer.key_norm.eps;
  norm.rotation = launch.rotation;
  norm.out = query_.as<void>();
  norm.kv = launch.kv;
  norm.slots = launch.slots;
  norm.key_scales = key_scales_[static_cast<std::size_t>(index)].as<float>();
  norm.key_cols = layer.key.u.n;
  if (norm.all_heads && heads_ < config_.num_heads) {
    const HeadShare& own = share_.heads;
    // The first rank of those that share a kv head counts it.
    const bool counts_keys =
        own.heads.begin == own.kv_heads.begin * (config_.num_heads / config_.num_kv_heads);
    for (bool keys : {false, true}) {
      cuda::NormLaunch part;
      part.x = keys ? norm.k : norm.q;
      part.ld =
          keys && only_scales ? norm.key_cols : (keys ? kv_heads_ : heads_) * config_.head_dim;
      part.m = m;
      part.n = keys && !counts_keys ? 0 : static_cast<int>(part.ld);
      part.kind = static_cast<int>(NormKind::kRms);
      part.statistics = floats_to_send() + (keys ? 1 : 0);
      part.statistics_ld = kStatisticsLd;
      run_norm(part);
    }
    sum_squares(m, 2, "squares of q and k");
    norm.squares = squares_.as<float>();
    norm.query_width = config_.num_heads * config_.head_dim;
    norm.key_width = config_.num_kv_heads * config_.head_dim;
  }
  check_launch(cuda::launch_qk_norm(norm, stream_.get()), "norm of q and k");
}

cuda::AttentionLaunch CudaDecoder::attention_launch(int layer) const {
  const auto index = static_cast<std::size_t>(layer);
  const CudaStep::AttentionOffsets& at = step_.offsets().attention[layer_attention_[index]];
  cuda::AttentionLaunch launch;
  launch.step.num_tasks = inputs(at.num_tasks);
  launch.step.num_combines = inputs(at.num_combines);
  launch.step.tasks = reinterpret_cast<const cuda::AttentionTask*>(inputs(at.tasks));
  launch.step.combines = reinterpret_cast<const cuda::AttentionTask*>(inputs(at.combines));
  launch.step.sequences =
      reinterpret_cast<const cuda::AttentionSequence*>(inputs(step_.offsets().sequences));
  launch.step.tables = inputs(step_.offsets().tables);
  launch.q = query_.as<void>();
  launch.kv = kv_pool(layer);
  launch.heads = heads_;
  launch.window = step_.attention(layer_attention_[index]).window;
  launch.scale = config_.score_scale();
  launch.soft_cap = config_.attention_soft_cap;
  launch.partial_sums = partial_sums_.as<float>();
  launch.partial_stats = partial_stats_.as<float>();
  launch.out = attended_.data.as<void>();
  launch.out_chunks = attended_.chunks;
  launch.blocks = attention_blocks_;
  return launch;
}

void CudaDecoder::attention_block(int m, int index) {
  const CudaLayer& layer = weights_.layers[static_cast<std::size_t>(index)];
  if (layer.kv.any_latent()) {
    attend_to_latents(m, index);
  } else {
    check_launch(cuda::launch_attention(attention_launch(index), stream_.get()), "attention");
  }
  add_to_residual(m, attended_, layer.output, layer.attention_output_norm);
}

void CudaDecoder::mlp_block(int m, const CudaLayer& layer) {
  const bool has_gate = is_gated(config_.mlp);
  const CudaLinear* const linears[] = {&layer.up, &layer.gate};
  const Linears group(linears, has_gate ? 2 : 1);
  const Input input = normed(m, layer.mlp_norm, group);
  const LinearEpilogue gated =
      config_.mlp == MlpKind::kGatedSilu ? LinearEpilogue::kGatedSilu : LinearEpilogue::kGatedGelu;
  const LinearEpilogue epilogue = has_gate ? gated : LinearEpilogue::kRelu;
  if (layer.up.exchange(kind_).after_u != Exchange::kNone) {
    float* const outs[] = {raw_up_.as<float>(), raw_gate_.as<float>()};
    for (std::size_t i = 0; i < group.size(); ++i) {
      inner(m, input, group.subspan(i, 1));
      exchange_output(m, *group[i], input, 0, cuda::ReduceSink::kFloat, outs[i], group[i]->u.n);
    }
    const cuda::ActivateLaunch launch{
        outs[1],      outs[0],  layer.up.u.n,           m,
        layer.up.u.n, epilogue, inner_.data.as<void>(), inner_.chunks};
    check_launch(cuda::launch_activate(launch, stream_.get()), "activation");
  } else {
    inner(m, input, group);
    LinearLaunch launch = outer_launch({0, m}, layer.up, input, 0);
    cuda::LinearSegment& segment = launch.segments[0];
    if (has_gate) {
      segment.second = segment.first;
      segment.first = outer(layer.gate, input, layer.up.z_chunks());
    }
    segment.epilogue = epilogue;
    segment.out = inner_.data.as<void>();
    segment.out_chunks = inner_.chunks;
    run_linear(launch);
  }
  add_to_residual(m, inner_, layer.down, layer.mlp_output_norm);
}

void CudaDecoder::run_layers(int m, int state_rows) {
  const CudaStep::Offsets& at = step_.offsets();
  tokens_in_step_ = m;
  for (std::size_t i = 0; i < ropes_.size(); ++i) {
    const std::size_t offset = angles_before(i);
    cuda::RopeLaunch launch;
    launch.positions = inputs(at.positions);
    launch.m = m;
    launch.frequencies = frequencies_[i].as<float>();
    launch.half = config_.head_dim / 2;
    launch.scaling = ropes_[i].attention_scaling();
    launch.cos = cos_.as<float>() + offset;
    launch.sin = sin_.as<float>() + offset;
    check_launch(cuda::launch_rope(launch, stream_.get()), "rope");
  }
  embed(m);
  keep_states(0, state_rows, m);
  for (int i = 0; i < config_.num_layers; ++i) {
    project_qkv(m, i);
    attention_block(m, i);
    mlp_block(m, weights_.layers[static_cast<std::size_t>(i)]);
    keep_states(i + 1, state_rows, m);
  }
}

}  // namespace deinfer
