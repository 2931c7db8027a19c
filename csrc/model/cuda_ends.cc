// What CudaDecoder launches before and after the layers: embedding, hidden states, the head. On the
// CPU: ops/residual_stream.cc, ops/output_head.cc.
#include <algorithm>

#include "base/bf16.h"
#include "model/cuda_decoder.h"

namespace deinfer {

using cuda::check_launch;
using cuda::LinearEpilogue;
using cuda::PeerExchange;

namespace {

std::size_t float_bytes(int rows, int cols) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(cols) * sizeof(float);
}

}  // namespace

void CudaDecoder::embed(int m) {
  const CudaStep::Offsets& at = step_.offsets();
  const int hidden = config_.hidden_size;
  const CudaMatrix& table = weights_.token_embedding();
  const Range columns = own_columns();
  const Range rows = own_rows(m);
  cuda::EmbedLaunch embed;
  embed.indices = inputs(at.tokens);
  embed.offset = -share_.vocabulary().begin;
  embed.m = m;
  embed.cols = hidden;
  embed.table = table.data.as<void>();
  embed.scales = table.scales.as<float>();
  embed.table_rows = table.n;
  embed.chunks = table.chunks();
  embed.scale = to_float(to_bf16(config_.embedding_scale));
  embed.x = has_ranks() ? floats_to_send() : residual_.as<float>();
  embed.ld = has_ranks() ? padded_floats(hidden) : hidden;
  check_launch(cuda::launch_embed(embed, stream_.get()), "embedding");
  if (has_ranks()) {
    // Ranks have zeros for the tokens of others.
    cuda::ReduceLaunch sum;
    sum.first_row = rows.begin;
    sum.rows = rows.size();
    sum.first_col = columns.begin;
    sum.cols = columns.size();
    sum.ld = padded_floats(hidden);
    sum.out = residual_.as<void>();
    sum.out_ld = columns.size();
    const bool whole = layout() == ResidualLayout::kReplicated;
    reduce(whole ? Collective::kAllReduce : Collective::kReduceScatter, m, float_bytes(m, hidden),
           "embedding", sum);
  }
  if (config_.positions != PositionKind::kLearned || rows.size() == 0) return;
  cuda::EmbedLaunch positions;
  positions.indices = inputs(at.positions);
  positions.offset = config_.position_offset;
  positions.first_row = rows.begin;
  positions.m = rows.size();
  positions.cols = columns.size();
  positions.table = weights_.positions.data.as<void>();
  positions.table_rows = weights_.positions.n;
  positions.chunks = weights_.positions.chunks();
  positions.adds = true;
  positions.x = residual_.as<float>();
  positions.ld = columns.size();
  check_launch(cuda::launch_embed(positions, stream_.get()), "positions");
}

void CudaDecoder::gather_rows(const int* rows, int count, int m, bool everywhere, const char* name,
                              float* out) {
  const int hidden = config_.hidden_size;
  const Range columns = own_columns();
  const bool wants = everywhere || share_.rank == 0;
  cuda::NormLaunch copy = norm_launch(m, CudaNorm{}, residual_);
  copy.rows = rows;
  copy.first_row = 0;
  copy.m = count;
  copy.out_ld = padded_floats(hidden);
  if (layout() == ResidualLayout::kReplicated) {
    if (!wants) return;
    copy.out_float = out;
    copy.out_ld = hidden;
    return run_norm(copy);
  }
  copy.out_float = floats_to_send() + columns.begin;
  run_norm(copy);
  cuda::GatherFloatsLaunch gather;
  gather.rows = wants ? count : 0;
  gather.cols = hidden;
  gather.ld = padded_floats(hidden);
  gather.by_rows = layout() == ResidualLayout::kTokenShards;
  gather.out = out;
  gather.out_ld = hidden;
  Extent extent = Extent::floats(count, gather.ld);
  if (gather.by_rows) {  // the device alone knows whose rows they are
    gather.owners = row_owners(m);
    gather.row_of = rows;
  } else {
    gather.owners = cuda_borders(share_.hidden);
    extent.divide_columns(gather.owners);
  }
  // Counted as plan/exchanges.h lists it: on the CPU it is a sum over zeros.
  const Collective to_all = gather.by_rows ? Collective::kAllReduce : Collective::kAllGather;
  communicator_->exchange(everywhere ? to_all : Collective::kGather,
                          float_bytes(count, columns.size()), name, extent,
                          [&](const PeerExchange& exchange, cuda::Stream stream) {
                            gather.exchange = exchange;
                            return cuda::launch_gather_floats(gather, stream);
                          });
}

void CudaDecoder::keep_states(int layer, int rows, int m) {
  auto found = std::find(limits_.state_layers.begin(), limits_.state_layers.end(), layer);
  if (found == limits_.state_layers.end() || rows == 0) return;
  const int hidden = config_.hidden_size;
  float* out = state_memory_.as<float>() +
               (found - limits_.state_layers.begin()) * rows * std::ptrdiff_t{hidden};
  gather_rows(inputs(step_.offsets().state_rows), rows, m, false, "hidden states", out);
  if (layer != config_.num_layers || share_.rank != 0) return;
  cuda::NormLaunch last;
  last.x = last.out_float = out;
  last.ld = last.out_ld = last.n = hidden;
  last.m = rows;
  last.kind = static_cast<int>(weights_.final_norm.kind);
  last.eps = weights_.final_norm.eps;
  last.gain = weights_.final_norm.gain.as<float>();
  last.bias = weights_.final_norm.bias.as<float>();
  run_norm(last);
}

CudaDecoder::Input CudaDecoder::head_input(const int* rows, int count) {
  const CudaNorm& norm = weights_.final_norm;
  const bool sharded = layout() != ResidualLayout::kReplicated;
  if (sharded) gather_rows(rows, count, tokens_in_step_, true, "final norm", whole_.as<float>());
  const Activations& x = sharded ? gathered_ : normed_;
  cuda::NormLaunch launch;
  launch.x = sharded ? whole_.as<float>() : residual_.as<float>();
  launch.rows = sharded ? nullptr : rows;
  launch.ld = launch.n = config_.hidden_size;
  launch.m = count;
  launch.kind = static_cast<int>(norm.kind);
  launch.eps = norm.eps;
  launch.gain = norm.gain.as<float>();
  launch.bias = norm.bias.as<float>();
  launch.out = x.data.as<void>();
  launch.out_chunks = x.chunks;
  run_norm(launch);
  const Input input{&x, nullptr, nullptr};
  const CudaLinear* const linears[] = {&weights_.head};
  inner(count, input, linears);
  return input;
}

void CudaDecoder::head(const Input& input, int count, float* out, std::int64_t ld) {
  cuda::LinearLaunch product = outer_launch({0, count}, weights_.head, input, 0);
  cuda::LinearSegment& segment = product.segments[0];
  segment.epilogue = LinearEpilogue::kFloat;
  segment.out = out;
  segment.ld = ld;
  segment.soft_cap = config_.logit_soft_cap;
  run_linear(product);
}

void CudaDecoder::argmax(int rows) {
  const Range own = share_.vocabulary();
  for (int first = 0; first < rows; first += kLogitRows) {
    const int count = std::min(kLogitRows, rows - first);
    const Input input = head_input(inputs(step_.offsets().argmax_rows) + first, count);
    head(input, count, logits_.as<float>(), own.size());
    cuda::ArgmaxLaunch launch;
    launch.logits = logits_.as<float>();
    launch.rows = count;
    launch.vocabulary = own.size();
    launch.first_token = own.begin;
    if (has_ranks()) {
      launch.candidates = reinterpret_cast<cuda::RankCandidate*>(communicator_->send());
    } else {
      launch.tokens = best_.as<int>() + first;
    }
    check_launch(cuda::launch_argmax(launch, stream_.get()), "argmax");
    if (!has_ranks()) continue;
    cuda::BestOfRanksLaunch best;
    best.rows = share_.rank == 0 ? count : 0;
    best.tokens = best_.as<int>() + first;
    for (std::size_t r = 0; r < share_.vocabularies.size(); ++r) {
      if (share_.vocabularies[r].size() > 0) best.ranks |= 1u << r;
    }
    communicator_->exchange(Collective::kGather, float_bytes(count, 2), "most likely tokens",
                            Extent::floats(count, 2),
                            [&](const PeerExchange& exchange, cuda::Stream stream) {
                              best.exchange = exchange;
                              return cuda::launch_best_of_ranks(best, stream);
                            });
  }
}

void CudaDecoder::sample(int rows) {
  const CudaStep::Offsets& at = step_.offsets();
  for (int first = 0; first < rows; first += kLogitRows) {
    const int count = std::min(kLogitRows, rows - first);
    whole_logits(inputs(at.sampled_rows) + first, count);
    if (share_.rank != 0) continue;
    sampling_.launch(logits_.as<float>(),
                     reinterpret_cast<const cuda::SampleRow*>(inputs(at.samples)),
                     inputs(at.tables), first, count);
  }
}

void CudaDecoder::choose(int rows, Choice choice) {
  if (choice == Choice::kMostLikely) argmax(rows);
  if (choice == Choice::kSampled) sample(rows);
}

void CudaDecoder::whole_logits(const int* rows, int count) {
  const Range own = share_.vocabulary();
  const int vocabulary = config_.vocab_size;
  const Input input = head_input(rows, count);
  if (!has_ranks()) return head(input, count, logits_.as<float>(), vocabulary);
  cuda::GatherFloatsLaunch gather;
  gather.ld = padded_floats(vocabulary);
  head(input, count, floats_to_send() + own.begin, gather.ld);
  gather.rows = share_.rank == 0 ? count : 0;
  gather.cols = vocabulary;
  gather.owners = cuda_borders(share_.vocabularies);
  gather.out = logits_.as<float>();
  gather.out_ld = vocabulary;
  communicator_->exchange(Collective::kGather, float_bytes(count, own.size()), "logits",
                          Extent::floats(count, gather.ld).divide_columns(gather.owners),
                          [&](const PeerExchange& exchange, cuda::Stream stream) {
                            gather.exchange = exchange;
                            return cuda::launch_gather_floats(gather, stream);
                          });
}

float* CudaDecoder::logits(int first, int count) {
  whole_logits(inputs(step_.offsets().logit_rows) + first, count);
  if (has_ranks()) communicator_->make_even();
  if (share_.rank != 0) return nullptr;
  stream_.download(host_logits_.as<void>(), logits_.as<void>(),
                   float_bytes(count, config_.vocab_size));
  synchronize();
  return host_logits_.as<float>();
}

}  // namespace deinfer
