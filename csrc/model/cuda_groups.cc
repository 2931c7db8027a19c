// What CudaDecoder launches for linears that share their input: the norm of it, V, U, and the
// exchanges that a plan puts before, between and after them. On the CPU: ops/linear_group.cc,
// ops/z_exchange.cc, ops/residual_stream.cc.
#include <algorithm>

#include "base/bf16.h"
#include "base/check.h"
#include "model/cuda_decoder.h"
#include "plan/exchanges.h"

namespace deinfer {
namespace {

using cuda::check_launch;
using cuda::kTileCols;
using cuda::kTileRows;
using cuda::kTileTokens;
using cuda::LinearEpilogue;
using cuda::LinearLaunch;
using cuda::LinearSegment;
using cuda::PeerExchange;
using cuda::ReduceSink;

std::size_t product_bytes(int rows, int cols, std::size_t element) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols) * element;
}

/// Elements before a tile of columns of the first tile of tokens.
std::int64_t elements_before(int chunk) { return std::int64_t{chunk} * kTileTokens * kTileCols; }

/// Rows of a batch that products of `tokens` begin with: tiles are whole.
int first_token_tile(Range tokens) { return tokens.begin / kTileTokens; }

void set_tokens(LinearLaunch& launch, Range tokens) {
  const int first = first_token_tile(tokens) * kTileTokens;
  launch.m = tokens.end - first;
  launch.first_token = tokens.begin - first;
}

}  // namespace

CudaDecoder::Input CudaDecoder::normed(int m, const CudaNorm& norm, Linears group) {
  auto gathers = [&](const CudaLinear* linear) {
    return linear->exchange(kind_).before != Exchange::kNone;
  };
  const bool any_gathers = std::any_of(group.begin(), group.end(), gathers);
  Input input{&normed_, &gathered_, nullptr};
  cuda::NormLaunch launch = norm_launch(m, norm, residual_);
  launch.out = normed_.data.as<void>();
  launch.out_chunks = normed_.chunks;
  if (layout() == ResidualLayout::kTokenShards && any_gathers) {
    launch.out = communicator_->send();
    run_norm(launch);
    cuda::GatherActivationsLaunch gather;
    gather.rows = m;
    gather.chunks = normed_.chunks;
    gather.by_rows = true;
    gather.owners = row_owners(m);
    gather.out = gathered_.data.as<void>();
    gather.out_chunks = gathered_.chunks;
    communicator_->exchange(Collective::kAllGather,
                            product_bytes(own_rows(m).size(), config_.hidden_size, sizeof(bf16)),
                            "rows of x",
                            Extent::activations(m, normed_.chunks).divide_rows(gather.owners),
                            [&](const PeerExchange& exchange, cuda::Stream stream) {
                              gather.exchange = exchange;
                              return cuda::launch_gather_activations(gather, stream);
                            });
    input.x = &gathered_;
    return input;
  }
  if (layout() == ResidualLayout::kHiddenShards) {
    if (any_gathers) gather_columns(m, norm);
    if (std::all_of(group.begin(), group.end(), gathers)) return input;
    if (norm.kind != NormKind::kNone) {
      // They travel with the sums of z, as its last columns.
      int cols = 0;
      for (const CudaLinear* linear : group) cols += linear->z_cols();
      launch.statistics = floats_to_send() + cols;
      launch.statistics_ld = cols + 4;
      launch.bias = nullptr;
      input.completes = &norm;
    }
  }
  run_norm(launch);
  return input;
}

/// gathered_ = norm(x) of whole rows.
void CudaDecoder::gather_columns(int m, const CudaNorm& norm) {
  const Range columns = own_columns();
  const int hidden = config_.hidden_size;
  const int ld = padded_floats(hidden);
  cuda::NormLaunch copy = norm_launch(m, CudaNorm{}, residual_);
  copy.out_float = floats_to_send() + columns.begin;
  copy.out_ld = ld;
  run_norm(copy);
  cuda::GatherFloatsLaunch gather;
  gather.rows = m;
  gather.cols = hidden;
  gather.ld = ld;
  gather.owners = cuda_borders(share_.hidden);
  gather.out = whole_.as<float>();
  gather.out_ld = hidden;
  communicator_->exchange(Collective::kAllGather, product_bytes(m, columns.size(), sizeof(float)),
                          "columns of x", Extent::floats(m, ld).divide_columns(gather.owners),
                          [&](const PeerExchange& exchange, cuda::Stream stream) {
                            gather.exchange = exchange;
                            return cuda::launch_gather_floats(gather, stream);
                          });
  cuda::NormLaunch launch = norm_launch(m, norm, whole_);
  launch.ld = launch.n = hidden;
  launch.gain = norm.gain.as<float>();
  launch.bias = norm.bias.as<float>();
  launch.out = gathered_.data.as<void>();
  launch.out_chunks = gathered_.chunks;
  run_norm(launch);
}

void CudaDecoder::inner(int m, const Input& input, Linears linears) {
  Exchange exchange = Exchange::kNone;
  int chunks = 0;
  for (const CudaLinear* linear : linears) {
    if (linear->is_low_rank()) exchange = linear->exchange(kind_).after_v;
    chunks += linear->z_chunks();
  }
  if (chunks == 0) return;
  const bool gathers = exchange == Exchange::kAllGather;
  const bool by_rows = gathers && layout() == ResidualLayout::kTokenShards;
  const Range tokens = by_rows ? own_rows(m) : Range{0, m};
  const int token_tile = first_token_tile(tokens);
  const int ld = chunks * kTileCols + (input.completes != nullptr ? 4 : 0);
  LinearLaunch launch;
  set_tokens(launch, tokens);
  int z_chunk = 0;
  for (const CudaLinear* linear : linears) {
    if (!linear->is_low_rank()) continue;
    LinearSegment& segment = launch.segments[launch.num_segments++];
    segment.first = linear->v.factor(
        input.x->data.as<bf16>() + elements_before(token_tile * input.x->chunks), input.x->chunks);
    segment.tiles = linear->v.tiles;
    segment.n = linear->v.tiles * kTileRows;  // padding is zero
    if (exchange == Exchange::kNone || gathers) {
      const int out_chunks = gathers ? chunks : z_.chunks;
      auto* out = gathers ? reinterpret_cast<bf16*>(communicator_->send()) : z_.data.as<bf16>();
      segment.epilogue = LinearEpilogue::kActivation;
      segment.out = out + elements_before(token_tile * out_chunks + z_chunk);
      segment.out_chunks = out_chunks;
      if (gathers && !by_rows) {  // beside the other ranks' columns
        segment.out_col = linear->v_shares[static_cast<std::size_t>(share_.rank)].begin;
        segment.out_rows = linear->v.n;
      }
    } else {
      segment.epilogue = LinearEpilogue::kFloat;
      segment.out = floats_to_send() + z_chunk * kTileCols;
      segment.ld = ld;
    }
    z_chunk += linear->z_chunks();
  }
  run_linear(launch);
  if (gathers) {
    gather_z(m, linears);
  } else if (exchange != Exchange::kNone) {
    receive_z(m, input, linears, exchange);
  }
}

/// z_ = the sum of the ranks' parts.
void CudaDecoder::receive_z(int m, const Input& input, Linears linears, Exchange exchange) {
  const bool scatters = exchange == Exchange::kReduceScatter;
  cuda::ReduceLaunch args;
  const Range rows = scatters ? own_rows(m) : Range{0, m};
  args.first_row = rows.begin;
  args.rows = rows.size();
  int travels = 0;
  int count = 0;
  for (const CudaLinear* linear : linears) {
    if (!linear->is_low_rank()) continue;
    args.cols += linear->z_cols();
    travels += linear->rank;
    args.terms[count++] = {linear->z_cols(), linear->gain_terms.as<float>(),
                           linear->bias_terms.as<float>()};
  }
  args.ld = args.cols;
  args.sink = ReduceSink::kActivation;
  args.out = z_.data.as<void>();
  args.out_ld = z_.chunks;
  if (input.completes != nullptr) {
    args.ld += 4;
    travels += statistics_columns(input.completes->kind);
    args.norm.kind = static_cast<int>(input.completes->kind);
    args.norm.eps = input.completes->eps;
    args.norm.statistics_col = args.cols;
    args.norm.width = config_.hidden_size;
    for (std::size_t r = 0; r < share_.hidden.size(); ++r) {
      args.norm.shares[r] = share_.hidden[r].size();
    }
  }
  reduce(collective_of(exchange), m, product_bytes(m, travels, sizeof(float)), "z", args);
}

/// z_ from the columns, or under token shards the rows, of every rank.
void CudaDecoder::gather_z(int m, Linears linears) {
  cuda::GatherActivationsLaunch args;
  args.rows = m;
  args.by_rows = layout() == ResidualLayout::kTokenShards;
  if (args.by_rows) args.owners = row_owners(m);
  int travels = 0;
  for (const CudaLinear* linear : linears) {
    if (!linear->is_low_rank()) continue;
    args.columns[args.num_columns++] = {args.chunks * kTileCols, linear->z_cols(),
                                        cuda_borders(linear->v_shares)};
    args.chunks += linear->z_chunks();
    travels += linear->v.n;
  }
  args.out = z_.data.as<void>();
  args.out_chunks = z_.chunks;
  const int rows = args.by_rows ? own_rows(m).size() : m;
  Extent extent = Extent::activations(m, args.chunks);
  if (args.by_rows) {
    extent.divide_rows(args.owners);
  } else {
    for (int i = 0; i < args.num_columns; ++i) {
      extent.divide_columns(args.columns[i].owners, args.columns[i].first);
    }
  }
  communicator_->exchange(Collective::kAllGather, product_bytes(rows, travels, sizeof(bf16)), "z",
                          extent, [&](const PeerExchange& exchange, cuda::Stream stream) {
                            args.exchange = exchange;
                            return cuda::launch_gather_activations(args, stream);
                          });
}

cuda::LinearFactor CudaDecoder::outer(const CudaLinear& linear, const Input& input, int z_chunk,
                                      int token_tile) const {
  const bool gathered = linear.exchange(kind_).before != Exchange::kNone;
  const Activations& from = linear.is_low_rank() ? z_ : gathered ? *input.gathered : *input.x;
  const int chunk = linear.is_low_rank() ? z_chunk : linear.x_chunk;
  cuda::LinearFactor factor = linear.u.factor(
      from.data.as<bf16>() + elements_before(token_tile * from.chunks + chunk), from.chunks);
  if (linear.exchange(kind_).after_u != Exchange::kNone) factor.bias = nullptr;  // once, after it
  return factor;
}

LinearLaunch CudaDecoder::outer_launch(Range tokens, const CudaLinear& linear, const Input& input,
                                       int z_chunk) const {
  LinearLaunch launch;
  set_tokens(launch, tokens);
  launch.num_segments = 1;
  LinearSegment& segment = launch.segments[0];
  segment.first = outer(linear, input, z_chunk, first_token_tile(tokens));
  segment.n = linear.u.n;
  segment.tiles = linear.u.tiles;
  return launch;
}

void CudaDecoder::exchange_output(int m, const CudaLinear& linear, const Input& input, int z_chunk,
                                  ReduceSink sink, float* out, int ld) {
  const Exchange exchange = linear.exchange(kind_).after_u;
  LinearLaunch launch = outer_launch({0, m}, linear, input, z_chunk);
  LinearSegment& segment = launch.segments[0];
  cuda::ReduceLaunch args;
  args.ld = padded_floats(linear.u.n);
  segment.epilogue = LinearEpilogue::kFloat;
  segment.out = communicator_->send();
  segment.ld = args.ld;
  run_linear(launch);
  const bool by_rows =
      exchange == Exchange::kReduceScatter && layout() == ResidualLayout::kTokenShards;
  const Range rows = by_rows ? own_rows(m) : Range{0, m};
  const bool by_columns = exchange == Exchange::kReduceScatter && !by_rows;
  args.first_row = rows.begin;
  args.rows = rows.size();
  args.first_col = by_columns ? linear.y_share.begin : 0;
  args.cols = by_columns ? linear.y_share.size() : linear.u.n;
  args.sink = sink;
  args.out = out;
  args.out_ld = ld;
  args.bias = linear.u.bias.as<float>();
  reduce(collective_of(exchange), m, product_bytes(m, linear.u.n, sizeof(float)), "y", args);
}

void CudaDecoder::reduce(Collective kind, int m, std::size_t bytes, const char* name,
                         cuda::ReduceLaunch args) {
  Extent extent = Extent::floats(m, args.ld);
  extent.of_reader = true;
  if (kind == Collective::kReduceScatter) {  // as the residual stream is
    if (layout() == ResidualLayout::kTokenShards) extent.divide_rows(row_owners(m));
    if (layout() == ResidualLayout::kHiddenShards) {
      extent.divide_columns(cuda_borders(share_.hidden));
    }
  }
  auto sum = [&](const cuda::ReduceLaunch& launch) {
    communicator_->exchange(kind, bytes, name, extent,
                            [&](const PeerExchange& exchange, cuda::Stream stream) {
                              cuda::ReduceLaunch own = launch;
                              own.exchange = exchange;
                              return cuda::launch_reduce(own, stream);
                            });
  };
  if (kind != Collective::kAllReduce || m < share_.size ||
      !communicator_->sums_in_two_shots(bytes)) {
    return sum(args);
  }
  // Every rank sums some rows for all, which then gather them.
  const Range rows = split(m, share_.size, share_.rank);
  const cuda::ReduceLaunch whole = args;
  args.first_row = rows.begin;
  args.rows = rows.size();
  args.out = communicator_->send_after();
  const cuda::Borders owners = row_owners(m);
  extent.divide_rows(owners);
  if (args.sink == ReduceSink::kActivation) {
    args.out_ld = args.cols / kTileCols;
    sum(args);
    cuda::GatherActivationsLaunch gather;
    gather.rows = m;
    gather.chunks = args.out_ld;
    gather.by_rows = true;
    gather.owners = owners;
    gather.out = whole.out;
    gather.out_chunks = whole.out_ld;
    extent = Extent::activations(m, gather.chunks).divide_rows(owners);
    return communicator_->exchange(Collective::kBarrier, 0, name, extent,
                                   [&](const PeerExchange& exchange, cuda::Stream stream) {
                                     gather.exchange = exchange;
                                     return cuda::launch_gather_activations(gather, stream);
                                   });
  }
  args.sink = ReduceSink::kFloat;
  args.out_ld = padded_floats(args.cols);
  args.bias = nullptr;
  sum(args);
  cuda::GatherFloatsLaunch gather;
  gather.rows = m;
  gather.cols = args.cols;
  gather.ld = args.out_ld;
  gather.by_rows = true;
  gather.owners = owners;
  gather.adds = whole.sink == ReduceSink::kAdd;
  gather.out = static_cast<float*>(whole.out);
  gather.out_ld = whole.out_ld;
  gather.bias = whole.bias;
  extent = Extent::floats(m, gather.ld).divide_rows(owners);
  communicator_->exchange(Collective::kBarrier, 0, name, extent,
                          [&](const PeerExchange& exchange, cuda::Stream stream) {
                            gather.exchange = exchange;
                            return cuda::launch_gather_floats(gather, stream);
                          });
}

std::size_t CudaDecoder::exchange_bytes() const {
  const int tokens = padded_tokens(limits_.max_tokens);
  int columns = padded_floats(config_.hidden_size);  // of fp32
  auto of_group = [&](std::initializer_list<const CudaLinear*> group) {
    int z = 0;
    for (const CudaLinear* linear : group) {
      z += linear->z_cols();
      if (linear->exchange(StepKind::kDecode).after_u != Exchange::kNone) {
        columns = std::max(columns, padded_floats(linear->u.n));
      }
    }
    columns = std::max(columns, z + 4);
  };
  for (const CudaLayer& layer : weights_.layers) {
    of_group({&layer.query, &layer.key, &layer.value});
    of_group({&layer.output});
    of_group({&layer.gate, &layer.up});
    of_group({&layer.down});
  }
  const int rows = std::max(kLogitRows, limits_.max_state_rows);
  return std::max({product_bytes(tokens, columns, sizeof(float)),
                   product_bytes(kLogitRows, padded_floats(config_.vocab_size), sizeof(float)),
                   product_bytes(rows, padded_floats(config_.hidden_size), sizeof(float))});
}

}  // namespace deinfer
