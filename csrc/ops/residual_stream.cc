#include "ops/residual_stream.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "ops/norm.h"

namespace deinfer {
namespace {

std::size_t float_bytes(int rows, int cols) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols) * sizeof(float);
}

/// f(first row, rows) for the chunks in which m tokens pass through the layers.
template <typename F>
void for_each_tile(const ExecutionContext& ctx, int m, F f) {
  for (int row = 0; row < m; row += ctx.tile_tokens) f(row, std::min(ctx.tile_tokens, m - row));
}

const float* floats_from(const ExecutionContext& ctx, int rank, Ticket ticket) {
  return reinterpret_cast<const float*>(ctx.exchange.from(rank, ticket));
}

float* floats_to_send(const ExecutionContext& ctx) {
  return reinterpret_cast<float*>(ctx.exchange.send(ctx.member, ctx.ticket));
}

}  // namespace

ResidualStream::ResidualStream(int hidden, std::vector<Range> hidden_shares, DType activations,
                               int max_tokens, int max_wanted)
    : hidden_(hidden),
      hidden_shares_(std::move(hidden_shares)),
      columns_(hidden),
      normed_(activations, std::max(max_tokens, max_wanted), hidden),
      gathered_(activations, max_tokens, hidden),
      sum_squares_(float_bytes(max_tokens, 1)),
      wanted_(float_bytes(max_wanted, hidden)) {
  if (!hidden_shares_.empty()) columns_ = 0;
  for (Range share : hidden_shares_) columns_ = std::max(columns_, share.size());
  rows_ = Buffer(float_bytes(max_tokens, columns_));
}

Range ResidualStream::own_columns(const ExecutionContext& ctx) const {
  if (ctx.residual != ResidualLayout::kHiddenShards) return {0, hidden_};
  return hidden_shares_[static_cast<std::size_t>(ctx.exchange.rank())];
}

void ResidualStream::embed(ExecutionContext& ctx, std::span<const TokenId> tokens,
                           const cpu::PackedMatrix& table, Range vocabulary) {
  auto m = static_cast<int>(tokens.size());
  if (ctx.exchange.size() == 1) {
    auto [begin, end] = ctx.member.share(m);
    for (int i = begin; i < end; ++i) {
      table.read_row(tokens[static_cast<std::size_t>(i)], rows() + i * ld());
    }
    ctx.member.barrier();
    return;
  }
  for_each_tile(ctx, m, [&](int row, int count) {
    float* part = floats_to_send(ctx);
    auto [begin, end] = ctx.member.share(count);
    for (int i = begin; i < end; ++i) {
      TokenId token = tokens[static_cast<std::size_t>(row + i)];
      float* out = part + std::ptrdiff_t{i} * hidden_;
      if (token >= vocabulary.begin && token < vocabulary.end) {
        table.read_row(token - vocabulary.begin, out);
      } else {
        std::fill_n(out, hidden_, 0.0f);
      }
    }
    bool replicated = ctx.residual == ResidualLayout::kReplicated;
    Ticket ticket = ctx.ticket++;
    ctx.exchange.start(ctx.member, replicated ? Collective::kAllReduce : Collective::kReduceScatter,
                       float_bytes(count, hidden_));
    ctx.exchange.wait(ctx.member, ticket);
    Range own{row, row + count};
    if (ctx.residual == ResidualLayout::kTokenShards) {
      own = own_tokens(row, count, ctx.exchange.rank(), ctx.exchange.size());
    }
    Range columns = own_columns(ctx);
    auto [first, last] = ctx.member.share(own.size());
    std::array<const float*, Communicator::kMaxRanks> parts;
    for (int r = 0; r < ctx.exchange.size(); ++r) {
      parts[static_cast<std::size_t>(r)] = floats_from(ctx, r, ticket) +
                                           std::ptrdiff_t{own.begin - row + first} * hidden_ +
                                           columns.begin;
    }
    ctx.kernels.sum_parts_f32(parts.data(), ctx.exchange.size(), hidden_, last - first,
                              columns.size(), nullptr, rows() + (own.begin + first) * ld(), ld());
    ctx.exchange.finish(ctx.member, ticket);
  });
}

GroupInput ResidualStream::normed(ExecutionContext& ctx, int m, const std::vector<float>& gain,
                                  float eps, bool gather) {
  GroupInput input;
  switch (ctx.residual) {
    case ResidualLayout::kReplicated:
      input.x = rms_norm(ctx, m, hidden_, rows(), ld(), gain.data(), eps, normed_.view());
      return input;
    case ResidualLayout::kTokenShards:
      input.x = normed_.view();
      for_each_tile(ctx, m, [&](int row, int count) {
        Range own = own_tokens(row, count, ctx.exchange.rank(), ctx.exchange.size());
        auto [begin, end] = ctx.member.share(own.size());
        rms_norm_rows(ctx, own.begin + begin, own.begin + end, hidden_, rows(), ld(), gain.data(),
                      eps, input.x);
      });
      ctx.member.barrier();
      if (gather) gather_tokens(ctx, m);
      break;
    case ResidualLayout::kHiddenShards:
      input = normed_shard(ctx, m, gain.data() + own_columns(ctx).begin);
      input.width = hidden_;
      input.eps = eps;
      if (gather) gather_columns(ctx, m, gain.data(), eps);
      break;
  }
  input.gathered = gathered_.view();
  return input;
}

GroupInput ResidualStream::normed_shard(ExecutionContext& ctx, int m, const float* gain) {
  GroupInput input;
  bool few = m <= ctx.scratch.normed_rows;  // every thread for itself: cheaper than a barrier
  input.x = few ? ctx.scratch.normed.view() : normed_.view();
  float* sums = few ? ctx.scratch.sum_squares.data() : sum_squares_.as<float>();
  input.sum_squares = sums;
  auto [begin, end] = few ? std::pair(0, m) : ctx.member.share(m);
  int n = own_columns(ctx).size();
  for (int i = begin; i < end; ++i) {
    Activations out = input.x.rows_from(i);
    const float* x = rows() + i * ld();
    sums[i] = out.dtype == DType::kFloat32 ? ctx.kernels.apply_gain_f32(x, gain, n, out.f32())
                                           : ctx.kernels.apply_gain_bf16(x, gain, n, out.b16());
  }
  if (!few) ctx.member.barrier();
  return input;
}

void ResidualStream::gather_columns(ExecutionContext& ctx, int m, const float* gain, float eps) {
  int own = own_columns(ctx).size();
  for_each_tile(ctx, m, [&](int row, int count) {
    float* part = floats_to_send(ctx);
    auto [begin, end] = ctx.member.share(count);
    for (int i = begin; i < end; ++i) {
      std::copy_n(rows() + (row + i) * ld(), own, part + std::ptrdiff_t{i} * own);
    }
    Ticket ticket = ctx.ticket++;
    ctx.exchange.start(ctx.member, Collective::kAllGather, float_bytes(count, own));
    ctx.exchange.wait(ctx.member, ticket);
    float* whole = ctx.scratch.row.data();
    for (int i = begin; i < end; ++i) {
      for (int r = 0; r < ctx.exchange.size(); ++r) {
        Range share = hidden_shares_[static_cast<std::size_t>(r)];
        std::copy_n(floats_from(ctx, r, ticket) + std::ptrdiff_t{i} * share.size(), share.size(),
                    whole + share.begin);
      }
      Activations out = gathered_.view().rows_from(row + i);
      rms_norm_rows(ctx, 0, 1, hidden_, whole, hidden_, gain, eps, out);
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

Activations ResidualStream::wanted(ExecutionContext& ctx, int count, const int* rows_wanted, int m,
                                   const std::vector<float>& gain, float eps) {
  if (ctx.residual == ResidualLayout::kReplicated) {
    return rms_norm(ctx, count, hidden_, rows(), ld(), gain.data(), eps, normed_.view(),
                    rows_wanted);
  }
  bool shards = ctx.residual == ResidualLayout::kHiddenShards;
  int columns = shards ? own_columns(ctx).size() : hidden_;
  auto is_own = [&](int row) {
    int tile = row / ctx.tile_tokens * ctx.tile_tokens;
    Range own = own_tokens(tile, std::min(ctx.tile_tokens, m - tile), ctx.exchange.rank(),
                           ctx.exchange.size());
    return shards || (row >= own.begin && row < own.end);
  };
  float* part = floats_to_send(ctx);
  auto [begin, end] = ctx.member.share(count);
  for (int i = begin; i < end; ++i) {
    float* out = part + std::ptrdiff_t{i} * columns;
    if (is_own(rows_wanted[i])) {
      std::copy_n(rows() + rows_wanted[i] * ld(), columns, out);
    } else {
      std::fill_n(out, columns, 0.0f);
    }
  }
  Ticket ticket = ctx.ticket++;
  ctx.exchange.start(ctx.member, shards ? Collective::kAllGather : Collective::kAllReduce,
                     float_bytes(count, columns));
  ctx.exchange.wait(ctx.member, ticket);
  auto* whole = wanted_.as<float>();
  for (int i = begin; i < end; ++i) {
    float* out = whole + std::ptrdiff_t{i} * hidden_;
    if (!shards) std::fill_n(out, hidden_, 0.0f);
    for (int r = 0; r < ctx.exchange.size(); ++r) {
      Range share = shards ? hidden_shares_[static_cast<std::size_t>(r)] : Range{0, hidden_};
      const float* source = floats_from(ctx, r, ticket) + std::ptrdiff_t{i} * share.size();
      for (int j = 0; j < share.size(); ++j) {
        // Token shards: all but one rank have zeros.
        out[share.begin + j] = shards ? source[j] : out[j] + source[j];
      }
    }
  }
  ctx.exchange.finish(ctx.member, ticket);
  return rms_norm(ctx, count, hidden_, whole, hidden_, gain.data(), eps, normed_.view());
}

}  // namespace deinfer
