// Attention over latents, in every pair of forms, against attention over the K and V that they
// stand for.
#include <gtest/gtest.h>

#include <cmath>

#include "comm/communicator.h"
#include "ops/attention.h"
#include "ops/latent_kv.h"
#include "reference.h"

namespace deinfer::test {
namespace {

constexpr int kBlock = 16;

struct Shape {
  int heads, kv_heads, head_dim, k_rank, v_rank;
  int window = 0;
  bool biases = false;
};

LowRankLinear random_linear(Random& random, DType dtype, int n, int rank, bool bias) {
  LowRankLinear linear;
  const auto count = static_cast<std::size_t>(n) * static_cast<std::size_t>(rank);
  const std::vector<float> u = random.vector(count, 1 / std::sqrt(static_cast<float>(rank)));
  linear.u = cpu::allocate_packed(dtype, n, rank, cpu::kPanelRows);
  cpu::pack_rows({u.data(), DType::kFloat32, n, rank, rank}, {}, 0, linear.u.num_panels(),
                 linear.u);
  linear.rank = rank;
  if (!bias) return linear;
  linear.bias = Buffer(static_cast<std::size_t>(n + 64) * sizeof(float));
  const std::vector<float> values = random.vector(static_cast<std::size_t>(n));
  std::copy(values.begin(), values.end(), linear.bias.as<float>());
  return linear;
}

/// Latents of some sequences, their K and V, and queries.
class Scene {
 public:
  Scene(const Shape& shape, DType dtype, int threads)
      : shape_(shape),
        activations_(dtype == DType::kFloat32 ? dtype : DType::kBFloat16),
        kernels_(cpu::kernels_for(detect_isas().back())),
        team_(threads),
        communicator_(make_single_communicator(0)),
        exchange_(*communicator_) {
    Random random(3);
    const int kv = shape.kv_heads * shape.head_dim;
    key_ = random_linear(random, dtype, kv, shape.k_rank, shape.biases);
    value_ = random_linear(random, dtype, kv, shape.v_rank, shape.biases);
    for (auto [computed, rows] : {std::pair{0, 1}, {0, 70}, {250, 20}, {599, 1}, {300, 140}}) {
      BatchSequence sequence{batch_.num_tokens(), rows, computed, nullptr};
      tables_.emplace_back();
      for (int block = 0; block * kBlock < computed + rows; ++block) {
        tables_.back().push_back(num_blocks_++);
      }
      for (int i = 0; i < rows; ++i) batch_.token_ids.push_back(0);
      batch_.sequences.push_back(sequence);
    }
    for (std::size_t i = 0; i < tables_.size(); ++i) {
      batch_.sequences[i].block_table = tables_[i].data();
    }
    ldq_ = shape.heads * shape.head_dim;
    q_ = random.vector(static_cast<std::size_t>(batch_.num_tokens()) *
                       static_cast<std::size_t>(ldq_));
    const int tokens = num_blocks_ * kBlock;
    k_latents_ = random.vector(static_cast<std::size_t>(tokens * shape.k_rank));
    v_latents_ = random.vector(static_cast<std::size_t>(tokens * shape.v_rank));
    absorbed_ = transposed_heads(key_, shape.kv_heads, shape.head_dim, team_);
  }

  /// out[m, heads * head_dim] with K and V kept so.
  std::vector<float> run(const KvForms& forms, int count_rows = 1 << 20) {
    const KvTraits traits{shape_.heads / shape_.kv_heads, shape_.head_dim, true, false};
    KvCacheConfig config{{{kv_key_shape(traits, forms.k, shape_.k_rank, shape_.kv_heads, 4),
                           kv_value_shape(traits, forms.v, shape_.v_rank, shape_.kv_heads)}},
                         kBlock,
                         num_blocks_,
                         activations_};
    KvCache cache(config);
    const KvLayer layer = cache.layer(0);
    fill(layer);
    AttentionShape shape;
    shape.heads = shape_.heads;
    shape.kv_heads = shape_.kv_heads;
    shape.head_dim = shape_.head_dim;
    shape.window = shape_.window;
    shape.scale = 0.3f;
    shape.forms = forms;
    shape.k_latent = shape_.k_rank + 3;  // another layer may have more
    shape.v_latent = shape_.v_rank + 3;
    AttentionSchedule schedule(shape, activations_, team_.size());
    Batch batch = batch_;
    while (!batch.sequences.empty() && batch.sequences.back().first_row >= count_rows) {
      batch.sequences.pop_back();
    }
    schedule.plan(batch);
    const int rows = batch_.num_tokens();
    ActivationBuffer out(activations_, rows, ldq_);
    LatentKv latents;
    latents.key = &key_;
    latents.value = &value_;
    latents.absorbed_key = absorbed_;
    std::vector<ThreadScratch> scratch(static_cast<std::size_t>(team_.size()));
    for (ThreadScratch& one : scratch) {
      one.attention = Buffer(attention_scratch_bytes(kernels_, shape, activations_));
    }
    team_.run([&](TeamMember& member) {
      ExecutionContext ctx{kernels_, member, scratch[static_cast<std::size_t>(member.id())],
                           exchange_};
      schedule.run(ctx, batch, q_.data(), ldq_, layer, latents, out.view());
    });
    std::vector<float> values;
    for (int row = 0; row < std::min(rows, count_rows); ++row) {
      for (int j = 0; j < ldq_; ++j) {
        const Activations at = out.view().rows_from(row).columns_from(j);
        values.push_back(at.dtype == DType::kFloat32 ? *at.f32() : to_float(*at.b16()));
      }
    }
    return values;
  }

 private:
  /// Latents as they are, or K and V of them.
  void fill(const KvLayer& layer) {
    std::vector<ThreadScratch> scratch(1);
    ThreadTeam one(1);
    for (int is_key = 0; is_key < 2; ++is_key) {
      const LowRankLinear& linear = is_key != 0 ? key_ : value_;
      const std::vector<float>& all = is_key != 0 ? k_latents_ : v_latents_;
      const KvSide& side = is_key != 0 ? layer.k : layer.v;
      const int tokens = num_blocks_ * kBlock;
      ActivationBuffer z(activations_, tokens, linear.rank + 16);
      std::vector<KvSlot> slots;
      for (int i = 0; i < tokens; ++i) {
        const float* row = all.data() + std::ptrdiff_t{i} * linear.rank;
        const Activations to = z.view().rows_from(i);
        if (activations_ == DType::kFloat32) {
          kernels_.copy_row_f32(row, linear.rank, to.f32());
        } else {
          kernels_.copy_row_bf16(row, linear.rank, to.b16());
        }
        slots.push_back({i / kBlock, i % kBlock});
      }
      if (side.is_latent()) {
        const StoreLatent store(side, is_key != 0, linear.rank, slots);
        for (int i = 0; i < tokens; ++i) store.store(z.view(), i);
        continue;
      }
      auto* tile = scratch[0].tile_a.as<float>();
      auto write_k = activations_ == DType::kFloat32 ? kernels_.write_k_f32 : kernels_.write_k_bf16;
      auto write_v = activations_ == DType::kFloat32 ? kernels_.write_v_f32 : kernels_.write_v_bf16;
      for (int i = 0; i < tokens; ++i) {
        for (int panel = 0; panel < linear.u.num_panels(); ++panel) {
          scratch[0].expanded.forget();
          multiply_panel(kernels_, linear.u, {0, linear.u.k_pad}, z.view().rows_from(i), 1, panel,
                         nullptr, scratch[0].expanded, tile);
          for (int j = 0; j < linear.u.rows_of(panel); ++j) {
            const int column = panel * cpu::kPanelRows + j;
            if (column >= linear.u.n) break;
            float value = tile[j];
            if (linear.has_bias()) value += linear.bias.as<float>()[column];
            const int head = column / shape_.head_dim;
            (is_key != 0 ? write_k : write_v)(&value, 1, column % shape_.head_dim, shape_.head_dim,
                                              i % kBlock, side.at(i / kBlock, head));
          }
        }
      }
    }
  }

  Shape shape_;
  DType activations_;
  const cpu::KernelTable& kernels_;
  ThreadTeam team_;
  std::unique_ptr<Communicator> communicator_;
  TeamExchange exchange_;
  LowRankLinear key_, value_;
  std::vector<cpu::PackedMatrix> absorbed_;
  std::vector<std::vector<std::int32_t>> tables_;
  std::int32_t num_blocks_ = 0;
  Batch batch_;
  std::vector<float> q_, k_latents_, v_latents_;
  int ldq_ = 0;
};

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    size += std::pow(b[i], 2);
  }
  return std::sqrt(difference / size);
}

constexpr KvForm kForms[] = {KvForm::kDense, KvForm::kAbsorbed, KvForm::kRebuilt};

const Shape kShapes[] = {{8, 8, 16, 21, 40},
                         {8, 2, 24, 9, 5, 70},
                         {6, 3, 40, 64, 33, 0, true},
                         {40, 1, 8, 2, 3, 9, true}};

TEST(LatentAttention, EqualsAttentionOverWhatLatentsStandFor) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(testing::Message() << shape.heads << " heads of " << shape.head_dim);
    Scene scene(shape, DType::kFloat32, 1);
    const std::vector<float> dense = scene.run({});
    for (KvForm k : kForms) {
      for (KvForm v : kForms) {
        SCOPED_TRACE(testing::Message() << "K " << kv_form_name(k) << ", V " << kv_form_name(v));
        const std::vector<float> latent = scene.run({k, v});
        EXPECT_LE(distance(latent, dense), 2e-6);
        if (k != KvForm::kAbsorbed && v != KvForm::kAbsorbed) {
          EXPECT_EQ(latent, dense);
        }
      }
    }
  }
}

TEST(LatentAttention, BitsDependOnNeitherThreadsNorCompany) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kInt8}) {
    for (const Shape& shape : kShapes) {
      Scene alone(shape, dtype, 1);
      Scene shared(shape, dtype, 3);
      for (KvForm k : kForms) {
        for (KvForm v : kForms) {
          const std::vector<float> expected = alone.run({k, v});
          EXPECT_EQ(shared.run({k, v}), expected);
          // The first two sequences without the others.
          const std::vector<float> few = shared.run({k, v}, 71);
          EXPECT_TRUE(std::equal(few.begin(), few.end(), expected.begin()));
        }
      }
    }
  }
}

TEST(LatentAttention, RoundsNoWorseThanADenseCache) {
  for (DType dtype : {DType::kBFloat16, DType::kInt8}) {
    for (const Shape& shape : kShapes) {
      SCOPED_TRACE(testing::Message() << shape.heads << " heads of " << shape.head_dim);
      Scene scene(shape, dtype, 1);
      const std::vector<float> dense = scene.run({});
      for (KvForm k : kForms) {
        for (KvForm v : kForms) {
          if (k != KvForm::kAbsorbed && v != KvForm::kAbsorbed) {
            EXPECT_EQ(scene.run({k, v}), dense);
          } else {
            EXPECT_LE(distance(scene.run({k, v}), dense), 1e-2);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace deinfer::test
