// Event logs in files: what is written is read back, and replays to the same batches.
#include "scheduler/event_log_file.h"

#include <unistd.h>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "deinfer/engine.h"
#include "scheduler_simulation.h"
#include "tiny_model.h"

namespace deinfer {
namespace {

using namespace test;

class EventLogFile : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    path_ = std::filesystem::temp_directory_path() /
            ("deinfer_event_log_" + std::string(info->name()) + "_" + std::to_string(::getpid()));
  }
  void TearDown() override { std::filesystem::remove(path_); }

  void write(const std::string& text) const { std::ofstream(path_) << text; }
  std::string read() const {
    std::ifstream file(path_);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  std::string error() const {
    try {
      read_event_log(path_);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
      return e.what();
    }
    return {};
  }

  std::filesystem::path path_;
};

TEST_F(EventLogFile, ReplaysToTheSameBatchesUnderEveryPolicy) {
  unsigned seed = 60'000;
  for (const char* name :
       {"fcfs", "hrrn", "length_bucket", "longest_tail", "sjf", "static_bucket"}) {
    for (int round = 0; round < 6; ++round, ++seed) {
      SCOPED_TRACE(std::string(name) + ", seed " + std::to_string(seed));
      Trace trace = random_trace(seed);
      for (Job& job : trace.jobs) {
        const auto real = static_cast<float>(job.answer_length);
        const float lengths[] = {0.3f * real, real, 1.7f * real};
        const float chances[] = {0.1f, 0.2f, 0.4f};
        job.sequence.expected_length = {lengths, chances};
      }
      trace.config.graph_sizes = {2, 5};
      Outcome outcome = play(trace, policy(name), false, true);
      SchedulerSetup setup;
      setup.config = trace.config;
      setup.policy = name;
      EventLogWriter(path_, setup).drain(outcome.log);
      EXPECT_EQ(outcome.log.size(), 0u);

      const auto [read_setup, log] = read_event_log(path_);
      std::vector<std::string> batches;
      log.replay(*read_setup.make(), [&](const ScheduledBatch& batch) {
        if (!batch.items.empty()) batches.push_back(describe(batch));
      });
      ASSERT_EQ(batches, outcome.batches);
    }
  }
}

TEST_F(EventLogFile, TheLogOfAnEngineReplays) {
  test::TinyModel model(test::TinyConfig{});
  EngineConfig config;
  config.model = model.path();
  config.num_threads = 1;
  config.max_num_seqs = 3;
  config.num_kv_blocks = 12;
  config.scheduling_policy = "hrrn";
  config.event_log = path_.string();
  std::int64_t steps = 0;
  {
    Engine engine(config);
    for (int i = 0; i < 12; ++i) {
      std::vector<TokenId> prompt(static_cast<std::size_t>(3 + 7 * i % 20), 5 + i % 3);
      SamplingParams params;
      params.max_tokens = 2 + 5 * i % 31;
      params.ignore_eos = true;
      params.temperature = 0.9f;
      params.seed = i;
      params.n = i % 4 == 0 ? 2 : 1;
      if (i % 3 != 0) params.expected_tokens = static_cast<float>(4 + i);
      const RequestId id = engine.submit(prompt, params);
      engine.step();
      if (i == 5) engine.abort(id);
    }
    while (engine.has_unfinished_requests()) engine.step();
    steps = engine.stats().num_steps;
  }
  const auto [setup, log] = read_event_log(path_);
  EXPECT_EQ(setup.policy, "hrrn");
  EXPECT_EQ(setup.config.max_num_seqs, 3);
  const std::unique_ptr<Scheduler> scheduler = setup.make();
  std::int64_t replayed = 0;
  log.replay(*scheduler, [&](const ScheduledBatch& batch) { replayed += !batch.items.empty(); });
  EXPECT_GT(steps, 20);
  EXPECT_EQ(replayed, steps);
  EXPECT_FALSE(scheduler->has_unfinished());

  // A plan that the scheduler does not make is noticed.
  std::string text = read();
  const std::size_t plan = text.find("\"plan\":[[");
  ASSERT_NE(plan, std::string::npos);
  text.insert(plan + 8, "[77,1],");
  write(text);
  const auto changed = read_event_log(path_);
  EXPECT_THROW(changed.second.replay(*changed.first.make(), [](const ScheduledBatch&) {}), Error);
}

TEST_F(EventLogFile, SaysWhatIsWrongWithAFile) {
  EXPECT_NE(error().find("cannot be read"), std::string::npos);
  write("");
  EXPECT_NE(error().find("not a deinfer.event_log"), std::string::npos);
  write("{\"format\": \"other\"}\n");
  EXPECT_NE(error().find("line 1"), std::string::npos);
  SchedulerSetup setup;
  setup.config.num_blocks = 8;
  {
    EventLogWriter writer(path_, setup);
  }
  EXPECT_EQ(error(), "");
  const std::string head = read();
  write(head + "{\"jump\": 1}\n");
  EXPECT_NE(error().find("line 2: no event of a known kind: {\"jump\":1}"), std::string::npos);
  write(head + "{\"abort\": \"x\"}\n");
  EXPECT_NE(error().find("line 2"), std::string::npos);
  write(head + "{\"step\": 1, \"plan\": [[1]]}\n");
  EXPECT_NE(error().find("line 2"), std::string::npos);
  write(head + "{\"step\"");
  EXPECT_NE(error().find("line 2"), std::string::npos);
  EXPECT_THROW(EventLogWriter("/nonexistent/log", setup), Error);
}

}  // namespace
}  // namespace deinfer
