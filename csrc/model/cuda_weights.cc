#include "model/cuda_weights.h"

#include <algorithm>
#include <cstring>

#include "base/bf16.h"
#include "kernels/cpu/packing.h"
#include "kernels/cuda/latents.h"
#include "kernels/cuda/packing.h"
#include "model/decoder_weights.h"

namespace deinfer {
namespace {

using cuda::kTileCols;
using cuda::kTileRows;
using cuda::tiles_of;

/// out[w.cols] = row `row` of w as a matrix of type `dtype` has it.
void read_rounded_row(DType dtype, const TensorView& w, std::int64_t row, float* out) {
  cpu::read_row(w, row, out);
  const float scale = dtype == DType::kInt8 ? cpu::int8_scale(w, row) : 0.0f;
  for (std::int64_t i = 0; i < w.cols; ++i) {
    out[i] = dtype == DType::kInt8 ? cpu::from_int8(cpu::to_int8(out[i], scale)) * scale
                                   : to_float(to_bf16(out[i]));
  }
}

/// Packs matrices on the host and uploads them, part by part.
class Uploader {
 public:
  /// `dtype`: of linears.
  Uploader(DType dtype, WeightLoader& loader, ThreadTeam& team, cuda::DeviceStream& stream)
      : dtype_(dtype), loader_(loader), team_(team), stream_(stream), staging_(kStagingBytes) {}

  /// A part of a tensor [n, k]. `row_multiple`: tiles are added (zero) until their rows are a
  /// multiple of it. The columns begin at `first_col` of the result. int8: a row's scale is that of
  /// the part's columns, as on the CPU.
  CudaMatrix matrix(DType dtype, const std::string& tensor, int n, int k, Range rows, Range cols,
                    const std::vector<std::int32_t>& row_map = {}, int row_multiple = kTileRows,
                    int first_col = 0) {
    CudaMatrix out = matrix(dtype, part_of(loader_.source().matrix(tensor, n, k), rows, cols),
                            row_map, row_multiple, first_col);
    loader_.used(tensor, static_cast<std::uint64_t>(n) * static_cast<std::uint64_t>(k));
    return out;
  }

  CudaMatrix matrix(DType dtype, const TensorView& source, const std::vector<std::int32_t>& row_map,
                    int row_multiple, int first_col = 0) {
    const bool int8 = dtype == DType::kInt8;
    CudaMatrix out;
    out.n =
        static_cast<int>(row_map.empty() ? static_cast<std::size_t>(source.rows) : row_map.size());
    out.k = source.cols == 0 ? 0 : first_col + static_cast<int>(source.cols);
    out.tiles = tiles_of(out.n, row_multiple) * row_multiple / kTileRows;
    const std::size_t tile_bytes = static_cast<std::size_t>(out.chunks()) * kTileRows * kTileCols *
                                   dtype_size(int8 ? DType::kInt8 : DType::kBFloat16);
    std::vector<float> scales(int8 ? static_cast<std::size_t>(out.tiles * kTileRows) : 0);
    if (tile_bytes > 0) {
      out.data = cuda::DeviceBuffer(static_cast<std::size_t>(out.tiles) * tile_bytes);
      const int most = std::max(1, static_cast<int>(kStagingBytes / tile_bytes));
      if (tile_bytes > staging_.size()) staging_ = cuda::PinnedBuffer(tile_bytes);
      for (int first = 0; first < out.tiles; first += most) {
        const int count = std::min(most, out.tiles - first);
        team_.run([&](TeamMember& member) {
          auto [begin, end] = member.share(count);
          std::byte* to = staging_.as<std::byte>() + static_cast<std::size_t>(begin) * tile_bytes;
          if (int8) {
            cuda::pack_int8_weights(source, row_map, first + begin, first + end,
                                    reinterpret_cast<std::uint16_t*>(to),
                                    scales.data() + (first + begin) * kTileRows, first_col);
          } else {
            cuda::pack_weights(source, row_map, first + begin, first + end,
                               reinterpret_cast<bf16*>(to), first_col);
          }
        });
        copy(out.data.as<std::byte>() + static_cast<std::size_t>(first) * tile_bytes,
             static_cast<std::size_t>(count) * tile_bytes);
      }
    }
    out.scales = floats(scales);
    return out;
  }

  /// W^T of every head in bf16, each padded to head_columns() rows.
  CudaMatrix transposed(const TensorView& w, int heads) {
    const int head_dim = static_cast<int>(w.rows) / heads;
    const auto rank = static_cast<std::size_t>(w.cols);
    std::vector<float> row(rank), values(static_cast<std::size_t>(w.rows) * rank);
    for (int i = 0; i < w.rows; ++i) {
      read_rounded_row(dtype_, w, i, row.data());
      float* head = values.data() + static_cast<std::size_t>(i / head_dim * head_dim) * rank;
      for (std::size_t j = 0; j < rank; ++j) {
        head[j * static_cast<std::size_t>(head_dim) + static_cast<std::size_t>(i % head_dim)] =
            row[j];
      }
    }
    return matrix(DType::kBFloat16,
                  {values.data(), DType::kFloat32, heads * w.cols, head_dim, head_dim},
                  cuda_head_row_map(heads, static_cast<int>(w.cols), kTileCols), kTileRows);
  }

  cuda::DeviceBuffer floats(const std::vector<float>& values) {
    cuda::DeviceBuffer out(values.size() * sizeof(float));
    const std::size_t most = staging_.size() / sizeof(float);
    for (std::size_t first = 0; first < values.size(); first += most) {
      const std::size_t count = std::min(most, values.size() - first);
      std::memcpy(staging_.as<void>(), values.data() + first, count * sizeof(float));
      copy(out.as<float>() + first, count * sizeof(float));
    }
    return out;
  }

  /// `norm`: of what it reads, whose terms are needed where V has columns of it; or null.
  /// `absorbed_heads`: so many heads of keys are absorbed; 0: none.
  CudaLinear linear(const std::string& name, LinearRole role, int n, int k, const Norm* norm,
                    const std::vector<std::int32_t>& row_map = {}, int row_multiple = kTileRows,
                    int absorbed_heads = 0) {
    const LinearPart part = loader_.part(name, role, n, k);
    const LinearTensors& tensors = part.tensors;
    const LinearPlacement& place = part.place;
    CudaLinear out;
    out.name = name;
    out.rank = part.rank();
    out.exchanges = part.exchanges;
    out.v_shares = part.v_shares;
    out.y_share = part.y_share;
    out.x_chunk = part.x_col / kTileCols;
    const std::vector<std::int32_t> in_order;
    const std::vector<std::int32_t>& map = part.exchanges_output() ? in_order : row_map;
    if (part.multiplied_out) {
      const std::vector<float> values = loader_.product(part, n, k);
      out.u = matrix(dtype_,
                     {values.data(), DType::kFloat32, place.u_rows.size(), place.u_cols.size(),
                      place.u_cols.size()},
                     map, row_multiple);
    } else if (out.is_low_rank()) {
      if (norm != nullptr && norm->kind == NormKind::kLayer && !loader_.share().hidden.empty()) {
        out.own_terms = own_terms(
            part_of(loader_.source().matrix(tensors.v, out.rank, k), place.v_rows, place.v_cols),
            *norm, place.v_cols.begin);
      }
      // The padding of z is written too, as products read it.
      out.v = matrix(dtype_, tensors.v, out.rank, k, place.v_rows, place.v_cols, {}, kTileCols);
      if (absorbed_heads > 0) {
        out.u = transposed(
            part_of(loader_.source().matrix(tensors.u, n, out.rank), place.u_rows, place.u_cols),
            absorbed_heads);
        loader_.used(tensors.u,
                     static_cast<std::uint64_t>(n) * static_cast<std::uint64_t>(out.rank));
      } else {
        out.u =
            matrix(dtype_, tensors.u, n, out.rank, place.u_rows, place.u_cols, map, row_multiple);
      }
    } else {
      out.u = matrix(dtype_, tensors.w, n, k, place.u_rows, place.u_cols, map, row_multiple,
                     part.x_col % kTileCols);
    }
    if (!tensors.bias.empty()) {
      std::vector<float> bias = loader_.bias(part, n, map);
      if (absorbed_heads > 0) return out;
      bias.resize(std::max(bias.size(), static_cast<std::size_t>(out.u.tiles * kTileRows)));
      out.u.bias = floats(bias);
    }
    return out;
  }

  CudaNorm norm(const Norm& norm) {
    return {norm.kind, norm.eps, floats(norm.gain), floats(norm.bias)};
  }

 private:
  /// V g and V b of columns of V, as rounded.
  std::vector<float> own_terms(const TensorView& v, const Norm& norm, int first) const {
    const auto rank = static_cast<std::size_t>(v.rows);
    std::vector<float> terms(2 * rank), row(static_cast<std::size_t>(v.cols));
    for (std::size_t j = 0; j < rank; ++j) {
      read_rounded_row(dtype_, v, static_cast<std::int64_t>(j), row.data());
      double gain = 0, bias = 0;
      for (std::size_t k = 0; k < row.size(); ++k) {
        const auto column = static_cast<std::size_t>(first) + k;
        const auto value = static_cast<double>(row[k]);
        gain += value * norm.gain[column];
        bias += value * norm.bias[column];
      }
      terms[j] = static_cast<float>(gain);
      terms[rank + j] = static_cast<float>(bias);
    }
    return terms;
  }

  static constexpr std::size_t kStagingBytes = std::size_t{32} << 20;

  void copy(void* to, std::size_t bytes) {
    stream_.upload(to, staging_.as<void>(), bytes);
    stream_.synchronize();  // the staging memory is used again
  }

  DType dtype_;
  WeightLoader& loader_;
  ThreadTeam& team_;
  cuda::DeviceStream& stream_;
  cuda::PinnedBuffer staging_;
};

CudaLayer load_layer(const ModelConfig& config, const KvForms& forms, const std::string& prefix,
                     WeightLoader& loader, Uploader& uploader) {
  const ModuleNames& names = config.names;
  const HeadShare& own = loader.share().heads;
  const int hidden = config.hidden_size;
  const int inner = config.intermediate_size;
  const int query_size = config.num_heads * config.head_dim;
  const int kv_size = config.num_kv_heads * config.head_dim;
  auto norm = [&](const std::string& name) {
    return load_norm(config, prefix, name, hidden, loader);
  };
  const bool absorbs_keys = forms.k == KvForm::kAbsorbed;
  auto head_map = [&](Range heads, int row_multiple) {
    return cuda_head_row_map(heads.size(), config.head_dim, row_multiple);
  };
  auto row_map = [&](Range heads, bool rotates) {
    return rotates ? cuda_rotary_row_map(heads.size(), config.head_dim)
                   : std::vector<std::int32_t>{};
  };
  // Absorbed queries are read as activations of heads, absorbed values written by pairs of tiles;
  // keys are rebuilt with their rotation, whatever comes before it.
  const std::vector<std::int32_t> query_rows =
      absorbs_keys ? head_map(own.heads, kTileCols) : row_map(own.heads, rotates_tiles(config));
  std::vector<std::int32_t> key_rows = row_map(own.kv_heads, rotates_tiles(config));
  if (forms.k == KvForm::kRebuilt) {
    key_rows = config.positions == PositionKind::kRotary ? row_map(own.kv_heads, true)
                                                         : head_map(own.kv_heads, kTileRows);
  }
  std::vector<std::int32_t> value_rows;
  if (forms.v != KvForm::kDense) {
    value_rows = head_map(own.kv_heads, forms.v == KvForm::kAbsorbed ? 2 * kTileRows : kTileRows);
  }
  auto head_norm = [&](const std::string& name, int heads, Range part) {
    return uploader.norm(load_head_norm(config, prefix, name, heads, part, loader));
  };
  CudaLayer layer;
  const Norm attention_norm = norm(names.attention_norm);
  layer.attention_norm = uploader.norm(attention_norm);
  layer.query = uploader.linear(prefix + names.query, LinearRole::kQuery, query_size, hidden,
                                &attention_norm, query_rows);
  layer.key =
      uploader.linear(prefix + names.key, LinearRole::kKey, kv_size, hidden, &attention_norm,
                      key_rows, kTileRows, absorbs_keys ? own.kv_heads.size() : 0);
  layer.value = uploader.linear(prefix + names.value, LinearRole::kValue, kv_size, hidden,
                                &attention_norm, value_rows);
  layer.kv = forms;
  check_has_latents(layer.key, forms.k);
  check_has_latents(layer.value, forms.v);
  if (config.qk_norm != QkNormKind::kNone) {
    layer.query_norm = head_norm(names.query_norm, config.num_heads, own.heads);
    layer.key_norm = head_norm(names.key_norm, config.num_kv_heads, own.kv_heads);
  }
  layer.output = uploader.linear(prefix + names.output, LinearRole::kAttentionOutput, hidden,
                                 query_size, nullptr);
  layer.attention_output_norm = uploader.norm(norm(names.attention_output_norm));
  const Norm mlp_norm = norm(names.mlp_norm);
  layer.mlp_norm = uploader.norm(mlp_norm);
  // What they write is read up to a multiple of kTileCols.
  if (is_gated(config.mlp)) {
    layer.gate = uploader.linear(prefix + names.gate, LinearRole::kGate, inner, hidden, &mlp_norm,
                                 {}, kTileCols);
  }
  layer.up =
      uploader.linear(prefix + names.up, LinearRole::kUp, inner, hidden, &mlp_norm, {}, kTileCols);
  layer.down = uploader.linear(prefix + names.down, LinearRole::kDown, hidden, inner, nullptr);
  layer.mlp_output_norm = uploader.norm(norm(names.mlp_output_norm));
  return layer;
}

/// The terms of all ranks, whose own are known.
void join_terms(CudaLinear& linear, Communicator& communicator, cuda::DeviceStream& stream) {
  if (linear.own_terms.empty()) return;
  const auto rank = static_cast<std::size_t>(linear.rank);
  const auto cols = static_cast<std::size_t>(linear.z_cols());
  const auto size = static_cast<std::size_t>(communicator.size());
  const std::vector<float>& own = linear.own_terms;
  std::vector<float> all(size * own.size()), gain(size * cols), bias(cols);
  communicator.all_gather(own.data(), own.size() * sizeof(float), all.data());
  for (std::size_t r = 0; r < size; ++r) {
    const float* theirs = all.data() + r * own.size();
    std::copy_n(theirs, rank, gain.data() + r * cols);
    for (std::size_t j = 0; j < rank; ++j) bias[j] += theirs[rank + j];
  }
  linear.gain_terms = cuda::DeviceBuffer(gain.size() * sizeof(float));
  linear.bias_terms = cuda::DeviceBuffer(bias.size() * sizeof(float));
  stream.upload(linear.gain_terms.as<void>(), gain.data(), linear.gain_terms.size());
  stream.upload(linear.bias_terms.as<void>(), bias.data(), linear.bias_terms.size());
  stream.synchronize();
  linear.own_terms = {};
}

}  // namespace

std::vector<std::int32_t> cuda_rotary_row_map(int heads, int head_dim) {
  std::vector<std::int32_t> map;
  const int half = head_dim / 2;
  for (int head = 0; head < heads; ++head) {
    for (int first = 0; first < half; first += 8) {
      for (int row = 0; row < kTileRows; ++row) {
        const int j = first + row % 8;
        map.push_back(j < half ? head * head_dim + j + (row < 8 ? 0 : half) : -1);
      }
    }
  }
  return map;
}

std::vector<std::int32_t> cuda_head_row_map(int heads, int head_dim, int row_multiple) {
  std::vector<std::int32_t> map;
  for (int head = 0; head < heads; ++head) {
    for (int row = 0; row < tiles_of(head_dim, row_multiple) * row_multiple; ++row) {
      map.push_back(row < head_dim ? head * head_dim + row : -1);
    }
  }
  return map;
}

std::vector<const CudaLinear*> CudaLayer::linears() const {
  std::vector<const CudaLinear*> all = {&query, &key, &value, &output, &up, &down, &gate};
  if (gate.name.empty()) all.pop_back();  // a plain MLP
  return all;
}

std::size_t CudaWeights::bytes() const {
  std::size_t total = embedding.bytes() + positions.bytes() + head.bytes() + final_norm.bytes();
  for (const CudaLayer& layer : layers) {
    for (const CudaLinear* linear : layer.linears()) total += linear->bytes();
    for (const CudaNorm* norm :
         {&layer.attention_norm, &layer.attention_output_norm, &layer.query_norm, &layer.key_norm,
          &layer.mlp_norm, &layer.mlp_output_norm}) {
      total += norm->bytes();
    }
  }
  return total;
}

void join_norm_terms(CudaWeights& weights, Communicator& communicator, cuda::DeviceStream& stream) {
  for (CudaLayer& layer : weights.layers) {
    for (CudaLinear* linear : {&layer.query, &layer.key, &layer.value, &layer.gate, &layer.up}) {
      join_terms(*linear, communicator, stream);
    }
  }
}

CudaWeights load_cuda_weights(const ModelConfig& config, DType dtype,
                              const std::vector<KvForms>& kv_forms, WeightLoader& loader,
                              ThreadTeam& team, cuda::DeviceStream& stream) {
  Uploader uploader(dtype, loader, team, stream);
  const ModuleNames& names = config.names;
  const RankShare& share = loader.share();
  const Range columns{0, config.hidden_size};
  CudaWeights weights;
  weights.dtype = dtype;
  CudaMatrix embedding = uploader.matrix(config.tie_word_embeddings ? dtype : DType::kBFloat16,
                                         names.embedding + ".weight", config.vocab_size,
                                         config.hidden_size, share.vocabulary(), columns);
  if (config.positions == PositionKind::kLearned) {
    const int rows = config.position_offset + config.max_position_embeddings;
    weights.positions = uploader.matrix(
        DType::kBFloat16, names.positions + ".weight", rows, config.hidden_size, {0, rows},
        share.hidden.empty() ? columns : share.hidden[static_cast<std::size_t>(share.rank)]);
  }
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string prefix = names.layers + "." + std::to_string(i) + ".";
    const KvForms forms = kv_forms.empty() ? KvForms{} : kv_forms[static_cast<std::size_t>(i)];
    weights.layers.push_back(load_layer(config, forms, prefix, loader, uploader));
  }
  weights.final_norm =
      uploader.norm(load_norm(config, "", names.final_norm, config.hidden_size, loader));
  if (config.tie_word_embeddings) {
    weights.head.name = names.embedding;
    weights.head.u = std::move(embedding);
  } else {
    weights.head = uploader.linear(names.head, LinearRole::kHead, config.vocab_size,
                                   config.hidden_size, nullptr);
    weights.embedding = std::move(embedding);
  }
  loader.check_all_used();
  return weights;
}

}  // namespace deinfer
