#include "ops/residual_stream.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "ops/z_exchange.h"

namespace deinfer {
namespace {

std::size_t float_bytes(int rows, int cols) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols) * sizeof(float);
}

/// The rows of tokens [row, row + count) that this rank has.
Range own_rows(const ExecutionContext& ctx, int row, int count) {
  if (ctx.residual != ResidualLayout::kTokenShards) return {row, row + count};
  return own_tokens(row, count, ctx.exchange.rank(), ctx.exchange.size());
}

}  // namespace

ResidualStream::ResidualStream(int hidden, std::vector<Range> hidden_shares, DType activations,
                               const ResidualLimits& limits)
    : hidden_(hidden),
      hidden_shares_(std::move(hidden_shares)),
      columns_(hidden),
      normed_(activations, std::max(limits.max_tokens, limits.max_wanted), hidden),
      gathered_(activations, limits.sharded ? limits.max_tokens : 0, hidden),
      statistics_(float_bytes(limits.max_tokens, 2)),
      wanted_(float_bytes(limits.max_wanted, hidden)) {
  if (!hidden_shares_.empty()) columns_ = 0;
  for (Range share : hidden_shares_) columns_ = std::max(columns_, share.size());
  rows_ = Buffer(float_bytes(limits.max_tokens, columns_));
  branch_ = Buffer(float_bytes(limits.branches ? limits.max_tokens : 0, columns_));
}

Range ResidualStream::own_columns(const ExecutionContext& ctx) const {
  if (ctx.residual != ResidualLayout::kHiddenShards) return {0, hidden_};
  return hidden_shares_[static_cast<std::size_t>(ctx.exchange.rank())];
}

void ResidualStream::embed(ExecutionContext& ctx, std::span<const TokenId> tokens,
                           const cpu::PackedMatrix& table, Range vocabulary, float scale) {
  auto m = static_cast<int>(tokens.size());
  auto read_row = [&](TokenId token, float* row) {
    table.read_row(token - vocabulary.begin, row);
    if (scale != 1.0f) ctx.kernels.scale_row(row, hidden_, scale);
  };
  if (ctx.exchange.size() == 1) {
    auto [begin, end] = ctx.member.share(m);
    for (int i = begin; i < end; ++i) {
      read_row(tokens[static_cast<std::size_t>(i)], rows() + i * ld());
    }
    ctx.member.barrier();
    return;
  }
  for_each_tile(ctx, m, [&](int row, int count) {
    float* part = ctx.floats_to_send();
    auto [begin, end] = ctx.member.share(count);
    for (int i = begin; i < end; ++i) {
      TokenId token = tokens[static_cast<std::size_t>(row + i)];
      float* out = part + std::ptrdiff_t{i} * hidden_;
      if (token >= vocabulary.begin && token < vocabulary.end) {
        read_row(token, out);
      } else {
        std::fill_n(out, hidden_, 0.0f);
      }
    }
    bool replicated = ctx.residual == ResidualLayout::kReplicated;
    Ticket ticket = ctx.exchange_floats(
        replicated ? Collective::kAllReduce : Collective::kReduceScatter, count, hidden_);
    Range own = own_rows(ctx, row, count);
    Range columns = own_columns(ctx);
    auto [first, last] = ctx.member.share(own.size());
    std::array<const float*, Communicator::kMaxRanks> parts;
    for (int r = 0; r < ctx.exchange.size(); ++r) {
      parts[static_cast<std::size_t>(r)] = ctx.floats_from(r, ticket) +
                                           std::ptrdiff_t{own.begin - row + first} * hidden_ +
                                           columns.begin;
    }
    ctx.kernels.sum_parts_f32(parts.data(), ctx.exchange.size(), hidden_, last - first,
                              columns.size(), nullptr, rows() + (own.begin + first) * ld(), ld());
    ctx.exchange.finish(ctx.member, ticket);
  });
}

void ResidualStream::add_positions(ExecutionContext& ctx, std::span<const int> positions,
                                   int offset, const cpu::PackedMatrix& table) {
  const int columns = own_columns(ctx).size();
  for_each_tile(ctx, static_cast<int>(positions.size()), [&](int row, int count) {
    Range own = own_rows(ctx, row, count);
    auto [begin, end] = ctx.member.share(own.size());
    for (int i = own.begin + begin; i < own.begin + end; ++i) {
      float* position = ctx.scratch.row.data();
      table.read_row(positions[static_cast<std::size_t>(i)] + offset, position);
      ctx.kernels.add_row(position, columns, rows() + i * ld());
    }
  });
  ctx.member.barrier();
}

GroupInput ResidualStream::normed(ExecutionContext& ctx, int m, const Norm& norm, bool gather) {
  GroupInput input;
  switch (ctx.residual) {
    case ResidualLayout::kReplicated:
      input.x = normalize(ctx, m, hidden_, rows(), ld(), norm, normed_.view());
      return input;
    case ResidualLayout::kTokenShards:
      input.x = normed_.view();
      for_each_tile(ctx, m, [&](int row, int count) {
        Range own = own_rows(ctx, row, count);
        auto [begin, end] = ctx.member.share(own.size());
        normalize_rows(ctx, own.begin + begin, own.begin + end, hidden_, rows(), ld(), norm,
                       input.x);
      });
      ctx.member.barrier();
      if (gather) gather_tokens(ctx, m);
      break;
    case ResidualLayout::kHiddenShards:
      input = normed_shard(ctx, m, norm);
      if (gather) gather_columns(ctx, m, norm);
      break;
  }
  input.gathered = gathered_.view();
  return input;
}

GroupInput ResidualStream::normed_shard(ExecutionContext& ctx, int m, const Norm& norm) {
  GroupInput input;
  bool few = m <= ctx.scratch.normed_rows;  // every thread for itself: cheaper than a barrier
  input.x = few ? ctx.scratch.normed.view() : normed_.view();
  float* statistics = few ? ctx.scratch.statistics.data() : statistics_.as<float>();
  input.norm = &norm;
  input.statistics = statistics;
  input.shares = hidden_shares_;
  auto [begin, end] = few ? std::pair(0, m) : ctx.member.share(m);
  const Range columns = own_columns(ctx);
  const int n = columns.size();
  const cpu::KernelTable& kernels = ctx.kernels;
  for (int i = begin; i < end; ++i) {
    const float* x = rows() + i * ld();
    Activations out = input.x.rows_from(i);
    const bool f32 = out.dtype == DType::kFloat32;
    if (norm.kind == NormKind::kNone) {
      normalize_row(kernels, x, n, norm, out);
      continue;
    }
    const float* gain = norm.gain.data() + columns.begin;
    float* own = statistics + std::ptrdiff_t{i} * statistics_columns(norm.kind);
    if (norm.kind == NormKind::kRms) {
      *own = f32 ? kernels.apply_gain_f32(x, gain, n, out.f32())
                 : kernels.apply_gain_bf16(x, gain, n, out.b16());
    } else {
      f32 ? kernels.center_row_f32(x, gain, n, out.f32(), own)
          : kernels.center_row_bf16(x, gain, n, out.b16(), own);
    }
  }
  if (!few) ctx.member.barrier();
  return input;
}

void ResidualStream::add_branch(ExecutionContext& ctx, int m, const Norm& norm) {
  for_each_tile(ctx, m, [&](int row, int count) {
    if (ctx.residual == ResidualLayout::kHiddenShards) return scale_branch(ctx, row, count, norm);
    Range own = own_rows(ctx, row, count);
    auto [begin, end] = ctx.member.share(own.size());
    for (int i = own.begin + begin; i < own.begin + end; ++i) {
      float* x = branch() + i * ld();
      normalize_row(ctx.kernels, x, hidden_, norm, {x, DType::kFloat32, ld()});
      ctx.kernels.add_row(x, hidden_, rows() + i * ld());
    }
  });
  ctx.member.barrier();
}

void ResidualStream::scale_branch(ExecutionContext& ctx, int row, int count, const Norm& norm) {
  const Range columns = own_columns(ctx);
  float* squares = ctx.floats_to_send();
  auto [begin, end] = ctx.member.share(count);
  for (int i = begin; i < end; ++i) {
    float* x = branch() + (row + i) * ld();
    squares[i] = ctx.kernels.apply_gain_f32(x, norm.gain.data() + columns.begin, columns.size(), x);
  }
  Ticket ticket = ctx.exchange_floats(Collective::kAllReduce, count, 1);
  for (int i = begin; i < end; ++i) {
    std::array<const float*, Communicator::kMaxRanks> parts;
    for (int r = 0; r < ctx.exchange.size(); ++r) {
      parts[static_cast<std::size_t>(r)] = ctx.floats_from(r, ticket) + i;
    }
    const float scale = combine_statistics(norm, hidden_shares_, parts.data()).scale;
    float* x = branch() + (row + i) * ld();
    ctx.kernels.scale_row(x, columns.size(), scale);
    ctx.kernels.add_row(x, columns.size(), rows() + (row + i) * ld());
  }
  ctx.exchange.finish(ctx.member, ticket);
}

void ResidualStream::gather_columns(ExecutionContext& ctx, int m, const Norm& norm) {
  int own = own_columns(ctx).size();
  for_each_tile(ctx, m, [&](int row, int count) {
    float* part = ctx.floats_to_send();
    auto [begin, end] = ctx.member.share(count);
    for (int i = begin; i < end; ++i) {
      std::copy_n(rows() + (row + i) * ld(), own, part + std::ptrdiff_t{i} * own);
    }
    Ticket ticket = ctx.exchange_floats(Collective::kAllGather, count, own);
    float* whole = ctx.scratch.row.data();
    for (int i = begin; i < end; ++i) {
      for (int r = 0; r < ctx.exchange.size(); ++r) {
        Range share = hidden_shares_[static_cast<std::size_t>(r)];
        std::copy_n(ctx.floats_from(r, ticket) + std::ptrdiff_t{i} * share.size(), share.size(),
                    whole + share.begin);
      }
      normalize_row(ctx.kernels, whole, hidden_, norm, gathered_.view().rows_from(row + i));
    }
    ctx.exchange.finish(ctx.member, ticket);
  });
}

void ResidualStream::gather_tokens(ExecutionContext& ctx, int m) {
  auto row_bytes = static_cast<std::size_t>(hidden_) * dtype_size(normed_.view().dtype);
  for_each_tile(ctx, m, [&](int row, int count) {
    std::byte* part = ctx.exchange.send(ctx.member, ctx.ticket);
    Range own = own_tokens(row, count, ctx.exchange.rank(), ctx.exchange.size());
    auto [begin, end] = ctx.member.share(own.size());
    for (int i = begin; i < end; ++i) {
      std::memcpy(part + static_cast<std::size_t>(i) * row_bytes,
                  normed_.view().rows_from(own.begin + i).data, row_bytes);
    }
    Ticket ticket = ctx.ticket++;
    ctx.exchange.start(ctx.member, Collective::kAllGather,
                       static_cast<std::size_t>(own.size()) * row_bytes);
    ctx.exchange.wait(ctx.member, ticket);
    for (int r = 0; r < ctx.exchange.size(); ++r) {
      Range theirs = own_tokens(row, count, r, ctx.exchange.size());
      auto [first, last] = ctx.member.share(theirs.size());
      for (int i = first; i < last; ++i) {
        std::memcpy(gathered_.view().rows_from(theirs.begin + i).data,
                    ctx.exchange.from(r, ticket) + static_cast<std::size_t>(i) * row_bytes,
                    row_bytes);
      }
    }
    ctx.exchange.finish(ctx.member, ticket);
  });
}

/// The sharded layouts' part of gather_rows() and wanted(); `out` may be null.
void ResidualStream::exchange_rows(ExecutionContext& ctx, Collective kind, int count,
                                   const int* rows_wanted, int m, float* out) {
  bool shards = ctx.residual == ResidualLayout::kHiddenShards;
  int columns = shards ? own_columns(ctx).size() : hidden_;
  auto is_own = [&](int row) {
    const int most = ctx.overlap.tile_tokens;
    int tile = row / most * most;
    Range own = own_rows(ctx, tile, std::min(most, m - tile));
    return shards || (row >= own.begin && row < own.end);
  };
  float* part = ctx.floats_to_send();
  auto [begin, end] = ctx.member.share(count);
  for (int i = begin; i < end; ++i) {
    float* row = part + std::ptrdiff_t{i} * columns;
    if (is_own(rows_wanted[i])) {
      std::copy_n(rows() + rows_wanted[i] * ld(), columns, row);
    } else {
      std::fill_n(row, columns, 0.0f);
    }
  }
  Ticket ticket = ctx.exchange_floats(kind, count, columns);
  for (int i = begin; i < end && out != nullptr; ++i) {
    float* row = out + std::ptrdiff_t{i} * hidden_;
    if (!shards) std::fill_n(row, hidden_, 0.0f);
    for (int r = 0; r < ctx.exchange.size(); ++r) {
      Range share = shards ? hidden_shares_[static_cast<std::size_t>(r)] : Range{0, hidden_};
      const float* source = ctx.floats_from(r, ticket) + std::ptrdiff_t{i} * share.size();
      for (int j = 0; j < share.size(); ++j) {
        // Token shards: all but one rank have zeros.
        row[share.begin + j] = shards ? source[j] : row[j] + source[j];
      }
    }
  }
  ctx.exchange.finish(ctx.member, ticket);
}

void ResidualStream::gather_rows(ExecutionContext& ctx, int count, const int* rows_wanted, int m,
                                 float* out) {
  bool root = ctx.exchange.rank() == 0;
  if (ctx.residual == ResidualLayout::kReplicated) {
    auto [begin, end] = ctx.member.share(count);
    for (int i = begin; i < end && root; ++i) {
      std::copy_n(rows() + rows_wanted[i] * ld(), hidden_, out + std::ptrdiff_t{i} * hidden_);
    }
    return;
  }
  exchange_rows(ctx, Collective::kGather, count, rows_wanted, m, root ? out : nullptr);
}

Activations ResidualStream::wanted(ExecutionContext& ctx, int count, const int* rows_wanted, int m,
                                   const Norm& norm) {
  if (ctx.residual == ResidualLayout::kReplicated) {
    return normalize(ctx, count, hidden_, rows(), ld(), norm, normed_.view(), rows_wanted);
  }
  bool shards = ctx.residual == ResidualLayout::kHiddenShards;
  auto* whole = wanted_.as<float>();
  exchange_rows(ctx, shards ? Collective::kAllGather : Collective::kAllReduce, count, rows_wanted,
                m, whole);
  return normalize(ctx, count, hidden_, whole, hidden_, norm, normed_.view());
}

}  // namespace deinfer
