// The CUDA engine, where only the emulated device can tell: what it does with threads, graphs,
// memory and failures.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>

#include "cuda_engine_fixture.h"
#include "expect_error.h"
#include "scheduler/event_log_file.h"
#include "thread_order.h"

namespace deinfer {
namespace {

using test::expect_error;

using test::Answer;
using test::config_for;
using test::generate;
using test::greedy;
using test::Request;

TEST(CudaEngineDevice, TheOrderOfThreadsDoesNotMatter) {
  test::TinyConfig config;
  config.bfloat16 = true;
  config.family = "qwen3";
  test::TinyModel model(config);
  const std::vector<Request> requests = {greedy(20, 1, 3), greedy(5, 2, 4)};
  std::vector<std::vector<Answer>> all;
  for (int order = 0; order < test::kThreadOrders; ++order) {
    test::set_thread_order(order);
    Engine engine(config_for(model, "cuda"));
    all.push_back(generate(engine, requests));
  }
  test::set_thread_order(0);
  EXPECT_EQ(all[1], all[0]);
  EXPECT_EQ(all[2], all[0]);
}

TEST(CudaEngineDevice, DecodesByGraphsWithoutAllocations) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  EngineConfig engine_config = config_for(model, "cuda");
  engine_config.hidden_state_layers.clear();
  Engine engine(engine_config);
  emulation::DeviceState& device = emulation::device_state();
  const int graphs = device.graphs;
  generate(engine, {greedy(4, 1, 12)});
  EXPECT_EQ(device.graphs - graphs, 1) << "one size";
  const std::size_t used = device.used_bytes;
  const int launches = device.graph_launches;
  const int waits = device.synchronizations;
  generate(engine, {greedy(4, 1, 12)});
  EXPECT_EQ(device.graphs - graphs, 1) << "captured once";
  EXPECT_EQ(device.graph_launches - launches, 11) << "all but the prompt";
  EXPECT_EQ(device.synchronizations - waits, 12) << "one read-back per step";
  EXPECT_EQ(device.used_bytes, used);
  generate(engine, {greedy(4, 1, 4), greedy(4, 2, 4), greedy(4, 3, 4)});
  EXPECT_EQ(device.graphs - graphs, 2);
}

TEST(CudaEngineDevice, SampledStepsAreGraphsThatReadBackOnce) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  EngineConfig engine_config = config_for(model, "cuda");
  engine_config.hidden_state_layers.clear();
  Engine engine(engine_config);
  std::vector<Request> requests = {greedy(4, 1, 12), greedy(4, 2, 12), greedy(4, 3, 12)};
  requests[1].params.temperature = 0.8f;
  requests[1].params.top_p = 0.9f;
  requests[1].params.repetition_penalty = 1.2f;
  requests[2].params.logprobs = 3;
  generate(engine, requests);
  emulation::DeviceState& device = emulation::device_state();
  const int graphs = device.graphs;
  const std::size_t used = device.used_bytes;
  const int launches = device.graph_launches;
  const int waits = device.synchronizations;
  generate(engine, requests);
  EXPECT_EQ(device.graphs, graphs);
  EXPECT_EQ(device.graph_launches - launches, 11) << "all but the prompts";
  EXPECT_EQ(device.synchronizations - waits, 12) << "one read-back per step";
  EXPECT_EQ(device.used_bytes, used);
}

TEST(CudaEngineDevice, ComputesTheNextStepWhileTheCallerReads) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  for (int ranks : {1, 2}) {
    EngineConfig engine_config = config_for(model, "cuda");
    engine_config.hidden_state_layers.clear();
    engine_config.tensor_parallel_size = ranks;
    Engine engine(engine_config);
    const Request request = greedy(4, 1, 6);
    generate(engine, {request});  // captures the graph
    const int launches = emulation::device_state().graph_launches;
    engine.submit(request.prompt, request.params);
    for (int step = 1; step <= 6; ++step) {
      EXPECT_EQ(engine.step().at(0).outputs.at(0).new_token_ids.size(), 1u);
      // The prompt has no graph, and after the last token there is nothing to compute.
      EXPECT_EQ(emulation::device_state().graph_launches - launches, ranks * std::min(step, 5));
    }
    EXPECT_TRUE(engine.step().empty());
    EXPECT_EQ(engine.stats().num_steps, 12);
  }
}

TEST(CudaEngineDevice, MayBeDestroyedWhileABatchIsUnderWay) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  emulation::DeviceState& device = emulation::device_state();
  const std::size_t used = device.used_bytes;
  for (int ranks : {1, 3}) {
    EngineConfig engine_config = config_for(model, "cuda");
    engine_config.tensor_parallel_size = ranks;
    {
      Engine engine(engine_config);
      const Request request = greedy(4, 1, 8);
      engine.submit(request.prompt, request.params);
      for (int step = 0; step < 3; ++step) EXPECT_EQ(engine.step().size(), 1u);
    }
    EXPECT_EQ(device.used_bytes, used);
  }
}

/// The scheduler knows what decode steps are filled up to, and its log replays what it did ahead.
TEST(CudaEngineDevice, TheSchedulerKnowsTheSizesOfGraphs) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  const std::filesystem::path log_file = std::filesystem::path(model.path()) / "events.jsonl";
  EngineConfig engine_config = config_for(model, "cuda");
  engine_config.max_num_seqs = 5;
  engine_config.event_log = log_file.string();
  std::int64_t steps = 0;
  {
    Engine engine(engine_config);
    for (int i = 0; i < 9; ++i) {
      const Request request = greedy(3 + 5 * i, i, 4 + i);
      const RequestId id = engine.submit(request.prompt, request.params);
      engine.step();
      if (i == 4) engine.abort(id);
    }
    while (engine.has_unfinished_requests()) engine.step();
    steps = engine.stats().num_steps;
  }
  const auto [setup, log] = read_event_log(log_file);
  EXPECT_EQ(setup.config.graph_sizes, (std::vector<int>{1, 2, 4, 8}));
  const std::unique_ptr<Scheduler> scheduler = setup.make();
  std::int64_t replayed = 0;
  log.replay(*scheduler, [&](const ScheduledBatch& batch) { replayed += !batch.items.empty(); });
  EXPECT_EQ(replayed, steps);
  EXPECT_FALSE(scheduler->has_unfinished());
}

/// Samples are aborted while the device computes their next tokens.
TEST(CudaEngineDevice, NothingIsReportedOfWhatWasAborted) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  Engine engine(config_for(model, "cuda"));
  const std::int64_t free_blocks = engine.stats().free_kv_blocks;
  std::vector<Request> requests;
  for (int i = 0; i < 5; ++i) {
    requests.push_back(greedy(3 + 7 * i, i, 9));
    requests.back().params.hidden_states = 1;
  }
  using States = std::vector<std::vector<float>>;  // of every token
  const auto run = [&](const std::vector<int>& abort_after) {
    std::vector<States> states(requests.size());
    std::vector<bool> aborted(requests.size()), ended(requests.size());
    std::map<RequestId, std::size_t> places;
    for (const Request& request : requests) {
      const std::size_t place = places.size();
      places[engine.submit(request.prompt, request.params)] = place;
    }
    while (engine.has_unfinished_requests()) {
      for (const RequestOutput& output : engine.step()) {
        const std::size_t place = places.at(output.request_id);
        for (const SequenceOutput& sample : output.outputs) {
          EXPECT_FALSE(ended[place]) << "reported after its end";
          ended[place] = sample.finish_reason != FinishReason::kNone;
          EXPECT_EQ(sample.finish_reason == FinishReason::kAbort, aborted[place]);
          EXPECT_EQ(sample.new_token_ids.empty(), aborted[place]);
          if (!aborted[place]) states[place].push_back(sample.hidden_states);
        }
      }
      for (const auto& [id, place] : places) {
        if (static_cast<int>(states[place].size()) != abort_after[place]) continue;
        aborted[place] = engine.abort(id) || aborted[place];
      }
    }
    EXPECT_EQ(std::count(ended.begin(), ended.end(), true), 5);
    EXPECT_TRUE(engine.step().empty());
    EXPECT_EQ(engine.stats().free_kv_blocks, free_blocks);
    return states;
  };
  const std::vector<States> whole = run({-1, -1, -1, -1, -1});
  const std::vector<int> after = {2, -1, 5, 1, -1};
  const std::vector<States> cut = run(after);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    States expected = whole[i];
    EXPECT_EQ(expected.size(), 9u);
    if (after[i] > 0) expected.resize(static_cast<std::size_t>(after[i]));
    EXPECT_EQ(cut[i], expected) << i;
  }
}

TEST(CudaEngineDevice, AFailureOfTheNextStepComesWithTheNextCall) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  Engine engine(config_for(model, "cuda"));
  const Request request = greedy(4, 1, 4);
  engine.submit(request.prompt, request.params);
  emulation::device_state().refuses_graphs = true;
  const std::vector<RequestOutput> outputs = engine.step();  // the next decodes
  EXPECT_EQ(outputs.at(0).outputs.at(0).new_token_ids.size(), 1u);
  emulation::device_state().refuses_graphs = false;
  EXPECT_THROW(engine.step(), Error);
  EXPECT_THROW(engine.step(), Error) << "for good";
  EXPECT_THROW(engine.submit(request.prompt, request.params), Error);
}

TEST(CudaEngineDevice, RefusesWhatItCannotDo) {
  test::TinyModel model;
  const auto make = [&](auto change) {
    return [&model, change] {
      EngineConfig config = config_for(model, "cuda");
      change(config);
      Engine engine(config);
    };
  };
  using C = EngineConfig;
  expect_error(ErrorCode::kInvalidArgument, "device=\"cuda:3\": there is 1 CUDA device",
               make([](C& c) { c.device = "cuda:3"; }));
  expect_error(ErrorCode::kInvalidArgument, "device=\"cuda:x\"",
               make([](C& c) { c.device = "cuda:x"; }));
  expect_error(ErrorCode::kInvalidArgument, "device=\"gpu\" is unknown",
               make([](C& c) { c.device = "gpu"; }));
  expect_error(ErrorCode::kUnsupported, "dtype=\"float32\": on CUDA devices weights are",
               make([](C& c) { c.dtype = "float32"; }));
  expect_error(ErrorCode::kUnsupported, "emulated_link=\"pcie\"", make([](C& c) {
                 c.tensor_parallel_size = 2;
                 c.tensor_parallel_plan = "dense";
                 c.emulated_link = "pcie";
               }));
  expect_error(ErrorCode::kUnsupported, "exchange_chunks=2: on CUDA devices", make([](C& c) {
                 c.tensor_parallel_size = 2;
                 c.exchange_chunks = 2;
               }));
  expect_error(ErrorCode::kOutOfMemory, "of device memory",
               make([](C& c) { c.num_kv_blocks = 1 << 28; }));
  emulation::device_state().count = 0;
  expect_error(ErrorCode::kUnsupported, "no CUDA device is visible", make([](C&) {}));
  EngineConfig config = config_for(model, "auto");
  Engine engine(config);
  EXPECT_EQ(emulation::device_state().used_bytes, 0u) << "auto without a device is the CPU";
  emulation::device_state().count = 1;
}

TEST(CudaEngineDevice, AFailedKernelFailsTheEngine) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  for (int ranks : {1, 3}) {
    EngineConfig engine_config = config_for(model, "cuda");
    engine_config.tensor_parallel_size = ranks;
    Engine engine(engine_config);
    Request request = greedy(4, 1, 4);
    engine.submit(request.prompt, request.params);
    emulation::device_state().fails = true;
    EXPECT_THROW(engine.step(), Error);
    emulation::device_state().fails = false;
    EXPECT_THROW(engine.step(), Error) << "for good";
  }
}

TEST(CudaEngineDevice, RanksDecodeByGraphsOnOneDeviceOrSeveral) {
  test::TinyConfig config;
  config.bfloat16 = true;
  test::TinyModel model(config);
  emulation::DeviceState& device = emulation::device_state();
  EngineConfig engine_config = config_for(model, "cuda");
  engine_config.hidden_state_layers.clear();
  engine_config.tensor_parallel_size = 3;
  std::vector<Answer> answers;
  for (int devices : {1, 2}) {
    device.count = devices;
    Engine engine(engine_config);
    const int graphs = device.graphs;
    answers.push_back(generate(engine, {greedy(4, 1, 8)})[0]);
    EXPECT_EQ(device.graphs - graphs, 3) << "one size";
    const std::size_t used = device.used_bytes;
    const int launches = device.graph_launches;
    const int waits = device.synchronizations;
    answers.push_back(generate(engine, {greedy(4, 1, 8)})[0]);
    EXPECT_EQ(device.graphs - graphs, 3) << "captured once";
    EXPECT_EQ(device.graph_launches - launches, 3 * 7) << "all but the prompt";
    EXPECT_EQ(device.synchronizations - waits, 3 * 8) << "one per step";
    EXPECT_EQ(device.used_bytes, used);
  }
  for (const Answer& answer : answers) EXPECT_EQ(answer, answers[0]);
  device.reads_peers = false;
  expect_error(ErrorCode::kUnsupported, "ranks 0 and 2 share CUDA device 0, and NCCL wants",
               [&] { Engine engine(engine_config); });
  engine_config.device = "cuda:1";  // all on one
  Engine engine(engine_config);
  EXPECT_EQ(generate(engine, {greedy(4, 1, 8)})[0], answers[0]);
  device.reads_peers = true;
  device.count = 1;
}

}  // namespace
}  // namespace deinfer
