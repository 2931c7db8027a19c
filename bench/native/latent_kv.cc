// Attention of one layer while decoding, over a dense cache, over latents, and as DeInfer does it:
// copy all latents, rebuild all K and V, then attend (arXiv 2604.17709).
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string_view>

#include "base/check.h"
#include "bench.h"
#include "comm/communicator.h"
#include "model/position_angles.h"
#include "ops/attention.h"
#include "ops/latent_kv.h"

namespace deinfer::bench {
namespace {

constexpr int kBlock = 16;

LowRankLinear random_linear(Team& team, std::mt19937& random, int n, int rank,
                            const std::vector<std::int32_t>& row_map) {
  std::normal_distribution<float> normal(0.0f, 1.0f / std::sqrt(static_cast<float>(rank)));
  std::vector<float> u(static_cast<std::size_t>(n) * static_cast<std::size_t>(rank));
  for (float& value : u) value = normal(random);
  LowRankLinear linear;
  const int rows = row_map.empty() ? n : static_cast<int>(row_map.size());
  linear.u = cpu::allocate_packed(DType::kBFloat16, rows, rank, cpu::kPanelRows, &team.weights);
  cpu::pack_rows({u.data(), DType::kFloat32, n, rank, rank}, row_map, 0, linear.u.num_panels(),
                 linear.u);
  linear.rank = rank;
  return linear;
}

/// What is kept and how it is used; kRebuildAll is the peer.
enum class Kind { kDense, kValuesLatent, kLatent, kRebuildAll };

/// One layer's cache of one sequence, in bf16.
struct LatentLayer {
  LatentLayer(Team& bench_team, Kind form, bool rotary, int heads, int kv_heads, int head_dim,
              int rank, int length)
      : team(bench_team),
        kind(form),
        counts{heads, kv_heads, head_dim},
        context(length),
        communicator(make_single_communicator(0)),
        exchange(*communicator) {
    std::mt19937 random(5);
    const int kv = kv_heads * head_dim;
    key = random_linear(team, random, kv, rank,
                        rotary ? rotary_row_map(kv_heads, head_dim) : std::vector<std::int32_t>{});
    value = random_linear(team, random, kv, rank, {});
    if (rotary) {
      angles.emplace(Rope(RopeConfig{}, head_dim, context), (head_dim / 2 + 15) / 16 * 16, context);
      angles->reach(context);
      latents.angles = angles->view();
    } else if (kind == Kind::kLatent) {
      absorbed = transposed_heads(key, kv_heads, head_dim, team.team);
      latents.absorbed_key = absorbed;
    }
    latents.key = &key;
    latents.value = &value;
    const KvTraits traits{heads / kv_heads, head_dim, !rotary, false};
    KvForms latent{latent_key_form(traits, rank), latent_value_form(traits, rank)};
    if (kind == Kind::kRebuildAll) latent = {KvForm::kRebuilt, KvForm::kRebuilt};
    forms = kind == Kind::kDense ? KvForms{} : latent;
    if (kind == Kind::kValuesLatent) forms.k = KvForm::kDense;
    const int blocks = (context + kBlock - 1) / kBlock;
    auto config_of = [&](const KvForms& kept) {
      return KvCacheConfig{{{kv_key_shape(traits, kept.k, rank, kv_heads, 2),
                             kv_value_shape(traits, kept.v, rank, kv_heads)}},
                           kBlock,
                           blocks,
                           DType::kBFloat16};
    };
    cache = std::make_unique<KvCache>(config_of(forms));
    for (int block = blocks; block-- > 0;) table.push_back(block);
    fill(random, rank);
    if (kind == Kind::kRebuildAll) {
      whole = std::make_unique<KvCache>(config_of({}));
      gathered = std::make_unique<KvCache>(config_of(forms));
      for (int block = 0; block < blocks; ++block) in_order.push_back(block);
    }
    AttentionShape shape;
    shape.heads = heads;
    shape.kv_heads = kv_heads;
    shape.head_dim = head_dim;
    shape.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    if (kind != Kind::kRebuildAll) shape.forms = forms;
    shape.k_latent = shape.v_latent = rank;
    schedule = std::make_unique<AttentionSchedule>(shape, DType::kBFloat16, team.team.size());
    batch.token_ids = {0};
    batch.sequences = {{0, 1, context - 1, whole ? in_order.data() : table.data()}};
    schedule->plan(batch);
    for (ThreadScratch& scratch : team.scratch) {
      const std::size_t bytes = attention_scratch_bytes(team.kernels, shape, DType::kBFloat16);
      if (scratch.attention.size() < bytes) scratch.attention = Buffer(bytes);
    }
    query.resize(static_cast<std::size_t>(heads * head_dim));
    std::normal_distribution<float> normal(0.0f, 1.0f);
    for (float& element : query) element = normal(random);
    out = ActivationBuffer(DType::kBFloat16, 1, heads * head_dim);
  }

  /// Numbers of ordinary size, so that softmax and rounding do ordinary work; the same latents in
  /// every kind.
  void fill(std::mt19937& random, int rank) {
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const KvLayer layer = cache->layer(0);
    std::vector<KvSlot> slots;
    for (int p = 0; p < context; ++p) {
      slots.push_back({table[static_cast<std::size_t>(p / kBlock)], p % kBlock});
    }
    ActivationBuffer z(DType::kBFloat16, context, rank + 16);
    for (int is_key = 0; is_key < 2; ++is_key) {
      const KvSide& side = is_key != 0 ? layer.k : layer.v;
      for (int p = 0; p < context; ++p) {
        bf16* row = z.view().rows_from(p).b16();
        for (int i = 0; i < rank; ++i) row[i] = to_bf16(normal(random));
      }
      if (side.is_latent()) {
        const StoreLatent store(side, is_key != 0, rank, slots);
        for (int p = 0; p < context; ++p) store.store(z.view(), p);
      } else {
        const std::uint64_t bytes = is_key != 0 ? cache->k_bytes(0) : cache->v_bytes(0);
        auto* elements = reinterpret_cast<bf16*>(side.data);
        for (std::size_t i = 0; i < bytes / sizeof(bf16); ++i)
          elements[i] = to_bf16(normal(random));
      }
    }
    random.seed(7);  // queries do not depend on the kind
  }

  /// The latents in one piece, and K and V of all positions.
  void rebuild_all(ExecutionContext& ctx) {
    const KvLayer from = cache->layer(0), to = gathered->layer(0), dense = whole->layer(0);
    const int blocks = static_cast<int>(table.size());
    auto [first, last] = ctx.member.share(blocks);
    for (int block = first; block < last; ++block) {
      for (auto [a, b] : {std::pair{&from.k, &to.k}, {&from.v, &to.v}}) {
        std::memcpy(b->at(block, 0), a->at(table[static_cast<std::size_t>(block)], 0),
                    static_cast<std::size_t>(a->block_stride()) * sizeof(bf16));
      }
    }
    ctx.member.barrier();
    const int splits = (context + cpu::kKvSplit - 1) / cpu::kKvSplit;
    auto* split_memory = reinterpret_cast<std::byte*>(ctx.scratch.attention.as<float>());
    auto [begin, end] = ctx.member.share(splits * counts.kv_heads);
    ctx.member.work(begin, end, [&](int item) {
      const int head = item % counts.kv_heads;
      const int base = item / counts.kv_heads * cpu::kKvSplit;
      const Range positions{base, std::min(base + cpu::kKvSplit, context)};
      auto store = [&](const KvSide& side) {  // a split of a head, block by block
        const auto bytes = static_cast<std::size_t>(side.head_stride()) * sizeof(bf16);
        for (int p = positions.begin; p < positions.end; p += kBlock) {
          std::memcpy(side.at(p / kBlock, head),
                      split_memory + static_cast<std::size_t>((p - base) / kBlock) * bytes, bytes);
        }
      };
      rebuild_keys(ctx, latents, to.k, counts, head, in_order.data(), positions, split_memory);
      store(dense.k);
      rebuild_values(ctx, latents, to.v, counts, head, in_order.data(), positions, split_memory);
      store(dense.v);
    });
    ctx.member.barrier();
  }

  void run(TeamMember& member) {
    ExecutionContext ctx{team.kernels, member, team.scratch[static_cast<std::size_t>(member.id())],
                         exchange};
    if (kind == Kind::kRebuildAll) rebuild_all(ctx);
    const int width = counts.heads * counts.head_dim;
    schedule->run(ctx, batch, query.data(), width,
                  kind == Kind::kRebuildAll ? whole->layer(0) : cache->layer(0), latents,
                  out.view());
  }

  Team& team;
  Kind kind;
  HeadCounts counts;
  int context;
  KvForms forms;
  std::unique_ptr<Communicator> communicator;
  TeamExchange exchange;
  LowRankLinear key, value;
  std::optional<PositionAngles> angles;
  std::vector<cpu::PackedMatrix> absorbed;
  LatentKv latents;
  std::unique_ptr<KvCache> cache, gathered, whole;
  std::vector<std::int32_t> table, in_order;
  Batch batch;
  std::unique_ptr<AttentionSchedule> schedule;
  std::vector<float> query;
  ActivationBuffer out;
};

}  // namespace
}  // namespace deinfer::bench

using namespace deinfer;
using bench::guarded;
using bench::Kind;
using bench::LatentLayer;
using bench::Team;

/// The layer of one sequence of `context` tokens: "dense", "v_latent" (K dense), "latent", or
/// "rebuild_all", which is the peer.
BENCH_API LatentLayer* bench_latent_create(Team* team, const char* kind, int rotary, int heads,
                                           int kv_heads, int head_dim, int rank, int context) {
  return guarded<LatentLayer*>(nullptr, [&] {
    const std::string_view name = kind;
    Kind form = Kind::kDense;
    if (name == "v_latent") {
      form = Kind::kValuesLatent;
    } else if (name == "latent") {
      form = Kind::kLatent;
    } else if (name == "rebuild_all") {
      form = Kind::kRebuildAll;
    } else {
      check_argument(name == "dense", "there is no kind ", name);
    }
    return new LatentLayer(*team, form, rotary != 0, heads, kv_heads, head_dim, rank, context);
  });
}

BENCH_API void bench_latent_destroy(LatentLayer* layer) { delete layer; }

/// nanoseconds[i] of the attention of one decoded token.
BENCH_API int bench_latent_run(Team* team, LatentLayer* layer, int count, double* nanoseconds) {
  return guarded(-1, [&] {
    bench::time_steps(team->team, count, nanoseconds,
                      [&](TeamMember& member, int) { layer->run(member); });
    return 0;
  });
}

/// out[heads * head_dim] of the last run.
BENCH_API int bench_latent_output(LatentLayer* layer, float* out) {
  return guarded(-1, [&] {
    const int width = layer->counts.heads * layer->counts.head_dim;
    for (int i = 0; i < width; ++i) out[i] = to_float(layer->out.view().b16()[i]);
    return 0;
  });
}
