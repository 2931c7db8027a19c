// z = V x of linears that share their input: where it is in memory, and its exchange between ranks.
#pragma once

#include <array>
#include <span>

#include "ops/linear_group.h"

namespace deinfer {

inline constexpr std::size_t kMaxLinears = 3;  // q, k, v

/// The rows of tokens [row, row + rows) that `rank` of `size` has under token shards.
Range own_tokens(int row, int rows, int rank, int size);

/// z of a low-rank linear: its columns in the z buffer.
struct Inner {
  const LowRankLinear* linear = nullptr;
  int z_col = 0;

  int rank() const { return linear->inner_size(); }
};

/// A chunk of the tokens on its way through a group of linears.
struct Tile {
  int row = 0;
  int rows = 0;
  Range v_tokens, u_tokens;  // rows for which this rank computes the factors
  std::array<Ticket, kMaxRankChunks> tickets{};

  Range all() const { return {row, row + rows}; }
};

/// Computing and sending z goes in chunks() chunks of its columns, and so does receiving it: for
/// every tile all chunks in order, the same ones.
class ZExchange {
 public:
  ZExchange(ExecutionContext& ctx, const GroupInput& input, const Activations& z)
      : ctx_(ctx), input_(input), z_(z) {}

  /// Dense linears have no z.
  void add(const LowRankLinear& linear);

  std::span<const Inner> inners() const { return std::span(inners_.data(), num_inners_); }
  Exchange kind() const { return kind_; }
  int chunks() const { return num_rank_chunks(kind_, v_columns(), ctx_.overlap.rank_chunks); }
  Activations z_of(const Inner& inner) const { return z_.columns_from(inner.z_col); }
  Activations z_of(const LowRankLinear& linear) const { return z_of(inner_of(linear)); }

  /// This rank's contribution to a chunk, the next to be started: fp32 sums, or finished columns or
  /// rows. From its first row on it has those of Tile::v_tokens.
  Activations part(int chunk) const;
  /// The rows of V, or columns of its z, in a chunk, and where these begin in part().
  Range v_rows(std::size_t inner, int chunk) const {
    return chunk_columns(v_columns(), inner, chunk, chunks());
  }
  int part_col(std::size_t inner, int chunk) const;
  /// The first columns of z that have been received with `chunk`.
  int columns_received(const LowRankLinear& linear, int chunk) const;

  /// Zeros the columns of z from `col` on, which U's padding relies on.
  void clear(const Inner& inner, Range tokens, int col);
  /// Sends part().
  void start(Tile& tile, int chunk);
  /// Receives z of the rows that U reads.
  void receive(const Tile& tile, int chunk);

 private:
  std::span<const int> v_columns() const { return std::span(v_columns_.data(), num_inners_); }
  const Inner& inner_of(const LowRankLinear& linear) const;
  /// Columns of part(): those of z, then the statistics, which travel with the first chunk.
  int part_columns(int chunk) const { return part_col(num_inners_, chunk); }
  int part_ld(int chunk) const { return part_columns(chunk) + (chunk == 0 ? statistics() : 0); }
  int statistics() const;
  template <typename F>
  void for_each_block(Range tokens, int chunk, F f);
  void sum(const Tile& tile, int chunk);
  void gather(const Tile& tile);

  ExecutionContext& ctx_;
  const GroupInput& input_;
  const Activations& z_;
  std::array<Inner, kMaxLinears> inners_;
  std::array<int, kMaxLinears> v_columns_{};  // rows of V on this rank
  std::size_t num_inners_ = 0;
  int z_cols_ = 0;
  Exchange kind_ = Exchange::kNone;
};

}  // namespace deinfer
