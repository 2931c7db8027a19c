// The CUDA attention over latents, in every pair of forms, against attention in fp64 over the K and
// V that they stand for.
#include <numeric>

#include "cuda_fixture.h"
#include "cuda_latent_fixture.h"
#include "model/cuda_step.h"

namespace deinfer {
namespace {

using cuda::DeviceBuffer;
using test::Factor;
using test::kBlockSize;
using test::kEps;
using test::Side;
using Work = test::LatentWork;

constexpr int kPartialRows = 512;
constexpr float kScale = 0.2f;

class CudaLatentAttention : public test::CudaTest {
 protected:
  /// out[m, heads, output_dim] as bf16 bits. `warps`: how much the splits are divided.
  std::vector<bf16> run(const Work& work, int warps) {
    test::Random random(5);
    const int m = std::accumulate(work.rows.begin(), work.rows.end(), 0);
    CudaStepLimits limits;
    limits.max_tokens = m;
    limits.max_sequences = static_cast<int>(work.rows.size());
    limits.max_model_len = 2048;
    limits.block_size = kBlockSize;
    limits.heads = work.heads;
    limits.attention = {{work.window, work.task_heads()}};
    limits.partial_rows = kPartialRows;
    limits.parallel_warps = warps;
    CudaStep step(limits);

    // Blocks are handed out backwards; what nobody has written is NaN.
    Batch batch;
    std::vector<std::vector<std::int32_t>> tables(work.rows.size());
    int blocks = 1;
    for (std::size_t i = 0; i < work.rows.size(); ++i) {
      blocks += (work.positions(i) + kBlockSize - 1) / kBlockSize;
    }
    int next = blocks;
    rows_.clear();
    for (std::size_t i = 0; i < work.rows.size(); ++i) {
      for (int b = 0; b * kBlockSize < work.positions(i); ++b) tables[i].push_back(--next);
      batch.sequences.push_back(
          {batch.num_tokens(), work.rows[i], work.computed[i], tables[i].data()});
      for (int r = 0; r < work.rows[i]; ++r) {
        rows_.push_back({tables[i], work.computed[i] + r});
        batch.token_ids.push_back(0);
        batch.positions.push_back(work.computed[i] + r);
        batch.slots.push_back({});
      }
    }
    k_ = make_side(work.k, work.k_rank, true, work, blocks);
    v_ = make_side(work.v, work.v_rank, false, work, blocks);
    std::vector<float> scales(static_cast<std::size_t>(blocks * kBlockSize), test::kNan);
    const Factor key = make_factor(random, work.k, work.k_rank, work.rotates, work);
    const Factor value = make_factor(random, work.v, work.v_rank, false, work);
    gain_ = random.vector(static_cast<std::size_t>(work.kv_heads * work.head_dim));
    const int half = work.head_dim / 2;
    std::vector<float> cos, sin;
    for (int i = 0; i < 1024 * half; ++i) {
      const float angle = static_cast<float>(i / half) / static_cast<float>(1 + i % half);
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
    for (std::size_t i = 0; i < work.rows.size(); ++i) {
      for (int p = 0; p < work.positions(i); ++p) {
        const int place =
            tables[i][static_cast<std::size_t>(p / kBlockSize)] * kBlockSize + p % kBlockSize;
        fill(random, work.k, work.k_rank, key, work, place, k_);
        fill(random, work.v, work.v_rank, value, work, place, v_);
        if (work.k != KvForm::kRebuilt) continue;
        std::vector<double>& all = k_.exact[static_cast<std::size_t>(place)];
        if (work.norm == QkNormKind::kFull) {
          scales[static_cast<std::size_t>(place)] = 0.5f + 0.01f * static_cast<float>(p % 90);
        }
        for (int head = 0; head < work.kv_heads; ++head) {
          finish_key(work, gain_, head, all.data() + head * work.head_dim,
                     scales[static_cast<std::size_t>(place)], cos.data() + p * half,
                     sin.data() + p * half);
        }
      }
    }

    const int query_width = work.k == KvForm::kAbsorbed ? cuda::head_columns(work.k_rank)
                                                        : cuda::head_width(work.head_dim);
    q_.clear();
    std::vector<bf16> queries;
    for (int i = 0; i < m * work.heads; ++i) {
      for (int d = 0; d < query_width; ++d) {
        queries.push_back(d < work.query_dim() ? to_bf16(random.normal()) : bf16{});
        if (d < work.query_dim()) q_.push_back(test::wide(queries.back()));
      }
    }
    std::vector<std::byte> inputs(step.capacity_bytes());
    step.build(batch, m, inputs.data());
    DeviceBuffer device = on_device(inputs);
    const CudaStep::Offsets& at = step.offsets();
    const auto* words = device.as<int>();
    DeviceBuffer q = on_device(queries), k = on_device(k_.pool), v = on_device(v_.pool);
    DeviceBuffer key_scales = on_device(scales), gain = on_device(gain_);
    DeviceBuffer cosines = on_device(cos), sines = on_device(sin);
    DeviceBuffer key_u = weights(key.packed, key.rows, work.k_rank);
    DeviceBuffer value_u = weights(value.packed, value.rows, work.v_rank);
    DeviceBuffer key_bias = on_device(key.bias), value_bias = on_device(value.bias);

    cuda::LatentAttentionLaunch launch;
    cuda::AttentionLaunch& common = launch.common;
    common.step.num_tasks = words + at.attention[0].num_tasks;
    common.step.num_combines = words + at.attention[0].num_combines;
    common.step.tasks = reinterpret_cast<const cuda::AttentionTask*>(words + at.attention[0].tasks);
    common.step.combines =
        reinterpret_cast<const cuda::AttentionTask*>(words + at.attention[0].combines);
    common.step.sequences = reinterpret_cast<const cuda::AttentionSequence*>(words + at.sequences);
    common.step.tables = words + at.tables;
    common.q = q.as<void>();
    common.heads = work.heads;
    common.window = work.window;
    common.scale = kScale;
    common.soft_cap = work.soft_cap;
    common.kv = {nullptr,           nullptr,       kBlockSize,
                 work.task_heads(), work.head_dim, cuda::head_width(work.head_dim)};
    if (work.v == KvForm::kAbsorbed) {
      common.kv.head_dim = common.kv.head_width = cuda::head_columns(work.v_rank);
    }
    const int out_dim = common.kv.head_dim;
    const int chunks = cuda::tiles_of(work.heads * out_dim, cuda::kTileCols);
    DeviceBuffer out(static_cast<std::size_t>(cuda::tiles_of(m, 128) * 128 * chunks * 32) * 2);
    DeviceBuffer sums(kPartialRows * static_cast<std::size_t>(common.kv.head_width) * 4);
    DeviceBuffer stats(kPartialRows * 2 * 4);
    common.partial_sums = sums.as<float>();
    common.partial_stats = stats.as<float>();
    common.out = out.as<void>();
    common.out_chunks = chunks;
    common.blocks = 3;
    DeviceBuffer totals(cuda::latent_totals_bytes(common.blocks));
    launch.totals = totals.as<float>();
    launch.query_width = query_width;
    launch.keys = pool_of(k_, k, work.head_dim);
    launch.values = pool_of(v_, v, work.head_dim);
    launch.head_dim = work.head_dim;
    launch.head_width = cuda::head_width(work.head_dim);
    const auto factor_of = [&](const Factor& factor, const DeviceBuffer& u,
                               const DeviceBuffer& bias, int rank) {
      return cuda::HeadFactor{u.as<void>(), work.biases ? bias.as<float>() : nullptr,
                              factor.rows / 16 / work.kv_heads,
                              cuda::tiles_of(rank, cuda::kTileCols)};
    };
    if (work.k == KvForm::kRebuilt) {
      launch.key_factor = factor_of(key, key_u, key_bias, work.k_rank);
      if (work.rotates) launch.rotation = {cosines.as<float>(), sines.as<float>(), half};
      if (work.norm != QkNormKind::kNone) launch.key_gain = gain.as<float>();
      if (work.norm == QkNormKind::kFull) launch.key_scales = key_scales.as<float>();
      launch.key_eps = kEps;
    }
    if (work.v == KvForm::kRebuilt) {
      launch.value_factor = factor_of(value, value_u, value_bias, work.v_rank);
    }
    cuda::check_launch(cuda::launch_latent_attention(launch, stream_->get()), "attention");
    const std::vector<bf16> tiled = on_host<bf16>(out);
    std::vector<bf16> result;
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < work.heads * out_dim; ++j) {
        const bf16 element = tiled[static_cast<std::size_t>(cuda::activation_offset(i, j, chunks))];
        if (j % out_dim < work.output_dim()) {
          result.push_back(element);
        } else {
          EXPECT_EQ(test::wide(element), 0.0) << "padding";
        }
      }
    }
    num_combines_ = reinterpret_cast<const int*>(inputs.data())[at.attention[0].num_combines];
    return result;
  }

  /// Of the last run, in fp64.
  double exact(const Work& work, std::size_t row, int head, int d) const {
    const auto& [table, position] = rows_[row];
    const int kv_head = head / (work.heads / work.kv_heads);
    const int dim = work.query_dim();
    const double* q =
        q_.data() + (row * static_cast<std::size_t>(work.heads) + static_cast<std::size_t>(head)) *
                        static_cast<std::size_t>(dim);
    double sum = 0, total = 0;
    const int first = work.window > 0 ? std::max(0, position - work.window + 1) : 0;
    for (int p = first; p <= position; ++p) {
      const auto place = static_cast<std::size_t>(
          table[static_cast<std::size_t>(p / kBlockSize)] * kBlockSize + p % kBlockSize);
      const double* key = k_.exact[place].data() + kv_head * dim;
      double score = std::inner_product(q, q + dim, key, 0.0) * static_cast<double>(kScale);
      if (work.soft_cap > 0) score = work.soft_cap * std::tanh(score / work.soft_cap);
      sum += std::exp(score);
      total += std::exp(score) *
               v_.exact[place][static_cast<std::size_t>(kv_head * work.output_dim() + d)];
    }
    return total / sum;
  }
  void expect_exact(const Work& work, int warps) {
    const std::vector<bf16> got = run(work, warps);
    std::size_t at = 0;
    for (std::size_t row = 0; row < rows_.size(); ++row) {
      for (int head = 0; head < work.heads; ++head) {
        for (int d = 0; d < work.output_dim(); ++d) {
          ASSERT_NEAR(test::wide(got[at++]), exact(work, row, head, d), 0.02)
              << "row " << row << ", head " << head << ", " << d;
        }
      }
    }
  }

  int num_combines_ = 0;

 private:
  static cuda::KvPool pool_of(const Side& side, const DeviceBuffer& memory, int head_dim) {
    auto* data = memory.as<void>();
    return {side.transposed ? nullptr : data,
            side.transposed ? data : nullptr,
            kBlockSize,
            side.heads,
            head_dim,
            side.width};
  }

  Side k_, v_;
  std::vector<double> q_;  // [m, heads, query_dim]
  std::vector<float> gain_;
  std::vector<std::pair<std::vector<std::int32_t>, int>> rows_;  // block table, position
};

constexpr KvForm kForms[] = {KvForm::kDense, KvForm::kAbsorbed, KvForm::kRebuilt};

TEST_F(CudaLatentAttention, AgreesInEveryPairOfForms) {
  for (const KvForm k : kForms) {
    for (const KvForm v : kForms) {
      if (k == KvForm::kDense && v == KvForm::kDense) continue;
      SCOPED_TRACE(testing::Message() << "K " << kv_form_name(k) << ", V " << kv_form_name(v));
      Work work{{0, 5, 139}, {19, 1, 4}, k, v};
      expect_exact(work, 0);
      work.biases = true;
      work.rotates = true;
      expect_exact(work, 100000);
      EXPECT_EQ(num_combines_, 1);
    }
  }
}

TEST_F(CudaLatentAttention, TakesAnyHeadsAndRanks) {
  struct Shape {
    int heads, kv_heads, head_dim, k_rank, v_rank;
  };
  // Columns of outputs for several warps, for more than a block has; heads of every width.
  for (const Shape& shape :
       {Shape{1, 1, 2, 1, 1}, Shape{3, 3, 12, 64, 130}, Shape{20, 1, 8, 8, 3},
        Shape{2, 2, 80, 33, 40}, Shape{2, 1, 128, 96, 1100}, Shape{2, 1, 160, 32, 16}}) {
    for (const KvForm form : {KvForm::kAbsorbed, KvForm::kRebuilt}) {
      SCOPED_TRACE(testing::Message()
                   << shape.heads << " heads of " << shape.head_dim << ", " << kv_form_name(form));
      Work work{{0, 130}, {3, 1}, form, form};
      work.heads = shape.heads;
      work.kv_heads = shape.kv_heads;
      work.head_dim = shape.head_dim;
      work.k_rank = shape.k_rank;
      work.v_rank = shape.v_rank;
      work.rotates = true;
      expect_exact(work, 100000);
      if (shape.head_dim > 64 || form == KvForm::kRebuilt) continue;
      work.k = KvForm::kRebuilt;  // as most models with rotation
      expect_exact(work, 0);
    }
  }
}

TEST_F(CudaLatentAttention, SeesWindowsAndCapsScores) {
  for (const int window : {1, 33, 128}) {
    Work work{{0, 250}, {40, 1}, KvForm::kRebuilt, KvForm::kRebuilt};
    work.window = window;
    work.soft_cap = 1.5f;
    expect_exact(work, window == 33 ? 0 : 100000);
    work.k = work.v = KvForm::kAbsorbed;
    expect_exact(work, window == 33 ? 0 : 100000);
  }
}

TEST_F(CudaLatentAttention, NormsRebuiltKeys) {
  for (const QkNormKind norm : {QkNormKind::kPerHead, QkNormKind::kFull}) {
    for (const bool rotates : {false, true}) {
      Work work{{0, 120}, {18, 9}, KvForm::kRebuilt, KvForm::kAbsorbed};
      work.norm = norm;
      work.rotates = rotates;
      work.head_dim = 36;
      expect_exact(work, 100000);
    }
  }
}

/// Splits on their own or not, rows of a sequence that share what is rebuilt or not.
TEST_F(CudaLatentAttention, TheDivisionOfWorkChangesNoBit) {
  for (const auto& [k, v] : {std::pair{KvForm::kRebuilt, KvForm::kRebuilt},
                             {KvForm::kRebuilt, KvForm::kAbsorbed},
                             {KvForm::kAbsorbed, KvForm::kAbsorbed},
                             {KvForm::kDense, KvForm::kAbsorbed}}) {
    for (const int window : {0, 190}) {
      Work work{{300, 0, 120}, {1, 140, 10}, k, v};
      work.window = window;
      const std::vector<bf16> whole = run(work, 0);
      EXPECT_EQ(num_combines_, 0);
      const std::vector<bf16> divided = run(work, 100000);
      EXPECT_GE(num_combines_, 2);
      EXPECT_TRUE(test::same_bits(whole.data(), divided.data(), whole.size() * 2));
    }
  }
}

TEST_F(CudaLatentAttention, HasNoRace) {
  for (const KvForm v : {KvForm::kRebuilt, KvForm::kAbsorbed}) {
    Work work{{130, 0}, {1, 20}, KvForm::kRebuilt, v};
    work.norm = QkNormKind::kPerHead;
    work.rotates = true;
    test::in_every_order<bf16>([&] { return run(work, 100000); });
  }
}

/// z of activations in the slots of a pool, as keys lie and as values do.
TEST_F(CudaLatentAttention, WritesLatents) {
  const int m = 9, k_rank = 11, v_rank = 37;
  test::Random random(3);
  const auto z = random.vector<bf16>(static_cast<std::size_t>(m) * 96);
  std::vector<bf16> padded = z;
  for (int i = 0; i < m; ++i) {
    for (int j = k_rank; j < 32; ++j) padded[static_cast<std::size_t>(i * 96 + j)] = bf16{};
    for (int j = 32 + v_rank; j < 96; ++j) padded[static_cast<std::size_t>(i * 96 + j)] = bf16{};
  }
  DeviceBuffer device = activations(padded, m, 96, 3);
  std::vector<int> slots = {5, 40, -1, 17, 0, 33, 2, -1, 46};
  DeviceBuffer places = on_device(slots);
  const std::size_t k_count = 48 * 16, v_count = 48 * 40;
  DeviceBuffer k = on_device(std::vector<bf16>(k_count)), v = on_device(std::vector<bf16>(v_count));
  cuda::LatentWriteLaunch launch;
  launch.z = device.as<void>();
  launch.z_chunks = 3;
  launch.m = m;
  launch.slots = places.as<int>();
  launch.sides[0] = {0, {k.as<void>(), nullptr, kBlockSize, 1, k_rank, 16}};
  launch.sides[1] = {1, {nullptr, v.as<void>(), kBlockSize, 1, v_rank, 40}};
  cuda::check_launch(cuda::launch_latent_write(launch, stream_->get()), "latents");
  std::vector<bf16> expected_k(k_count), expected_v(v_count);
  for (int i = 0; i < m; ++i) {
    const int slot = slots[static_cast<std::size_t>(i)];
    if (slot < 0) continue;
    for (int j = 0; j < 16; ++j) {
      expected_k[static_cast<std::size_t>(slot * 16 + j)] =
          padded[static_cast<std::size_t>(i * 96 + j)];
    }
    for (int j = 0; j < 40; ++j) {
      const int at = (slot / 16 * 40 + j) * 16 + slot % 16;
      expected_v[static_cast<std::size_t>(at)] = padded[static_cast<std::size_t>(i * 96 + 32 + j)];
    }
  }
  EXPECT_TRUE(test::same_bits(on_host<bf16>(k).data(), expected_k.data(), k_count * 2));
  EXPECT_TRUE(test::same_bits(on_host<bf16>(v).data(), expected_v.data(), v_count * 2));
}

}  // namespace
}  // namespace deinfer
