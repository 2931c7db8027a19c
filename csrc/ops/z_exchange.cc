#include "ops/z_exchange.h"

#include <algorithm>
#include <cstring>

namespace deinfer {
namespace {

constexpr int kBlockRows = 16;
constexpr int kBlockCols = 256;
constexpr std::size_t kMaxRanks = Communicator::kMaxRanks;

int blocks_of(const Inner& inner) { return (inner.rank() + kBlockCols - 1) / kBlockCols; }

}  // namespace

Collective collective_of(Exchange exchange) {
  switch (exchange) {
    case Exchange::kAllReduce: return Collective::kAllReduce;
    case Exchange::kAllGather: return Collective::kAllGather;
    default: return Collective::kReduceScatter;
  }
}

Range own_tokens(int row, int rows, int rank, int size) {
  Range part = split(rows, size, rank);
  return {row + part.begin, row + part.end};
}

void ZExchange::add(const LowRankLinear& linear) {
  if (!linear.is_low_rank()) return;
  inners_[num_inners_++] = {&linear, z_cols_, part_sums_};
  z_cols_ += linear.z_cols();
  part_sums_ += linear.v.n;
  kind_ = linear.exchange(ctx_.step_kind).after_v;
}

int ZExchange::statistics() const {
  bool travel = input_.norm != nullptr && kind_ == Exchange::kAllReduce;
  return travel ? statistics_columns(input_.norm->kind) : 0;
}

Activations ZExchange::z_of(const LowRankLinear& linear) const {
  const Inner* inner = inners_.data();
  while (inner->linear != &linear) ++inner;
  return z_of(*inner);
}

Activations ZExchange::part() const {
  DType dtype = kind_ == Exchange::kAllGather ? z_.dtype : DType::kFloat32;
  return {ctx_.exchange.send(ctx_.member, ctx_.ticket), dtype, part_cols()};
}

void ZExchange::clear(const Inner& inner, Range tokens, int col) {
  auto [begin, end] = ctx_.member.share(tokens.size());
  auto bytes = static_cast<std::size_t>(inner.linear->z_cols() - col) * dtype_size(z_.dtype);
  for (int i = begin; i < end; ++i) {
    std::memset(z_of(inner).rows_from(tokens.begin + i).columns_from(col).data, 0, bytes);
  }
}

void ZExchange::start(Tile& tile) {
  if (int count = statistics(); count > 0) {
    auto [begin, end] = ctx_.member.share(tile.rows);
    for (int i = begin; i < end; ++i) {
      std::copy_n(input_.statistics + std::ptrdiff_t{tile.row + i} * count, count,
                  part().rows_from(i).f32() + part_sums_);
    }
  }
  std::size_t bytes = static_cast<std::size_t>(tile.v_tokens.size()) *
                      static_cast<std::size_t>(part_cols()) * dtype_size(part().dtype);
  tile.tickets[0] = ctx_.ticket++;
  ctx_.exchange.start(ctx_.member, collective_of(kind_), bytes);
}

void ZExchange::finish(const Tile& tile) {
  ctx_.exchange.wait(ctx_.member, tile.tickets[0]);
  if (kind_ != Exchange::kAllGather) {
    sum(tile);
  } else {
    gather(tile);
  }
  ctx_.exchange.finish(ctx_.member, tile.tickets[0]);
}

/// z = the sum over ranks of their parts, normalised where that was left to be done.
void ZExchange::sum(const Tile& tile) {
  const int size = ctx_.exchange.size();
  const int ld = part_cols();
  const int num_statistics = statistics();
  for_each_block(tile.u_tokens, [&](const Inner& inner, int row, int rows, int col, int cols) {
    std::array<const float*, kMaxRanks> parts, numbers;
    float scale[kBlockRows];
    float shifts[kBlockRows * kMaxRanks];
    for (int i = 0; num_statistics > 0 && i < rows; ++i) {
      for (int r = 0; r < size; ++r) {
        numbers[static_cast<std::size_t>(r)] = ctx_.floats_from(r, tile.tickets[0]) +
                                               std::ptrdiff_t{row - tile.row + i} * ld + part_sums_;
      }
      RowStatistics whole = combine_statistics(*input_.norm, input_.shares, numbers.data());
      scale[i] = whole.scale;
      for (int r = 0; r < size; ++r) {
        shifts[i * size + r] = numbers[static_cast<std::size_t>(r)][0] - whole.mean;
      }
    }
    for (int r = 0; r < size; ++r) {
      parts[static_cast<std::size_t>(r)] = ctx_.floats_from(r, tile.tickets[0]) +
                                           std::ptrdiff_t{row - tile.row} * ld + inner.part_col +
                                           col;
    }
    Activations out = z_of(inner).rows_from(row).columns_from(col);
    const bool f32 = out.dtype == DType::kFloat32;
    const cpu::KernelTable& kernels = ctx_.kernels;
    if (num_statistics > 0 && input_.norm->kind == NormKind::kLayer) {
      const NormTerms& terms = inner.linear->norm_terms;
      cpu::Centering centering{scale, shifts, terms.gain.data() + col, inner.rank(),
                               terms.bias.data() + col};
      f32 ? kernels.sum_centered_parts_f32(parts.data(), size, ld, rows, cols, centering, out.f32(),
                                           out.ld)
          : kernels.sum_centered_parts_bf16(parts.data(), size, ld, rows, cols, centering,
                                            out.b16(), out.ld);
      return;
    }
    const float* factors = num_statistics > 0 ? scale : nullptr;
    f32 ? kernels.sum_parts_f32(parts.data(), size, ld, rows, cols, factors, out.f32(), out.ld)
        : kernels.sum_parts_bf16(parts.data(), size, ld, rows, cols, factors, out.b16(), out.ld);
  });
}

/// f(inner, first row, rows, first column, columns) for this thread's share of the blocks of all
/// z; the columns beyond the rank are zeroed.
template <typename F>
void ZExchange::for_each_block(Range tokens, F f) {
  int row_blocks = (tokens.size() + kBlockRows - 1) / kBlockRows;
  int col_blocks = 0;
  for (std::size_t i = 0; i < num_inners_; ++i) col_blocks += blocks_of(inners_[i]);
  auto [begin, end] = ctx_.member.share(row_blocks * col_blocks);
  for (int item = begin; item < end; ++item) {
    int row = tokens.begin + item / col_blocks * kBlockRows;
    int rows = std::min(kBlockRows, tokens.end - row);
    int block = item % col_blocks;
    const Inner* inner = inners_.data();
    for (; block >= blocks_of(*inner); ++inner) block -= blocks_of(*inner);
    int col = block * kBlockCols;
    f(*inner, row, rows, col, std::min(kBlockCols, inner->rank() - col));
  }
  for (std::size_t i = 0; i < num_inners_; ++i) clear(inners_[i], tokens, inners_[i].rank());
}

/// z from the columns, or under token shards the rows, of every rank.
void ZExchange::gather(const Tile& tile) {
  bool tokens = ctx_.residual == ResidualLayout::kTokenShards;
  for (int r = 0; r < ctx_.exchange.size(); ++r) {
    Range rows = tokens ? own_tokens(tile.row, tile.rows, r, ctx_.exchange.size()) : tile.all();
    auto columns_of = [&](const Inner& inner) {
      return tokens ? Range{0, inner.rank()} : inner.linear->v_shares[static_cast<std::size_t>(r)];
    };
    int ld = 0;
    for (std::size_t i = 0; i < num_inners_; ++i) ld += columns_of(inners_[i]).size();
    Activations part{const_cast<std::byte*>(ctx_.exchange.from(r, tile.tickets[0])), z_.dtype, ld};
    auto [begin, end] = ctx_.member.share(rows.size());
    for (int i = begin; i < end; ++i) {
      int part_col = 0;
      for (std::size_t j = 0; j < num_inners_; ++j) {
        Range columns = columns_of(inners_[j]);
        Activations out =
            z_.rows_from(rows.begin + i).columns_from(inners_[j].z_col + columns.begin);
        std::memcpy(out.data, part.rows_from(i).columns_from(part_col).data,
                    static_cast<std::size_t>(columns.size()) * dtype_size(z_.dtype));
        part_col += columns.size();
      }
    }
  }
  for (std::size_t i = 0; i < num_inners_; ++i) {
    clear(inners_[i], tile.all(), inners_[i].rank());
  }
}

}  // namespace deinfer
