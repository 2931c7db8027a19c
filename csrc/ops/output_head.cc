#include "ops/output_head.h"

#include <algorithm>
#include <limits>

namespace deinfer {
namespace {

/// The largest logit of one rank's share of the vocabulary.
struct Candidate {
  float value = 0.0f;
  TokenId token = 0;
};
constexpr int kCandidateFloats = sizeof(Candidate) / sizeof(float);
static_assert(kCandidateFloats == 2);

}  // namespace

void output_logits(ExecutionContext& ctx, int m, const GroupInput& x, const LowRankLinear& head,
                   float soft_cap, const Activations& z, std::span<const Range> vocabularies,
                   float* out) {
  int vocabulary = vocabularies.back().end;
  if (ctx.exchange.size() == 1) {
    return lowrank_linear(ctx, m, x, head, z, out, vocabulary, soft_cap);
  }
  int own = vocabularies[static_cast<std::size_t>(ctx.exchange.rank())].size();
  lowrank_linear(ctx, m, x, head, z, ctx.floats_to_send(), own, soft_cap);
  Ticket ticket = ctx.exchange_floats(Collective::kGather, m, own);
  if (ctx.exchange.rank() == 0) {
    auto [begin, end] = ctx.member.share(m);
    for (int i = begin; i < end; ++i) {
      for (int r = 0; r < ctx.exchange.size(); ++r) {
        Range share = vocabularies[static_cast<std::size_t>(r)];
        std::copy_n(ctx.floats_from(r, ticket) + std::ptrdiff_t{i} * share.size(), share.size(),
                    out + std::ptrdiff_t{i} * vocabulary + share.begin);
      }
    }
  }
  ctx.exchange.finish(ctx.member, ticket);
}

void output_most_likely(ExecutionContext& ctx, int m, const GroupInput& x,
                        const LowRankLinear& head, float soft_cap, const Activations& z,
                        std::span<const Range> vocabularies, std::span<RowMaximum> maxima,
                        float* value, TokenId* tokens) {
  lowrank_argmax(ctx, m, x, head, z, maxima, value, tokens, soft_cap);
  if (ctx.exchange.size() == 1) return;
  Range own = vocabularies[static_cast<std::size_t>(ctx.exchange.rank())];
  auto* part = reinterpret_cast<Candidate*>(ctx.floats_to_send());
  auto [begin, end] = ctx.member.share(m);
  for (int i = begin; i < end; ++i) part[i] = {value[i], own.begin + tokens[i]};
  Ticket ticket = ctx.exchange_floats(Collective::kGather, m, kCandidateFloats);
  if (ctx.exchange.rank() == 0) {
    for (int i = begin; i < end; ++i) {
      Candidate best{-std::numeric_limits<float>::infinity(), 0};
      for (int r = 0; r < ctx.exchange.size(); ++r) {  // ascending: equal ones keep the lowest
        Candidate theirs = reinterpret_cast<const Candidate*>(ctx.floats_from(r, ticket))[i];
        bool any = vocabularies[static_cast<std::size_t>(r)].size() > 0;
        if (any && (r == 0 || theirs.value > best.value)) best = theirs;
      }
      tokens[i] = best.token;
    }
  }
  ctx.exchange.finish(ctx.member, ticket);
}

}  // namespace deinfer
