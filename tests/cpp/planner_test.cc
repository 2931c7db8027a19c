// Cost model and planner: formulas on small models, and properties that no constants may change.
#include "plan/planner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "deinfer/error.h"

namespace deinfer {
namespace {

/// Llama with `layers` layers; ranks keep the share `keep` of each linear, 0: dense.
PlannedModel llama(ModelShape shape, int layers, double keep) {
  PlannedModel model;
  model.shape = shape;
  const int query = shape.num_heads * shape.head_dim;
  const int kv = shape.num_kv_heads * shape.head_dim;
  auto linear = [&](int n, int k) {
    return LinearShape{n, k, static_cast<int>(keep * n * k / (n + k))};
  };
  const int hidden = shape.hidden_size, inner = shape.intermediate_size;
  LayerShape layer{linear(query, hidden), linear(kv, hidden),    linear(kv, hidden),
                   linear(hidden, query), linear(inner, hidden), linear(inner, hidden),
                   linear(hidden, inner)};
  model.layers.assign(static_cast<std::size_t>(layers), layer);
  model.head = {shape.vocab_size, hidden, 0};
  return model;
}

const ModelShape k8B{4096, 14336, 32, 8, 128, 128256};
const ModelShape k70B{8192, 28672, 64, 8, 128, 128256};

PlannerOptions options_for(int size, const char* link) {
  PlannerOptions options;
  options.size = size;
  options.link = parse_link_model(link);
  options.hardware = parse_hardware("h100");
  options.batches = {1, 4, 16, 64, 256};
  options.prefill = {2048};
  return options;
}

const PlanEstimate& estimate_of(const PlanReport& report, std::string_view plan) {
  return *std::find_if(report.plans.begin(), report.plans.end(),
                       [&](const PlanEstimate& estimate) { return estimate.plan == plan; });
}

double seconds_of(const PlanReport& report, std::string_view plan, std::string_view phase) {
  const auto& phases = estimate_of(report, plan).phases;
  return std::find_if(phases.begin(), phases.end(),
                      [&](const PhaseEstimate& estimate) { return estimate.phase == phase; })
      ->seconds;
}

TEST(LinkModel, FollowsItsFormulas) {
  const LinkModel link{10e-6, 1e9};
  const double b = 1e6 / 1e9;
  EXPECT_NEAR(exchange_seconds(link, Collective::kAllGather, 1000000, 4), 10e-6 + 3 * b, 1e-12);
  EXPECT_NEAR(exchange_seconds(link, Collective::kReduceScatter, 1000000, 4), 10e-6 + .75 * b,
              1e-12);
  // Large sums go in two shots, small ones in one.
  EXPECT_NEAR(exchange_seconds(link, Collective::kAllReduce, 1000000, 4), 15e-6 + 1.5 * b, 1e-12);
  EXPECT_NEAR(exchange_seconds(link, Collective::kAllReduce, 1000, 4), 10e-6 + 3e-6, 1e-12);
  EXPECT_EQ(exchange_seconds(link, Collective::kBarrier, 0, 4), 10e-6);
  for (int kind = 0; kind < static_cast<int>(kNumCollectives); ++kind) {
    EXPECT_EQ(exchange_seconds(link, static_cast<Collective>(kind), 1000, 1), 0);
  }
}

TEST(Hardware, ReadsItsText) {
  EXPECT_EQ(parse_hardware("cpu:40:500").flops_per_s, 500e9);
  for (const char* rates : {"", "5", "5:", ":5", "0:5", "5:-1", "5:nan", "5:inf", "5:5x"}) {
    std::string text = std::string("cpu:") + rates;
    try {
      parse_hardware(text);
      ADD_FAILURE() << "\"" << text << "\" was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos);
    }
  }
}

TEST(CostModel, DenseDecodeIsTheSumOfItsParts) {
  const PlannedModel model = llama(k8B, 32, 0);
  const Hardware hw = parse_hardware("h100");
  const LinkModel link{5e-6, 100e9};
  auto plan = make_plan("dense", model.shape, 2);
  const StepCost cost = step_cost(model, *plan, hw, link, {false, 1, 1000}, 1);
  const double h = 4096, f = 14336, kv = 1024;
  const double layer = (h * h + 2 * kv * h + h * h + 3 * h * f) / 2;
  EXPECT_NEAR(cost.products, 2 * (32 * layer + 128256 * h / 2) / 3e12, 1e-9);
  EXPECT_NEAR(cost.attention, 32 * 1000 * 2 * (kv / 2) * 2 / (0.85 * 3e12), 1e-12);
  EXPECT_NEAR(cost.operations, (32 * 10 + 4) * 2.2e-6, 1e-9);
  EXPECT_NEAR(cost.exchanges, 65 * (5e-6 + h * 4 / 100e9) + 5e-6 + 8 / 100e9, 1e-9);
}

TEST(CostModel, WeightsAndKvAreThoseOfTheShares) {
  const PlannedModel model = llama(k8B, 2, 0.4);
  double v_in = 0, u_in = 0, v_out = 0, u_out = 0;
  for (const LayerShape& layer : model.layers) {
    for (const LinearShape* s : {&layer.query, &layer.key, &layer.value, &layer.gate, &layer.up}) {
      v_in += double{1} * s->rank * s->k, u_in += double{1} * s->rank * s->n;
    }
    for (const LinearShape* s : {&layer.attention_output, &layer.down}) {
      v_out += double{1} * s->rank * s->k, u_out += double{1} * s->rank * s->n;
    }
  }
  const double ends = 2.0 * 128256 * 4096 / 4 * 2 + 5 * 4096 * 4;
  auto bytes = [&](const char* name) {
    return static_cast<double>(rank_weight_bytes(model, *make_plan(name, model.shape, 4), 1));
  };
  EXPECT_NEAR(bytes("hidden_sharded"), 2 * (v_in + u_in + v_out + u_out) / 4 + ends, 1);
  EXPECT_NEAR(bytes("two_collective"), 2 * (v_in + u_in / 4 + v_out / 4 + u_out) + ends, 1);
  EXPECT_EQ(bytes("token_sharded"), bytes("two_collective"));
  auto plan = make_plan("hidden_sharded", model.shape, 4);
  EXPECT_EQ(rank_kv_bytes(model, *plan, 3), 2u * 2 * 2 * 128 * 2);
  EXPECT_EQ(rank_kv_bytes(model, *make_plan("naive", model.shape, 4), 3), 2u * 2 * 8 * 128 * 2);
}

TEST(CostModel, OverlapHidesButNeverHurts) {
  const PlannedModel model = llama(k70B, 4, 0.4);
  const Hardware hw = parse_hardware("h100");
  for (const char* text : {"nvlink", "pcie", "ethernet"}) {
    for (std::string_view name : plan_names()) {
      auto plan = make_plan(name, model.shape, 8);
      for (const Phase& phase : {Phase{false, 1, 1024}, Phase{false, 64, 1024},
                                 Phase{true, 2048, 0}, Phase{true, 8192, 4096}}) {
        const LinkModel link = parse_link_model(text);
        const StepCost one = step_cost(model, *plan, hw, link, phase, 1);
        const StepCost best = best_step_cost(model, *plan, hw, link, phase, 4);
        EXPECT_LE(best.total(), one.total());
        EXPECT_GE(best.exchanges, 0);
        EXPECT_EQ(best.products, one.products);
      }
    }
  }
  // A long prefill hides most of what PCIe needs; one token has nothing to hide behind.
  auto plan = make_plan("token_sharded", model.shape, 8);
  const LinkModel link = parse_link_model("pcie");
  EXPECT_GT(best_step_cost(model, *plan, hw, link, {true, 4096, 0}, 4).chunks, 1);
  EXPECT_EQ(best_step_cost(model, *plan, hw, link, {false, 1, 1024}, 4).chunks, 1);
}

// V in two chunks, each of which travels when it is there; U in two, of which the first hides the
// latency of the second.
TEST(CostModel, ChunksOfTheRankDimensionFollowTheRuntime) {
  ModelShape shape{1024, 1024, 8, 8, 128, 1024};
  PlannedModel model = llama(shape, 1, 0);
  for (LinearShape* linear : {&model.layers[0].attention_output, &model.layers[0].down}) {
    linear->rank = 256;
  }
  Hardware hw = parse_hardware("cpu:1:1000");  // 1 GB/s: products take as long as their bytes
  hw.operation_s = 1e-6;
  hw.exchange_s = 3e-6;
  hw.received_bytes_per_s = 2e9;
  const LinkModel link{50e-6, 1e9};
  auto plan = make_plan("two_collective", shape, 2);
  const Phase phase{false, 1, 1};
  const double whole = step_cost(model, *plan, hw, link, phase, 1).exchanges;
  const double cut = step_cost(model, *plan, hw, link, phase, 2).exchanges;
  const double v = 256 * 512 * 2 / 1e9, u = 256 * 1024 * 2 / 1e9;
  const double chunk = 128 * 4 / 1e9;  // one shot of an all-reduce between two
  // The second chunk leaves after V, the link being free, and arrives before half of U is done.
  ASSERT_LT(chunk, v / 2);
  ASSERT_LT(50e-6 + chunk, u / 2);
  const double received = 3e-6 + 2 * 128 * 4 / 2e9;  // a chunk of either rank
  const double one = 50e-6 + 2 * chunk + 2 * received - 3e-6;
  // All of V and an operation more; U starts when both V is done and the first chunk has come, and
  // the second chunk is there when the first half of U is done, whose sums it reads and writes.
  const double sums = (2 * 4 + 256) * 1024 / 1e9;  // and a stream of weights that jumps
  const double two =
      std::max(v + 1e-6, v / 2 + 50e-6 + chunk) + u + 2 * received + 1e-6 + sums - v - u;
  EXPECT_NEAR(whole - cut, 2 * (one - two), 1e-9);
}

TEST(CostModel, FormsThatTheRuntimeLacksAreNotPredicted) {
  const PlannedModel model = llama(k70B, 2, 0.4);
  const Hardware hw = parse_hardware("cpu:100:2000");
  const LinkModel link{200e-6, 20e9};
  auto total = [&](const char* name, const Phase& phase, int chunks) {
    return step_cost(model, *make_plan(name, k70B, 4), hw, link, phase, chunks).total();
  };
  for (const char* name : {"dense", "naive"}) {  // they exchange after U
    EXPECT_EQ(total(name, {false, 64, 100}, 4), total(name, {false, 64, 100}, 1));
  }
  for (const char* name : {"rank_gather", "hidden_sharded", "two_collective", "token_sharded"}) {
    EXPECT_LT(total(name, {false, 16, 100}, 4), total(name, {false, 16, 100}, 1)) << name;
  }
  // No more than kTileTokens pass together, and tiles overlap, whatever was asked for.
  EXPECT_EQ(total("dense", {true, 2048, 0}, 1), total("dense", {true, 2048, 0}, 4));
  EXPECT_LT(total("dense", {true, 2048, 0}, 4), 4 * total("dense", {true, 512, 0}, 1));
}

TEST(CostModel, EveryPlanIsTheSameOnOneRankButForItsOperations) {
  const PlannedModel model = llama(k8B, 4, 0.5);
  const Hardware hw = parse_hardware("h100");
  const Phase phase{false, 16, 1024};
  const StepCost expected = step_cost(model, *make_plan("hidden_sharded", k8B, 1), hw,
                                      parse_link_model("pcie"), phase, 1);
  for (std::string_view name : plan_names()) {
    if (name == "dense") continue;
    const StepCost cost =
        step_cost(model, *make_plan(name, k8B, 1), hw, parse_link_model("pcie"), phase, 1);
    EXPECT_EQ(cost.exchanges, 0) << name;
    EXPECT_NEAR(cost.products, expected.products, 1e-9) << name;
    EXPECT_EQ(cost.attention, expected.attention) << name;
    EXPECT_EQ(wire_bytes_per_token(model, *make_plan(name, k8B, 1)), 0) << name;
  }
}

TEST(Planner, NvlinkDecodeOf70BTakesHiddenShards) {
  for (int size : {4, 8}) {
    const PlanReport report = choose_plan(llama(k70B, 80, 0.4), options_for(size, "nvlink"));
    EXPECT_EQ(report.layout, "hidden_sharded") << report.reason;
    EXPECT_EQ(report.decode_plan, "hidden_sharded");
    EXPECT_EQ(report.prefill_plan, "hidden_sharded");
  }
}

TEST(Planner, PcieDecodeOf8BTakesTwoCollectives) {
  const PlanReport report = choose_plan(llama(k8B, 32, 0.4), options_for(2, "pcie"));
  EXPECT_EQ(report.layout, "two_collective") << report.reason;
  EXPECT_EQ(report.decode_plan, "two_collective");
  EXPECT_EQ(report.prefill_plan, "token_sharded");
  EXPECT_NE(report.reason.find("two_collective to decode and token_sharded to prefill"),
            std::string::npos);
}

TEST(Planner, CollectivesAreThoseOfTheDesign) {
  const PlanReport report = choose_plan(llama(k8B, 3, 0.4), options_for(4, "nvlink"));
  auto check = [&](const char* plan, double reduces, double gathers, double scatters) {
    const PlanEstimate& estimate = estimate_of(report, plan);
    EXPECT_NEAR(estimate.all_reduces, reduces, 1e-9) << plan;
    EXPECT_NEAR(estimate.all_gathers, gathers, 1e-9) << plan;
    EXPECT_NEAR(estimate.reduce_scatters, scatters, 1e-9) << plan;
  };
  check("dense", 2, 0, 0);
  check("naive", 7, 0, 0);
  check("rank_gather", 2, 2, 0);
  check("hidden_sharded", 4, 0, 0);
  check("two_collective", 2, 0, 0);
  check("token_sharded", 0, 2, 2);
}

TEST(Planner, AChoiceStaysWithinOneLayout) {
  for (const char* link : {"nvlink", "pcie", "ethernet", "1:10"}) {
    for (double keep : {0.0, 0.4, 0.8}) {
      for (int size : {1, 2, 8}) {
        const PlanReport report = choose_plan(llama(k8B, 8, keep), options_for(size, link));
        ASSERT_EQ(report.choices.size(), 6u);
        double weights = 0;
        for (const PhaseChoice& choice : report.choices) {
          EXPECT_EQ(weight_layout(choice.plan), report.layout);
          EXPECT_EQ(choice.seconds, seconds_of(report, choice.plan, choice.phase));
          weights += choice.weight;
        }
        EXPECT_NEAR(weights, 1, 1e-12);
        EXPECT_FALSE(report.reason.empty());
      }
    }
  }
}

TEST(Planner, TheMixDecides) {
  // Decoding alone prefers a 70B's hidden shards, prefilling alone the token shards.
  PlannerOptions options = options_for(8, "pcie");
  options.mix = {{"decode:1", 1}};
  const PlannedModel model = llama(k70B, 80, 0.4);
  EXPECT_EQ(choose_plan(model, options).layout, "hidden_sharded");
  options.mix = {{"prefill:2048", 1}};
  EXPECT_EQ(choose_plan(model, options).layout, "two_collective");
}

TEST(Planner, MemoryExcludes) {
  PlannerOptions options = options_for(8, "pcie");
  const PlannedModel model = llama(k70B, 80, 0.4);
  options.mix = {{"prefill:2048", 1}};
  options.memory_bytes = 16'000'000'000;
  const PlanReport report = choose_plan(model, options);
  EXPECT_FALSE(estimate_of(report, "two_collective").fits);
  EXPECT_TRUE(estimate_of(report, "hidden_sharded").fits);
  EXPECT_NE(report.layout, "two_collective");
  EXPECT_NE(report.reason.find("two_collective ("), std::string::npos) << report.reason;

  options.memory_bytes = 1'000'000'000;
  const PlanReport nothing = choose_plan(model, options);
  EXPECT_EQ(nothing.layout, "");
  EXPECT_TRUE(nothing.choices.empty());
  EXPECT_NE(nothing.reason.find("No plan fits: hidden_sharded"), std::string::npos)
      << nothing.reason;
}

TEST(Planner, ErrorsNameTheValue) {
  const PlannedModel model = llama(k8B, 1, 0.4);
  auto message = [&](const std::function<void(PlannerOptions&)>& change) -> std::string {
    PlannerOptions options = options_for(2, "nvlink");
    change(options);
    try {
      choose_plan(model, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  auto has = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  has(message([](auto& o) { o.size = 33; }), "tensor_parallel_size=33");
  has(message([](auto& o) { o.size = 0; }), "tensor_parallel_size=0");
  has(message([](auto& o) { o.batches = {1, 0}; }), "batches has 0");
  has(message([](auto& o) { o.prefill = {-5}; }), "prefill has -5");
  has(message([](auto& o) { o.context = 0; }), "context=0");
  has(message([](auto& o) { o.max_chunks = 3; }), "max_chunks=3");
  has(message([](auto& o) { o.mix = {{"decode:2", 1}}; }), "\"decode:2\"");
  has(message([](auto& o) { o.mix = {{"decode:1", -1}}; }), "weight -1");
  has(message([](auto& o) { o.batches.clear(), o.prefill.clear(); }), "both empty");
}

}  // namespace
}  // namespace deinfer
