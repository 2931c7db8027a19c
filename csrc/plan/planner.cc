#include "plan/planner.h"

#include <algorithm>
#include <limits>
#include <set>

#include "base/check.h"
#include "plan/kv_choice.h"
#include "plan/report_text.h"

namespace deinfer {
namespace {

struct NamedPhase {
  std::string name;
  Phase phase;
  double weight = 0;
};

void check_options(const PlannerOptions& options) {
  check_argument(options.context >= 1, "context=", options.context, " must be at least 1");
  check_argument(!options.batches.empty() || !options.prefill.empty(),
                 "batches and prefill are both empty");
  for (int batch : options.batches) {
    check_argument(batch >= 1, "batches has ", batch, ", which must be at least 1");
  }
  for (int tokens : options.prefill) {
    check_argument(tokens >= 1, "prefill has ", tokens, ", which must be at least 1");
  }
  check_argument(
      options.max_chunks == 1 || options.max_chunks == 2 || options.max_chunks == kMaxPlannedChunks,
      "max_chunks=", options.max_chunks, " must be 1, 2 or 4");
  KvRequest{options.kv_cache, options.kv_latents}.validate();
}

std::vector<NamedPhase> make_phases(const PlannerOptions& options) {
  std::vector<NamedPhase> phases;
  std::set<std::string> seen;
  auto add = [&](const char* kind, bool prefill, int tokens, int context) {
    std::string name = str_cat(kind, ":", tokens);
    if (seen.insert(name).second) phases.push_back({name, {prefill, tokens, context}});
  };
  for (int batch : options.batches) add("decode", false, batch, options.context);
  for (int tokens : options.prefill) add("prefill", true, tokens, 0);

  if (options.mix.empty()) {
    const std::set<std::string> usual = {"decode:1", "decode:16", "decode:64"};
    const bool any = std::any_of(phases.begin(), phases.end(),
                                 [&](const NamedPhase& p) { return usual.contains(p.name); });
    for (NamedPhase& phase : phases) {
      phase.weight = phase.phase.prefill || !any || usual.contains(phase.name) ? 1 : 0;
    }
  }
  for (const auto& [name, weight] : options.mix) {
    check_argument(weight > 0 && weight < std::numeric_limits<double>::infinity(), "mix: ", name,
                   " has weight ", weight, ", which must be positive");
    auto found = std::find_if(phases.begin(), phases.end(),
                              [&](const NamedPhase& phase) { return phase.name == name; });
    check_argument(found != phases.end(), "mix: \"", name,
                   "\" is none of the predicted phases; they are called decode:BATCH and "
                   "prefill:TOKENS");
    found->weight = weight;
  }
  double sum = 0;
  for (const NamedPhase& phase : phases) sum += phase.weight;
  for (NamedPhase& phase : phases) phase.weight /= sum;
  return phases;
}

std::int64_t largest_kv(const std::vector<NamedPhase>& phases) {
  std::int64_t tokens = 0;
  for (const auto& [name, phase, weight] : phases) {
    if (weight == 0) continue;
    tokens = std::max(tokens, phase.prefill ? std::int64_t{phase.tokens}
                                            : std::int64_t{phase.tokens} * phase.context);
  }
  return tokens;
}

void count_exchanges(const PlannedModel& model, const TensorParallelPlan& plan,
                     PlanEstimate& estimate) {
  if (plan.size() == 1 || model.layers.empty()) return;
  const double share = 1.0 / static_cast<double>(model.layers.size());
  for (const LayerShape& layer : model.layers) {
    for (const PlannedExchange& exchange :
         layer_exchanges(plan, layer, plan.size(), 0, model.activation_bytes, model.norms)) {
      switch (exchange.kind) {
        case Collective::kAllReduce: estimate.all_reduces += share; break;
        case Collective::kAllGather: estimate.all_gathers += share; break;
        case Collective::kReduceScatter: estimate.reduce_scatters += share; break;
        default: break;
      }
    }
  }
}

/// What the KV cache keeps under a plan. Where nothing can be latent, "latent" is dense here: other
/// plans may have latents.
void choose_kv(PlannedModel& model, const TensorParallelPlan& plan, const PlannerOptions& options,
               std::uint64_t memory, PlanEstimate& estimate) {
  const std::vector<KvForms> dense = model.kv_forms();
  estimate.dense_kv_bytes_per_token = most_kv_bytes(model, plan);
  const std::vector<KvForms> latent = latent_kv_forms(model, plan, false);
  model.set_kv_forms(latent);
  estimate.latent_kv_bytes_per_token = most_kv_bytes(model, plan);
  model.set_kv_forms(latent_kv_forms(model, plan, true));
  estimate.token_sharded_kv_bytes_per_token = most_kv_bytes(model, plan);
  model.set_kv_forms(dense);
  KvDemand demand;
  demand.context = options.context;
  if (!options.batches.empty()) {
    demand.max_sequences = *std::max_element(options.batches.begin(), options.batches.end());
  }
  demand.bytes = memory;
  demand.with_weights = true;
  const KvRequest request{options.kv_cache, options.kv_latents};
  KvChoice choice =
      options.kv_cache == "latent" && latent == dense
          ? KvChoice{dense, "dense: this plan has no whole latents on a rank"}
          : choose_kv_forms(request, model, plan, options.hardware, options.link, demand);
  model.set_kv_forms(choice.forms);
  estimate.kv_reason = std::move(choice.reason);
  estimate.kv_bytes_per_token = most_kv_bytes(model, plan);
  estimate.kv_token_sharded = std::any_of(choice.forms.begin(), choice.forms.end(),
                                          [](const KvForms& forms) { return forms.token_sharded; });
  const KvBreakEven even = kv_break_even(model, plan, options.hardware, estimate.kv_token_sharded);
  estimate.k_break_even = even.k;
  estimate.v_break_even = even.v;
}

PlanEstimate estimate_plan(std::string_view name, PlannedModel model, const PlannerOptions& options,
                           std::uint64_t memory, const std::vector<NamedPhase>& phases) {
  auto plan = make_plan(name, model.shape, options.size);
  PlanEstimate estimate;
  estimate.plan = name;
  estimate.layout = weight_layout(name);
  choose_kv(model, *plan, options, memory, estimate);
  count_exchanges(model, *plan, estimate);
  estimate.wire_bytes_per_token = wire_bytes_per_token(model, *plan);
  estimate.weight_bytes = most_weight_bytes(model, *plan);
  if (memory > 0) {
    const std::uint64_t left = memory - std::min(memory, estimate.weight_bytes);
    estimate.kv_tokens = static_cast<std::int64_t>(left / estimate.kv_bytes_per_token);
    estimate.fits = memory >= estimate.weight_bytes && estimate.kv_tokens >= largest_kv(phases);
  }
  for (const NamedPhase& phase : phases) {
    const StepCost cost = best_step_cost(model, *plan, options.hardware, options.link, phase.phase,
                                         options.max_chunks);
    estimate.phases.push_back({phase.name, cost.total(), cost.products, cost.operations,
                               cost.attention, cost.exchanges, cost.chunks});
  }
  return estimate;
}

/// A weight layout with the fastest of its plans for each phase.
struct Layout {
  std::string name;
  std::vector<const PlanEstimate*> plans;
  std::vector<const PlanEstimate*> best;  // per phase
  double score = 0;  // seconds relative to the fastest layout of each phase, weighted
};

std::vector<Layout> fitting_layouts(const std::vector<PlanEstimate>& plans, std::size_t phases) {
  std::vector<Layout> layouts;
  for (const PlanEstimate& plan : plans) {
    if (!plan.fits) continue;
    auto found = std::find_if(layouts.begin(), layouts.end(),
                              [&](const Layout& layout) { return layout.name == plan.layout; });
    if (found == layouts.end()) {
      found = layouts.insert(layouts.end(), Layout{plan.layout, {}, {}});
      found->best.assign(phases, &plan);
    }
    found->plans.push_back(&plan);
    for (std::size_t i = 0; i < phases; ++i) {
      if (plan.phases[i].seconds < found->best[i]->phases[i].seconds) found->best[i] = &plan;
    }
  }
  return layouts;
}

void score(std::vector<Layout>& layouts, const std::vector<NamedPhase>& phases) {
  for (std::size_t i = 0; i < phases.size(); ++i) {
    double fastest = std::numeric_limits<double>::infinity();
    for (const Layout& layout : layouts) {
      fastest = std::min(fastest, layout.best[i]->phases[i].seconds);
    }
    for (Layout& layout : layouts) {
      layout.score += phases[i].weight * layout.best[i]->phases[i].seconds / fastest;
    }
  }
}

/// The plan of a layout that is fastest over the phases of one kind, weighted as in the mix (or
/// equally where the mix has none of them), relative to the layout's best per phase.
std::string best_of_kind(const Layout& layout, const std::vector<NamedPhase>& phases,
                         bool prefill) {
  const bool weighted = std::any_of(phases.begin(), phases.end(), [&](const NamedPhase& p) {
    return p.phase.prefill == prefill && p.weight > 0;
  });
  const PlanEstimate* best = nullptr;
  double least = std::numeric_limits<double>::infinity();
  for (const PlanEstimate* plan : layout.plans) {
    double sum = 0;
    for (std::size_t i = 0; i < phases.size(); ++i) {
      if (phases[i].phase.prefill != prefill) continue;
      sum += (weighted ? phases[i].weight : 1) * plan->phases[i].seconds /
             layout.best[i]->phases[i].seconds;
    }
    if (sum < least) least = sum, best = plan;
  }
  return best->plan;
}

}  // namespace

std::string_view weight_layout(std::string_view plan) {
  return plan == "token_sharded" ? "two_collective" : plan;
}

PlanReport choose_plan(const PlannedModel& model, const PlannerOptions& options) {
  check_options(options);
  const std::vector<NamedPhase> phases = make_phases(options);
  PlanReport report;
  report.link_latency_s = options.link.latency_s;
  report.link_bytes_per_s = options.link.bytes_per_s;
  report.memory_bytes_per_s = options.hardware.memory_bytes_per_s;
  report.flops_per_s = options.hardware.flops_per_s;
  report.memory_bytes =
      options.memory_bytes > 0 ? options.memory_bytes : options.hardware.memory_bytes;
  for (std::string_view name : plan_names()) {
    report.plans.push_back(estimate_plan(name, model, options, report.memory_bytes, phases));
  }

  std::vector<Layout> layouts = fitting_layouts(report.plans, phases.size());
  if (layouts.empty()) {
    report.reason = reason_nothing_fits(report.plans, largest_kv(phases), report.memory_bytes);
    return report;
  }
  score(layouts, phases);
  std::stable_sort(layouts.begin(), layouts.end(),
                   [](const Layout& a, const Layout& b) { return a.score < b.score; });
  const Layout& chosen = layouts[0];
  report.layout = chosen.name;
  for (std::size_t i = 0; i < phases.size(); ++i) {
    report.choices.push_back({phases[i].name, chosen.best[i]->plan, phases[i].weight,
                              chosen.best[i]->phases[i].seconds});
  }
  // Where only one kind of phase was asked for, its plan serves the other too.
  report.decode_plan = best_of_kind(chosen, phases, options.batches.empty());
  report.prefill_plan = best_of_kind(chosen, phases, !options.prefill.empty());

  std::vector<RankedLayout> ranked;
  for (const Layout& layout : layouts) ranked.push_back({layout.name, layout.score, layout.best});
  report.reason = reason_of_choice(report, ranked);
  return report;
}

}  // namespace deinfer
