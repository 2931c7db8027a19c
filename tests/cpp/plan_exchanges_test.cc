// The exchanges of every plan, against formulas written out here by hand.
#include "plan/exchanges.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

namespace deinfer {

void PrintTo(const PlannedExchange& exchange, std::ostream* out) {
  *out << exchange.where << " stage " << static_cast<int>(exchange.stage) << " kind "
       << static_cast<int>(exchange.kind) << ": " << exchange.bytes << " bytes";
}

namespace {

constexpr auto kAR = Collective::kAllReduce;
constexpr auto kAG = Collective::kAllGather;
constexpr auto kRS = Collective::kReduceScatter;
constexpr auto kBefore = ExchangeStage::kBefore;
constexpr auto kAfterV = ExchangeStage::kAfterV;
constexpr auto kAfterU = ExchangeStage::kAfterU;
constexpr auto kStatistics = ExchangeStage::kStatistics;
constexpr auto kEnd = ExchangeStage::kEnd;

constexpr int kHidden = 96, kInner = 160, kHeads = 6, kKvHeads = 3, kHeadDim = 10, kVocab = 200;
constexpr int kQuery = kHeads * kHeadDim, kKv = kKvHeads * kHeadDim;
const ModelShape kModel{kHidden, kInner, kHeads, kKvHeads, kHeadDim, kVocab};

struct Ranks {
  int q, k, v, o, g, u, d;
};

LayerShape layer_of(const Ranks& r) {
  return {{kQuery, kHidden, r.q}, {kKv, kHidden, r.k},    {kKv, kHidden, r.v},
          {kHidden, kQuery, r.o}, {kInner, kHidden, r.g}, {kInner, kHidden, r.u},
          {kHidden, kInner, r.d}};
}

constexpr LayerNorms kLayerNorms{NormKind::kLayer, NormKind::kNone, QkNormKind::kNone};

constexpr LayerNorms kPostNorms{NormKind::kNone, NormKind::kRms, QkNormKind::kFull};  // OLMo 2
constexpr LayerNorms kHeadNorms{NormKind::kRms, NormKind::kNone, QkNormKind::kPerHead};

constexpr Ranks kLowRank{11, 5, 7, 13, 17, 19, 23};
constexpr Ranks kDense{0, 0, 0, 0, 0, 0, 0};
constexpr Ranks kMixed{11, 0, 7, 0, 17, 0, 23};

/// Own part of r columns, own tokens, own hidden columns (units of 16).
int cols(int r, int size, int i) { return r * (i + 1) / size - r * i / size; }
int h(int size, int i) { return 16 * cols(kHidden / 16, size, i); }

struct Case {
  const char* plan;
  Ranks ranks;
  LayerNorms norms;
  // m tokens, own tokens t, size n, rank i, activation bytes a
  std::function<std::vector<PlannedExchange>(int m, int t, int n, int i, int a)> expected;
};

// clang-format off
const Case kCases[] = {
    {"dense", kLowRank, LayerNorms{}, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "attention_output", kAfterU, m * 96ull * 4},
                                           {kAR, "down", kAfterU, m * 96ull * 4}}; }},
    {"naive", kLowRank, LayerNorms{}, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "query", kAfterU, m * 60ull * 4},
                                           {kAR, "key", kAfterU, m * 30ull * 4},
                                           {kAR, "value", kAfterU, m * 30ull * 4},
                                           {kAR, "attention_output", kAfterU, m * 96ull * 4},
                                           {kAR, "gate", kAfterU, m * 160ull * 4},
                                           {kAR, "up", kAfterU, m * 160ull * 4},
                                           {kAR, "down", kAfterU, m * 96ull * 4}}; }},
    {"rank_gather", kLowRank, LayerNorms{}, [](int m, int, int n, int i, int a) {
       auto bytes = [&](int part) { return static_cast<std::uint64_t>(m * part * a); };
       return std::vector<PlannedExchange>{
           {kAG, "qkv", kAfterV, bytes(cols(11, n, i) + cols(5, n, i) + cols(7, n, i))},
           {kAR, "attention_output", kAfterV, m * 13ull * 4},
           {kAG, "gate_up", kAfterV, bytes(cols(17, n, i) + cols(19, n, i))},
           {kAR, "down", kAfterV, m * 23ull * 4}}; }},
    {"hidden_sharded", kLowRank, LayerNorms{}, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "qkv", kAfterV, m * (23ull + 1) * 4},
                                           {kAR, "attention_output", kAfterV, m * 13ull * 4},
                                           {kAR, "gate_up", kAfterV, m * (36ull + 1) * 4},
                                           {kAR, "down", kAfterV, m * 23ull * 4}}; }},
    {"hidden_sharded", kLowRank, kLayerNorms, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "qkv", kAfterV, m * (23ull + 2) * 4},
                                           {kAR, "attention_output", kAfterV, m * 13ull * 4},
                                           {kAR, "gate_up", kAfterV, m * (36ull + 2) * 4},
                                           {kAR, "down", kAfterV, m * 23ull * 4}}; }},
    {"hidden_sharded", kLowRank, kPostNorms, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "qkv", kAfterV, m * 23ull * 4},
                                           {kAR, "qk_norm", kStatistics, m * 2ull * 4},
                                           {kAR, "attention_output", kAfterV, m * 13ull * 4},
                                           {kAR, "attention_output", kStatistics, m * 4ull},
                                           {kAR, "gate_up", kAfterV, m * 36ull * 4},
                                           {kAR, "down", kAfterV, m * 23ull * 4},
                                           {kAR, "down", kStatistics, m * 4ull}}; }},
    {"hidden_sharded", kDense, kPostNorms, [](int m, int, int n, int i, int) {
       const auto own = static_cast<std::uint64_t>(m * h(n, i) * 4);
       return std::vector<PlannedExchange>{{kAG, "qkv", kBefore, own},
                                           {kAR, "qk_norm", kStatistics, m * 2ull * 4},
                                           {kRS, "attention_output", kAfterU, m * 96ull * 4},
                                           {kAR, "attention_output", kStatistics, m * 4ull},
                                           {kAG, "gate_up", kBefore, own},
                                           {kRS, "down", kAfterU, m * 96ull * 4},
                                           {kAR, "down", kStatistics, m * 4ull}}; }},
    {"two_collective", kLowRank, kPostNorms, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "qk_norm", kStatistics, m * 2ull * 4},
                                           {kAR, "attention_output", kAfterV, m * 13ull * 4},
                                           {kAR, "down", kAfterV, m * 23ull * 4}}; }},
    {"two_collective", kLowRank, kHeadNorms, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "attention_output", kAfterV, m * 13ull * 4},
                                           {kAR, "down", kAfterV, m * 23ull * 4}}; }},
    {"token_sharded", kDense, kPostNorms, [](int m, int t, int, int, int a) {
       const auto own = static_cast<std::uint64_t>(t * 96 * a);
       return std::vector<PlannedExchange>{{kAG, "qkv", kBefore, own},
                                           {kAR, "qk_norm", kStatistics, m * 2ull * 4},
                                           {kRS, "attention_output", kAfterU, m * 96ull * 4},
                                           {kAG, "gate_up", kBefore, own},
                                           {kRS, "down", kAfterU, m * 96ull * 4}}; }},
    {"naive", kLowRank, kPostNorms, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "query", kAfterU, m * 60ull * 4},
                                           {kAR, "key", kAfterU, m * 30ull * 4},
                                           {kAR, "value", kAfterU, m * 30ull * 4},
                                           {kAR, "attention_output", kAfterU, m * 96ull * 4},
                                           {kAR, "gate", kAfterU, m * 160ull * 4},
                                           {kAR, "up", kAfterU, m * 160ull * 4},
                                           {kAR, "down", kAfterU, m * 96ull * 4}}; }},
    {"two_collective", kLowRank, LayerNorms{}, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "attention_output", kAfterV, m * 13ull * 4},
                                           {kAR, "down", kAfterV, m * 23ull * 4}}; }},
    {"token_sharded", kLowRank, LayerNorms{}, [](int m, int t, int, int, int a) {
       auto bytes = [&](int columns) { return static_cast<std::uint64_t>(t * columns * a); };
       return std::vector<PlannedExchange>{{kAG, "qkv", kAfterV, bytes(23)},
                                           {kRS, "attention_output", kAfterV, m * 13ull * 4},
                                           {kAG, "gate_up", kAfterV, bytes(36)},
                                           {kRS, "down", kAfterV, m * 23ull * 4}}; }},
    {"rank_gather", kDense, LayerNorms{}, [](int m, int, int, int, int) {
       return std::vector<PlannedExchange>{{kAR, "attention_output", kAfterU, m * 96ull * 4},
                                           {kAR, "down", kAfterU, m * 96ull * 4}}; }},
    {"hidden_sharded", kDense, LayerNorms{}, [](int m, int, int n, int i, int) {
       const auto own = static_cast<std::uint64_t>(m * h(n, i) * 4);
       return std::vector<PlannedExchange>{{kAG, "qkv", kBefore, own},
                                           {kRS, "attention_output", kAfterU, m * 96ull * 4},
                                           {kAG, "gate_up", kBefore, own},
                                           {kRS, "down", kAfterU, m * 96ull * 4}}; }},
    {"token_sharded", kDense, LayerNorms{}, [](int m, int t, int, int, int a) {
       const auto own = static_cast<std::uint64_t>(t * 96 * a);
       return std::vector<PlannedExchange>{{kAG, "qkv", kBefore, own},
                                           {kRS, "attention_output", kAfterU, m * 96ull * 4},
                                           {kAG, "gate_up", kBefore, own},
                                           {kRS, "down", kAfterU, m * 96ull * 4}}; }},
    {"hidden_sharded", kMixed, LayerNorms{}, [](int m, int, int n, int i, int) {
       const auto own = static_cast<std::uint64_t>(m * h(n, i) * 4);
       return std::vector<PlannedExchange>{{kAG, "qkv", kBefore, own},
                                           {kAR, "qkv", kAfterV, m * (18ull + 1) * 4},
                                           {kRS, "attention_output", kAfterU, m * 96ull * 4},
                                           {kAG, "gate_up", kBefore, own},
                                           {kAR, "gate_up", kAfterV, m * (17ull + 1) * 4},
                                           {kAR, "down", kAfterV, m * 23ull * 4}}; }},
};
// clang-format on

TEST(Exchanges, OfALayer) {
  for (const Case& test : kCases) {
    for (int size : {1, 2, 3, 4, 6}) {
      auto plan = make_plan(test.plan, kModel, size);
      for (int m : {1, 2, 7, 64}) {
        for (int rank = 0; rank < size; ++rank) {
          for (int activation_bytes : {2, 4}) {
            SCOPED_TRACE(std::string(test.plan) + " size " + std::to_string(size) + " m " +
                         std::to_string(m) + " rank " + std::to_string(rank));
            EXPECT_EQ(
                layer_exchanges(*plan, layer_of(test.ranks), m, rank, activation_bytes, test.norms),
                test.expected(m, cols(m, size, rank), size, rank, activation_bytes));
          }
        }
      }
    }
  }
}

TEST(Exchanges, APlainMlpHasNoGate) {
  LayerShape layer = layer_of(kLowRank);
  layer.gate = {};
  EXPECT_EQ(layer_exchanges(*make_plan("naive", kModel, 2), layer, 1, 0, 4, kLayerNorms).size(),
            6u);
  auto exchanges =
      layer_exchanges(*make_plan("hidden_sharded", kModel, 2), layer, 3, 0, 4, kLayerNorms);
  ASSERT_EQ(exchanges.size(), 4u);
  EXPECT_EQ(exchanges[2].bytes, 3u * (19 + 2) * 4);
}

TEST(Exchanges, OfAStep) {
  const std::vector<LayerShape> layers(3, layer_of(kLowRank));
  const StepRows rows{5, 2, 3};
  using List = std::vector<PlannedExchange>;
  for (int rank = 0; rank < 2; ++rank) {
    const int words = rank == 0 ? 96 : 104;  // of 200, in units of 32
    for (std::string_view name : plan_names()) {
      SCOPED_TRACE(name);
      auto plan = make_plan(name, kModel, 2);
      const bool whole = plan->residual() == ResidualLayout::kReplicated;
      List expected = {{whole ? kAR : kRS, "embedding", kEnd, 5ull * 96 * 4}};
      for (const LayerShape& layer : layers) {
        for (const auto& exchange : layer_exchanges(*plan, layer, 5, rank, 2, {})) {
          expected.push_back(exchange);
        }
      }
      auto add_norm = [&](std::uint64_t wanted) {
        if (name == "hidden_sharded")
          expected.push_back({kAG, "final_norm", kEnd, wanted * 48 * 4});
        if (name == "token_sharded") expected.push_back({kAR, "final_norm", kEnd, wanted * 96 * 4});
      };
      add_norm(2);
      expected.push_back({Collective::kGather, "logits", kEnd, 2ull * words * 4});
      add_norm(3);
      expected.push_back({Collective::kGather, "most_likely", kEnd, 3ull * 2 * 4});
      EXPECT_EQ(step_exchanges(*plan, layers, rows, rank, 2, {}), expected);
      // Without wanted rows nothing follows the layers.
      EXPECT_TRUE(head_exchanges(*plan, {5, 0, 0}, rank).empty());
    }
  }
}

}  // namespace
}  // namespace deinfer
