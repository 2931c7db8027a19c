// Which latents "auto" keeps, and what the cost model says of them.
#include "plan/kv_choice.h"

#include <gtest/gtest.h>

#include "deinfer/error.h"

namespace deinfer {
namespace {

/// 1.1B parameters before the decomposition, multi-head.
PlannedModel model_of(int kv_heads, int rank, bool rotary) {
  PlannedModel model;
  model.shape = {2048, 5632, 32, kv_heads, 64, 32000};
  model.absorbs_keys = !rotary;
  const int kv = kv_heads * 64;
  LayerShape layer{{2048, 2048, 409}, {kv, 2048, rank},  {kv, 2048, rank}, {2048, 2048, 409},
                   {5632, 2048, 600}, {5632, 2048, 600}, {2048, 5632, 600}};
  model.layers.assign(22, layer);
  model.head = {32000, 2048, 0};
  return model;
}

/// A CPU, whose attention over a dense cache is bound by memory.
Hardware cpu_hardware() { return parse_hardware("cpu:20:100"); }

KvChoice choose(const char* kind, const PlannedModel& model, const char* plan, int ranks,
                const KvDemand& demand, const Hardware& hardware = cpu_hardware(),
                const char* latents = "replicated") {
  return choose_kv_forms({kind, latents}, model, *make_plan(plan, model.shape, ranks), hardware,
                         parse_link_model("nvlink"), demand);
}

KvDemand demand_of(std::uint64_t bytes) {
  KvDemand demand;
  demand.context = 512;
  demand.bytes = bytes;
  return demand;
}

TEST(KvChoice, LatentTakesAllThatCanBeAndSaysWhatCannot) {
  PlannedModel model = model_of(32, 409, true);
  model.layers[3].key.rank = 0;
  const KvChoice choice = choose("latent", model, "hidden_sharded", 2, {});
  for (std::size_t i = 0; i < 22; ++i) {
    EXPECT_EQ(choice.forms[i].k, i == 3 ? KvForm::kDense : KvForm::kRebuilt);
    EXPECT_EQ(choice.forms[i].v, KvForm::kAbsorbed);
  }
  EXPECT_EQ(choice.reason,
            "K dense in 1 layer, rebuilt in 21 layers; V absorbed; latents on each of 2 ranks: "
            "asked for");
  EXPECT_THROW(choose("latent", model, "naive", 2, {}), Error);
  EXPECT_THROW(choose("latent", model, "dense", 1, {}), Error);
  EXPECT_NO_THROW(choose("latent", model, "naive", 1, {}));
  EXPECT_THROW(choose("latent", model_of(32, 0, true), "hidden_sharded", 1, {}), Error);
}

TEST(KvChoice, AutoKeepsDenseWhatMemoryDoesNotLimit) {
  // A byte is read in the time of one operation, of which absorbed values take more.
  const Hardware slow = parse_hardware("cpu:60:60");
  const PlannedModel model = model_of(32, 409, true);
  EXPECT_EQ(choose("auto", model, "hidden_sharded", 1, demand_of(0), slow).forms,
            std::vector<KvForms>(22));
  KvDemand fixed;  // as many tokens whatever they take
  fixed.tokens = 2048;
  EXPECT_EQ(choose("auto", model, "hidden_sharded", 1, fixed, slow).forms,
            std::vector<KvForms>(22));
}

TEST(KvChoice, AutoShrinksValuesBeforeRotatedKeysWhereMemoryLimits) {
  // Dense caches hold 2 sequences of 512 tokens in 200 MB.
  const PlannedModel model = model_of(32, 409, true);
  const KvChoice choice = choose("auto", model, "hidden_sharded", 1, demand_of(200'000'000));
  for (const KvForms& forms : choice.forms) {
    EXPECT_EQ(forms.k, KvForm::kDense);
    EXPECT_EQ(forms.v, KvForm::kAbsorbed);
  }
  EXPECT_NE(choice.reason.find("K dense; V absorbed"), std::string::npos) << choice.reason;
}

TEST(KvChoice, AutoRebuildsKeysOnlyWhereThatIsFast) {
  // Tiles of a CPU multiply many tokens far faster than they make K of a block.
  const PlannedModel model = model_of(32, 409, true);
  Hardware tiles = parse_hardware("cpu:20:3000");
  tiles.attention_flops_per_s = 200e9;
  const KvDemand demand = demand_of(200'000'000);
  const KvChoice fast = choose("auto", model, "hidden_sharded", 1, demand, tiles);
  EXPECT_EQ(fast.forms[0].k, KvForm::kRebuilt);
  tiles.rebuild_flops_per_s = 100e9;
  const KvChoice slow = choose("auto", model, "hidden_sharded", 1, demand, tiles);
  EXPECT_EQ(slow.forms[0].k, KvForm::kDense);
  EXPECT_EQ(slow.forms[0].v, KvForm::kAbsorbed);
}

TEST(KvChoice, AutoAbsorbsBothWhereNothingIsRotated) {
  const PlannedModel model = model_of(32, 409, false);
  const KvChoice choice = choose("auto", model, "hidden_sharded", 1, demand_of(200'000'000));
  for (const KvForms& forms : choice.forms) {
    EXPECT_EQ(forms, (KvForms{KvForm::kAbsorbed, KvForm::kAbsorbed}));
  }
}

TEST(KvChoice, AutoNeverTakesLatentsThatAreWiderThanARanksHeads) {
  // On 8 ranks a dense side has 4 heads of 64, a latent 409 elements on every rank.
  const KvChoice choice =
      choose("auto", model_of(32, 409, false), "hidden_sharded", 8, demand_of(20'000'000));
  EXPECT_EQ(choice.forms, std::vector<KvForms>(22));
}

TEST(KvChoice, RanksDivideTheTokensWhereThatMakesRoom) {
  // In 60 MB of each of 4 ranks a replicated latent leaves room for 2 sequences.
  const PlannedModel model = model_of(32, 409, false);
  const Hardware gpu = parse_hardware("h100");
  auto latent = [&](std::uint64_t bytes, const char* latents) {
    return choose("latent", model, "hidden_sharded", 4, demand_of(bytes), gpu, latents);
  };
  const KvChoice tight = latent(60'000'000, "auto");
  for (const KvForms& forms : tight.forms) {
    EXPECT_EQ(forms, (KvForms{KvForm::kAbsorbed, KvForm::kAbsorbed, true}));
  }
  EXPECT_NE(tight.reason.find("4 ranks divide the tokens: latents asked for; so they take 8998 "
                              "bytes per token and rank"),
            std::string::npos)
      << tight.reason;
  EXPECT_NE(tight.reason.find("the other way 35992 bytes"), std::string::npos) << tight.reason;
  EXPECT_EQ(latent(60'000'000, "replicated").forms,
            latent_kv_forms(model, *make_plan("hidden_sharded", model.shape, 4), false));
  EXPECT_EQ(latent(60'000'000, "token_sharded").forms, tight.forms);
  // One rank has nobody to divide with.
  EXPECT_EQ(choose("latent", model, "hidden_sharded", 1, {}, gpu, "token_sharded").forms,
            choose("latent", model, "hidden_sharded", 1, {}, gpu, "replicated").forms);
  EXPECT_THROW(latent(0, "divided"), Error);
}

TEST(KvChoice, AutoDividesTokensWhereALatentIsWiderThanARanksHeads) {
  // As above, but each rank keeps an eighth of the tokens.
  const KvChoice choice = choose("auto", model_of(32, 409, false), "hidden_sharded", 8,
                                 demand_of(20'000'000), cpu_hardware(), "auto");
  for (const KvForms& forms : choice.forms) EXPECT_TRUE(forms.token_sharded);
  EXPECT_NE(choice.reason.find("8 ranks divide the tokens: 4499 bytes per token and rank"),
            std::string::npos)
      << choice.reason;
}

TEST(KvChoice, DividingTokensCostsAnExchangeAndWeights) {
  PlannedModel model = model_of(8, 100, false);
  auto plan = make_plan("hidden_sharded", model.shape, 4);
  const Hardware gpu = parse_hardware("h100");
  const LinkModel link = parse_link_model("nvlink");
  auto cost = [&](bool token_sharded, int context) {
    model.set_kv_forms(latent_kv_forms(model, *plan, token_sharded));
    return step_cost(model, *plan, gpu, link, {false, 8, context}, 1);
  };
  EXPECT_GT(cost(true, 64).exchanges, cost(false, 64).exchanges);
  EXPECT_GT(cost(true, 64).products, cost(false, 64).products);
  EXPECT_GT(cost(true, 64).total(), cost(false, 64).total());
  // A rank reads a quarter of the latents.
  EXPECT_LT(cost(true, 65536).attention, 0.3 * cost(false, 65536).attention);
  EXPECT_LT(cost(true, 65536).total(), cost(false, 65536).total());
  model.set_kv_forms(latent_kv_forms(model, *plan, true));
  const std::uint64_t all = most_weight_bytes(model, *plan);
  model.set_kv_forms(latent_kv_forms(model, *plan, false));
  // U of all heads instead of a quarter: of q, k and v in every layer.
  EXPECT_EQ(all - most_weight_bytes(model, *plan), 22u * 2 * (1536 * 409 + 2 * 384 * 100));
}

TEST(KvChoice, ValuesAreRebuiltWhereManyHeadsShareFewElements) {
  const KvTraits many{64, 16, true, false};
  EXPECT_EQ(latent_value_form(many, 40), KvForm::kRebuilt);  // 64 x (40 - 16) > 16 x 40
  EXPECT_EQ(latent_value_form(many, 20), KvForm::kAbsorbed);
  EXPECT_EQ(latent_key_form(many, 40), KvForm::kRebuilt);
  EXPECT_EQ(latent_key_form(many, 20), KvForm::kAbsorbed);
  const KvTraits rotary{64, 16, false, false};
  EXPECT_EQ(latent_key_form(rotary, 20), KvForm::kRebuilt);
  const KvTraits odd{1, 15, true, false};
  EXPECT_EQ(latent_key_form(odd, 4), KvForm::kRebuilt);
}

TEST(KvBreakEven, IsWhereDecodingTakesAsLongAsWithADenseCache) {
  const Hardware gpu = parse_hardware("h100");
  const Phase phase{false, 1, 4096};
  for (bool rotary : {false, true}) {
    const PlannedModel model = model_of(32, 1, rotary);
    auto plan = make_plan("hidden_sharded", model.shape, 1);
    const KvBreakEven even = kv_break_even(model, *plan, gpu, false);
    auto seconds = [&](int rank) {
      LayerShape layer;
      layer.key.rank = rank;
      layer.kv.k = latent_key_form(model.kv_traits(), rank);
      return attention_seconds(model, *plan, gpu, phase, layer);
    };
    const double dense = attention_seconds(model, *plan, gpu, phase, {});
    EXPECT_LE(seconds(even.k), dense);
    EXPECT_GT(seconds(even.k + 1), dense);
    // A rotated key costs 2 x 2048 operations per element of its latent, at some 200 operations in
    // the time in which a byte is read.
    EXPECT_EQ(even.k < 600, rotary);
    EXPECT_GE(even.v, 2048);
  }
}

}  // namespace
}  // namespace deinfer
