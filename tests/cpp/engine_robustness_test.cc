// Bad input and bad luck: a clear error or the right result, never a crash, a leak or a hang.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <limits>
#include <thread>

#include "base/check.h"
#include "deinfer/engine.h"
#include "expect_error.h"
#include "model/planned_model.h"
#include "rank_group_fixture.h"
#include "tiny_model.h"

namespace deinfer {
namespace {

using test::expect_error;

EngineConfig config_for(const test::TinyModel& model) {
  EngineConfig config;
  config.model = model.path();
  config.num_threads = 2;
  config.num_kv_blocks = 32;
  return config;
}

/// Runs fn, which must throw Error with `code` and a message that contains `text`.
std::vector<TokenId> generate(Engine& engine, std::vector<TokenId> prompt, int max_tokens) {
  SamplingParams params;
  params.max_tokens = max_tokens;
  params.temperature = 0;
  params.ignore_eos = true;
  engine.submit(prompt, params);
  std::vector<TokenId> tokens;
  while (engine.has_unfinished_requests()) {
    for (const RequestOutput& output : engine.step()) {
      for (TokenId token : output.outputs.at(0).new_token_ids) tokens.push_back(token);
    }
  }
  return tokens;
}

TEST(EngineRobustness, RejectsBadRequestsByValue) {
  test::TinyModel model;
  Engine engine(config_for(model));
  auto submit = [&](std::vector<TokenId> prompt, const SamplingParams& params) {
    return [&engine, prompt, params] { engine.submit(prompt, params); };
  };
  SamplingParams plain;
  constexpr auto kBad = ErrorCode::kInvalidArgument;
  expect_error(kBad, "prompt is empty", submit({}, plain));
  expect_error(kBad, "97", submit({1, 97}, plain));
  expect_error(kBad, "-1", submit({-1}, plain));
  expect_error(kBad, "300 tokens", submit(std::vector<TokenId>(300, 1), plain));
  expect_error(kBad, "256 tokens", submit(std::vector<TokenId>(256, 1), plain));
  auto with = [&](auto&& change) {
    SamplingParams params;
    change(params);
    return submit({1, 2, 3}, params);
  };
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  expect_error(kBad, "got 0", with([](auto& p) { p.max_tokens = 0; }));
  expect_error(kBad, "got -5", with([](auto& p) { p.max_tokens = -5; }));
  expect_error(kBad, "temperature", with([=](auto& p) { p.temperature = kNan; }));
  expect_error(kBad, "temperature", with([](auto& p) { p.temperature = -0.5f; }));
  expect_error(kBad, "temperature", with([](auto& p) { p.temperature = INFINITY; }));
  expect_error(kBad, "top_p", with([](auto& p) { p.top_p = 0; }));
  expect_error(kBad, "top_p", with([=](auto& p) { p.top_p = kNan; }));
  expect_error(kBad, "top_k", with([](auto& p) { p.top_k = -2; }));
  expect_error(kBad, "min_p", with([](auto& p) { p.min_p = 1.5f; }));
  expect_error(kBad, "n must", with([](auto& p) { p.n = 0; }));
  expect_error(kBad, "logprobs", with([](auto& p) { p.logprobs = -1; }));
  expect_error(kBad, "repetition_penalty", with([](auto& p) { p.repetition_penalty = 0; }));
  expect_error(kBad, "presence_penalty", with([](auto& p) { p.presence_penalty = 3; }));
  expect_error(kBad, "stop token id 1000", with([](auto& p) { p.stop_token_ids = {1000}; }));
  expect_error(kBad, "min_tokens", with([](auto& p) { p.min_tokens = 20; }));
  EXPECT_EQ(generate(engine, {1, 2, 3}, 5).size(), 5u) << "a rejected request must leave no trace";
}

TEST(EngineRobustness, RejectsBadConfigurationsByValue) {
  test::TinyModel model;
  auto with = [&](auto&& change) {
    return [&] {
      EngineConfig config = config_for(model);
      change(config);
      Engine engine(config);
    };
  };
  constexpr auto kBad = ErrorCode::kInvalidArgument;
  expect_error(kBad, "nowhere", with([](auto& c) { c.model = "/nowhere"; }));
  expect_error(kBad, "int4", with([](auto& c) { c.dtype = "int4"; }));
  expect_error(kBad, "tpu", with([](auto& c) { c.device = "tpu"; }));
  expect_error(ErrorCode::kUnsupported, "cuda", with([](auto& c) { c.device = "cuda"; }));
  expect_error(kBad, "got 0", with([](auto& c) { c.tensor_parallel_size = 0; }));
  expect_error(kBad, "7", with([](auto& c) { c.tensor_parallel_size = 7; }));  // 6 heads
  expect_error(kBad, "pigeon", with([](auto& c) {
                 c.tensor_parallel_size = 2;
                 c.emulated_link = "pigeon";
               }));
  expect_error(kBad, "ring", with([](auto& c) { c.tensor_parallel_plan = "ring"; }));
  expect_error(kBad, "8", with([](auto& c) { c.block_size = 8; }));
  expect_error(kBad, "lottery", with([](auto& c) { c.scheduling_policy = "lottery"; }));
  expect_error(kBad, "1000", with([](auto& c) { c.max_model_len = 1000; }));
  expect_error(kBad, "max_num_seqs", with([](auto& c) { c.max_num_seqs = 0; }));
  expect_error(kBad, "max_num_batched_tokens", with([](auto& c) { c.max_num_batched_tokens = 0; }));
  expect_error(kBad, "10 is less than one KV block", with([](auto& c) {
                 c.num_kv_blocks = 0;
                 c.kv_cache_bytes = 10;
               }));
}

TEST(EngineRobustness, RejectsConfigsThatLie) {
  constexpr auto kBad = ErrorCode::kInvalidArgument;
  auto with = [&](const char* key, const nlohmann::json& value) {
    return [=] {
      test::TinyModel model;
      model.json()[key] = value;
      model.write();
      Engine engine(config_for(model));
    };
  };
  expect_error(kBad, "[97, 64]", with("hidden_size", 64));
  expect_error(kBad, "hidden_size", with("hidden_size", -48));
  expect_error(kBad, "hidden_size", with("hidden_size", "48"));
  expect_error(kBad, "vocab_size", with("vocab_size", 99999999999));
  expect_error(kBad, "[1000, 48]", with("vocab_size", 1000));
  expect_error(kBad, "model.layers.2", with("num_hidden_layers", 3));
  expect_error(kBad, "unexpected tensor model.layers.1", with("num_hidden_layers", 1));
  expect_error(kBad, "num_key_value_heads=4", with("num_key_value_heads", 4));
  expect_error(kBad, "head_dim=7", with("head_dim", 7));
  expect_error(ErrorCode::kUnsupported, "mamba", with("model_type", "mamba"));
  expect_error(ErrorCode::kUnsupported, "gelu", with("hidden_act", "gelu"));
  expect_error(ErrorCode::kUnsupported, "spiral",
               with("rope_scaling", {{"rope_type", "spiral"}, {"factor", 2.0}}));
  expect_error(kBad, "low_rank.ranks says dense, the tensors say 7",
               with("low_rank", {{"version", 1}, {"ranks", nlohmann::json::object()}}));
  expect_error(ErrorCode::kUnsupported, "version", with("low_rank", {{"version", 9}}));
}

TEST(EngineRobustness, RejectsBrokenWeightFiles) {
  test::TinyModel model;
  auto size = std::filesystem::file_size(model.weights_file());
  for (double part : {0.0, 0.001, 0.01, 0.3, 0.9, 0.9999}) {
    std::filesystem::resize_file(model.weights_file(),
                                 static_cast<std::uintmax_t>(static_cast<double>(size) * part));
    expect_error(ErrorCode::kInvalidArgument, "model.safetensors",
                 [&] { Engine engine(config_for(model)); });
    model.write();
  }
  std::filesystem::remove(model.weights_file());
  expect_error(ErrorCode::kInvalidArgument, "model.safetensors",
               [&] { Engine engine(config_for(model)); });
  model.write();
  std::ofstream(std::filesystem::path(model.path()) / "config.json") << "{ \"model_type\": ";
  expect_error(ErrorCode::kInvalidArgument, "config.json",
               [&] { Engine engine(config_for(model)); });
}

TEST(EngineRobustness, RefusesWhatTheKvPoolCanNeverHold) {
  test::TinyModel model;
  EngineConfig config = config_for(model);
  config.num_kv_blocks = 4;  // 64 tokens
  Engine engine(config);
  SamplingParams params;
  params.max_tokens = 60;
  expect_error(ErrorCode::kOutOfMemory, "the pool has 4",
               [&] { engine.submit(std::vector<TokenId>(10, 1), params); });
  EXPECT_EQ(generate(engine, std::vector<TokenId>(10, 1), 54).size(), 54u);
}

TEST(EngineRobustness, StopsAtTheEndOfTheContext) {
  test::TinyModel model;
  Engine engine(config_for(model));
  SamplingParams params;
  params.max_tokens = std::nullopt;
  params.ignore_eos = true;
  engine.submit(std::vector<TokenId>(250, 3), params);
  std::size_t generated = 0;
  FinishReason reason = FinishReason::kNone;
  while (engine.has_unfinished_requests()) {
    for (const RequestOutput& output : engine.step()) {
      generated += output.outputs.at(0).new_token_ids.size();
      reason = output.outputs.at(0).finish_reason;
    }
  }
  EXPECT_EQ(generated, 6u);
  EXPECT_EQ(reason, FinishReason::kLength);
}

TEST(EngineRobustness, AbortsInTheMiddle) {
  test::TinyModel model;
  Engine engine(config_for(model));
  SamplingParams params;
  params.max_tokens = 100;
  params.ignore_eos = true;
  params.n = 2;
  std::vector<TokenId> prompt = {5, 6, 7};
  RequestId kept = engine.submit(prompt, params);
  RequestId dropped = engine.submit(prompt, params);
  for (int i = 0; i < 10; ++i) engine.step();
  EXPECT_TRUE(engine.abort(dropped));
  EXPECT_FALSE(engine.abort(dropped));
  EXPECT_TRUE(engine.abort(kept, 1));
  EXPECT_FALSE(engine.abort(kept, 1));
  EXPECT_FALSE(engine.abort(12345));
  int aborted = 0;
  std::size_t tokens = 0;
  while (engine.has_unfinished_requests()) {
    for (const RequestOutput& output : engine.step()) {
      for (const SequenceOutput& sample : output.outputs) {
        aborted += sample.finish_reason == FinishReason::kAbort;
        if (output.request_id == kept && sample.index == 0) tokens += sample.new_token_ids.size();
      }
    }
  }
  EXPECT_EQ(aborted, 3);
  EXPECT_EQ(tokens, 90u);
  EXPECT_TRUE(engine.step().empty());
  EXPECT_EQ(engine.stats().num_running, 0);
  EXPECT_EQ(engine.stats().free_kv_blocks, 32);
}

TEST(EngineRobustness, StatsFollowAStepThatOnlyAborts) {
  test::TinyModel model;
  Engine engine(config_for(model));
  SamplingParams params;
  params.ignore_eos = true;
  RequestId id = engine.submit(std::vector<TokenId>{1, 2}, params);
  engine.step();
  EXPECT_EQ(engine.stats().num_running, 1);
  engine.abort(id);
  engine.step();
  EXPECT_EQ(engine.stats().num_running, 0);
  EXPECT_FALSE(engine.has_unfinished_requests());
}

TEST(EngineRobustness, TakesRequestsAndAbortsFromOtherThreads) {
  test::TinyModel model;
  Engine engine(config_for(model));
  std::atomic<int> submitted = 0;
  std::vector<std::thread> clients;
  for (int client = 0; client < 3; ++client) {
    clients.emplace_back([&, client] {
      for (int i = 0; i < 20; ++i) {
        SamplingParams params;
        params.max_tokens = 8;
        std::vector<TokenId> prompt(static_cast<std::size_t>(1 + (i + client) % 9), 4);
        RequestId id = engine.submit(prompt, params);
        if (i % 4 == 0) engine.abort(id);
        ++submitted;
        std::this_thread::yield();
      }
    });
  }
  int finished = 0;
  while (submitted < 60 || engine.has_unfinished_requests()) {
    for (const RequestOutput& output : engine.step()) finished += output.finished;
  }
  for (std::thread& client : clients) client.join();
  while (engine.has_unfinished_requests()) {
    for (const RequestOutput& output : engine.step()) finished += output.finished;
  }
  EXPECT_EQ(finished, 60);
}

TEST(EngineRobustness, TwoEnginesInOneProcess) {
  test::TinyModel first_model({}, 1);
  test::TinyModel second_model({}, 2);
  Engine first(config_for(first_model));
  Engine second(config_for(second_model));
  std::vector<TokenId> alone_first = generate(first, {1, 2, 3}, 40);
  std::vector<TokenId> alone_second = generate(second, {1, 2, 3}, 40);
  EXPECT_NE(alone_first, alone_second);
  std::vector<TokenId> together_first;
  std::thread other([&] { together_first = generate(first, {1, 2, 3}, 40); });
  EXPECT_EQ(generate(second, {1, 2, 3}, 40), alone_second);
  other.join();
  EXPECT_EQ(together_first, alone_first);
}

TEST(EngineRobustness, AFailingWorkerThreadReleasesTheOthers) {
  test::TinyModel model;
  EngineConfig config = config_for(model);
  ModelConfig parsed = read_model_config(config.model);
  RankShare share(make_step_plans("naive", model_shape(parsed), 1), 0);
  CpuWorker worker(config, parsed, share, {}, {}, make_single_communicator(0), 3, 256, {});
  worker.allocate_kv_cache(4);
  std::int32_t blocks[] = {0};
  Batch batch;
  batch.token_ids = {1, 2};
  batch.positions = {0, 1};
  batch.slots = {{0, 0}, {0, 1}};
  batch.sequences = {{0, 2, 0, blocks}};
  batch.logit_rows = {1};
  for (int failing : {0, 1, 2}) {
    expect_error(ErrorCode::kInternal, "thread " + std::to_string(failing), [&] {
      test::execute(worker, batch, [&](TeamMember& member, int, int, float*) {
        if (member.id() == failing) fail(ErrorCode::kInternal, "thread ", failing, " failed");
      });
    });
  }
  int rows = 0;
  test::execute(worker, batch, [&](TeamMember& member, int, int count, float* logits) {
    if (member.id() == 0) rows = std::isfinite(logits[0]) ? count : -1;
  });
  EXPECT_EQ(rows, 1) << "the worker stays usable";
}

}  // namespace
}  // namespace deinfer
