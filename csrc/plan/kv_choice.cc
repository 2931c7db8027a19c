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
    room = static_cast<double>(demand.bytes) /
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
    const LayerShape& layer = model.layers[i];
    const double dense = attention_seconds(model, plan, hardware, phase, layer, {});
    const KvLayerShape before = rank_kv_shape(model, plan, layer, {}, 0);
    const KvForms sides[] = {{latent[i].k, KvForm::kDense}, {KvForm::kDense, latent[i].v}};
    for (const KvForms& forms : sides) {
      if (forms == KvForms{}) continue;
      const KvLayerShape after = rank_kv_shape(model, plan, layer, forms, 0);
      const double saved = static_cast<double>(before.k.elements() + before.v.elements()) -
                           static_cast<double>(after.k.elements() + after.v.elements());
      if (saved <= 0) continue;
      const double added = attention_seconds(model, plan, hardware, phase, layer, forms) - dense;
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

KvChoice choose_automatically(PlannedModel model, const TensorParallelPlan& plan,
                              const Hardware& hardware, const LinkModel& link,
                              const KvDemand& demand) {
  const std::vector<KvForms> dense(model.layers.size());
  const std::vector<KvForms> latent = latent_kv_forms(model, plan);
  model.kv_forms = dense;
  const Prediction before = predict(model, plan, hardware, link, demand);
  Prediction best = before;
  KvChoice choice{dense, {}};
  const std::uint64_t dense_bytes = most_kv_bytes(model, plan);
  const std::vector<Candidate> sides = candidates(model, plan, hardware, latent, demand.context);
  for (std::size_t i = 0; i < sides.size(); ++i) {
    KvForms& forms = model.kv_forms[sides[i].layer];
    const KvForms& to = latent[sides[i].layer];
    (sides[i].is_key ? forms.k : forms.v) = sides[i].is_key ? to.k : to.v;
    // Sides of one price go together.
    if (i + 1 < sides.size() && sides[i + 1].price == sides[i].price) continue;
    const Prediction after = predict(model, plan, hardware, link, demand);
    // What only promises time is not worth the risk of a prediction: latents are for room.
    if (after.sequences <= before.sequences) continue;
    if (after.rate() > best.rate() && after.rate() >= kLeastGain * before.rate()) {
      best = after;
      choice.forms = model.kv_forms;
    }
  }
  model.kv_forms = choice.forms;
  const std::string at = str_cat(" at context ", demand.context);
  if (choice.forms == dense) {
    choice.reason = str_cat("dense: of ", sides.size(),
                            " K and V that latents would shrink, none "
                            "promises more throughput",
                            at, " (", prediction_text(before), ")");
    return choice;
  }
  choice.reason = str_cat(kv_forms_text(choice.forms), ": ", most_kv_bytes(model, plan),
                          " bytes per token and rank instead of ", dense_bytes, "; predicted", at,
                          ": ", prediction_text(best), " instead of ", prediction_text(before));
  return choice;
}

}  // namespace

std::vector<KvForms> latent_kv_forms(const PlannedModel& model, const TensorParallelPlan& plan) {
  std::vector<KvForms> forms;
  for (const LayerShape& layer : model.layers) {
    KvForms& latent = forms.emplace_back();
    if (has_latents(plan, LinearRole::kKey, layer.key)) {
      latent.k = latent_key_form(model.kv_traits(), layer.key.rank);
    }
    if (has_latents(plan, LinearRole::kValue, layer.value)) {
      latent.v = latent_value_form(model.kv_traits(), layer.value.rank);
    }
  }
  return forms;
}

KvChoice choose_kv_forms(std::string_view kind, const PlannedModel& model,
                         const TensorParallelPlan& plan, const Hardware& hardware,
                         const LinkModel& link, const KvDemand& demand) {
  const std::vector<KvForms> dense(model.layers.size());
  if (kind == "dense") return {dense, "dense: asked for"};
  if (kind == "auto") return choose_automatically(model, plan, hardware, link, demand);
  check_argument(kind == "latent", "kv_cache=\"", kind,
                 "\" is unknown; use \"dense\", \"latent\" or \"auto\"");
  KvChoice choice{latent_kv_forms(model, plan), {}};
  const bool decomposed = std::any_of(
      model.layers.begin(), model.layers.end(),
      [](const LayerShape& layer) { return layer.key.rank > 0 || layer.value.rank > 0; });
  check_argument(decomposed,
                 "kv_cache=\"latent\": no projection to k or v of this model is decomposed");
  check_argument(choice.forms != dense, "kv_cache=\"latent\": under the plan ", plan.name(),
                 " no rank has the whole latents of k and v; another tensor_parallel_plan has");
  choice.reason = str_cat(kv_forms_text(choice.forms), ": asked for");
  return choice;
}

KvBreakEven kv_break_even(const PlannedModel& model, const TensorParallelPlan& plan,
                          const Hardware& hardware) {
  const Phase phase{false, 1, 4096};  // all terms grow with the context alike
  const KvTraits traits = model.kv_traits();
  const double dense = attention_seconds(model, plan, hardware, phase, {}, {});
  auto largest = [&](auto seconds) {
    int fits = 0, exceeds = 4 * model.shape.num_heads * model.shape.head_dim;
    while (exceeds - fits > 1) {
      const int rank = (fits + exceeds) / 2;
      (seconds(rank) <= dense ? fits : exceeds) = rank;
    }
    return fits;
  };
  auto keys = [&](int rank) {
    LayerShape layer;
    layer.key.rank = rank;
    return attention_seconds(model, plan, hardware, phase, layer,
                             {latent_key_form(traits, rank), KvForm::kDense});
  };
  auto values = [&](int rank) {
    LayerShape layer;
    layer.value.rank = rank;
    return attention_seconds(model, plan, hardware, phase, layer,
                             {KvForm::kDense, latent_value_form(traits, rank)});
  };
  return {largest(keys), largest(values)};
}

std::string kv_forms_text(const std::vector<KvForms>& forms) {
  return str_cat("K", side_text(forms, &KvForms::k), "; V", side_text(forms, &KvForms::v));
}

}  // namespace deinfer
