// The host logic of CUDA steps: sizes of graphs, the layout of inputs, the division of attention.
#include "model/cuda_step.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "base/check.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packing.h"
#include "kernels/cuda/packing.h"

namespace deinfer {
namespace {

CudaStepLimits limits() {
  CudaStepLimits limits;
  limits.max_tokens = 100;
  limits.max_sequences = 8;
  limits.max_model_len = 1000;
  limits.block_size = 16;
  limits.heads = 8;
  limits.attention = {{0, 2}, {64, 2}};
  limits.partial_rows = 1000;
  limits.parallel_warps = 1000;
  limits.vocabulary = 100;
  limits.history_tokens = 50;
  return limits;
}

TEST(CudaStep, GraphsAreFewAndFit) {
  std::set<int> sizes;
  int before = 0;
  for (int m = 1; m <= 256; ++m) {
    const int bucket = graph_bucket(m);
    EXPECT_GE(bucket, m);
    EXPECT_GE(bucket, before);
    EXPECT_LE(bucket, std::max(m + 31, 1));
    EXPECT_EQ(graph_bucket(bucket), bucket) << "a size is its own";
    before = bucket;
    sizes.insert(bucket);
  }
  EXPECT_EQ(sizes.size(), 17u);
  EXPECT_EQ(graph_bucket(257), 0);
  EXPECT_EQ(graph_sizes(1), std::vector<int>{1});
  EXPECT_EQ(graph_sizes(9), (std::vector<int>{1, 2, 4, 8, 16}));
  EXPECT_EQ(graph_sizes(1000), std::vector<int>(sizes.begin(), sizes.end()));
}

TEST(CudaStep, LaysOutABatchAtFixedPlaces) {
  CudaStep step(limits());
  std::vector<std::byte> block(step.capacity_bytes(), std::byte{0xff});
  const std::int32_t first[] = {7, 3}, second[] = {9};
  Batch batch;
  batch.token_ids = {5, 6, 11};
  batch.positions = {16, 17, 4};
  batch.slots = {{3, 0}, {3, 1}, {9, 4}};
  batch.sequences = {{0, 2, 16, first}, {2, 1, 4, second}};
  batch.argmax_rows = {1};
  batch.logit_rows = {2};
  const std::size_t used = step.build(batch, 8, block.data());
  const auto* words = reinterpret_cast<const std::int32_t*>(block.data());
  const CudaStep::Offsets& at = step.offsets();
  EXPECT_EQ(used, static_cast<std::size_t>(at.tables + 3) * 4);
  auto read = [&](std::int64_t offset, int count) {
    return std::vector<int>(words + offset, words + offset + count);
  };
  EXPECT_EQ(read(at.tokens, 8), (std::vector<int>{5, 6, 11, 0, 0, 0, 0, 0}));
  EXPECT_EQ(read(at.positions, 8), (std::vector<int>{16, 17, 4, 0, 0, 0, 0, 0}));
  EXPECT_EQ(read(at.slots, 8), (std::vector<int>{48, 49, 148, -1, -1, -1, -1, -1}));
  EXPECT_EQ(read(at.argmax_rows, 8), (std::vector<int>{1, 0, 0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(read(at.logit_rows, 2), (std::vector<int>{2, 0}));
  EXPECT_EQ(read(at.sequences, 8), (std::vector<int>{0, 2, 16, 0, 2, 1, 4, 2}));
  EXPECT_EQ(read(at.tables, 3), (std::vector<int>{7, 3, 9}));
  for (const CudaStep::AttentionOffsets& kind : at.attention) {
    EXPECT_EQ(words[kind.num_tasks], 2);
    EXPECT_EQ(words[kind.num_combines], 0);
  }
}

TEST(CudaStep, DescribesSampledRowsBehindTheTables) {
  CudaStep step(limits());
  std::vector<std::byte> block(step.capacity_bytes(), std::byte{0xff});
  const std::int32_t table[] = {7, 3};
  const std::vector<TokenId> history = {4, 5, 4, 9}, banned = {8};
  SamplingParams drawn;
  drawn.temperature = 0.5f;
  drawn.top_p = 0.75f;
  drawn.min_p = 0.5f;
  drawn.top_k = 100;
  drawn.frequency_penalty = 1.0f;
  SamplingParams largest;
  largest.temperature = 0.0f;
  largest.repetition_penalty = 2.0f;
  Batch batch;
  batch.token_ids = {5, 6, 11, 12};
  batch.positions = {16, 17, 18, 19};
  batch.slots = {{3, 0}, {3, 1}, {3, 2}, {3, 3}};
  batch.sequences = {{0, 4, 16, table}};
  EXPECT_EQ(CudaStep::num_sampled(batch), 0);
  batch.argmax_rows = {3};
  EXPECT_EQ(CudaStep::num_sampled(batch), 0) << "those alone are not sampled";
  batch.sampled = {{0, &drawn, history, 3, banned, 0.25, -1, 5},
                   {1, &drawn, {}, 0, {}, 0.0, 17, 2},
                   {2, &largest, history, 3, {}, 0.0, -1, -1}};
  EXPECT_EQ(CudaStep::num_sampled(batch), 4);
  const std::size_t used = step.build(batch, 8, block.data());
  const auto* words = reinterpret_cast<const std::int32_t*>(block.data());
  const CudaStep::Offsets& at = step.offsets();
  const std::vector<int> pool(words + at.tables, words + used / 4);
  EXPECT_EQ(pool, (std::vector<int>{7, 3, 9, 8, 4, 5, 4, 9})) << "generated ones; all";
  EXPECT_EQ(std::vector<int>(words + at.sampled_rows, words + at.sampled_rows + 8),
            (std::vector<int>{0, 1, 2, 3, 0, 0, 0, 0}));
  const auto* samples = reinterpret_cast<const cuda::SampleRow*>(words + at.samples);
  EXPECT_EQ(samples[0].mode, cuda::SampleMode::kDraw);
  EXPECT_EQ(samples[0].uniform, 0.25);
  EXPECT_EQ(samples[0].scale, 2.0f);
  EXPECT_EQ(samples[0].top_p, 0.75);
  EXPECT_EQ(samples[0].top_k, 0) << "all";
  EXPECT_EQ(samples[0].has_min_p, 1);
  EXPECT_EQ(samples[0].history, 2);
  EXPECT_EQ(samples[0].prompt_tokens, 0);
  EXPECT_EQ(samples[0].tokens, 1);
  EXPECT_EQ(samples[0].banned, 1);
  EXPECT_EQ(samples[0].report, 0);
  EXPECT_EQ(samples[1].mode, cuda::SampleMode::kGiven);
  EXPECT_EQ(samples[1].given, 17);
  EXPECT_EQ(samples[1].report, 5);
  EXPECT_EQ(samples[2].mode, cuda::SampleMode::kLargest);
  EXPECT_EQ(samples[2].history, 4);
  EXPECT_EQ(samples[2].prompt_tokens, 3);
  EXPECT_EQ(samples[2].tokens, 4);
  EXPECT_EQ(samples[2].top, -1);
  EXPECT_EQ(samples[3].mode, cuda::SampleMode::kLargest) << "the most likely token of row 3";
  for (int i = 4; i < 8; ++i) EXPECT_EQ(samples[i].mode, cuda::SampleMode::kIdle);
}

/// The tasks of a kind of attention.
std::vector<cuda::AttentionTask> tasks_of(const CudaStepLimits& limits, const Batch& batch,
                                          std::size_t kind, bool combines = false) {
  CudaStep step(limits);
  std::vector<std::byte> block(step.capacity_bytes());
  step.build(batch, batch.num_tokens(), block.data());
  const auto* words = reinterpret_cast<const std::int32_t*>(block.data());
  const CudaStep::AttentionOffsets& at = step.offsets().attention[kind];
  const auto* tasks =
      reinterpret_cast<const cuda::AttentionTask*>(words + (combines ? at.combines : at.tasks));
  return {tasks, tasks + words[combines ? at.num_combines : at.num_tasks]};
}

Batch batch_of(const std::vector<std::pair<int, int>>& runs) {
  static const std::vector<std::int32_t> table(1000, 0);
  Batch batch;
  for (auto [computed, rows] : runs) {
    batch.sequences.push_back({batch.num_tokens(), rows, computed, table.data()});
    batch.token_ids.resize(batch.token_ids.size() + static_cast<std::size_t>(rows));
    batch.positions.resize(batch.token_ids.size());
    batch.slots.resize(batch.token_ids.size());
  }
  return batch;
}

TEST(CudaStep, DividesLongContextsWhereThereIsLittleToDo) {
  const Batch batch = batch_of({{900, 1}, {100, 1}});
  std::vector<cuda::AttentionTask> tasks = tasks_of(limits(), batch, 0);
  ASSERT_EQ(tasks.size(), 8u + 1u) << "positions 0 .. 900 are 8 splits";
  std::set<int> rows;
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(tasks[static_cast<std::size_t>(i)].first_split, i);
    EXPECT_EQ(tasks[static_cast<std::size_t>(i)].num_splits, 1);
    rows.insert(tasks[static_cast<std::size_t>(i)].partial);
  }
  EXPECT_EQ(rows.size(), 8u);
  EXPECT_EQ(*rows.rbegin(), 7 * 2 * 4) << "4 rows for each of 2 kv heads and split";
  EXPECT_EQ(tasks[8].partial, -1);
  EXPECT_EQ(tasks_of(limits(), batch, 0, true).size(), 1u);
  EXPECT_EQ(tasks_of(limits(), batch, 1).size(), 3u) << "the window reaches back over one border";

  CudaStepLimits busy = limits();
  busy.parallel_warps = 2;
  EXPECT_EQ(tasks_of(busy, batch, 0).size(), 2u);
  CudaStepLimits little = limits();
  little.partial_rows = 60;
  EXPECT_EQ(tasks_of(little, batch, 0).size(), 2u) << "no room for 64 rows of states";
}

TEST(CudaStep, CoversEveryRowOnce) {
  const Batch batch = batch_of({{0, 50}, {3, 1}, {10, 33}});
  for (std::size_t kind : {0u, 1u}) {
    std::set<std::pair<int, int>> seen;
    for (const cuda::AttentionTask& task : tasks_of(limits(), batch, kind)) {
      if (task.partial < 0) {
        EXPECT_TRUE(seen.insert({task.sequence, task.tile}).second);
      }
    }
    EXPECT_EQ(seen.size(), 13u + 1u + 9u) << "4 heads of a group: 4 tokens per tile";
  }
}

TEST(CudaStep, PackedWeightsArePermutedNotLost) {
  std::vector<float> w;
  for (int i = 0; i < 19 * 40; ++i) w.push_back(static_cast<float>(i % 251));
  const std::vector<std::int32_t> map = {18, -1, 0};
  std::vector<bf16> out(1 * 2 * 512, to_bf16(-1.0f));
  cuda::pack_weights({w.data(), DType::kFloat32, 19, 40, 40}, map, 0, 1, out.data());
  std::set<std::int64_t> places;
  for (int row = 0; row < 16; ++row) {
    for (int col = 0; col < 64; ++col) {
      const std::int64_t place = cuda::weight_offset(row, col, 2);
      EXPECT_TRUE(places.insert(place).second);
      const bool real = row < 3 && col < 40 && map[static_cast<std::size_t>(row)] >= 0;
      const int from = real ? map[static_cast<std::size_t>(row)] * 40 + col : 0;
      EXPECT_EQ(to_float(out[static_cast<std::size_t>(place)]),
                real ? static_cast<float>(from % 251) : 0.0f);
    }
  }
  EXPECT_EQ(places.size(), 1024u);
}

/// int8 weights hold what the CPU makes of them, every q and scale.
TEST(CudaStep, Int8WeightsAreThoseOfTheCpu) {
  std::vector<float> w;
  for (int i = 0; i < 40 * 50; ++i)
    w.push_back(std::sin(static_cast<float>(i)) * (i / 50 == 7 ? 0 : 3));
  const TensorView source{w.data(), DType::kFloat32, 40, 50, 50};
  const std::vector<std::int32_t> map = {18, -1, 0, 39, 7, 5, 6, 8, 11, 12, 38, 1, 2, 20};
  cpu::PackedMatrix expected = cpu::allocate_packed(DType::kInt8, 14, 50, cpu::kPanelRows);
  cpu::pack_rows(source, map, 0, 1, expected);
  const int first_col = 3;
  std::vector<std::uint16_t> pairs(2 * 256, 0xffff);
  std::vector<float> scales(16, -1.0f);
  cuda::pack_int8_weights(source, map, 0, 1, pairs.data(), scales.data(), first_col);
  for (int row = 0; row < 16; ++row) {
    std::vector<float> values(64);
    if (row < 14) expected.read_row(row, values.data() + first_col);
    EXPECT_EQ(scales[static_cast<std::size_t>(row)],
              row < 14 ? 64 * expected.scales[static_cast<std::size_t>(row)] : 0.0f);
    for (int col = 0; col < 64; ++col) {
      unsigned pair = pairs[static_cast<std::size_t>(cuda::int8_offset(row, col, 2))];
      if (row >= 8) pair = pair >> 8 | pair << 8;
      const float magnitude = static_cast<float>(pair & 0x7f) / 64;
      EXPECT_EQ(
          ((pair & 0x8000) != 0 ? -magnitude : magnitude) * scales[static_cast<std::size_t>(row)],
          values[static_cast<std::size_t>(col)])
          << row << ", " << col;
    }
  }
  w[50 * 39 + 4] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(cuda::pack_int8_weights(source, map, 0, 1, pairs.data(), scales.data()), Error);
}

}  // namespace
}  // namespace deinfer
