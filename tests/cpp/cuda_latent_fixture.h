// K and V, or latents, in pools of CUDA attention, and what they stand for in fp64.
#pragma once

#include <cmath>
#include <numeric>
#include <span>
#include <vector>

#include "kernels/cuda/latents.h"
#include "model/cuda_weights.h"
#include "plan/kv_forms.h"
#include "reference.h"

namespace deinfer::test {

inline constexpr int kBlockSize = 16;
inline constexpr float kEps = 1e-5f;

/// Sequences with `computed` positions in the cache and `rows` further ones whose queries ask.
struct LatentWork {
  std::vector<int> computed, rows;
  KvForm k = KvForm::kRebuilt, v = KvForm::kRebuilt;
  int heads = 4;
  int kv_heads = 2;
  int head_dim = 20;
  int k_rank = 11;
  int v_rank = 37;
  int window = 0;
  float soft_cap = 0.0f;
  bool rotates = false;
  QkNormKind norm = QkNormKind::kNone;
  bool biases = false;

  int positions(std::size_t i) const { return computed[i] + rows[i]; }
  /// Where all heads have the same tasks.
  int task_heads() const { return k == KvForm::kAbsorbed && v == KvForm::kAbsorbed ? 1 : kv_heads; }
  int query_dim() const { return k == KvForm::kAbsorbed ? k_rank : head_dim; }
  int output_dim() const { return v == KvForm::kAbsorbed ? v_rank : head_dim; }
};

/// K or V of all blocks: what is in the pool, and in fp64 what it stands for.
struct Side {
  int heads = 1, width = 0;  // of the pool
  bool transposed = false;   // [head, width, position] in a block
  std::vector<bf16> pool;
  std::vector<std::vector<double>> exact;  // [place][kv_heads * dim]

  void put(int place, int head, int d, bf16 value) {
    const int page = place / kBlockSize * heads + head;
    const int offset = place % kBlockSize;
    const int at = transposed ? (page * width + d) * kBlockSize + offset
                              : (page * kBlockSize + offset) * width + d;
    pool[static_cast<std::size_t>(at)] = value;
  }
};

/// U of every kv head in the order in which rows are rebuilt.
struct Factor {
  int rows = 0;
  std::vector<std::int32_t> map;
  std::vector<bf16> packed;  // [rows, rank]
  std::vector<float> bias;   // [rows]
};

inline Side make_side(KvForm form, int rank, bool is_key, const LatentWork& work, int blocks) {
  Side side;
  const bool dense = form == KvForm::kDense;
  side.heads = dense ? work.kv_heads : 1;
  side.width = dense ? cuda::head_width(work.head_dim) : cuda::latent_width(rank);
  side.transposed = !is_key && form != KvForm::kRebuilt;
  const auto places = static_cast<std::size_t>(blocks * kBlockSize);
  side.pool.assign(places * static_cast<std::size_t>(side.heads * side.width), to_bf16(kNan));
  side.exact.resize(places);
  return side;
}
inline Factor make_factor(Random& random, KvForm form, int rank, bool rotates,
                          const LatentWork& work) {
  Factor factor;
  if (form != KvForm::kRebuilt) return factor;
  factor.map = rotates ? cuda_rotary_row_map(work.kv_heads, work.head_dim)
                       : cuda_head_row_map(work.kv_heads, work.head_dim, cuda::kTileRows);
  factor.rows = static_cast<int>(factor.map.size());
  for (const std::int32_t row : factor.map) {
    factor.bias.push_back(row >= 0 && work.biases ? random.normal() : 0.0f);
    for (int j = 0; j < rank; ++j) {
      const float scale = 1 / std::sqrt(static_cast<float>(rank));
      factor.packed.push_back(row >= 0 ? to_bf16(scale * random.normal()) : bf16{});
    }
  }
  return factor;
}
/// A position's K or V, or latents, and what they stand for.
inline void fill(Random& random, KvForm form, int rank, const Factor& factor,
                 const LatentWork& work, int place, Side& side) {
  const int dim = form == KvForm::kDense ? work.head_dim : rank;
  std::vector<double> values;
  for (int head = 0; head < side.heads; ++head) {
    for (int d = 0; d < side.width; ++d) {
      const bf16 value = d < dim ? to_bf16(random.normal()) : bf16{};
      side.put(place, head, d, value);
      if (d < dim) values.push_back(wide(value));
    }
  }
  std::vector<double>& exact = side.exact[static_cast<std::size_t>(place)];
  if (form == KvForm::kDense) {
    exact = values;
  } else if (form == KvForm::kAbsorbed) {  // all heads'
    for (int head = 0; head < work.kv_heads; ++head) {
      exact.insert(exact.end(), values.begin(), values.end());
    }
  } else {
    exact.resize(static_cast<std::size_t>(work.kv_heads * work.head_dim));
    for (std::size_t row = 0; row < factor.map.size(); ++row) {
      if (factor.map[row] < 0) continue;
      double sum = factor.bias[row];
      for (std::size_t j = 0; j < values.size(); ++j) {
        sum += wide(factor.packed[row * values.size() + j]) * values[j];
      }
      exact[static_cast<std::size_t>(factor.map[row])] = sum;
    }
  }
}
/// Norm and rotation of a rebuilt key of a head.
inline void finish_key(const LatentWork& work, std::span<const float> gain, int head, double* key,
                       float scale, const float* cos, const float* sin) {
  double factor = scale;
  if (work.norm == QkNormKind::kPerHead) {
    const double squares = std::inner_product(key, key + work.head_dim, key, 0.0);
    factor = 1 / std::sqrt(squares / work.head_dim + static_cast<double>(kEps));
  }
  for (int d = 0; d < work.head_dim && work.norm != QkNormKind::kNone; ++d) {
    const int at = work.norm == QkNormKind::kFull ? head * work.head_dim + d : d;
    key[d] *= factor * static_cast<double>(gain[static_cast<std::size_t>(at)]);
  }
  const int half = work.head_dim / 2;
  for (int j = 0; j < half && work.rotates; ++j) {
    const double low = key[j], high = key[j + half];
    key[j] = low * static_cast<double>(cos[j]) - high * static_cast<double>(sin[j]);
    key[j + half] = high * static_cast<double>(cos[j]) + low * static_cast<double>(sin[j]);
  }
}

}  // namespace deinfer::test
