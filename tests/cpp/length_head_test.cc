// The length head: what it reads, what it computes, and that whatever it says changes no token.
#include "engine/length_head.h"

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <numeric>
#include <random>

#include "deinfer/engine.h"
#include "deinfer/error.h"
#include "tiny_model.h"

namespace deinfer {
namespace {

constexpr int kHidden = 48;  // of the tiny model
constexpr int kLayers = 2;
constexpr int kBins = 4;

/// An artifact whose numbers can be changed before write().
struct Artifact {
  nlohmann::json json = {
      {"format", "deinfer.length_head"},
      {"version", 1},
      {"hidden_size", kHidden},
      {"num_layers", kLayers},
      {"layer", 1},
      {"refine_every", 4},
      {"lengths", {10.0, 20.0, 40.0, 80.0}},
      {"weights", "head.safetensors"},
      {"stages",
       {{"prompt",
         {{"temperature", 2.0}, {"levels_from", {0, 0.5, 1}}, {"levels_to", {0, 0.7, 1}}}},
        {"refined", {{"temperature", 1.0}, {"levels_from", {0, 1}}, {"levels_to", {0, 1}}}}}}};
  std::map<std::string, std::pair<std::vector<int>, std::vector<float>>> tensors;

  explicit Artifact(std::uint32_t seed = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    auto add = [&](const std::string& name, std::vector<int> shape, float scale) {
      std::size_t size = 1;
      for (int n : shape) size *= static_cast<std::size_t>(n);
      std::vector<float> values(size);
      for (float& value : values) value = scale * normal(random);
      tensors[name] = {std::move(shape), std::move(values)};
    };
    for (auto [stage, inputs] :
         {std::pair{"prompt", kHidden}, {"refined", 2 * kHidden + 1 + kBins}}) {
      std::string name = stage;
      add(name + ".shift", {inputs}, 1.0f);
      add(name + ".scale", {inputs}, 1.0f);
      bool hidden = name == "refined";
      if (hidden) {
        add(name + ".hidden.weight", {7, inputs}, 0.2f);
        add(name + ".hidden.bias", {7}, 0.2f);
      }
      add(name + ".output.weight", {kBins, hidden ? 7 : inputs}, 0.3f);
      add(name + ".output.bias", {kBins}, 0.5f);
    }
  }

  std::filesystem::path write(const std::filesystem::path& directory) const {
    nlohmann::json header;
    std::string data;
    for (const auto& [name, tensor] : tensors) {
      std::size_t begin = data.size();
      data.append(reinterpret_cast<const char*>(tensor.second.data()),
                  tensor.second.size() * sizeof(float));
      header[name] = {
          {"dtype", "F32"}, {"shape", tensor.first}, {"data_offsets", {begin, data.size()}}};
    }
    std::string text = header.dump();
    auto length = static_cast<std::uint64_t>(text.size());
    std::ofstream file(directory / "head.safetensors", std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), sizeof(length));
    file << text << data;
    std::ofstream(directory / "head.json") << json.dump();
    return directory / "head.json";
  }
};

/// The stage in float64, as its definition reads.
std::vector<double> reference(const Artifact& artifact, const std::string& stage,
                              const std::vector<double>& input, int generated,
                              std::vector<double>& raw) {
  auto values = [&](const std::string& name) { return artifact.tensors.at(stage + name).second; };
  std::vector<double> x(input.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = (input[i] - values(".shift")[i]) * values(".scale")[i];
  }
  auto linear = [&](const std::string& name, const std::vector<double>& in) {
    std::vector<double> out;
    std::vector<float> weight = values(name + ".weight");
    for (float bias : values(name + ".bias")) {
      double sum = bias;
      for (std::size_t i = 0; i < in.size(); ++i) sum += in[i] * weight[out.size() * in.size() + i];
      out.push_back(sum);
    }
    return out;
  };
  if (stage == "refined") {
    x = linear(".hidden", x);
    for (double& value : x) value = std::max(value, 0.0);
  }
  std::vector<double> logits = raw = linear(".output", x);
  const nlohmann::json& entry = artifact.json["stages"][stage];
  auto lengths = artifact.json["lengths"].get<std::vector<double>>();
  double sum = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    bool open = lengths[i] > generated || i + 1 == logits.size();
    logits[i] = open ? std::exp(logits[i] / entry["temperature"].get<double>()) : 0.0;
    sum += logits[i];
  }
  double below = 0.0;
  double level = 0.0;
  for (double& value : logits) {
    below += value / sum;
    double next = below;
    if (stage == "prompt") next = below < 0.5 ? 1.4 * below : 0.7 + 0.6 * (below - 0.5);
    value = next - level;
    level = next;
  }
  return logits;
}

TEST(LengthHead, ComputesWhatItsDefinitionSays) {
  test::TemporaryDirectory directory;
  Artifact artifact;
  LengthHead head(artifact.write(directory.path()), kHidden, kLayers);
  EXPECT_EQ(head.layer(), 1);
  EXPECT_EQ(head.refine_every(), 4);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> prior;
  std::vector<float> nothing(kHidden);
  EXPECT_FALSE(head.predict(nothing, nothing, 4, prior).known());  // the first stage comes first
  std::vector<double> expected_prior;
  for (int generated : {0, 4, 12, 40, 1000, 0, 8}) {
    std::vector<float> state(kHidden), mean(kHidden);
    for (float& value : state) value = normal(random);
    for (float& value : mean) value = normal(random);
    std::vector<double> input(state.begin(), state.end());
    if (generated > 0) {
      input.insert(input.end(), mean.begin(), mean.end());
      input.push_back(std::log(generated));
      input.insert(input.end(), expected_prior.begin(), expected_prior.end());
    }
    std::vector<double> logits;
    std::vector<double> expected =
        reference(artifact, generated == 0 ? "prompt" : "refined", input, generated, logits);
    LengthDistribution belief = head.predict(state, mean, generated, prior);
    if (generated == 0) {
      double center = std::accumulate(logits.begin(), logits.end(), 0.0) / kBins;
      for (double& logit : logits) logit -= center;
      expected_prior = logits;
    }
    ASSERT_EQ(belief.num_bins(), kBins);
    for (std::size_t i = 0; i < kBins; ++i) {
      EXPECT_NEAR(belief.probabilities()[i], expected[i], 1e-5) << generated << " " << i;
    }
  }
}

TEST(LengthHead, RefusesWhatItCannotRead) {
  test::TemporaryDirectory directory;
  auto expect_error = [&](const Artifact& artifact, const std::string& part) {
    auto path = artifact.write(directory.path());
    try {
      LengthHead head(path, kHidden, kLayers);
      ADD_FAILURE() << "nothing was thrown for " << part;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  auto with = [](auto change) {
    Artifact artifact;
    change(artifact);
    return artifact;
  };
  expect_error(with([](Artifact& a) { a.json["format"] = "other"; }), "deinfer.length_head");
  expect_error(with([](Artifact& a) { a.json["hidden_size"] = 64; }),
               "was trained for hidden_size=64, num_layers=2; the model has 48 and 2");
  expect_error(with([](Artifact& a) { a.json["layer"] = 3; }), "layer=3 is outside [0, 2]");
  expect_error(with([](Artifact& a) { a.json.erase("layer"); }), "\"layer\"");
  expect_error(with([](Artifact& a) { a.json["refine_every"] = 0; }), "refine_every");
  expect_error(with([](Artifact& a) { a.json["lengths"] = {3.0, 1.0}; }), "ascending");
  expect_error(with([](Artifact& a) { a.json["lengths"] = std::vector<float>(17, 1.0f); }), "17");
  expect_error(with([](Artifact& a) { a.json["lengths"] = {1.0, 2.0}; }), "4 outputs for 2 bins");
  expect_error(with([](Artifact& a) { a.json["stages"]["prompt"]["levels_to"] = {0, 1}; }),
               "levels of stage prompt");
  expect_error(with([](Artifact& a) { a.tensors.erase("prompt.shift"); }),
               "prompt.shift is missing");
  expect_error(
      with([](Artifact& a) { a.tensors["prompt.output.weight"].first = {kHidden, kBins}; }),
      "prompt.output.weight is F32 [48, 4], not F32 [4, 48]");
  EXPECT_THROW(LengthHead(directory.path() / "none.json", kHidden, kLayers), Error);
}

/// Tokens of all requests, and the engine's counters.
std::pair<std::vector<std::vector<TokenId>>, EngineStats> run(const EngineConfig& config) {
  Engine engine(config);
  std::mt19937 random(5);
  std::map<RequestId, std::size_t> places;
  std::vector<std::vector<TokenId>> answers(12);
  for (std::size_t i = 0; i < answers.size(); ++i) {
    SamplingParams params;
    params.max_tokens = 10 + static_cast<int>(random() % 30);
    params.seed = i;
    std::vector<TokenId> prompt(1 + random() % 20);
    for (TokenId& token : prompt) token = static_cast<TokenId>(random() % 97);
    const float bad = std::numeric_limits<float>::quiet_NaN();
    LengthBelief belief;
    if (i % 3 == 1) belief = {{bad, 5.0f}, {0.5f, 0.5f}};
    if (i % 3 == 2) belief = {{1e9f, 1.0f}, {0.0f, 1.0f}};
    places[engine.submit(prompt, params, belief)] = i;
  }
  for (int step = 0; engine.has_unfinished_requests() && step < 2000; ++step) {
    for (const RequestOutput& output : engine.step()) {
      for (const SequenceOutput& sample : output.outputs) {
        auto& answer = answers[places.at(output.request_id)];
        answer.insert(answer.end(), sample.new_token_ids.begin(), sample.new_token_ids.end());
      }
    }
  }
  EXPECT_FALSE(engine.has_unfinished_requests());
  return {answers, engine.stats()};
}

TEST(LengthHead, WhateverItSaysTheTokensStay) {
  test::TinyModel model;
  test::TemporaryDirectory directory;
  EngineConfig config;
  config.model = model.path();
  config.num_kv_blocks = 24;
  config.num_threads = 1;
  auto [expected, plain] = run(config);
  EXPECT_EQ(plain.length_predictions, 0);
  const float values[] = {std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity(), 0.0f, -1e30f};
  for (float value : values) {
    for (const char* name : {"prompt.output.weight", "refined.hidden.weight", "prompt.scale"}) {
      Artifact artifact;
      for (float& number : artifact.tensors.at(name).second) number = value;
      config.length_predictor = artifact.write(directory.path()).string();
      auto [answers, stats] = run(config);
      EXPECT_EQ(answers, expected) << name << " = " << value;
      EXPECT_GT(stats.length_predictions, 12);
    }
  }
}

TEST(LengthHead, BeliefsThatFitNoDistributionAreRefused) {
  test::TinyModel model;
  EngineConfig config;
  config.model = model.path();
  config.num_kv_blocks = 8;
  Engine engine(config);
  std::vector<TokenId> prompt{1, 2};
  EXPECT_THROW(engine.submit(prompt, {}, {{1.0f, 2.0f}, {1.0f}}), Error);
  EXPECT_THROW(engine.submit(prompt, {}, {std::vector<float>(17), std::vector<float>(17)}), Error);
  EXPECT_FALSE(engine.has_unfinished_requests());
}

TEST(LengthHead, PredictorsThatDoNotExistAreRefused) {
  test::TinyModel model;
  EngineConfig config;
  config.model = model.path();
  config.num_kv_blocks = 8;
  for (const char* name : {"clairvoyant", "hidden_state", "nowhere.json"}) {
    config.length_predictor = name;
    try {
      Engine engine(config);
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace deinfer
