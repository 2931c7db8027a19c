// How a step is cut, so that computing one part hides the exchange of another.
//
// A few tokens stay together, and the rank dimension is cut: V computes a chunk of z while the one
// before travels, and U takes every chunk as it arrives, on top of the sums over those before. So
// weights are still read once, and results have the same bits in any number of chunks. Only sums
// of z are cut so. Of gathered z every chunk would bring columns from all over k, which U could not
// take in ascending order; outputs that are exchanged after U are not cut either.
//
// Many tokens pass in tiles: the exchange of one, of any kind, travels while the next is computed.
// Every tile reads the weights again.
#pragma once

#include <span>
#include <vector>

#include "plan/tensor_parallel_plan.h"

namespace deinfer {

/// Tokens that one pass over the weights serves at most; longer batches take several.
inline constexpr int kTileTokens = 512;
/// Up to so many tokens the rank dimension is cut, beyond the tokens.
inline constexpr int kRankChunkTokens = 128;
/// Tokens whose partial results of attention travel in one exchange, at most.
inline constexpr int kAttentionTokens = 128;
/// Shorter tiles would multiply too inefficiently.
inline constexpr int kMinTileTokens = 16;
/// Chunks of the rank dimension: as many exchanges as a communicator has under way.
inline constexpr int kMaxRankChunks = 4;
/// Borders of chunks of z are multiples of it: of the panels of V, and of the kernels' steps in k.
inline constexpr int kChunkColumns = 32;

/// What "chunks" means for a step of so many tokens.
struct Overlap {
  int tile_tokens = kTileTokens;
  int rank_chunks = 1;  // into which sums of z are cut, as far as they have kChunkColumns for each
};

/// For a step of `tokens` tokens in `chunks` chunks; no tile has more than `most_tokens`.
Overlap overlap_of(int tokens, int chunks, int most_tokens = kTileTokens);

/// Whether z that travels so after V may be cut.
constexpr bool has_rank_chunks(Exchange after_v) {
  return after_v == Exchange::kAllReduce || after_v == Exchange::kReduceScatter;
}
/// The chunks of a linear group's z, of which linear i has columns[i], that travel after V by
/// `exchange`, where `chunks` are wanted.
int num_rank_chunks(Exchange exchange, std::span<const int> columns, int chunks);
/// The columns of linear `index` in chunk `chunk` of num_rank_chunks(). Chunks have all columns of
/// the first linear, then of the second, ..., near-equally many.
Range chunk_columns(std::span<const int> columns, std::size_t index, int chunk, int chunks);

/// In how many chunks steps of how many tokens are cut.
struct ExchangeChunks {
  struct UpTo {
    int tokens;
    int chunks;
  };
  std::vector<UpTo> sizes;  // ascending

  /// Of the first entry with at least so many tokens, else of the last.
  int of(int tokens) const;
};

}  // namespace deinfer
