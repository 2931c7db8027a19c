// The CUDA attention kernels, with steps as the decoder plans them.
#include <numeric>

#include "cuda_fixture.h"
#include "model/cuda_step.h"

namespace deinfer {
namespace {

using cuda::DeviceBuffer;

/// Sequences with `computed` positions in the cache and `rows` further ones whose queries ask.
struct Work {
  std::vector<int> computed, rows;
  int heads = 4;
  int kv_heads = 2;
  int head_dim = 20;
  int window = 0;
  float soft_cap = 0.0f;

  int positions(std::size_t i) const { return computed[i] + rows[i]; }
};

constexpr int kBlockSize = 16;

class CudaAttention : public test::CudaTest {
 protected:
  /// out[m, heads * head_dim] as bf16 bits. `warps`: how much the splits are divided.
  std::vector<bf16> run(const Work& work, int warps, unsigned seed = 1) {
    const int width = cuda::head_width(work.head_dim);
    int m = std::accumulate(work.rows.begin(), work.rows.end(), 0);
    CudaStepLimits limits;
    limits.max_tokens = m;
    limits.max_sequences = static_cast<int>(work.rows.size());
    limits.max_model_len = 2048;
    limits.block_size = kBlockSize;
    limits.heads = work.heads;
    limits.attention = {{work.window, work.kv_heads}};
    limits.partial_rows = 256;
    limits.parallel_warps = warps;
    CudaStep step(limits);

    // Blocks are handed out backwards; those that nobody has hold NaN.
    int blocks = 1;
    for (std::size_t i = 0; i < work.rows.size(); ++i) {
      blocks += (work.positions(i) + kBlockSize - 1) / kBlockSize;
    }
    const auto pool = static_cast<std::size_t>(blocks * work.kv_heads * kBlockSize * width);
    k_.assign(pool, to_bf16(test::kNan));
    v_.assign(pool, to_bf16(test::kNan));
    q_.assign(static_cast<std::size_t>(m * work.heads * width), bf16{});
    Batch batch;
    std::vector<std::vector<std::int32_t>> tables(work.rows.size());
    int next = blocks;
    rows_.clear();
    sequences_.clear();
    for (std::size_t i = 0; i < work.rows.size(); ++i) {
      test::Random random(seed + static_cast<unsigned>(i));
      const int positions = work.positions(i);
      for (int b = 0; b * kBlockSize < positions; ++b) tables[i].push_back(--next);
      Sequence sequence;
      for (int p = 0; p < positions; ++p) {
        const std::int32_t block = tables[i][static_cast<std::size_t>(p / kBlockSize)];
        for (int head = 0; head < work.kv_heads; ++head) {
          const int page = block * work.kv_heads + head;
          for (int d = 0; d < width; ++d) {
            const bf16 k = d < work.head_dim ? to_bf16(random.normal()) : bf16{};
            const bf16 v = d < work.head_dim ? to_bf16(random.normal()) : bf16{};
            k_[static_cast<std::size_t>((page * kBlockSize + p % kBlockSize) * width + d)] = k;
            v_[static_cast<std::size_t>((page * width + d) * kBlockSize + p % kBlockSize)] = v;
            sequence.k.push_back(test::wide(k));
            sequence.v.push_back(test::wide(v));
          }
        }
      }
      batch.sequences.push_back(
          {batch.num_tokens(), work.rows[i], work.computed[i], tables[i].data()});
      for (int r = 0; r < work.rows[i]; ++r) {
        for (int j = 0; j < work.heads; ++j) {
          for (int d = 0; d < work.head_dim; ++d) {
            q_[static_cast<std::size_t>((batch.num_tokens() * work.heads + j) * width + d)] =
                to_bf16(random.normal());
          }
        }
        rows_.push_back({i, work.computed[i] + r});
        batch.token_ids.push_back(0);
        batch.positions.push_back(work.computed[i] + r);
        batch.slots.push_back({});
      }
      sequences_.push_back(std::move(sequence));
    }

    std::vector<std::byte> inputs(step.capacity_bytes());
    const std::size_t used = step.build(batch, m, inputs.data());
    EXPECT_LE(used, inputs.size());
    DeviceBuffer device = on_device(inputs);
    const CudaStep::Offsets& at = step.offsets();
    const auto* words = device.as<int>();
    DeviceBuffer q = on_device(q_), k = on_device(k_), v = on_device(v_);
    const int chunks = cuda::tiles_of(work.heads * work.head_dim, cuda::kTileCols);
    DeviceBuffer out(static_cast<std::size_t>(cuda::tiles_of(m, 128) * 128 * chunks * 32) * 2);
    DeviceBuffer sums(256 * static_cast<std::size_t>(width) * 4), stats(256 * 2 * 4);
    cuda::AttentionLaunch launch;
    launch.step.num_tasks = words + at.attention[0].num_tasks;
    launch.step.num_combines = words + at.attention[0].num_combines;
    launch.step.tasks = reinterpret_cast<const cuda::AttentionTask*>(words + at.attention[0].tasks);
    launch.step.combines =
        reinterpret_cast<const cuda::AttentionTask*>(words + at.attention[0].combines);
    launch.step.sequences = reinterpret_cast<const cuda::AttentionSequence*>(words + at.sequences);
    launch.step.tables = words + at.tables;
    launch.q = q.as<void>();
    launch.kv = {k.as<void>(), v.as<void>(), kBlockSize, work.kv_heads, work.head_dim, width};
    launch.heads = work.heads;
    launch.window = work.window;
    launch.scale = kScale;
    launch.soft_cap = work.soft_cap;
    launch.partial_sums = sums.as<float>();
    launch.partial_stats = stats.as<float>();
    launch.out = out.as<void>();
    launch.out_chunks = chunks;
    launch.blocks = 3;
    cuda::check_launch(cuda::launch_attention(launch, stream_->get()), "attention");
    std::vector<bf16> tiled = on_host<bf16>(out);
    std::vector<bf16> result;
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < work.heads * work.head_dim; ++j) {
        result.push_back(tiled[static_cast<std::size_t>(cuda::activation_offset(i, j, chunks))]);
      }
    }
    num_combines_ = reinterpret_cast<const int*>(inputs.data())[at.attention[0].num_combines];
    return result;
  }

  /// Of the last run, in fp64.
  double exact(const Work& work, std::size_t row, int head, int d) const {
    const int width = cuda::head_width(work.head_dim);
    const auto [index, position] = rows_[row];
    const Sequence& sequence = sequences_[index];
    const int kv_head = head / (work.heads / work.kv_heads);
    double sum = 0, total = 0;
    const int first = work.window > 0 ? std::max(0, position - work.window + 1) : 0;
    for (int p = first; p <= position; ++p) {
      const auto at = static_cast<std::size_t>((p * work.kv_heads + kv_head) * width);
      double score = 0;
      for (int e = 0; e < work.head_dim; ++e) {
        const auto from =
            (row * static_cast<std::size_t>(work.heads) + static_cast<std::size_t>(head)) *
                static_cast<std::size_t>(width) +
            static_cast<std::size_t>(e);
        score += test::wide(q_[from]) * sequence.k[at + static_cast<std::size_t>(e)];
      }
      score *= kScale;
      if (work.soft_cap > 0) score = work.soft_cap * std::tanh(score / work.soft_cap);
      sum += std::exp(score);
      total += std::exp(score) * sequence.v[at + static_cast<std::size_t>(d)];
    }
    return total / sum;
  }
  void expect_exact(const Work& work, int warps) {
    const std::vector<bf16> got = run(work, warps);
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      for (int head = 0; head < work.heads; ++head) {
        for (int d = 0; d < work.head_dim; ++d) {
          const auto at =
              (row * static_cast<std::size_t>(work.heads) + static_cast<std::size_t>(head)) *
                  static_cast<std::size_t>(work.head_dim) +
              static_cast<std::size_t>(d);
          ASSERT_NEAR(test::wide(got[at]), exact(work, row, head, d), 0.012)
              << "row " << row << ", head " << head << ", " << d;
        }
      }
    }
  }

  static constexpr float kScale = 0.2f;
  struct Sequence {
    std::vector<double> k, v;  // [positions, kv_heads, width]
  };
  std::vector<bf16> q_, k_, v_;
  std::vector<Sequence> sequences_;
  std::vector<std::pair<std::size_t, int>> rows_;  // sequence, position
  int num_combines_ = 0;
};

TEST_F(CudaAttention, DecodesAndPrefillsTogether) {
  expect_exact({{0, 5, 40, 299}, {3, 1, 20, 1}}, 0);
  expect_exact({{0, 5, 40, 299}, {3, 1, 20, 1}}, 100000);
  EXPECT_EQ(num_combines_, 1);
}

TEST_F(CudaAttention, SharesKvAmongAnyNumberOfHeads) {
  for (auto [heads, kv_heads] : {std::pair{1, 1}, {3, 3}, {6, 2}, {7, 1}, {20, 1}}) {
    Work work{{0, 130}, {18, 2}};
    work.heads = heads;
    work.kv_heads = kv_heads;
    work.head_dim = 8;
    expect_exact(work, 100000);
  }
}

TEST_F(CudaAttention, IsCompiledForTheUsualHeads) {
  for (int head_dim : {2, 64, 80, 96, 128, 256}) {
    Work work{{0, 150}, {5, 1}, 2, 1, head_dim};
    expect_exact(work, 100000);
  }
}

TEST_F(CudaAttention, SeesWindowsAndCapsScores) {
  for (int window : {1, 7, 33, 128, 200}) {
    Work work{{0, 390, 250}, {30, 1, 40}};
    work.window = window;
    work.soft_cap = 1.5f;
    expect_exact(work, 100000);
  }
}

TEST_F(CudaAttention, SplitsChangeNoBit) {
  for (int window : {0, 190}) {
    Work work{{700, 0, 300}, {1, 140, 3}};
    work.window = window;
    const std::vector<bf16> whole = run(work, 0);
    EXPECT_EQ(num_combines_, 0);
    const std::vector<bf16> divided = run(work, 100000);
    EXPECT_GE(num_combines_, 2);
    EXPECT_TRUE(test::same_bits(whole.data(), divided.data(), whole.size() * 2));
  }
}

TEST_F(CudaAttention, ATokenHasTheSameBitsInAnyBatch) {
  const Work together{{300, 0}, {1, 150}};
  const std::vector<bf16> all = run(together, 0);
  const std::vector<bf16> alone = run({{300}, {1}}, 100000);
  EXPECT_TRUE(test::same_bits(alone.data(), all.data(), alone.size() * 2));
}

TEST_F(CudaAttention, HasNoRace) {
  test::in_every_order<bf16>([&] { return run({{300, 0}, {1, 20}}, 100000); });
}

}  // namespace
}  // namespace deinfer
