#include "ops/z_exchange.h"

#include <algorithm>
#include <cstring>

#include "plan/exchanges.h"

namespace deinfer {
namespace {

constexpr int kBlockRows = 16;
constexpr int kBlockCols = 256;
constexpr std::size_t kMaxRanks = Communicator::kMaxRanks;
static_assert(kMaxRankChunks <= Communicator::kMaxInFlight);

int blocks_of(Range columns) { return (columns.size() + kBlockCols - 1) / kBlockCols; }

}  // namespace

Range own_tokens(int row, int rows, int rank, int size) {
  Range part = split(rows, size, rank);
  return {row + part.begin, row + part.end};
}

void ZExchange::add(const LowRankLinear& linear) {
  if (!linear.is_low_rank()) return;
  v_columns_[num_inners_] = linear.v.n;
  inners_[num_inners_++] = {&linear, z_cols_};
  z_cols_ += linear.z_cols();
  kind_ = linear.exchange(ctx_.step_kind).after_v;
}

int ZExchange::statistics() const {
  bool travel = input_.norm != nullptr && kind_ == Exchange::kAllReduce;
  return travel ? statistics_columns(input_.norm->kind) : 0;
}

const Inner& ZExchange::inner_of(const LowRankLinear& linear) const {
  const Inner* inner = inners_.data();
  while (inner->linear != &linear) ++inner;
  return *inner;
}

Activations ZExchange::part(int chunk) const {
  DType dtype = kind_ == Exchange::kAllGather ? z_.dtype : DType::kFloat32;
  return {ctx_.exchange.send(ctx_.member, ctx_.ticket), dtype, part_ld(chunk)};
}

int ZExchange::part_col(std::size_t inner, int chunk) const {
  int col = 0;
  for (std::size_t i = 0; i < inner; ++i) col += v_rows(i, chunk).size();
  return col;
}

int ZExchange::columns_received(const LowRankLinear& linear, int chunk) const {
  if (chunk + 1 == chunks()) return linear.inner_size();
  return v_rows(static_cast<std::size_t>(&inner_of(linear) - inners_.data()), chunk).end;
}

void ZExchange::clear(const Inner& inner, Range tokens, int col) {
  auto [begin, end] = ctx_.member.share(tokens.size());
  auto bytes = static_cast<std::size_t>(inner.linear->z_cols() - col) * dtype_size(z_.dtype);
  for (int i = begin; i < end; ++i) {
    std::memset(z_of(inner).rows_from(tokens.begin + i).columns_from(col).data, 0, bytes);
  }
}

void ZExchange::start(Tile& tile, int chunk) {
  const Activations out = part(chunk);
  if (int count = statistics(); count > 0 && chunk == 0) {
    auto [begin, end] = ctx_.member.share(tile.rows);
    for (int i = begin; i < end; ++i) {
      std::copy_n(input_.statistics + std::ptrdiff_t{tile.row + i} * count, count,
                  out.rows_from(i).f32() + part_columns(chunk));
    }
  }
  std::size_t bytes = static_cast<std::size_t>(tile.v_tokens.size()) *
                      static_cast<std::size_t>(out.ld) * dtype_size(out.dtype);
  tile.tickets[static_cast<std::size_t>(chunk)] = ctx_.ticket++;
  ctx_.exchange.start(ctx_.member, collective_of(kind_), bytes);
}

void ZExchange::receive(const Tile& tile, int chunk) {
  ctx_.exchange.wait(ctx_.member, tile.tickets[static_cast<std::size_t>(chunk)]);
  if (kind_ == Exchange::kAllGather) {
    gather(tile);
  } else {
    sum(tile, chunk);
  }
  if (chunk == 0) {  // with its last column a linear reads its padding, which may be in any chunk
    for (const Inner& inner : inners()) clear(inner, tile.u_tokens, inner.rank());
  }
  if (chunk + 1 < chunks()) return ctx_.member.barrier();
  // All at once, as every chunk needs the statistics of the first.
  ctx_.exchange.finish(ctx_.member, tile.tickets[0], chunks());
}

/// z = the sum over ranks of their parts, normalised where that was left to be done.
void ZExchange::sum(const Tile& tile, int chunk) {
  const int size = ctx_.exchange.size();
  const int ld = part_ld(chunk);
  const int num_statistics = statistics();
  const Ticket ticket = tile.tickets[static_cast<std::size_t>(chunk)];
  for_each_block(tile.u_tokens, chunk, [&](std::size_t index, int row, int rows, Range columns) {
    std::array<const float*, kMaxRanks> parts, numbers;
    float scale[kBlockRows];
    float shifts[kBlockRows * kMaxRanks];
    for (int i = 0; num_statistics > 0 && i < rows; ++i) {
      for (int r = 0; r < size; ++r) {
        numbers[static_cast<std::size_t>(r)] = ctx_.floats_from(r, tile.tickets[0]) +
                                               std::ptrdiff_t{row - tile.row + i} * part_ld(0) +
                                               part_columns(0);
      }
      RowStatistics whole = combine_statistics(*input_.norm, input_.shares, numbers.data());
      scale[i] = whole.scale;
      for (int r = 0; r < size; ++r) {
        shifts[i * size + r] = numbers[static_cast<std::size_t>(r)][0] - whole.mean;
      }
    }
    const int from = part_col(index, chunk) + columns.begin - v_rows(index, chunk).begin;
    for (int r = 0; r < size; ++r) {
      parts[static_cast<std::size_t>(r)] =
          ctx_.floats_from(r, ticket) + std::ptrdiff_t{row - tile.row} * ld + from;
    }
    const Inner& inner = inners_[index];
    const int cols = columns.size();
    Activations out = z_of(inner).rows_from(row).columns_from(columns.begin);
    const bool f32 = out.dtype == DType::kFloat32;
    const cpu::KernelTable& kernels = ctx_.kernels;
    if (num_statistics > 0 && input_.norm->kind == NormKind::kLayer) {
      const NormTerms& terms = inner.linear->norm_terms;
      cpu::Centering centering{scale, shifts, terms.gain.data() + columns.begin, inner.rank(),
                               terms.bias.data() + columns.begin};
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

/// f(index of the inner, first row, rows, columns of its z) for this thread's share of the blocks
/// of a chunk.
template <typename F>
void ZExchange::for_each_block(Range tokens, int chunk, F f) {
  int row_blocks = (tokens.size() + kBlockRows - 1) / kBlockRows;
  int col_blocks = 0;
  for (std::size_t i = 0; i < num_inners_; ++i) col_blocks += blocks_of(v_rows(i, chunk));
  auto [begin, end] = ctx_.member.share(row_blocks * col_blocks);
  for (int item = begin; item < end; ++item) {
    int row = tokens.begin + item / col_blocks * kBlockRows;
    int block = item % col_blocks;
    std::size_t index = 0;
    for (; block >= blocks_of(v_rows(index, chunk)); ++index) {
      block -= blocks_of(v_rows(index, chunk));
    }
    const Range all = v_rows(index, chunk);
    const int first = all.begin + block * kBlockCols;
    f(index, row, std::min(kBlockRows, tokens.end - row),
      Range{first, std::min(first + kBlockCols, all.end)});
  }
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
    for (const Inner& inner : inners()) ld += columns_of(inner).size();
    Activations part{const_cast<std::byte*>(ctx_.exchange.from(r, tile.tickets[0])), z_.dtype, ld};
    auto [begin, end] = ctx_.member.share(rows.size());
    for (int i = begin; i < end; ++i) {
      int from = 0;
      for (const Inner& inner : inners()) {
        Range columns = columns_of(inner);
        Activations out = z_of(inner).rows_from(rows.begin + i).columns_from(columns.begin);
        std::memcpy(out.data, part.rows_from(i).columns_from(from).data,
                    static_cast<std::size_t>(columns.size()) * dtype_size(z_.dtype));
        from += columns.size();
      }
    }
  }
}

}  // namespace deinfer
