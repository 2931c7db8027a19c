#include "ops/linear_group.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr std::size_t kMaxLinears = 3;  // q, k, v
constexpr int kBlockRows = 16;
constexpr int kBlockCols = 256;
constexpr std::size_t kMaxRanks = Communicator::kMaxRanks;

Collective collective_of(Exchange exchange) {
  switch (exchange) {
    case Exchange::kAllReduce: return Collective::kAllReduce;
    case Exchange::kAllGather: return Collective::kAllGather;
    default: return Collective::kReduceScatter;
  }
}

/// Writes the first n columns of tiles to rows of memory; out is where row `row0` of the batch
/// goes.
class StoreColumns final : public Epilogue {
 public:
  StoreColumns() = default;
  StoreColumns(const Activations& out, int row0, int n) : out_(out), row0_(row0), n_(n) {}
  void apply(const cpu::KernelTable& kernels, float* tile, const float*, int row, int m, int first,
             int cols) const override {
    cols = std::min(cols, n_ - first);
    if (cols <= 0) return;
    Activations out = out_.rows_from(row - row0_).columns_from(first);
    if (out_.dtype == DType::kFloat32) {
      kernels.store_f32(tile, m, cols, nullptr, out.f32(), out.ld);
    } else {
      kernels.store_bf16(tile, m, cols, nullptr, out.b16(), out.ld);
    }
  }

 private:
  Activations out_;
  int row0_ = 0;
  int n_ = 0;
};

/// z of a low-rank linear: its columns in the z buffer, and in this rank's contribution.
struct Inner {
  const LowRankLinear* linear = nullptr;
  int z_col = 0;
  int part_col = 0;

  int rank() const { return linear->inner_size(); }
};

/// A chunk of the tokens on its way through the group.
struct Tile {
  int row = 0;
  int rows = 0;
  Range v_tokens, u_tokens;  // rows for which this rank computes the factors
  std::array<Ticket, 2> tickets{};

  Range all() const { return {row, row + rows}; }
};

class Group {
 public:
  Group(ExecutionContext& ctx, const GroupInput& input, const Activations& z,
        std::span<const Branch> branches)
      : ctx_(ctx), input_(input), z_(z), branches_(branches) {
    for (const Branch& branch : branches) {
      add(*branch.linear);
      if (branch.second != nullptr) add(*branch.second);
    }
    after_u_ = branches.front().linear->exchange(ctx.step_kind).after_u;
    part_cols_ = part_sums_;
    if (input.sum_squares != nullptr && after_v_ == Exchange::kAllReduce) ++part_cols_;
  }

  /// Whether something travels between begin() and complete().
  bool exchanges() const { return after_v_ != Exchange::kNone || after_u_ != Exchange::kNone; }

  /// All up to the exchange.
  Tile begin(int row, int rows) {
    Tile tile{row, rows, {row, row + rows}, {row, row + rows}, {}};
    if (ctx_.residual == ResidualLayout::kTokenShards) {
      Range own = own_tokens(row, rows, ctx_.exchange.rank(), ctx_.exchange.size());
      if (after_v_ == Exchange::kAllGather) tile.v_tokens = own;
      if (after_v_ == Exchange::kReduceScatter) tile.u_tokens = own;
    }
    multiply_v(tile);
    if (after_v_ != Exchange::kNone) start_z(tile);
    if (after_u_ != Exchange::kNone) start_output(tile);
    return tile;
  }

  /// The exchange and what follows.
  void complete(const Tile& tile) {
    if (after_u_ != Exchange::kNone) return finish_output(tile);
    if (after_v_ != Exchange::kNone) finish_z(tile);
    multiply_u(tile);
  }

 private:
  /// Whether a linear belongs to the first stage: V factors do, and dense linears that read x and
  /// exchange nothing.
  bool reads_x(const LowRankLinear& linear) const {
    const LinearExchanges& exchanges = linear.exchange(ctx_.step_kind);
    return !linear.is_low_rank() && exchanges.before == Exchange::kNone &&
           exchanges.after_u == Exchange::kNone;
  }

  void add(const LowRankLinear& linear) {
    if (!linear.is_low_rank()) return;
    inners_[num_inners_++] = {&linear, z_cols_, part_sums_};
    z_cols_ += linear.z_cols();
    part_sums_ += linear.v.n;
    after_v_ = linear.exchange(ctx_.step_kind).after_v;
  }

  const Inner& inner_of(const LowRankLinear& linear) const {
    return *std::find_if(inners_.begin(), inners_.end(),
                         [&](const Inner& inner) { return inner.linear == &linear; });
  }

  /// The output factor of a linear and what it reads.
  PanelJob output_job(const LowRankLinear& linear) const {
    if (linear.is_low_rank()) {
      return {&linear.u, z_.columns_from(inner_of(linear).z_col), nullptr, nullptr, {}};
    }
    bool gathered = linear.exchange(ctx_.step_kind).before != Exchange::kNone;
    const Activations& x = gathered ? input_.gathered : input_.x;
    return {&linear.w, x.columns_from(linear.x_col), nullptr, nullptr, {}};
  }

  /// This rank's contribution to the exchange of z: fp32 sums, or finished columns or rows.
  Activations part() const {
    DType dtype = after_v_ == Exchange::kAllGather ? z_.dtype : DType::kFloat32;
    return {ctx_.exchange.send(ctx_.member, ctx_.ticket), dtype, part_cols_};
  }

  void multiply_v(const Tile& tile) {
    std::array<PanelJob, 2 * kMaxLinears> jobs;
    std::array<StoreColumns, kMaxLinears> stores;
    std::size_t count = 0;
    for (std::size_t i = 0; i < num_inners_; ++i) {
      const Inner& inner = inners_[i];
      const cpu::PackedMatrix& v = inner.linear->v;
      if (after_v_ == Exchange::kNone) {
        // Padding columns are stored too: they are exact zeros, which U's padding relies on.
        stores[i] = StoreColumns(z_.columns_from(inner.z_col), 0, v.n_pad);
        if (v.empty()) clear_z(inner, tile.all(), 0);
      } else {
        stores[i] = StoreColumns(part().columns_from(inner.part_col), tile.v_tokens.begin, v.n);
      }
      jobs[count++] = {&v, input_.x, &stores[i], nullptr, {}};
    }
    for (const Branch& branch : branches_) {
      bool first = reads_x(*branch.linear);
      if (!first || (branch.second != nullptr && !reads_x(*branch.second))) continue;
      PanelJob job = output_job(*branch.linear);
      job.epilogue = branch.epilogue;
      if (branch.second != nullptr) {
        job.second = &branch.second->w;
        job.second_x = input_.x;
      }
      jobs[count++] = job;
    }
    if (count == 0) return;
    run_jobs(ctx_, std::span(jobs.data(), count), tile.v_tokens.begin, tile.v_tokens.size());
    if (after_v_ == Exchange::kNone) ctx_.member.barrier();
  }

  /// Zeros the columns of z from `col` on, which U's padding relies on.
  void clear_z(const Inner& inner, Range tokens, int col) {
    auto [begin, end] = ctx_.member.share(tokens.size());
    auto bytes = static_cast<std::size_t>(inner.linear->z_cols() - col) * dtype_size(z_.dtype);
    for (int i = begin; i < end; ++i) {
      std::memset(z_.rows_from(tokens.begin + i).columns_from(inner.z_col + col).data, 0, bytes);
    }
  }

  void start_z(Tile& tile) {
    if (part_cols_ > part_sums_) {
      auto [begin, end] = ctx_.member.share(tile.rows);
      for (int i = begin; i < end; ++i) {
        part().rows_from(i).f32()[part_sums_] = input_.sum_squares[tile.row + i];
      }
    }
    std::size_t bytes = static_cast<std::size_t>(tile.v_tokens.size()) *
                        static_cast<std::size_t>(part_cols_) * dtype_size(part().dtype);
    tile.tickets[0] = ctx_.ticket++;
    ctx_.exchange.start(ctx_.member, collective_of(after_v_), bytes);
  }

  void finish_z(const Tile& tile) {
    ctx_.exchange.wait(ctx_.member, tile.tickets[0]);
    if (after_v_ != Exchange::kAllGather) {
      sum_z(tile);
    } else {
      gather_z(tile);
    }
    ctx_.exchange.finish(ctx_.member, tile.tickets[0]);
  }

  /// z = the sum over ranks of their parts, for the rows that U reads.
  void sum_z(const Tile& tile) {
    for_each_block(tile.u_tokens, [&](const Inner& inner, int row, int rows, int col, int cols) {
      float scale[kBlockRows];
      std::array<const float*, kMaxRanks> parts;
      for (int r = 0; r < ctx_.exchange.size(); ++r) {
        parts[static_cast<std::size_t>(r)] =
            floats_from(r, tile.tickets[0]) + std::ptrdiff_t{row - tile.row} * part_cols_;
      }
      bool normalise = part_cols_ > part_sums_;
      for (int i = 0; normalise && i < rows; ++i) {
        float sum = 0.0f;
        for (int r = 0; r < ctx_.exchange.size(); ++r) {
          sum += parts[static_cast<std::size_t>(r)][std::ptrdiff_t{i} * part_cols_ + part_sums_];
        }
        scale[i] = 1.0f / std::sqrt(sum / static_cast<float>(input_.width) + input_.eps);
      }
      for (int r = 0; r < ctx_.exchange.size(); ++r) {
        parts[static_cast<std::size_t>(r)] += inner.part_col + col;
      }
      Activations out = z_.rows_from(row).columns_from(inner.z_col + col);
      const float* factors = normalise ? scale : nullptr;
      if (out.dtype == DType::kFloat32) {
        ctx_.kernels.sum_parts_f32(parts.data(), ctx_.exchange.size(), part_cols_, rows, cols,
                                   factors, out.f32(), out.ld);
      } else {
        ctx_.kernels.sum_parts_bf16(parts.data(), ctx_.exchange.size(), part_cols_, rows, cols,
                                    factors, out.b16(), out.ld);
      }
    });
  }

  /// f(inner, first row, rows, first column, columns) for this thread's share of the blocks of all
  /// z; the columns beyond the rank are zeroed.
  template <typename F>
  void for_each_block(Range tokens, F f) {
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
    for (std::size_t i = 0; i < num_inners_; ++i) clear_z(inners_[i], tokens, inners_[i].rank());
  }
  static int blocks_of(const Inner& inner) { return (inner.rank() + kBlockCols - 1) / kBlockCols; }

  /// z from the columns, or under token shards the rows, of every rank.
  void gather_z(const Tile& tile) {
    bool tokens = ctx_.residual == ResidualLayout::kTokenShards;
    for (int r = 0; r < ctx_.exchange.size(); ++r) {
      Range rows = tokens ? own_tokens(tile.row, tile.rows, r, ctx_.exchange.size()) : tile.all();
      auto columns_of = [&](const Inner& inner) {
        return tokens ? Range{0, inner.rank()}
                      : inner.linear->v_shares[static_cast<std::size_t>(r)];
      };
      int ld = 0;
      for (std::size_t i = 0; i < num_inners_; ++i) ld += columns_of(inners_[i]).size();
      Activations part{const_cast<std::byte*>(ctx_.exchange.from(r, tile.tickets[0])), z_.dtype,
                       ld};
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
      clear_z(inners_[i], tile.all(), inners_[i].rank());
    }
  }

  void multiply_u(const Tile& tile) {
    std::array<PanelJob, kMaxLinears> jobs;
    std::size_t count = 0;
    for (const Branch& branch : branches_) {
      bool first = reads_x(*branch.linear);
      if (first && (branch.second == nullptr || reads_x(*branch.second))) continue;
      PanelJob job = output_job(*branch.linear);
      job.epilogue = branch.epilogue;
      if (branch.second != nullptr) {
        PanelJob second = output_job(*branch.second);
        job.second = second.matrix;
        job.second_x = second.x;
      }
      jobs[count++] = job;
    }
    if (count == 0) return;
    run_jobs(ctx_, std::span(jobs.data(), count), tile.u_tokens.begin, tile.u_tokens.size());
    ctx_.member.barrier();
  }

  const float* floats_from(int rank, Ticket ticket) const {
    return reinterpret_cast<const float*>(ctx_.exchange.from(rank, ticket));
  }

  /// Output factors whose results are partial sums: of one linear, or of two that an epilogue
  /// combines.
  void start_output(Tile& tile) {
    std::size_t count = 0;
    for (const LowRankLinear* linear : {branches_.front().linear, branches_.front().second}) {
      if (linear == nullptr) continue;
      PanelJob job = output_job(*linear);
      int n = job.matrix->n;
      Activations out{ctx_.exchange.send(ctx_.member, ctx_.ticket), DType::kFloat32, n};
      StoreColumns store(out, tile.row, n);
      job.epilogue = &store;
      run_jobs(ctx_, std::span(&job, 1), tile.row, tile.rows);
      tile.tickets[count++] = ctx_.ticket++;
      ctx_.exchange.start(
          ctx_.member, collective_of(after_u_),
          static_cast<std::size_t>(tile.rows) * static_cast<std::size_t>(n) * sizeof(float));
    }
  }

  /// Sums the parts of the output that this rank keeps, tile by tile, for the epilogue.
  void finish_output(const Tile& tile) {
    const Branch& branch = branches_.front();
    std::size_t count = branch.second == nullptr ? 1 : 2;
    for (std::size_t i = 0; i < count; ++i) ctx_.exchange.wait(ctx_.member, tile.tickets[i]);
    bool scattered = after_u_ == Exchange::kReduceScatter;
    bool tokens = scattered && ctx_.residual == ResidualLayout::kTokenShards;
    Range rows = tokens
                     ? own_tokens(tile.row, tile.rows, ctx_.exchange.rank(), ctx_.exchange.size())
                     : tile.all();
    int n = branch.linear->output_factor().n;
    Range columns = scattered && !tokens ? branch.linear->y_share : Range{0, n};
    const std::vector<std::int32_t>& map = branch.linear->y_map;
    int outputs = map.empty() ? columns.size() : static_cast<int>(map.size());
    auto sum_columns = [&](Ticket ticket, int column, int cols, float* out) {
      std::array<const float*, kMaxRanks> parts;
      for (int r = 0; r < ctx_.exchange.size(); ++r) {
        parts[static_cast<std::size_t>(r)] = floats_from(r, ticket) +
                                             std::ptrdiff_t{rows.begin - tile.row} * n +
                                             columns.begin + column;
      }
      ctx_.kernels.sum_parts_f32(parts.data(), ctx_.exchange.size(), n, rows.size(), cols, nullptr,
                                 out, cpu::kPanelRows);
    };
    auto sum = [&](Ticket ticket, int first, int cols, Buffer& sums) {
      auto* out = sums.as<float>();
      if (map.empty()) return sum_columns(ticket, first, cols, out);
      const std::int32_t* from = map.data() + first;
      for (int i = 0, run = 1; i < cols; i += run, run = 1) {
        if (from[i] < 0) continue;
        while (i + run < cols && from[i + run] == from[i] + run) ++run;
        sum_columns(ticket, from[i], run, out + i);
      }
    };
    auto [begin, end] = ctx_.member.share((outputs + cpu::kPanelRows - 1) / cpu::kPanelRows);
    for (int panel = begin; panel < end; ++panel) {
      int first = panel * cpu::kPanelRows;
      int cols = std::min(cpu::kPanelRows, outputs - first);
      sum(tile.tickets[0], first, cols, ctx_.scratch.tile_a);
      if (count == 2) sum(tile.tickets[1], first, cols, ctx_.scratch.tile_b);
      branch.epilogue->apply(ctx_.kernels, ctx_.scratch.tile_a.as<float>(),
                             ctx_.scratch.tile_b.as<float>(), rows.begin, rows.size(), first, cols);
    }
    for (std::size_t i = 0; i < count; ++i) ctx_.exchange.finish(ctx_.member, tile.tickets[i]);
  }

  ExecutionContext& ctx_;
  const GroupInput& input_;
  const Activations& z_;
  std::span<const Branch> branches_;
  std::array<Inner, kMaxLinears> inners_;
  std::size_t num_inners_ = 0;
  int z_cols_ = 0;
  int part_sums_ = 0;  // columns of this rank's contribution of z
  int part_cols_ = 0;  // and of the sums of squares, if they travel with it
  Exchange after_v_ = Exchange::kNone;
  Exchange after_u_ = Exchange::kNone;
};

}  // namespace

Range own_tokens(int row, int rows, int rank, int size) {
  Range part = split(rows, size, rank);
  return {row + part.begin, row + part.end};
}

void run_group(ExecutionContext& ctx, int m, const GroupInput& input, const Activations& z,
               std::span<const Branch> branches) {
  Group group(ctx, input, z, branches);
  std::optional<Tile> under_way;  // computing the next tile hides its exchange
  for (int row = 0; row < m; row += ctx.tile_tokens) {
    Tile tile = group.begin(row, std::min(ctx.tile_tokens, m - row));
    if (under_way) group.complete(*under_way);
    under_way = tile;
    if (!group.exchanges()) {
      group.complete(tile);
      under_way.reset();
    }
  }
  if (under_way) group.complete(*under_way);
}

}  // namespace deinfer
