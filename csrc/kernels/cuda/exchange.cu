// Kernels that wait for the other ranks' contributions and read them.
#include "kernels/cuda/exchange.h"

#include <algorithm>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/system_scope.cuh"

namespace deinfer::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // floats that a thread takes at once
constexpr int kBlockCols = kThreads * kVector;
constexpr unsigned kSpinsBetweenChecks = 64;  // of what is in the host's memory
constexpr std::int64_t kMostCopyBlocks = 64;  // for one of the copies

/// Returns when rank `rank` has told of `epoch`; or when that takes too long, which aborts all.
__device__ __forceinline__ void wait_for(const PeerExchange& exchange, int rank, unsigned epoch) {
  if (*exchange.failed != 0) return;
  unsigned long long begin = 0;
  unsigned spins = 0;
  while (static_cast<int>(load_acquire_system(exchange.heard + rank) - epoch) < 0) {
    pause();
    if (++spins % kSpinsBetweenChecks != 0) continue;
    bool gives_up = load_acquire_system(exchange.aborted) != 0;
    const unsigned long long now = nanoseconds();
    if (begin == 0) begin = now;
    if (!gives_up && now - begin >= exchange.timeout_ns) {
      exchange.fault->missing = rank;
      exchange.fault->epoch = epoch;
      exchange.fault->exchange = exchange.name;
      store_release_system(exchange.aborted, 1);
      gives_up = true;
    }
    if (!gives_up) continue;
    *exchange.failed = 1;
    return;
  }
}

/// Tells and waits. Returns the epoch.
__device__ __forceinline__ unsigned begin_exchange(const PeerExchange& exchange) {
  const unsigned epoch = *exchange.epoch + 1;
  const int thread = static_cast<int>(threadIdx.x);
  if (exchange.tells && blockIdx.x == 0 && thread < exchange.size) {
    store_release_system(exchange.told[thread], epoch);
  }
  __syncwarp();  // all are told before anybody waits
  if (exchange.waits) {
    if (thread < exchange.size) wait_for(exchange, thread, epoch);
    __syncthreads();
  }
  return epoch;
}

/// The last block ends the exchange.
__device__ __forceinline__ void end_exchange(const PeerExchange& exchange, unsigned epoch) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(exchange.arrived, 1u) + 1 < gridDim.x) return;
  *exchange.arrived = 0;
  *exchange.epoch = epoch;
  if (exchange.progress != nullptr) *exchange.progress = epoch;
}

__global__ void __launch_bounds__(kThreads) copy_blocks_kernel(const CopyBlocksLaunch args) {
  const CopyBlock& block = args.blocks[blockIdx.y];
  const std::int64_t words = std::int64_t{block.rows} * block.row_words;
  const std::int64_t threads = std::int64_t{gridDim.x} * kThreads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words;
       i += threads) {
    const std::int64_t row = i / block.row_words;
    const std::int64_t col = i % block.row_words;
    block.to[row * block.to_pitch + col] = block.from[row * block.from_pitch + col];
  }
}

__global__ void __launch_bounds__(kThreads) tell_kernel(const PeerExchange exchange) {
  begin_exchange(exchange);
}

__device__ __forceinline__ const float* floats(const PeerExchange& exchange, int rank) {
  return reinterpret_cast<const float*>(exchange.parts[rank]);
}

/// Four numbers that another rank has written; not by way of a cache that may have older ones.
__device__ __forceinline__ float4 load_vector(const float* address) {
  return __ldcg(reinterpret_cast<const float4*>(address));
}

/// The rank of `owners` that has `index`.
__device__ __forceinline__ int owner_of(const Borders& owners, int index) {
  int rank = 0;
#pragma unroll
  for (int p = 1; p < kMaxPeers; ++p) rank += owners.at[p] <= index ? 1 : 0;
  return rank;
}

/// A norm of one row that is left to be applied to its z.
struct RowCompletion {
  float scale;
  float shifts[kMaxPeers];  // of the ranks' means from that of all
};

__device__ __forceinline__ void complete_row(const ReduceLaunch& args, int row,
                                             RowCompletion& whole) {
  const NormCompletion& norm = args.norm;
  const int size = args.exchange.size;
  const std::int64_t at = std::int64_t{row} * args.ld + norm.statistics_col;
  const auto width = static_cast<float>(norm.width);
  float squares = 0.0f;
  if (norm.kind == 2) {
    // Chan, Golub, LeVeque 1979: distances to the mean of all, from those to the parts' means.
    float mean = 0.0f;
    for (int p = 0; p < size; ++p) {
      whole.shifts[p] = __ldcg(floats(args.exchange, p) + at);
      mean += static_cast<float>(norm.shares[p]) * whole.shifts[p];
    }
    mean /= width;
    for (int p = 0; p < size; ++p) {
      whole.shifts[p] -= mean;
      squares += __ldcg(floats(args.exchange, p) + at + 1) +
                 static_cast<float>(norm.shares[p]) * whole.shifts[p] * whole.shifts[p];
    }
  } else {
    for (int p = 0; p < size; ++p) squares += __ldcg(floats(args.exchange, p) + at);
  }
  whole.scale = 1.0f / sqrtf(squares / width + norm.eps);
}

/// sums[4] of columns from `col` on become z of a normalised row.
__device__ __forceinline__ void complete_columns(const ReduceLaunch& args,
                                                 const RowCompletion& whole, int col,
                                                 float (&sums)[kVector]) {
  if (args.norm.kind != 2) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums[i] *= whole.scale;
    return;
  }
  int which = 0;
  while (col >= args.terms[which].cols) col -= args.terms[which++].cols;
  const ReduceLaunch::Terms& terms = args.terms[which];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    for (int p = 0; p < args.exchange.size; ++p) {
      sums[i] = __fmaf_rn(whole.shifts[p], terms.gain[p * terms.cols + col + i], sums[i]);
    }
    sums[i] = __fmaf_rn(sums[i], whole.scale, terms.bias[col + i]);
  }
}

__global__ void __launch_bounds__(kThreads) reduce_kernel(const ReduceLaunch args) {
  __shared__ RowCompletion whole;
  const unsigned epoch = begin_exchange(args.exchange);
  const int size = args.exchange.size;
  const int blocks_of_row = tiles_of(args.cols, kBlockCols);
  const int items = args.rows * blocks_of_row;
  for (int item = static_cast<int>(blockIdx.x); item < items; item += static_cast<int>(gridDim.x)) {
    const int row = args.first_row + item / blocks_of_row;
    const int col = item % blocks_of_row * kBlockCols + static_cast<int>(threadIdx.x) * kVector;
    if (args.norm.kind != 0) {
      __syncthreads();  // the row before has been completed
      if (threadIdx.x == 0) complete_row(args, row, whole);
      __syncthreads();
    }
    if (col >= args.cols) continue;
    const std::int64_t at = std::int64_t{row} * args.ld + args.first_col + col;
    float4 parts[kMaxPeers];
#pragma unroll
    for (int p = 0; p < kMaxPeers; ++p) {
      if (p < size) parts[p] = load_vector(floats(args.exchange, p) + at);
    }
    float sums[kVector] = {};
#pragma unroll
    for (int p = 0; p < kMaxPeers; ++p) {
      if (p >= size) break;
      sums[0] += parts[p].x;
      sums[1] += parts[p].y;
      sums[2] += parts[p].z;
      sums[3] += parts[p].w;
    }
    if (args.sink == ReduceSink::kActivation) {
      if (args.norm.kind != 0) complete_columns(args, whole, col, sums);
      auto* out = static_cast<__nv_bfloat16*>(args.out) + activation_offset(row, col, args.out_ld);
      *reinterpret_cast<uint2*>(out) = {pack_bf16(sums[0], sums[1]), pack_bf16(sums[2], sums[3])};
      continue;
    }
    float* out = static_cast<float*>(args.out) + std::int64_t{row} * args.out_ld + col;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (col + i >= args.cols) break;
      if (args.bias != nullptr) sums[i] += args.bias[col + i];
      out[i] = args.sink == ReduceSink::kAdd ? out[i] + sums[i] : sums[i];
    }
  }
  end_exchange(args.exchange, epoch);
}

constexpr int kUnit = 8;  // elements of bf16 that are loaded at once

__device__ __forceinline__ uint4 load_unit(const PeerExchange& exchange, int rank,
                                           std::int64_t at) {
  return __ldcg(reinterpret_cast<const uint4*>(exchange.parts[rank]) + at / kUnit);
}

/// Eight columns of a row from their owners, zero where there is none.
__device__ __forceinline__ uint4 gather_unit(const GatherActivationsLaunch& args, int row, int col,
                                             std::int64_t at) {
  if (args.by_rows) return load_unit(args.exchange, owner_of(args.owners, row), at);
  int which = 0;
  while (which < args.num_columns &&
         col >= args.columns[which].first + args.columns[which].padded) {
    ++which;
  }
  if (which == args.num_columns) return {0, 0, 0, 0};
  const GatherActivationsLaunch::Columns& columns = args.columns[which];
  const int first = col - columns.first;
  const int cols = columns.owners.at[args.exchange.size];
  if (first >= cols) return {0, 0, 0, 0};
  const int owner = owner_of(columns.owners, first);
  if (first + kUnit <= columns.owners.at[owner + 1]) return load_unit(args.exchange, owner, at);
  unsigned pairs[4] = {};
  for (int i = 0; i < kUnit && first + i < cols; ++i) {
    const std::byte* part = args.exchange.parts[owner_of(columns.owners, first + i)];
    const unsigned bits = __ldcg(reinterpret_cast<const unsigned short*>(part) + at + i);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      if (pair == i / 2) pairs[pair] |= bits << (16 * (i % 2));
    }
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

__global__ void __launch_bounds__(kThreads)
    gather_activations_kernel(const GatherActivationsLaunch args) {
  const unsigned epoch = begin_exchange(args.exchange);
  const int units_of_row = args.chunks * (kTileCols / kUnit);
  const int units = args.rows * units_of_row;
  for (int unit = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
       unit < units; unit += static_cast<int>(gridDim.x) * kThreads) {
    const int row = unit / units_of_row;
    const int col = unit % units_of_row * kUnit;
    const std::int64_t at = activation_offset(row, col, args.chunks);
    const std::int64_t to = activation_offset(row, col, args.out_chunks);
    static_cast<uint4*>(args.out)[to / kUnit] = gather_unit(args, row, col, at);
  }
  end_exchange(args.exchange, epoch);
}

__global__ void __launch_bounds__(kThreads) gather_floats_kernel(const GatherFloatsLaunch args) {
  const unsigned epoch = begin_exchange(args.exchange);
  const int units_of_row = tiles_of(args.cols, kVector);
  const int units = args.rows * units_of_row;
  for (int unit = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
       unit < units; unit += static_cast<int>(gridDim.x) * kThreads) {
    const int row = unit / units_of_row;
    const int col = unit % units_of_row * kVector;
    const std::int64_t at = std::int64_t{row} * args.ld + col;
    int owner = 0;
    bool together = true;
    if (args.by_rows) {
      owner = owner_of(args.owners, args.row_of != nullptr ? args.row_of[row] : row);
    } else {
      owner = owner_of(args.owners, col);
      together = col + kVector <= args.owners.at[owner + 1];
    }
    float values[kVector] = {};
    if (together) {
      const float4 loaded = load_vector(floats(args.exchange, owner) + at);
      values[0] = loaded.x;
      values[1] = loaded.y;
      values[2] = loaded.z;
      values[3] = loaded.w;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (col + i >= args.cols) break;
        values[i] = __ldcg(floats(args.exchange, owner_of(args.owners, col + i)) + at + i);
      }
    }
    float* out = args.out + std::int64_t{row} * args.out_ld + col;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (col + i >= args.cols) break;
      if (args.bias != nullptr) values[i] += args.bias[col + i];
      out[i] = args.adds ? out[i] + values[i] : values[i];
    }
  }
  end_exchange(args.exchange, epoch);
}

__global__ void __launch_bounds__(kThreads) best_of_ranks_kernel(const BestOfRanksLaunch args) {
  const unsigned epoch = begin_exchange(args.exchange);
  for (int row = static_cast<int>(threadIdx.x); row < args.rows; row += kThreads) {
    RankCandidate best = {-INFINITY, 0};
    bool any = false;
    for (int p = 0; p < args.exchange.size; ++p) {
      if ((args.ranks >> p & 1u) == 0) continue;
      const auto* part = reinterpret_cast<const RankCandidate*>(args.exchange.parts[p]) + row;
      const RankCandidate theirs = {__ldcg(&part->value), __ldcg(&part->token)};
      if (!any || theirs.value > best.value) best = theirs;
      any = true;
    }
    args.tokens[row] = best.token;
  }
  end_exchange(args.exchange, epoch);
}

dim3 grid_for(const PeerExchange& exchange, std::int64_t blocks) {
  const std::int64_t most = exchange.max_blocks;
  return grid_of(static_cast<int>(blocks < 1 ? 1 : blocks > most ? most : blocks));
}

std::int64_t blocks_for(std::int64_t units) { return (units + kThreads - 1) / kThreads; }

}  // namespace

int load_exchange_kernels() {
  return first_failure({load(copy_blocks_kernel), load(tell_kernel), load(reduce_kernel),
                        load(gather_activations_kernel), load(gather_floats_kernel),
                        load(best_of_ranks_kernel)});
}

int launch_copy_blocks(const CopyBlocksLaunch& args, Stream stream) {
  std::int64_t blocks = 1;
  for (int i = 0; i < args.count; ++i) {
    const std::int64_t words = std::int64_t{args.blocks[i].rows} * args.blocks[i].row_words;
    blocks = std::max(blocks, std::min(blocks_for(words), kMostCopyBlocks));
  }
  return launch(stream, grid_of(static_cast<int>(blocks), args.count), kThreads, copy_blocks_kernel,
                args);
}

int launch_tell(const PeerExchange& exchange, Stream stream) {
  return launch(stream, grid_of(1), kThreads, tell_kernel, exchange);
}

int launch_reduce(const ReduceLaunch& args, Stream stream) {
  const std::int64_t blocks = std::int64_t{args.rows} * tiles_of(args.cols, kBlockCols);
  return launch(stream, grid_for(args.exchange, blocks), kThreads, reduce_kernel, args);
}

int launch_gather_activations(const GatherActivationsLaunch& args, Stream stream) {
  const std::int64_t blocks =
      blocks_for(std::int64_t{args.rows} * args.chunks * (kTileCols / kUnit));
  return launch(stream, grid_for(args.exchange, blocks), kThreads, gather_activations_kernel, args);
}

int launch_gather_floats(const GatherFloatsLaunch& args, Stream stream) {
  const std::int64_t blocks = blocks_for(std::int64_t{args.rows} * tiles_of(args.cols, kVector));
  return launch(stream, grid_for(args.exchange, blocks), kThreads, gather_floats_kernel, args);
}

int launch_best_of_ranks(const BestOfRanksLaunch& args, Stream stream) {
  return launch(stream, grid_of(1), kThreads, best_of_ranks_kernel, args);
}

}  // namespace deinfer::cuda
