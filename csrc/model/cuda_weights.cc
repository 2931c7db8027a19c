#include "model/cuda_weights.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/packing.h"
#include "model/decoder_weights.h"

namespace deinfer {
namespace {

using cuda::kTileCols;
using cuda::kTileRows;
using cuda::tiles_of;

/// Packs matrices on the host and uploads them, part by part.
class Uploader {
 public:
  Uploader(WeightLoader& loader, ThreadTeam& team, cuda::DeviceStream& stream)
      : loader_(loader), team_(team), stream_(stream), staging_(kStagingBytes) {}

  /// `row_multiple`: tiles are added (zero) until their rows are a multiple of it.
  CudaMatrix matrix(const std::string& tensor, int n, int k,
                    const std::vector<std::int32_t>& row_map = {}, int row_multiple = kTileRows) {
    const TensorView source = loader_.source().matrix(tensor, n, k);
    CudaMatrix out;
    out.n = row_map.empty() ? n : static_cast<int>(row_map.size());
    out.k = k;
    out.tiles = tiles_of(out.n, row_multiple) * row_multiple / kTileRows;
    const std::size_t tile_bytes =
        static_cast<std::size_t>(out.chunks()) * kTileRows * kTileCols * sizeof(bf16);
    out.data = cuda::DeviceBuffer(static_cast<std::size_t>(out.tiles) * tile_bytes);
    const int most = std::max(1, static_cast<int>(kStagingBytes / tile_bytes));
    if (tile_bytes > staging_.size()) staging_ = cuda::PinnedBuffer(tile_bytes);
    for (int first = 0; first < out.tiles; first += most) {
      const int count = std::min(most, out.tiles - first);
      team_.run([&](TeamMember& member) {
        auto [begin, end] = member.share(count);
        cuda::pack_weights(source, row_map, first + begin, first + end,
                           reinterpret_cast<bf16*>(staging_.as<std::byte>() +
                                                   static_cast<std::size_t>(begin) * tile_bytes));
      });
      copy(out.data.as<std::byte>() + static_cast<std::size_t>(first) * tile_bytes,
           static_cast<std::size_t>(count) * tile_bytes);
    }
    loader_.used(tensor, static_cast<std::uint64_t>(n) * static_cast<std::uint64_t>(k));
    return out;
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

  CudaLinear linear(const std::string& name, int n, int k,
                    const std::vector<std::int32_t>& row_map = {}, int row_multiple = kTileRows) {
    const LinearTensors tensors = loader_.linear_tensors(name, k);
    CudaLinear out;
    out.name = name;
    if (tensors.rank > 0) {
      // The padding of z is written too, as products read it.
      out.v = matrix(tensors.v, tensors.rank, k, {}, kTileCols);
      out.u = matrix(tensors.u, n, tensors.rank, row_map, row_multiple);
    } else {
      out.u = matrix(tensors.w, n, k, row_map, row_multiple);
    }
    if (!tensors.bias.empty()) {
      const std::vector<float> values = loader_.vector(tensors.bias, n);
      std::vector<float> packed(static_cast<std::size_t>(out.u.tiles * kTileRows), 0.0f);
      for (int row = 0; row < out.u.n; ++row) {
        const int from = row_map.empty() ? row : row_map[static_cast<std::size_t>(row)];
        if (from >= 0) {
          packed[static_cast<std::size_t>(row)] = values[static_cast<std::size_t>(from)];
        }
      }
      out.u.bias = floats(packed);
    }
    return out;
  }

  CudaNorm norm(const Norm& norm) {
    return {norm.kind, norm.eps, floats(norm.gain), floats(norm.bias)};
  }

 private:
  static constexpr std::size_t kStagingBytes = std::size_t{32} << 20;

  void copy(void* to, std::size_t bytes) {
    stream_.upload(to, staging_.as<void>(), bytes);
    stream_.synchronize();  // the staging memory is used again
  }

  WeightLoader& loader_;
  ThreadTeam& team_;
  cuda::DeviceStream& stream_;
  cuda::PinnedBuffer staging_;
};

CudaLayer load_layer(const ModelConfig& config, const std::string& prefix, WeightLoader& loader,
                     Uploader& uploader) {
  const ModuleNames& names = config.names;
  const int hidden = config.hidden_size;
  const int inner = config.intermediate_size;
  const int query_size = config.num_heads * config.head_dim;
  const int kv_size = config.num_kv_heads * config.head_dim;
  auto norm = [&](const std::string& name) {
    return uploader.norm(load_norm(config, prefix, name, hidden, loader));
  };
  auto row_map = [&](int heads) {
    return rotates_tiles(config) ? cuda_rotary_row_map(heads, config.head_dim)
                                 : std::vector<std::int32_t>{};
  };
  auto head_norm = [&](const std::string& name, int heads) {
    return uploader.norm(load_head_norm(config, prefix, name, heads, {0, heads}, loader));
  };
  CudaLayer layer;
  layer.attention_norm = norm(names.attention_norm);
  layer.query =
      uploader.linear(prefix + names.query, query_size, hidden, row_map(config.num_heads));
  layer.key = uploader.linear(prefix + names.key, kv_size, hidden, row_map(config.num_kv_heads));
  layer.value = uploader.linear(prefix + names.value, kv_size, hidden);
  if (config.qk_norm != QkNormKind::kNone) {
    layer.query_norm = head_norm(names.query_norm, config.num_heads);
    layer.key_norm = head_norm(names.key_norm, config.num_kv_heads);
  }
  layer.output = uploader.linear(prefix + names.output, hidden, query_size);
  layer.attention_output_norm = norm(names.attention_output_norm);
  layer.mlp_norm = norm(names.mlp_norm);
  // What they write is read up to a multiple of kTileCols.
  if (is_gated(config.mlp)) {
    layer.gate = uploader.linear(prefix + names.gate, inner, hidden, {}, kTileCols);
  }
  layer.up = uploader.linear(prefix + names.up, inner, hidden, {}, kTileCols);
  layer.down = uploader.linear(prefix + names.down, hidden, inner);
  layer.mlp_output_norm = norm(names.mlp_output_norm);
  return layer;
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

CudaWeights load_cuda_weights(const ModelConfig& config, WeightLoader& loader, ThreadTeam& team,
                              cuda::DeviceStream& stream) {
  Uploader uploader(loader, team, stream);
  const ModuleNames& names = config.names;
  CudaWeights weights;
  CudaMatrix embedding =
      uploader.matrix(names.embedding + ".weight", config.vocab_size, config.hidden_size);
  if (config.positions == PositionKind::kLearned) {
    weights.positions = uploader.matrix(names.positions + ".weight",
                                        config.position_offset + config.max_position_embeddings,
                                        config.hidden_size);
  }
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string prefix = names.layers + "." + std::to_string(i) + ".";
    weights.layers.push_back(load_layer(config, prefix, loader, uploader));
  }
  weights.final_norm =
      uploader.norm(load_norm(config, "", names.final_norm, config.hidden_size, loader));
  if (config.tie_word_embeddings) {
    weights.head.name = names.embedding;
    weights.head.u = std::move(embedding);
  } else {
    weights.head = uploader.linear(names.head, config.vocab_size, config.hidden_size);
    weights.embedding = std::move(embedding);
  }
  loader.check_all_used();
  return weights;
}

}  // namespace deinfer
