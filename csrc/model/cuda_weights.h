// A decoder's weights on a CUDA device: bf16 in the order of kernels/cuda/layout.h.
#pragma once

#include <string>
#include <vector>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/runtime.h"
#include "model/loader.h"
#include "model/model_config.h"
#include "ops/norm.h"

namespace deinfer {

struct CudaMatrix {
  cuda::DeviceBuffer data;
  cuda::DeviceBuffer bias;  // fp32, one per row of all tiles; or empty
  int n = 0;                // rows in the packed order
  int k = 0;
  int tiles = 0;  // of rows

  bool empty() const { return n == 0; }
  int chunks() const { return cuda::tiles_of(k, cuda::kTileCols); }
  std::size_t bytes() const { return data.size() + bias.size(); }
};

/// y = W x + b, or U (V x) + b.
struct CudaLinear {
  std::string name;
  CudaMatrix v;  // [r, k]; empty when dense
  CudaMatrix u;  // [n, r], or W[n, k]

  bool is_low_rank() const { return !v.empty(); }
  /// Tiles of columns of z.
  int z_chunks() const { return is_low_rank() ? u.chunks() : 0; }
  std::size_t bytes() const { return v.bytes() + u.bytes(); }
};

struct CudaNorm {
  NormKind kind = NormKind::kNone;
  float eps = 0.0f;
  cuda::DeviceBuffer gain, bias;  // fp32
  std::size_t bytes() const { return gain.size() + bias.size(); }
};

struct CudaLayer {
  CudaNorm attention_norm, mlp_norm, attention_output_norm, mlp_output_norm;
  CudaNorm query_norm, key_norm;
  CudaLinear query, key, value, output;
  CudaLinear gate, up, down;  // gate is empty in a plain MLP

  std::vector<const CudaLinear*> linears() const;
};

struct CudaWeights {
  CudaMatrix embedding;  // [vocab, hidden]; empty when tied: then the head serves for both
  CudaMatrix positions;  // of learned ones
  std::vector<CudaLayer> layers;
  CudaNorm final_norm;
  CudaLinear head;

  const CudaMatrix& token_embedding() const { return embedding.empty() ? head.u : embedding; }
  std::size_t bytes() const;
};

/// Loads all weights of `config`, on one rank. Throws as WeightLoader does, and kOutOfMemory.
CudaWeights load_cuda_weights(const ModelConfig& config, WeightLoader& loader, ThreadTeam& team,
                              cuda::DeviceStream& stream);

/// Element j and its partner j + head_dim / 2 of a head in rows i and i + 8 of a tile; -1: padding.
std::vector<std::int32_t> cuda_rotary_row_map(int heads, int head_dim);

}  // namespace deinfer
