// A rank that fails, anywhere: the others come free, its own message surfaces, and the process goes
// on with new ranks.
#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/resource.h>

#include <atomic>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "rank_group_fixture.h"
#include "sanitized.h"

namespace deinfer {
namespace {

enum class Point { kContribution, kStart, kWait, kContributionOf, kFinish, kConsumer };
constexpr int kNumPoints = 6;

/// Lets one rank fail when it comes to a point for the `countdown`th time. Set between steps.
struct Trap {
  int rank = -1;
  Point point = Point::kStart;
  bool bad_alloc = false;
  std::atomic<int> countdown{0};

  static std::string message(int rank, Point point) {
    return str_cat("rank ", rank, " fails at point ", static_cast<int>(point));
  }
  void pass(int at_rank, Point at) {
    if (at_rank != rank || at != point || countdown.fetch_sub(1) != 0) return;
    if (bad_alloc) throw std::bad_alloc();
    fail(ErrorCode::kInternal, message(rank, point));
  }
};

class TrappedCommunicator final : public Communicator {
 public:
  TrappedCommunicator(std::unique_ptr<Communicator> inner, Trap& trap)
      : inner_(std::move(inner)), trap_(trap) {}
  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::size_t max_bytes() const override { return inner_->max_bytes(); }
  std::byte* contribution(std::size_t bytes) override {
    trap_.pass(rank(), Point::kContribution);
    return inner_->contribution(bytes);
  }
  Ticket next_ticket() const override { return inner_->next_ticket(); }
  Ticket start(Collective kind, std::size_t bytes) override {
    trap_.pass(rank(), Point::kStart);
    return inner_->start(kind, bytes);
  }
  void wait(Ticket ticket) override {
    trap_.pass(rank(), Point::kWait);
    inner_->wait(ticket);
  }
  const std::byte* contribution_of(int other, Ticket ticket) const override {
    trap_.pass(rank(), Point::kContributionOf);
    return inner_->contribution_of(other, ticket);
  }
  void finish(Ticket ticket) override {
    trap_.pass(rank(), Point::kFinish);
    inner_->finish(ticket);
  }
  void abort() override { inner_->abort(); }

 private:
  std::unique_ptr<Communicator> inner_;
  Trap& trap_;
};

test::TinyConfig tiny_config() {
  test::TinyConfig config;
  config.hidden = 64;
  config.heads = 4;
  config.tied = false;
  return config;
}

/// What fn throws, as text; "" when nothing.
template <typename F>
std::string error_of(F fn) {
  try {
    fn();
  } catch (const std::exception& error) {  // Error is one
    return error.what();
  } catch (const CommunicatorAborted&) {
    return "CommunicatorAborted";
  } catch (const TeamAborted&) {
    return "TeamAborted";
  }
  return "";
}

class TensorParallelAbort : public testing::Test {
 protected:
  EngineConfig config_for(const std::string& plan, int size) const {
    EngineConfig config;
    config.model = model_.path();
    config.tensor_parallel_plan = plan;
    config.tensor_parallel_size = size;
    config.exchange_chunks = 2;
    return config;
  }
  std::unique_ptr<RankGroup> ranks(const std::string& plan, int size, int threads, Trap& trap,
                                   const LoadProgress& progress = {}) const {
    return test::make_ranks(config_for(plan, size), threads, progress,
                            [&](std::unique_ptr<Communicator> inner) {
                              return std::make_unique<TrappedCommunicator>(std::move(inner), trap);
                            });
  }

  test::TinyModel model_{tiny_config()};
};

std::vector<TokenId> step(RankGroup& ranks, const Batch& batch, Trap& trap) {
  std::span<const TokenId> tokens = test::execute(
      ranks, batch, [&](TeamMember&, int, int, float*) { trap.pass(0, Point::kConsumer); });
  return {tokens.begin(), tokens.end()};
}

TEST_F(TensorParallelAbort, AThousandStepsWithFailuresAtRandomPoints) {
  const int wanted = test::repeats(1000, 250);
  std::mt19937 random(11);
  auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::vector<std::string_view> plans = plan_names();
  test::RankBatch prompts({20, 30, 7});
  test::RankBatch decodes(std::vector<int>(3, 1));
  Trap none;
  auto reference = ranks("hidden_sharded", 1, 1, none);
  std::vector<TokenId> after_prompts = step(*reference, prompts.batch, none);
  std::vector<TokenId> after_decodes = step(*reference, decodes.batch, none);
  int failures = 0;
  for (int steps = 0; steps < wanted;) {
    int size = 2 + below(3);
    int threads = below(4) == 0 ? 2 : 1;
    std::string plan(plans[static_cast<std::size_t>(below(static_cast<int>(plans.size())))]);
    SCOPED_TRACE(str_cat(plan, ", ", size, " ranks of ", threads, " threads, step ", steps));
    Trap trap;
    auto group = ranks(plan, size, threads, trap);
    auto starts = [&] {
      std::uint64_t ticket = group->rank(0).communicator().next_ticket();
      return static_cast<int>(ticket);
    };
    int calls = 0;  // exchanges of a step with prompts
    for (int good = 2 + below(8); good > 0; --good, ++steps) {
      bool prompt = good % 2 == 0;
      int before = starts();
      EXPECT_EQ(step(*group, prompt ? prompts.batch : decodes.batch, trap),
                prompt ? after_prompts : after_decodes);
      if (prompt) calls = starts() - before;
    }
    trap.point = static_cast<Point>(below(kNumPoints));
    bool consumer = trap.point == Point::kConsumer;
    trap.bad_alloc = below(4) == 0;
    trap.countdown = consumer ? below(threads) : below(calls);
    trap.rank = consumer ? 0 : below(size);
    std::string expected =
        trap.bad_alloc ? std::bad_alloc().what() : Trap::message(trap.rank, trap.point);
    std::string error = error_of([&] { step(*group, prompts.batch, trap); });
    EXPECT_NE(error.find(expected), std::string::npos) << error;
    EXPECT_EQ(error_of([&] { step(*group, decodes.batch, trap); }), error) << "at later calls";
    ++steps;
    ++failures;
  }
  EXPECT_GT(failures, wanted / 10);
}

TEST_F(TensorParallelAbort, AFailureDuringLoadingSurfaces) {
  Trap trap;
  for (int size : {2, 3, 4}) {
    for (int call : {0, 3, 20}) {
      int calls = 0;
      auto progress = [&](std::uint64_t, std::uint64_t) {
        if (calls++ == call) throw std::bad_alloc();
      };
      EXPECT_EQ(error_of([&] { ranks("dense", size, 2, trap, progress); }),
                std::bad_alloc().what());
    }
    auto group = ranks("hidden_sharded", size, 1, trap);
    std::string error = error_of([&] { group->allocate_kv_cache(std::int64_t{1} << 40); });
    EXPECT_NE(error.find("cannot allocate"), std::string::npos) << error;
  }
}

// Address space cannot be limited under sanitizers.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kLimitsWork = false;
#else
constexpr bool kLimitsWork = true;
#endif

TEST_F(TensorParallelAbort, AnEngineRethrowsItsFirstFailureAndANewOneWorks) {
  if (!kLimitsWork) GTEST_SKIP();
  mallopt(M_MMAP_THRESHOLD, 1 << 20);  // what is freed must not serve larger requests
  test::TinyConfig large = tiny_config();
  large.tied = true;
  large.vocab = 70000;
  test::TinyModel model(large);
  EngineConfig config = config_for("two_collective", 3);
  config.model = model.path();
  config.num_threads = 1;
  config.num_kv_blocks = 32;
  SamplingParams params;
  params.max_tokens = 2;
  params.ignore_eos = true;
  params.prompt_logits = true;
  std::vector<TokenId> prompt(250, 5);
  {
    Engine engine(config);
    engine.submit(prompt, params);
    rlimit before;
    getrlimit(RLIMIT_AS, &before);
    rlimit none{1 << 20, before.rlim_max};
    setrlimit(RLIMIT_AS, &none);  // the prompt's logits take more than an arena has, 64 MB
    std::string error = error_of([&] { engine.step(); });
    setrlimit(RLIMIT_AS, &before);
    EXPECT_EQ(error, std::bad_alloc().what());
    EXPECT_EQ(error_of([&] { engine.step(); }), error);
    EXPECT_EQ(error_of([&] { engine.submit(prompt, params); }), error);
  }
  Engine engine(config);
  engine.submit(prompt, params);
  std::size_t logits = 0;
  while (engine.has_unfinished_requests()) {
    for (const RequestOutput& output : engine.step()) logits += output.prompt_logits.size();
  }
  EXPECT_EQ(logits, prompt.size() * static_cast<std::size_t>(large.vocab));
}

}  // namespace
}  // namespace deinfer
