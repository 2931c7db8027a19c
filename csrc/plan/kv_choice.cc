#include "plan/kv_choice.h"

#include <algorithm>
#include <array>
#include <cstdio>

#include "base/check.h"

namespace deinfer {
namespace {

// What a prediction must gain to be worth leaving dense caches.
constexpr double kLeastGain = 1.02;

std::string fixed(double value, int digits) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.*f", digits, value);
  return text.data();
}

/// Whether every rank has the whole z of a linear.
bool has_latents(const TensorParallelPlan& plan, LinearRole role, const LinearShape& shape) {
  if (shape.rank == 0 || plan.multiplies_out()) return false;
  return plan.size() == 1 || plan.place(role, shape, 0).after_u == Exchange::kNone;
}

struct Prediction {
  double sequences = 0;  // that decode together
  double seconds = 0;    // of a step
  double rate() const { return sequences / seconds; }
};

Prediction predict(const PlannedModel& model, const TensorParallelPlan& plan,
                   const Hardware& hardware, const LinkModel& link, const KvDemand& demand) {
  double room = demand.max_sequences;
  if (demand.tokens >= 0) {
    room = static_cast<double>(demand.tokens) / demand.context;
  } else if (demand.bytes > 0) {
    const std::uint64_t weights = demand.with_weights ? most_weight_bytes(model, plan) : 0;
    room = static_cast<double>(demand.bytes - std::min(demand.bytes, weights)) /
           (static_cast<double>(most_kv_bytes(model, plan)) * demand.context);
  }
  // Contexts vary, so that there are as many on average, not a whole number.
  const double sequences = std::clamp<double>(room, 1, demand.max_sequences);
  const int whole = static_cast<int>(sequences);
  auto seconds = [&](int tokens) {
    return step_cost(model, plan, hardware, link, {false, tokens, demand.context}, 1).total();
  };
  const double first = seconds(whole);
  return {sequences, first + (sequences - whole) * (seconds(whole + 1) - first)};
}

/// One side of one layer that may become latent.
struct Candidate {
  std::size_t layer = 0;
  bool is_key = false;
  double price = 0;  // seconds of a decoded token, per byte saved of a cached one
};

std::vector<Candidate> candidates(const PlannedModel& model, const TensorParallelPlan& plan,
                                  const Hardware& hardware, const std::vector<KvForms>& latent,
                                  int context) {
  std::vector<Candidate> all;
  const Phase phase{false, 1, context};
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    LayerShape layer = model.layers[i];
    const double dense = attention_seconds(model, plan, hardware, phase, layer);
    const double before = rank_kv_shape(model, plan, layer, 0).elements();
    const bool sharded = latent[i].token_sharded;
    const KvForms sides[] = {{latent[i].k, KvForm::kDense, sharded},
                             {KvForm::kDense, latent[i].v, sharded}};
    for (const KvForms& forms : sides) {
      if (!forms.any_latent()) continue;
      layer.kv = forms;
      const double saved = before - rank_kv_shape(model, plan, layer, 0).elements();
      if (saved <= 0) continue;
      const double added = attention_seconds(model, plan, hardware, phase, layer) - dense;
      all.push_back({i, forms.k != KvForm::kDense, added / saved});
    }
  }
  std::stable_sort(all.begin(), all.end(),
                   [](const Candidate& a, const Candidate& b) { return a.price < b.price; });
  return all;
}

std::string prediction_text(const Prediction& prediction) {
  return str_cat(fixed(prediction.sequences, 1), " sequences at ", fixed(prediction.rate(), 0),
                 " tokens/s");
}

std::string side_text(const std::vector<KvForms>& forms, KvForm KvForms::* side) {
  constexpr KvForm kForms[] = {KvForm::kDense, KvForm::kAbsorbed, KvForm::kRebuilt};
  std::string text;
  for (const KvForm form : kForms) {
    const auto count = std::count_if(forms.begin(), forms.end(),
                                     [&](const KvForms& layer) { return layer.*side == form; });
    if (count == 0) continue;
    text += str_cat(text.empty() ? " " : ", ", kv_form_name(form));
    if (count < static_cast<std::ptrdiff_t>(forms.size())) {
      text += str_cat(" in ", count, count == 1 ? " layer" : " layers");
    }
  }
  return text;
}

/// The best of some sides being latent, all replicated or all token-sharded.
struct Best {
  std::vector<KvForms> forms;
  Prediction prediction;
  std::size_t candidates = 0;
};

Best best_latents(PlannedModel model, const TensorParallelPlan& plan, const Hardware& hardware,
                  const LinkModel& link, const KvDemand& demand, bool token_sharded) {
  const std::vector<KvForms> latent = latent_kv_forms(model, plan, token_sharded);
  const Prediction before = predict(model, plan, hardware, link, demand);
  Best best{model.kv_forms(), before, 0};
  const std::vector<Candidate> sides = candidates(model, plan, hardware, latent, demand.context);
  best.candidates = sides.size();
  for (std::size_t i = 0; i < sides.size(); ++i) {
    KvForms& forms = model.layers[sides[i].layer].kv;
    const KvForms& to = latent[sides[i].layer];
    (sides[i].is_key ? forms.k : forms.v) = sides[i].is_key ? to.k : to.v;
    forms.token_sharded = to.token_sharded;
    // Sides of one price go together.
    if (i + 1 < sides.size() && sides[i + 1].price == sides[i].price) continue;
    const Prediction after = predict(model, plan, hardware, link, demand);
    // What only promises time is not worth the risk of a prediction: latents are for room.
    if (after.sequences <= before.sequences) continue;
    if (after.rate() > best.prediction.rate() && after.rate() >= kLeastGain * before.rate()) {
      best.prediction = after;
      best.forms = model.kv_forms();
    }
  }
  return best;
}

/// The ways in which latents may lie on the ranks.
std::vector<bool> shardings(const KvRequest& request, const TensorParallelPlan& plan) {
  if (plan.size() == 1 || request.latents == "replicated") return {false};
  if (request.latents == "token_sharded") return {true};
  return {false, true};
}

KvChoice choose_automatically(const KvRequest& request, PlannedModel model,
                              const TensorParallelPlan& plan, const Hardware& hardware,
                              const LinkModel& link, const KvDemand& demand) {
  model.set_kv_forms(std::vector<KvForms>(model.layers.size()));
  const Prediction before = predict(model, plan, hardware, link, demand);
  const std::uint64_t dense_bytes = most_kv_bytes(model, plan);
  Best best{model.kv_forms(), before, 0};
  std::size_t sides = 0;
  for (const bool token_sharded : shardings(request, plan)) {
    Best found = best_latents(model, plan, hardware, link, demand, token_sharded);
    sides = std::max(sides, found.candidates);
    if (found.prediction.rate() > best.prediction.rate()) best = std::move(found);
  }
  const std::string at = str_cat(" at context ", demand.context);
  if (best.forms == model.kv_forms()) {
    return {best.forms, str_cat("dense: of ", sides,
                                " K and V that latents would shrink, none "
                                "promises more throughput",
                                at, " (", prediction_text(before), ")")};
  }
  model.set_kv_forms(best.forms);
  return {best.forms,
          str_cat(kv_forms_text(best.forms, plan.size()), ": ", most_kv_bytes(model, plan),
                  " bytes per token and rank instead of ", dense_bytes, "; predicted", at, ": ",
                  prediction_text(best.prediction), " instead of ", prediction_text(before))};
}

/// All latents, where the ranks keep them as asked for or as promises more throughput.
KvChoice choose_all(const KvRequest& request, PlannedModel model, const TensorParallelPlan& plan,
                    const Hardware& hardware, const LinkModel& link, const KvDemand& demand) {
  struct Option {
    std::vector<KvForms> forms;
    std::uint64_t bytes = 0;
    Prediction prediction;
  };
  const std::vector<bool> ways = shardings(request, plan);
  std::vector<Option> options;
  for (const bool token_sharded : ways) {
    Option& option = options.emplace_back();
    option.forms = latent_kv_forms(model, plan, token_sharded);
    model.set_kv_forms(option.forms);
    option.bytes = most_kv_bytes(model, plan);
    if (ways.size() > 1) option.prediction = predict(model, plan, hardware, link, demand);
  }
  std::string reason = "asked for";
  if (options.size() > 1) {
    if (options[1].prediction.rate() > options[0].prediction.rate()) {
      std::swap(options[0], options[1]);
    }
    reason = str_cat("latents asked for; so they take ", options[0].bytes,
                     " bytes per token and rank, predicted at context ", demand.context, ": ",
                     prediction_text(options[0].prediction), ", the other way ", options[1].bytes,
                     " bytes, ", prediction_text(options[1].prediction));
  }
  return {options[0].forms, str_cat(kv_forms_text(options[0].forms, plan.size()), ": ", reason)};
}

}  // namespace

void KvRequest::validate() const {
  check_argument(cache == "dense" || cache == "latent" || cache == "auto", "kv_cache=\"", cache,
                 "\" is unknown; use \"dense\", \"latent\" or \"auto\"");
  check_argument(latents == "replicated" || latents == "token_sharded" || latents == "auto",
                 "kv_latents=\"", latents,
                 "\" is unknown; use \"replicated\", \"token_sharded\" or \"auto\"");
}

std::vector<KvForms> latent_kv_forms(const PlannedModel& model, const TensorParallelPlan& plan,
                                     bool token_sharded) {
  std::vector<KvForms> forms;
  for (const LayerShape& layer : model.layers) {
    KvForms& latent = forms.emplace_back();
    if (has_latents(plan, LinearRole::kKey, layer.key)) {
      latent.k = latent_key_form(model.kv_traits(), layer.key.rank);
    }
    if (has_latents(plan, LinearRole::kValue, layer.value)) {
      latent.v = latent_value_form(model.kv_traits(), layer.value.rank);
    }
    latent.token_sharded = token_sharded && plan.size() > 1 && latent.any_latent();
  }
  return forms;
}

KvChoice choose_kv_forms(const KvRequest& request, const PlannedModel& model,
                         const TensorParallelPlan& plan, const Hardware& hardware,
                         const LinkModel& link, const KvDemand& demand) {
  request.validate();
  const std::vector<KvForms> dense(model.layers.size());
  if (request.cache == "dense") return {dense, "dense: asked for"};
  if (request.cache == "auto") {
    return choose_automatically(request, model, plan, hardware, link, demand);
  }
  const bool decomposed = std::any_of(
      model.layers.begin(), model.layers.end(),
      [](const LayerShape& layer) { return layer.key.rank > 0 || layer.value.rank > 0; });
  check_argument(decomposed,
                 "kv_cache=\"latent\": no projection to k or v of this model is decomposed");
  check_argument(latent_kv_forms(model, plan, false) != dense,
                 "kv_cache=\"latent\": under the plan ", plan.name(),
                 " no rank has the whole latents of k and v; another tensor_parallel_plan has");
  return choose_all(request, model, plan, hardware, link, demand);
}

KvBreakEven kv_break_even(const PlannedModel& model, const TensorParallelPlan& plan,
                          const Hardware& hardware, bool token_sharded) {
  const Phase phase{false, 1, 4096};  // all terms grow with the context alike
  const KvTraits traits = model.kv_traits();
  const bool sharded = token_sharded && plan.size() > 1;
  const double dense = attention_seconds(model, plan, hardware, phase, {});
  auto largest = [&](auto layer_of) {
    int fits = 0, exceeds = 4 * model.shape.num_heads * model.shape.head_dim;
    while (exceeds - fits > 1) {
      const int rank = (fits + exceeds) / 2;
      const bool within = attention_seconds(model, plan, hardware, phase, layer_of(rank)) <= dense;
      (within ? fits : exceeds) = rank;
    }
    return fits;
  };
  auto keys = [&](int rank) {
    LayerShape layer;
    layer.key.rank = rank;
    layer.kv = {latent_key_form(traits, rank), KvForm::kDense, sharded};
    return layer;
  };
  auto values = [&](int rank) {
    LayerShape layer;
    layer.value.rank = rank;
    layer.kv = {KvForm::kDense, latent_value_form(traits, rank), sharded};
    return layer;
  };
  return {largest(keys), largest(values)};
}

std::string kv_forms_text(const std::vector<KvForms>& forms, int ranks) {
  std::string text =
      str_cat("K", side_text(forms, &KvForms::k), "; V", side_text(forms, &KvForms::v));
  if (ranks == 1) return text;
  const bool sharded = std::any_of(forms.begin(), forms.end(),
                                   [](const KvForms& layer) { return layer.token_sharded; });
  return text + (sharded ? str_cat("; ", ranks, " ranks divide the tokens")
                         : str_cat("; latents on each of ", ranks, " ranks"));
}

}  // namespace deinfer
