// The CUDA engine against the CPU engine.
#include <gtest/gtest.h>

#include <cmath>

#include "base/check.h"
#include "cuda_engine_fixture.h"
#include "cuda_fixture.h"
#include "kernels/cuda/sampling.h"
#include "tiny_kinds.h"

namespace deinfer {
namespace {

using test::Answer;
using test::config_for;
using test::generate;
using test::greedy;
using test::Kind;
using test::Request;
using test::root_mean_square;

class CudaEngine : public test::CudaDeviceTest {};

/// So many logprobs make a row the host sampler's.
constexpr int kSampledOnTheHost = cuda::kMaxReported + 1;

/// The log-probabilities of a request's tokens, in order.
using Report = std::vector<std::vector<TokenLogprob>>;

TEST_F(CudaEngine, ComputesTheLogitsOfTheCpuEngine) {
  for (const Kind& kind : test::family_kinds()) {
    SCOPED_TRACE(kind.name);
    test::TinyModel model(kind.config);
    Request request = greedy(40, 1, 1);
    request.params.prompt_logits = true;
    std::vector<std::vector<float>> logits;
    for (auto [device, dtype] :
         {std::pair{"cuda", "bfloat16"}, {"cpu", "bfloat16"}, {"cpu", "float32"}}) {
      EngineConfig config = config_for(model, device);
      config.dtype = dtype;
      Engine engine(config);
      logits.push_back(generate(engine, {request})[0].prompt_logits);
    }
    ASSERT_EQ(logits[0].size(), std::size_t{40} * 97);
    const double own = root_mean_square(logits[0], logits[2]);
    const double cpu = root_mean_square(logits[1], logits[2]);
    EXPECT_LE(own, 1.4 * cpu + 1e-3) << "farther from fp32 than the CPU's bf16";
    EXPECT_LE(root_mean_square(logits[0], logits[1]), 2 * cpu + 1e-3);
  }
}

/// Greedy tokens are the CPU's, or the first other one is a tie: both engines give the two tokens
/// nearly the same probability.
TEST_F(CudaEngine, GeneratesTheTokensOfTheCpuEngine) {
  for (const Kind& kind : test::family_kinds()) {
    SCOPED_TRACE(kind.name);
    test::TinyModel model(kind.config);
    std::vector<Request> requests;
    for (int i = 0; i < 4; ++i) requests.push_back(greedy(3 + 9 * i, i, 6));
    Engine cuda(config_for(model, "cuda")), cpu(config_for(model, "cpu"));
    const std::vector<Answer> got = generate(cuda, requests);
    const std::vector<Answer> expected = generate(cpu, requests);
    int equal = 0;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      ASSERT_EQ(got[i].tokens.size(), 6u);
      const auto [mine, theirs] =
          std::mismatch(got[i].tokens.begin(), got[i].tokens.end(), expected[i].tokens.begin());
      equal += mine == got[i].tokens.end() ? 1 : 0;
      if (mine == got[i].tokens.end()) continue;
      Request request = requests[i];
      request.prompt.insert(request.prompt.end(), got[i].tokens.begin(), mine);
      request.params.max_tokens = 1;
      request.params.prompt_logits = true;
      const std::vector<float> logits = generate(cpu, {request})[0].prompt_logits;
      const float* last = logits.data() + (request.prompt.size() - 1) * 97;
      EXPECT_NEAR(last[*mine], last[*theirs], 0.06 * std::abs(last[*theirs]) + 0.05)
          << "request " << i;
    }
    EXPECT_GE(equal, 2);
  }
}

class CudaEngineOfType : public CudaEngine, public testing::WithParamInterface<const char*> {};

TEST_P(CudaEngineOfType, ATokenHasTheSameBitsInAnyBatch) {
  test::TinyConfig config;
  config.bfloat16 = true;
  config.all_low_rank = true;
  test::TinyModel model(config);
  std::vector<Request> requests;
  for (int i = 0; i < 12; ++i) {
    Request request = greedy(2 + 11 * i % 70, i, 6 + i % 3);
    if (i % 3 == 1) {
      request.params.temperature = 0.8f;
      request.params.top_p = 0.9f;
      request.params.logprobs = i % 2 == 0 ? 2 : kSampledOnTheHost;
    }
    requests.push_back(request);
  }
  EngineConfig engine_config = config_for(model, "cuda");
  engine_config.dtype = GetParam();
  Engine together(engine_config), alone(engine_config);
  const std::vector<Answer> all = generate(together, requests, true);
  EXPECT_EQ(generate(alone, requests, false), all);
  engine_config.enable_prefix_caching = false;
  engine_config.max_num_batched_tokens = 32;
  engine_config.num_kv_blocks = 14;
  Engine crowded(engine_config);
  EXPECT_EQ(generate(crowded, requests, true), all) << "other chunks, preemptions";
}

INSTANTIATE_TEST_SUITE_P(Weights, CudaEngineOfType, testing::Values("bfloat16", "int8"),
                         [](const auto& of) { return std::string(of.param); });

/// Whatever is asked for, a row that the device samples has the tokens and reports of the host; of
/// several ranks the first samples.
TEST_F(CudaEngine, SamplesAsTheHostDoes) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  std::vector<Request> all;
  for (int i = 0; i < 12; ++i) {
    Request request = greedy(5 + 7 * i % 40, i, 7);
    SamplingParams& params = request.params;
    params.seed = static_cast<std::uint64_t>(i);
    params.logprobs = i % 4;
    params.temperature = i % 5 == 4 ? 0.0f : 0.5f + 0.2f * static_cast<float>(i);
    if (i % 2 == 1) params.top_p = 0.8f;
    if (i % 3 == 1) params.top_k = 20;
    if (i % 4 == 2) params.min_p = 0.1f;
    if (i % 3 == 2) params.repetition_penalty = 1.3f;
    if (i % 4 == 1) params.frequency_penalty = 0.8f;
    if (i % 5 == 2) params.presence_penalty = -0.4f;
    if (i % 6 == 3) {
      params.ignore_eos = false;
      params.min_tokens = 5;
      params.stop_token_ids = {3, 4, 5, 6, 7, 8, 9};
    }
    if (i % 3 == 0) params.prompt_logprobs = 2;
    all.push_back(request);
  }
  const auto run = [&](int ranks, const std::vector<Request>& requests) {
    EngineConfig engine_config = config_for(model, "cuda");
    engine_config.tensor_parallel_size = ranks;
    Engine engine(engine_config);
    std::map<RequestId, std::size_t> places;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      places[engine.submit(requests[i].prompt, requests[i].params)] = i;
    }
    std::vector<Report> reports(requests.size());
    while (engine.has_unfinished_requests()) {
      for (const RequestOutput& output : engine.step()) {
        Report& report = reports[places.at(output.request_id)];
        for (const auto& entries : output.prompt_logprobs) report.push_back(entries);
        for (const SequenceOutput& sample : output.outputs) {
          for (const auto& entries : sample.logprobs) report.push_back(entries);
        }
      }
    }
    return reports;
  };
  std::vector<Request> by_the_host = all;
  for (Request& request : by_the_host) {
    request.params.logprobs = kSampledOnTheHost;
    if (request.params.prompt_logprobs) request.params.prompt_logprobs = kSampledOnTheHost;
  }
  for (int ranks : {1, 2}) {
    const std::vector<Report> device = run(ranks, all);
    const std::vector<Report> host = run(ranks, by_the_host);
    for (std::size_t i = 0; i < all.size(); ++i) {
      SCOPED_TRACE(str_cat(ranks, " ranks, request ", i));
      ASSERT_EQ(device[i].size(), host[i].size());
      ASSERT_GE(device[i].size(), 5u);
      for (std::size_t j = 0; j < device[i].size(); ++j) {
        // The chosen token, and of the others as many as were asked for.
        ASSERT_LT(device[i][j].size(), host[i][j].size());
        for (std::size_t k = 0; k < device[i][j].size(); ++k) {
          EXPECT_EQ(device[i][j][k].token, host[i][j][k].token);
          EXPECT_EQ(device[i][j][k].logprob, host[i][j][k].logprob);
          EXPECT_EQ(device[i][j][k].rank, host[i][j][k].rank);
        }
      }
    }
  }
}

TEST_F(CudaEngine, TellsHiddenStates) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  Request request = greedy(9, 1, 3);
  request.params.hidden_states = 1;
  std::vector<std::vector<float>> states;
  for (const char* device : {"cuda", "cpu"}) {
    Engine engine(config_for(model, device));
    engine.submit(request.prompt, request.params);
    std::vector<float> last;
    while (engine.has_unfinished_requests()) {
      for (RequestOutput& output : engine.step()) {
        for (SequenceOutput& sample : output.outputs) {
          if (!sample.hidden_states.empty()) last = sample.hidden_states;
        }
      }
    }
    states.push_back(last);
  }
  ASSERT_EQ(states[0].size(), std::size_t{2 * 3 * 48});
  EXPECT_LE(root_mean_square(states[0], states[1]), 0.02);
}

TEST_F(CudaEngine, DescribesItself) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  EngineConfig engine_config = config_for(model, "auto");
  engine_config.dtype = "auto";
  engine_config.num_kv_blocks = 0;
  Engine engine(engine_config);
  const ModelInfo& info = engine.model_info();
  EXPECT_EQ(info.dtype, "bfloat16");
  EXPECT_EQ(info.num_kv_blocks, 16 * 16) << "what all seats can fill";
  engine_config.device = "cpu";
  Engine cpu(engine_config);
  EXPECT_EQ(info.parameters, cpu.model_info().parameters);
  EXPECT_EQ(info.lowrank_matrices, cpu.model_info().lowrank_matrices);
  EXPECT_EQ(info.dense_matrices, cpu.model_info().dense_matrices);
}

}  // namespace
}  // namespace deinfer
