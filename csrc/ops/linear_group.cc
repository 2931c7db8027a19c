#include "ops/linear_group.h"

#include <algorithm>
#include <array>
#include <optional>

#include "base/check.h"
#include "ops/z_exchange.h"
#include "plan/exchanges.h"

namespace deinfer {
namespace {

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

class Group {
 public:
  Group(ExecutionContext& ctx, const GroupInput& input, const Activations& z,
        std::span<const Branch> branches)
      : ctx_(ctx), input_(input), z_(ctx, input, z), branches_(branches) {
    for (const Branch& branch : branches) {
      z_.add(*branch.linear);
      if (branch.second != nullptr) z_.add(*branch.second);
      stores_latents_ |= branch.latent != nullptr;
    }
    after_u_ = branches.front().linear->exchange(ctx.step_kind).after_u;
  }

  /// Whether something travels between begin() and complete().
  bool exchanges() const { return z_.kind() != Exchange::kNone || after_u_ != Exchange::kNone; }

  /// All up to the exchange.
  Tile begin(int row, int rows) {
    Tile tile{row, rows, {row, row + rows}, {row, row + rows}, {}};
    if (ctx_.residual == ResidualLayout::kTokenShards) {
      Range own = own_tokens(row, rows, ctx_.exchange.rank(), ctx_.exchange.size());
      if (z_.kind() == Exchange::kAllGather) tile.v_tokens = own;
      if (z_.kind() == Exchange::kReduceScatter) tile.u_tokens = own;
    }
    for (int chunk = 0; chunk < z_.chunks(); ++chunk) {
      multiply_v(tile, chunk);
      if (z_.kind() != Exchange::kNone) z_.start(tile, chunk);
    }
    if (after_u_ != Exchange::kNone) start_output(tile);
    return tile;
  }

  /// The exchange and what follows.
  void complete(const Tile& tile) {
    if (after_u_ != Exchange::kNone) return finish_output(tile);
    for (int chunk = 0; chunk < z_.chunks(); ++chunk) {
      if (z_.kind() != Exchange::kNone) z_.receive(tile, chunk);
      if (chunk + 1 == z_.chunks()) store_latents(tile);
      multiply_u(tile, chunk);
    }
  }

 private:
  /// Whether a linear belongs to the first stage: V factors do, and dense linears that read x and
  /// exchange nothing.
  bool reads_x(const LowRankLinear& linear) const {
    const LinearExchanges& exchanges = linear.exchange(ctx_.step_kind);
    return !linear.is_low_rank() && exchanges.before == Exchange::kNone &&
           exchanges.after_u == Exchange::kNone;
  }
  /// Two linears are computed together, so in the first stage only if both may be.
  bool in_first_stage(const Branch& branch) const {
    return reads_x(*branch.linear) && (branch.second == nullptr || reads_x(*branch.second));
  }

  /// The output factor of a linear and what it reads.
  PanelJob output_job(const LowRankLinear& linear) const {
    PanelJob job;
    job.matrix = &linear.output_factor();
    if (linear.is_low_rank()) {
      job.x = z_.z_of(linear);
    } else {
      bool gathered = linear.exchange(ctx_.step_kind).before != Exchange::kNone;
      job.x = (gathered ? input_.gathered : input_.x).columns_from(linear.x_col);
    }
    return job;
  }
  PanelJob branch_job(const Branch& branch) const {
    PanelJob job = output_job(*branch.linear);
    job.epilogue = branch.epilogue;
    if (branch.second != nullptr) {
      PanelJob second = output_job(*branch.second);
      job.second = second.matrix;
      job.second_x = second.x;
    }
    return job;
  }

  /// The V factors' rows in a chunk, and with the last the branches of the first stage.
  void multiply_v(const Tile& tile, int chunk) {
    std::array<PanelJob, 2 * kMaxLinears> jobs;
    std::array<StoreColumns, kMaxLinears> stores;
    std::size_t count = 0;
    std::span<const Inner> inners = z_.inners();
    for (std::size_t i = 0; i < inners.size(); ++i) {
      const cpu::PackedMatrix& v = inners[i].linear->v;
      PanelJob job;
      if (z_.kind() == Exchange::kNone) {
        // Padding columns are stored too: they are exact zeros, which U's padding relies on.
        stores[i] = StoreColumns(z_.z_of(inners[i]), 0, v.n_pad);
        if (v.empty()) z_.clear(inners[i], tile.all(), 0);
      } else {
        const Range rows = z_.v_rows(i, chunk);
        if (rows.size() == 0) continue;
        Activations out = z_.part(chunk).columns_from(z_.part_col(i, chunk) - rows.begin);
        stores[i] = StoreColumns(out, tile.v_tokens.begin, v.n);
        job.panels = {rows.begin / v.panel_rows, (rows.end + v.panel_rows - 1) / v.panel_rows};
      }
      job.matrix = &v;
      job.x = input_.x;
      job.epilogue = &stores[i];
      jobs[count++] = job;
    }
    for (const Branch& branch : branches_) {
      if (chunk + 1 < z_.chunks() || !in_first_stage(branch)) continue;
      jobs[count++] = branch_job(branch);
    }
    if (count == 0) return;
    run_jobs(ctx_, std::span(jobs.data(), count), tile.v_tokens.begin, tile.v_tokens.size());
    if (z_.kind() == Exchange::kNone) ctx_.member.barrier();
  }

  /// The columns of an output factor that may be computed with the chunks up to `chunk`.
  int columns_ready(const LowRankLinear& linear, int chunk) const {
    const cpu::PackedMatrix& matrix = linear.output_factor();
    if (chunk < 0) return 0;
    if (!linear.is_low_rank()) return chunk + 1 < z_.chunks() ? 0 : matrix.k_pad;
    const int columns = z_.columns_received(linear, chunk);
    return columns < linear.inner_size() ? columns : matrix.k_pad;
  }

  /// What a chunk of z allows, on top of the sums over the chunks before.
  void multiply_u(const Tile& tile, int chunk) {
    std::array<PanelJob, kMaxLinears> jobs;
    std::size_t count = 0;
    std::ptrdiff_t sums = 0;  // floats in use
    for (const Branch& branch : branches_) {
      if (branch.epilogue == nullptr || in_first_stage(branch)) continue;
      PanelJob job = branch_job(branch);
      if (z_.chunks() > 1) {
        auto ready = [&](const LowRankLinear& linear) {
          return Range{columns_ready(linear, chunk - 1), columns_ready(linear, chunk)};
        };
        PartOfK part;
        part.k = ready(*branch.linear);
        part.last = part.k.end == job.matrix->k_pad;
        std::ptrdiff_t panels = job.matrix->num_panels();
        if (branch.second != nullptr) {
          part.second_k = ready(*branch.second);
          part.last &= part.second_k.end == job.second->k_pad;
          panels *= 2;
        }
        part.sums = ctx_.partial_sums + sums;
        sums += panels * tile.u_tokens.size() * cpu::kPanelRows;
        if (part.k.size() + part.second_k.size() == 0) continue;
        job.part = part;
      }
      jobs[count++] = job;
    }
    if (count == 0 && !stores_latents_) return;
    if (count > 0) {
      run_jobs(ctx_, std::span(jobs.data(), count), tile.u_tokens.begin, tile.u_tokens.size());
    }
    if (chunk + 1 == z_.chunks()) ctx_.member.barrier();  // else receive() has the next
  }

  /// z where it is wanted itself; multiply_u() has the barrier.
  void store_latents(const Tile& tile) {
    if (!stores_latents_) return;
    auto [begin, end] = ctx_.member.share(tile.u_tokens.size());
    for (const Branch& branch : branches_) {
      if (branch.latent == nullptr) continue;
      const Activations z = z_.z_of(*branch.linear);
      for (int i = begin; i < end; ++i) branch.latent->store(z, tile.u_tokens.begin + i);
    }
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
      std::array<const float*, Communicator::kMaxRanks> parts;
      for (int r = 0; r < ctx_.exchange.size(); ++r) {
        parts[static_cast<std::size_t>(r)] = ctx_.floats_from(r, ticket) +
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
  ZExchange z_;
  std::span<const Branch> branches_;
  Exchange after_u_ = Exchange::kNone;
  bool stores_latents_ = false;
};

}  // namespace

std::size_t partial_sums_bytes(std::span<const LowRankLinear* const> group) {
  bool chunks = false;
  std::size_t panels = 0;
  for (const LowRankLinear* linear : group) {
    for (const LinearExchanges& exchanges : linear->exchanges) {
      chunks |= linear->is_low_rank() && has_rank_chunks(exchanges.after_v);
    }
    panels += static_cast<std::size_t>(linear->output_factor().num_panels());
  }
  return chunks ? panels * cpu::kPanelRows * kRankChunkTokens * sizeof(float) : 0;
}

void run_group(ExecutionContext& ctx, int m, const GroupInput& input, const Activations& z,
               std::span<const Branch> branches) {
  Group group(ctx, input, z, branches);
  std::optional<Tile> under_way;  // computing the next tile hides its exchange
  for_each_tile(ctx, m, [&](int row, int count) {
    Tile tile = group.begin(row, count);
    if (under_way) group.complete(*under_way);
    under_way = tile;
    if (!group.exchanges()) {
      group.complete(tile);
      under_way.reset();
    }
  });
  if (under_way) group.complete(*under_way);
}

}  // namespace deinfer
