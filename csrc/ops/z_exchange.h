// z = V x of linears that share their input: where it is in memory, and its exchange between ranks.
#pragma once

#include <array>
#include <span>

#include "ops/linear_group.h"

namespace deinfer {

inline constexpr std::size_t kMaxLinears = 3;  // q, k, v

Collective collective_of(Exchange exchange);

/// The rows of tokens [row, row + rows) that `rank` of `size` has under token shards.
Range own_tokens(int row, int rows, int rank, int size);

/// z of a low-rank linear: its columns in the z buffer, and in this rank's contribution.
struct Inner {
  const LowRankLinear* linear = nullptr;
  int z_col = 0;
  int part_col = 0;

  int rank() const { return linear->inner_size(); }
};

/// A chunk of the tokens on its way through a group of linears.
struct Tile {
  int row = 0;
  int rows = 0;
  Range v_tokens, u_tokens;  // rows for which this rank computes the factors
  std::array<Ticket, 2> tickets{};

  Range all() const { return {row, row + rows}; }
};

class ZExchange {
 public:
  ZExchange(ExecutionContext& ctx, const GroupInput& input, const Activations& z)
      : ctx_(ctx), input_(input), z_(z) {}

  /// Dense linears have no z.
  void add(const LowRankLinear& linear);

  std::span<const Inner> inners() const { return std::span(inners_.data(), num_inners_); }
  Exchange kind() const { return kind_; }
  Activations z_of(const Inner& inner) const { return z_.columns_from(inner.z_col); }
  Activations z_of(const LowRankLinear& linear) const;
  /// This rank's contribution: fp32 sums, or finished columns or rows. From its first row on it has
  /// those of Tile::v_tokens.
  Activations part() const;

  /// Zeros the columns of z from `col` on, which U's padding relies on.
  void clear(const Inner& inner, Range tokens, int col);
  /// Sends part().
  void start(Tile& tile);
  /// Receives z of the rows that U reads.
  void finish(const Tile& tile);

 private:
  int part_cols() const { return part_sums_ + statistics(); }
  int statistics() const;
  template <typename F>
  void for_each_block(Range tokens, F f);
  void sum(const Tile& tile);
  void gather(const Tile& tile);

  ExecutionContext& ctx_;
  const GroupInput& input_;
  const Activations& z_;
  std::array<Inner, kMaxLinears> inners_;
  std::size_t num_inners_ = 0;
  int z_cols_ = 0;
  int part_sums_ = 0;  // columns of part() before the statistics
  Exchange kind_ = Exchange::kNone;
};

}  // namespace deinfer
