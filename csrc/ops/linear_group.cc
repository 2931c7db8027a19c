#include "ops/linear_group.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

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

/// Writes the first n columns of tiles to rows of memory; out is where row `row0` of the batch goes.
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

class Group {
 public:
  Group(ExecutionContext& ctx, const GroupInput& input, const Activations& z,
        std::span<const Branch> branches)
      : ctx_(ctx), input_(input), z_(z), branches_(branches) {
    for (const Branch& branch : branches) {
      add(*branch.linear);
      if (branch.second != nullptr) add(*branch.second);
    }
    part_cols_ = part_sums_;
    if (input.sum_squares != nullptr && after_v_ == Exchange::kAllReduce) ++part_cols_;
  }

  void run(int row, int rows) {
    row_ = row;
    rows_ = rows;
    bool tokens = ctx_.residual == ResidualLayout::kTokenShards;
    Range all{row, row + rows};
    Range own = own_tokens(row, rows, ctx_.exchange.rank(), ctx_.exchange.size());
    v_tokens_ = tokens && after_v_ == Exchange::kAllGather ? own : all;
    u_tokens_ = tokens && after_v_ == Exchange::kReduceScatter ? own : all;
    multiply_v();
    if (after_v_ != Exchange::kNone) exchange_z();
    multiply_u();
  }

 private:
  /// Whether a linear belongs to the first stage: V factors do, and dense linears that read x and
  /// exchange nothing.
  bool reads_x(const LowRankLinear& linear) const {
    const LinearExchanges& exchanges = linear.exchange(ctx_.phase);
    return !linear.is_low_rank() && exchanges.before == Exchange::kNone &&
           exchanges.after_u == Exchange::kNone;
  }

  void add(const LowRankLinear& linear) {
    if (!linear.is_low_rank()) return;
    inners_[num_inners_++] = {&linear, z_cols_, part_sums_};
    z_cols_ += linear.z_cols();
    part_sums_ += linear.v.n;
    after_v_ = linear.exchange(ctx_.phase).after_v;
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
    bool gathered = linear.exchange(ctx_.phase).before != Exchange::kNone;
    const Activations& x = gathered ? input_.gathered : input_.x;
    return {&linear.w, x.columns_from(linear.x_col), nullptr, nullptr, {}};
  }

  /// This rank's contribution to the exchange of z: fp32 sums, or finished columns or rows.
  Activations part() const {
    DType dtype = after_v_ == Exchange::kAllGather ? z_.dtype : DType::kFloat32;
    return {ctx_.exchange.send(ctx_.member, ctx_.ticket), dtype, part_cols_};
  }

  void multiply_v() {
    std::array<PanelJob, 2 * kMaxLinears> jobs;
    std::array<StoreColumns, kMaxLinears> stores;
    std::size_t count = 0;
    for (std::size_t i = 0; i < num_inners_; ++i) {
      const Inner& inner = inners_[i];
      const cpu::PackedMatrix& v = inner.linear->v;
      if (after_v_ == Exchange::kNone) {
        // Padding columns are stored too: they are exact zeros, which U's padding relies on.
        stores[i] = StoreColumns(z_.columns_from(inner.z_col), 0, v.n_pad);
        if (v.empty()) clear_z(inner, 0);
      } else {
        stores[i] = StoreColumns(part().columns_from(inner.part_col), v_tokens_.begin, v.n);
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
    run_jobs(ctx_, std::span(jobs.data(), count), v_tokens_.begin, v_tokens_.size());
    if (after_v_ == Exchange::kNone) ctx_.member.barrier();
  }

  /// Zeros the columns of z from `col` on, which U's padding relies on.
  void clear_z(const Inner& inner, int col) {
    auto [begin, end] = ctx_.member.share(rows_);
    auto bytes = static_cast<std::size_t>(inner.linear->z_cols() - col) * dtype_size(z_.dtype);
    for (int i = begin; i < end; ++i) {
      std::memset(z_.rows_from(row_ + i).columns_from(inner.z_col + col).data, 0, bytes);
    }
  }

  void exchange_z() {
    Ticket ticket = ctx_.ticket;
    if (part_cols_ > part_sums_) {
      auto [begin, end] = ctx_.member.share(rows_);
      for (int i = begin; i < end; ++i) {
        part().rows_from(i).f32()[part_sums_] = input_.sum_squares[row_ + i];
      }
    }
    std::size_t bytes = static_cast<std::size_t>(v_tokens_.size()) *
                        static_cast<std::size_t>(part_cols_) * dtype_size(part().dtype);
    ctx_.exchange.start(ctx_.member, collective_of(after_v_), bytes);
    ++ctx_.ticket;
    ctx_.exchange.wait(ticket);
    if (after_v_ != Exchange::kAllGather) {
      sum_z(ticket);
    } else {
      gather_z(ticket);
    }
    ctx_.exchange.finish(ctx_.member, ticket);
  }

  /// z = the sum over ranks of their parts, for the rows that U reads.
  void sum_z(Ticket ticket) {
    for_each_block(u_tokens_, [&](const Inner& inner, int row, int rows, int col, int cols) {
      float scale[kBlockRows];
      std::array<const float*, kMaxRanks> parts;
      for (int r = 0; r < ctx_.exchange.size(); ++r) {
        parts[static_cast<std::size_t>(r)] =
            reinterpret_cast<const float*>(ctx_.exchange.from(r, ticket)) +
            std::ptrdiff_t{row - row_} * part_cols_;
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
    for (std::size_t i = 0; i < num_inners_; ++i) clear_z(inners_[i], inners_[i].rank());
  }
  static int blocks_of(const Inner& inner) { return (inner.rank() + kBlockCols - 1) / kBlockCols; }

  /// z from the columns, or under token shards the rows, of every rank.
  void gather_z(Ticket ticket) {
    bool tokens = ctx_.residual == ResidualLayout::kTokenShards;
    for (int r = 0; r < ctx_.exchange.size(); ++r) {
      Range rows = tokens ? own_tokens(row_, rows_, r, ctx_.exchange.size())
                          : Range{row_, row_ + rows_};
      auto columns_of = [&](const Inner& inner) {
        return tokens ? Range{0, inner.rank()}
                      : inner.linear->v_shares[static_cast<std::size_t>(r)];
      };
      int ld = 0;
      for (std::size_t i = 0; i < num_inners_; ++i) ld += columns_of(inners_[i]).size();
      Activations part{const_cast<std::byte*>(ctx_.exchange.from(r, ticket)), z_.dtype, ld};
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
    for (std::size_t i = 0; i < num_inners_; ++i) clear_z(inners_[i], inners_[i].rank());
  }

  void multiply_u() {
    if (branches_.front().linear->exchange(ctx_.phase).after_u != Exchange::kNone) {
      return exchange_output(branches_.front());
    }
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
    run_jobs(ctx_, std::span(jobs.data(), count), u_tokens_.begin, u_tokens_.size());
    ctx_.member.barrier();
  }

  /// Output factors whose results are partial sums: of one linear, or of two that an epilogue
  /// combines.
  void exchange_output(const Branch& branch) {
    std::array<Ticket, 2> tickets{};
    std::size_t count = 0;
    for (const LowRankLinear* linear : {branch.linear, branch.second}) {
      if (linear == nullptr) continue;
      PanelJob job = output_job(*linear);
      int n = job.matrix->n;
      Activations out{ctx_.exchange.send(ctx_.member, ctx_.ticket), DType::kFloat32, n};
      StoreColumns store(out, row_, n);
      job.epilogue = &store;
      run_jobs(ctx_, std::span(&job, 1), row_, rows_);
      ctx_.exchange.start(ctx_.member, collective_of(linear->exchange(ctx_.phase).after_u),
                          static_cast<std::size_t>(rows_) * static_cast<std::size_t>(n) * 4);
      tickets[count++] = ctx_.ticket++;
    }
    for (std::size_t i = 0; i < count; ++i) ctx_.exchange.wait(tickets[i]);
    finish_output(branch, tickets);
    for (std::size_t i = 0; i < count; ++i) ctx_.exchange.finish(ctx_.member, tickets[i]);
  }

  /// Sums the parts of the output that this rank keeps, tile by tile, for the epilogue.
  void finish_output(const Branch& branch, const std::array<Ticket, 2>& tickets) {
    const LowRankLinear& linear = *branch.linear;
    bool scattered = linear.exchange(ctx_.phase).after_u == Exchange::kReduceScatter;
    bool tokens = scattered && ctx_.residual == ResidualLayout::kTokenShards;
    Range rows = tokens ? own_tokens(row_, rows_, ctx_.exchange.rank(), ctx_.exchange.size())
                        : Range{row_, row_ + rows_};
    int n = linear.output_factor().n;
    Range columns = scattered && !tokens ? linear.y_share : Range{0, n};
    int panels = (columns.size() + cpu::kPanelRows - 1) / cpu::kPanelRows;
    auto sum = [&](Ticket ticket, int first, int cols, Buffer& tile) {
      std::array<const float*, kMaxRanks> parts;
      for (int r = 0; r < ctx_.exchange.size(); ++r) {
        parts[static_cast<std::size_t>(r)] =
            reinterpret_cast<const float*>(ctx_.exchange.from(r, ticket)) +
            std::ptrdiff_t{rows.begin - row_} * n + columns.begin + first;
      }
      ctx_.kernels.sum_parts_f32(parts.data(), ctx_.exchange.size(), n, rows.size(), cols, nullptr,
                                 tile.as<float>(), cpu::kPanelRows);
    };
    auto [begin, end] = ctx_.member.share(panels);
    for (int panel = begin; panel < end; ++panel) {
      int first = panel * cpu::kPanelRows;
      int cols = std::min(cpu::kPanelRows, columns.size() - first);
      sum(tickets[0], first, cols, ctx_.scratch.tile_a);
      if (branch.second != nullptr) sum(tickets[1], first, cols, ctx_.scratch.tile_b);
      branch.epilogue->apply(ctx_.kernels, ctx_.scratch.tile_a.as<float>(),
                             ctx_.scratch.tile_b.as<float>(), rows.begin, rows.size(), first, cols);
    }
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
  int row_ = 0;  // of the tile
  int rows_ = 0;
  Range v_tokens_, u_tokens_;  // rows for which the factors are computed
};

}  // namespace

Range own_tokens(int row, int rows, int rank, int size) {
  Range part = split(rows, size, rank);
  return {row + part.begin, row + part.end};
}

void run_group(ExecutionContext& ctx, int m, const GroupInput& input, const Activations& z,
               std::span<const Branch> branches) {
  Group group(ctx, input, z, branches);
  for (int row = 0; row < m; row += kTileTokens) group.run(row, std::min(kTileTokens, m - row));
}

}  // namespace deinfer
