// Exchanges between tensor-parallel ranks on devices: arguments and launches. comm/p2p.h and
// comm/nccl.h make a PeerExchange; what a rank contributes has been written to its memory by
// kernels before, what it receives a kernel here reads from the memory of all, or from what has
// come of it.
//
// Exchange e = 1, 2, ... uses contribution e % 2 of every rank: comm/epoch_protocol.h with a ring
// of two and one exchange at a time, in which who has started e + 1 has read e, so that nobody need
// say that he has finished (that is, where kernels wait for each other). Sums are over ranks in
// ascending order: all ranks get the same bits.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>

#include "kernels/cuda/kernels.h"

namespace deinfer::cuda {

/// Ranks that exchange at most: the GPUs of a machine.
inline constexpr int kMaxPeers = 8;

/// Which exchange a rank has given up waiting in, and for whom.
struct ExchangeFault {
  const char* exchange = nullptr;  // null: none
  unsigned epoch = 0;
  int missing = 0;  // a rank
};

/// One rank's end of one exchange. The epoch is in device memory, so that graphs can be replayed.
struct PeerExchange {
  int rank = 0;
  int size = 1;
  const std::byte* parts[kMaxPeers] = {};  // what each rank contributes
  unsigned* told[kMaxPeers] = {};          // where each rank hears of this one: its epoch
  const unsigned* heard = nullptr;         // [size] where this rank hears of the others
  unsigned* epoch = nullptr;               // exchanges that this rank has done
  unsigned* arrived = nullptr;             // blocks that have done this one
  unsigned* progress = nullptr;            // as `epoch`, for the host, in pinned memory; or null
  unsigned* failed = nullptr;              // not 0: this rank waits no more
  unsigned* aborted = nullptr;             // of all ranks, in pinned memory
  ExchangeFault* fault = nullptr;          // of this rank, likewise
  unsigned long long timeout_ns = 0;       // of waiting for a rank; it ends in a fault and an abort
  const char* name = nullptr;              // for the host
  int max_blocks = 1;  // few, so that ranks that wait on one device leave room for the others
  // Both, but in lockstep, where all ranks have told before any waits, and where the parts are
  // there before the kernel begins: neither.
  bool tells = true;
  bool waits = true;
};

/// Rows of words from one place to another.
struct CopyBlock {
  const unsigned* from = nullptr;
  unsigned* to = nullptr;
  int rows = 0;
  int row_words = 0;
  // Words from one row to the next.
  std::int64_t from_pitch = 0;
  std::int64_t to_pitch = 0;
};

/// What is sent is packed, what has come unpacked: blocks that do not overlap.
struct CopyBlocksLaunch {
  static constexpr int kMaxBlocks = kMaxPeers * LinearLaunch::kMaxSegments;
  CopyBlock blocks[kMaxBlocks];
  int count = 0;
};
int launch_copy_blocks(const CopyBlocksLaunch& args, Stream stream);

/// Tells the others that this rank has contributed, and nothing else.
int launch_tell(const PeerExchange& exchange, Stream stream);

/// What of a norm is left to do after V (NormLaunch::statistics): each part's row has its
/// statistics from column `statistics_col` on.
struct NormCompletion {
  int kind = 0;  // as NormLaunch
  float eps = 0.0f;
  int statistics_col = 0;
  int shares[kMaxPeers] = {};  // columns of what was normalised on each rank
  int width = 0;               // their sum
};

enum class ReduceSink {
  kFloat,       // out[i, j] = sum, fp32, rows out_ld apart
  kAdd,         // out[i, j] += sum
  kActivation,  // activations of out_ld chunks, column j
};

/// out[i, j] = the sum over ranks of their part[i, first_col + j] for i in [first_row, first_row +
/// rows), j in [0, cols); bias and norm included.
struct ReduceLaunch {
  PeerExchange exchange;
  int first_row = 0;
  int rows = 0;
  int first_col = 0;  // a multiple of 4
  int cols = 0;
  int ld = 0;  // of the parts, fp32; a multiple of 4
  ReduceSink sink = ReduceSink::kFloat;
  void* out = nullptr;
  int out_ld = 0;
  const float* bias = nullptr;  // [cols], of the float sinks
  NormCompletion norm;          // of kActivation
  /// What completes a LayerNorm with gain g and bias b, of z that stand side by side.
  struct Terms {
    int cols = 0;
    const float* gain = nullptr;  // [size, cols]: V_i g_i of the columns of rank i
    const float* bias = nullptr;  // [cols]: V b
  };
  Terms terms[LinearLaunch::kMaxSegments];
};
int launch_reduce(const ReduceLaunch& args, Stream stream);

/// Who has what of something that is gathered: rank p has [borders[p], borders[p + 1]).
struct Borders {
  Borders() {
    for (int& border : at) border = INT_MAX;  // beyond the ranks
  }
  int at[kMaxPeers + 1];
};

/// Activations from the ranks that have them, whose parts are activations of `chunks`: each rank's
/// columns of every row, or all columns of its rows.
struct GatherActivationsLaunch {
  PeerExchange exchange;
  int rows = 0;
  int chunks = 0;
  bool by_rows = false;
  Borders owners;  // of rows
  /// z of one linear: the columns of `owners`, then zeros up to `padded`.
  struct Columns {
    int first = 0;
    int padded = 0;  // a multiple of kTileCols
    Borders owners;  // of columns, from `first` on
  };
  Columns columns[LinearLaunch::kMaxSegments];  // unless by_rows
  int num_columns = 0;
  void* out = nullptr;  // activations of out_chunks, of which it has the first
  int out_chunks = 0;
};
int launch_gather_activations(const GatherActivationsLaunch& args, Stream stream);

/// fp32 rows from the ranks that have their columns, or that have them.
struct GatherFloatsLaunch {
  PeerExchange exchange;
  int rows = 0;
  int cols = 0;
  int ld = 0;  // of the parts; a multiple of 4
  bool by_rows = false;
  Borders owners;               // of columns, or rows
  const int* row_of = nullptr;  // [rows] which row of `owners` each is; null: 0, 1, ..
  bool adds = false;            // out[i, j] += , else =
  float* out = nullptr;         // [rows, cols], rows out_ld apart
  int out_ld = 0;
  const float* bias = nullptr;  // [cols]
};
int launch_gather_floats(const GatherFloatsLaunch& args, Stream stream);

/// tokens[i] = the token of the largest of the ranks' candidates [rows], the first of equal ones.
struct BestOfRanksLaunch {
  PeerExchange exchange;
  int rows = 0;
  unsigned ranks = 0;  // bits of those that have a part of the vocabulary
  int* tokens = nullptr;
};
int launch_best_of_ranks(const BestOfRanksLaunch& args, Stream stream);

}  // namespace deinfer::cuda
