// Tensor-parallel ranks on one CUDA device: every plan against the CPU engine.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <functional>

#include "cuda_engine_fixture.h"
#include "cuda_fixture.h"
#include "plan/tensor_parallel_plan.h"
#include "tiny_kinds.h"

namespace deinfer {
namespace {

using test::Answer;
using test::config_for;
using test::generate;
using test::greedy;
using test::Kind;
using test::Request;

constexpr int kVocabulary = 97;

class CudaRanks : public test::CudaDeviceTest {};

/// What an environment variable says, for a while.
class Setting {
 public:
  Setting(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Setting() { unsetenv(name_); }

 private:
  const char* name_;
};

/// Every kind of norm, position, MLP and linear, and dimensions that no number of ranks divides:
/// `heads` of them for at least as many ranks.
std::vector<Kind> kinds(int heads) {
  std::vector<Kind> all;
  for (std::string family : {"llama", "opt", "qwen3", "olmo2", "gemma2"}) {
    test::TinyConfig config;
    config.family = family;
    config.window = 11;
    config.bfloat16 = true;
    config.tied = family == "opt" || family == "gemma2";
    config.heads = heads;
    config.head_dim = family == "opt" ? 48 / heads : 8;
    config.all_low_rank = family == "opt" || family == "olmo2";
    config.biases = family == "llama";
    config.position_mean = 2.0f;
    all.push_back({family, config});
  }
  return all;
}

EngineConfig ranks_for(const test::TinyModel& model, int size, std::string_view plan) {
  EngineConfig config = config_for(model, "cuda");
  config.tensor_parallel_size = size;
  config.tensor_parallel_plan = plan;
  return config;
}

double root_mean_square(const float* a, const float* b, std::size_t count) {
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum / static_cast<double>(count));
}

/// Logits of a prompt and of generated tokens, by engines that are to be compared.
class Comparison {
 public:
  explicit Comparison(const test::TinyModel& model) {
    request_ = greedy(37, 1, 1);
    request_.params.prompt_logits = true;
    EngineConfig config = config_for(model, "cpu");
    for (bool multiplied_out : {false, true}) {
      config.tensor_parallel_plan = multiplied_out ? "dense" : "auto";
      Engine engine(config);
      rounded_[multiplied_out] = generate(engine, {request_})[0].prompt_logits;
    }
    config.tensor_parallel_plan = "auto";
    config.dtype = "float32";
    exact_.emplace(config);
    logits_ = generate(*exact_, {request_})[0].prompt_logits;
  }

  /// Prefill: not much farther from fp32 than the CPU's bf16. Decode: tokens that are the most
  /// likely ones, or nearly.
  void check(Engine& engine) {
    const std::vector<float>& rounded = rounded_[engine.model_info().decode_plan == "dense"];
    std::vector<Request> requests = {request_, greedy(5, 2, 4), greedy(12, 3, 4)};
    const std::vector<Answer> got = generate(engine, requests);
    const std::vector<float>& mine = got[0].prompt_logits;
    ASSERT_EQ(mine.size(), logits_.size());
    const double own = root_mean_square(mine.data(), logits_.data(), mine.size());
    const double cpu = root_mean_square(rounded.data(), logits_.data(), mine.size());
    EXPECT_LE(own, 1.5 * cpu + 1e-3) << "farther from fp32 than the CPU's bf16";
    for (std::size_t i = 1; i < requests.size(); ++i) {
      Request all = requests[i];
      all.prompt.insert(all.prompt.end(), got[i].tokens.begin(), got[i].tokens.end());
      all.params.max_tokens = 1;
      all.params.prompt_logits = true;
      const std::vector<float> logits = generate(*exact_, {all})[0].prompt_logits;
      for (std::size_t t = 0; t < got[i].tokens.size(); ++t) {
        const float* row = logits.data() + (requests[i].prompt.size() - 1 + t) * kVocabulary;
        const float best = *std::max_element(row, row + kVocabulary);
        EXPECT_GE(row[got[i].tokens[t]], best - 6 * cpu - 0.02) << "token " << t;
      }
    }
  }

 private:
  Request request_;
  std::optional<Engine> exact_;
  std::vector<float> logits_;      // in fp32
  std::vector<float> rounded_[2];  // in bf16; with the factors multiplied out
};

TEST_F(CudaRanks, EveryPlanComputesTheLogitsOfTheCpuEngine) {
  for (int heads : {4, 6, 8}) {
    for (const Kind& kind : kinds(heads)) {
      if (kind.name == "opt" && heads == 8) continue;
      test::TinyModel model(kind.config);
      Comparison comparison(model);
      for (std::string_view plan : plan_names()) {
        // 4 heads: 4 ranks, fewer kv heads; 6: 1 to 3; 8: as many ranks as heads.
        const int size = heads == 6 ? (kind.name == "llama" ? 2 : 3) : heads;
        if (heads == 8 && kind.name != "llama" && kind.name != "qwen3") continue;
        SCOPED_TRACE(kind.name + ", " + std::to_string(size) + " ranks, " + std::string(plan));
        Engine engine(ranks_for(model, size, plan));
        comparison.check(engine);
      }
    }
  }
}

}  // namespace
}  // namespace deinfer
