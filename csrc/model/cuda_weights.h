// A decoder's weights on a CUDA device: bf16 or int8, in the order of kernels/cuda/layout.h.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/runtime.h"
#include "model/loader.h"
#include "model/model_config.h"
#include "ops/norm.h"
#include "plan/kv_forms.h"

namespace deinfer {

struct CudaMatrix {
  cuda::DeviceBuffer data;
  cuda::DeviceBuffer scales;  // of int8, else empty: fp32, one per row of all tiles
  cuda::DeviceBuffer bias;    // likewise; or empty
  int n = 0;                  // rows in the packed order
  int k = 0;
  int tiles = 0;  // of rows

  int chunks() const { return cuda::tiles_of(k, cuda::kTileCols); }
  std::size_t bytes() const { return data.size() + scales.size() + bias.size(); }
  /// Its product with x, which has `x_chunks` tiles of columns.
  cuda::LinearFactor factor(const void* x, int x_chunks) const {
    return {data.as<void>(), x, chunks(), x_chunks, bias.as<float>(), scales.as<float>()};
  }
};

/// This rank's part of y = W x + b, or U (V x) + b. Where y travels, u has its rows in order, and
/// the bias is of those that this rank keeps.
struct CudaLinear {
  std::string name;
  CudaMatrix v;  // [r, k]; empty when dense, or when this rank has no row of it
  // [n, r], or W[n, k]. Of latent values, and of latent keys, heads begin with a tile each; of
  // absorbed keys it is U^T[r, head_dim] of every kv head, r padded to head_columns(), in bf16, as
  // scales of rows cannot become those of columns, and there is no bias: it adds the same to all
  // scores of a query.
  CudaMatrix u;
  int rank = 0;  // of the whole linear; 0: dense
  std::array<LinearExchanges, kNumStepKinds> exchanges;
  std::vector<Range> v_shares;   // as LowRankLinear
  Range y_share;                 // likewise
  int x_chunk = 0;               // of a replicated input, the first tile of columns that W takes
  std::vector<float> own_terms;  // V g, V b of this rank's columns, until join_norm_terms()
  cuda::DeviceBuffer gain_terms, bias_terms;  // NormTerms, padded as z is

  bool is_low_rank() const { return rank > 0; }
  const LinearExchanges& exchange(StepKind kind) const {
    return exchanges[static_cast<std::size_t>(kind)];
  }
  /// Tiles of columns of z.
  int z_chunks() const { return cuda::tiles_of(rank, cuda::kTileCols); }
  int z_cols() const { return z_chunks() * cuda::kTileCols; }
  std::size_t bytes() const {
    return v.bytes() + u.bytes() + gain_terms.size() + bias_terms.size();
  }
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
  KvForms kv;                 // what the KV cache keeps

  std::vector<const CudaLinear*> linears() const;
};

struct CudaWeights {
  DType dtype = DType::kBFloat16;  // of the linears
  // [own vocabulary, hidden]; empty when tied: then the head serves for both
  CudaMatrix embedding;
  CudaMatrix positions;  // of learned ones; under hidden shards this rank's columns
  std::vector<CudaLayer> layers;
  CudaNorm final_norm;
  CudaLinear head;

  const CudaMatrix& token_embedding() const { return embedding.n == 0 ? head.u : embedding; }
  std::size_t bytes() const;
};

/// Loads the weights of `config` that are the loader's rank's. Linears are bf16 or, as on the CPU,
/// int8; tables that are only looked up are bf16. kv_forms as load_decoder(), none of them
/// token-sharded. Throws as WeightLoader and cpu::int8_scale() do, and kOutOfMemory.
CudaWeights load_cuda_weights(const ModelConfig& config, DType dtype,
                              const std::vector<KvForms>& kv_forms, WeightLoader& loader,
                              ThreadTeam& team, cuda::DeviceStream& stream);

/// Computes CudaLinear::gain_terms where the plan divides what linears read by columns. All ranks
/// must call it, once all have loaded their weights.
void join_norm_terms(CudaWeights& weights, Communicator& communicator, cuda::DeviceStream& stream);

/// Element j and its partner j + head_dim / 2 of a head in rows i and i + 8 of a tile; -1: padding.
std::vector<std::int32_t> cuda_rotary_row_map(int heads, int head_dim);
/// Rows of every head in order, padded to a multiple of `row_multiple`.
std::vector<std::int32_t> cuda_head_row_map(int heads, int head_dim, int row_multiple);

}  // namespace deinfer
