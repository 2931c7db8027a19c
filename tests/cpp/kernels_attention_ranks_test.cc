// Attention over KV whose tokens ranks divide: each rank's part by itself, and all merged.
#include "reference.h"

namespace deinfer::test {
namespace {

class RankAttentionTest : public IsaTest {};

struct Shape {
  int ranks, run;  // tokens of a block that a rank keeps
  int first_position;
  int tokens;
  int window;
};

constexpr int kHeads = 3, kDim = 20;

TEST(TokenShare, NumbersWhatARankKeepsWithoutGaps) {
  for (const auto& [ranks, run] : {std::pair{1, 16}, {2, 16}, {3, 16}, {3, 32}, {5, 48}}) {
    std::vector<int> kept(static_cast<std::size_t>(ranks));
    for (int position = 0; position < 700; ++position) {
      const int owner = position % (ranks * run) / run;
      for (int rank = 0; rank < ranks; ++rank) {
        const cpu::TokenShare share{rank, ranks, run};
        int& count = kept[static_cast<std::size_t>(rank)];
        ASSERT_EQ(share.before(position), count);
        if (rank != owner) continue;
        ASSERT_EQ(share.position(count), position);
        ++count;
      }
    }
  }
}

template <typename T>
class Scene {
 public:
  explicit Scene(const Shape& shape)
      : shape_(shape), length_(shape.first_position + shape.tokens), random_(3) {
    const auto size = static_cast<std::size_t>(length_ * kDim);
    k_ = random_.vector<T>(size);
    v_ = random_.vector<T>(size);
    q_ = random_.vector(static_cast<std::size_t>(shape.tokens * kHeads * kDim));
    const int blocks = length_ / (shape.ranks * shape.run) + 1;
    for (int block = blocks - 1; block >= 0; --block) table_.push_back(block);
    // Nothing may read what a rank does not keep.
    const auto pool = static_cast<std::size_t>(blocks * shape.run * kDim);
    for (int rank = 0; rank < shape.ranks; ++rank) {
      k_pools_.emplace_back(pool, TypeTraits<T>::from(kNan));
      v_pools_.emplace_back(pool, TypeTraits<T>::from(kNan));
    }
    for (int p = 0; p < length_; ++p) {
      const int block = table_[static_cast<std::size_t>(p / (shape.ranks * shape.run))];
      const int rank = p / shape.run % shape.ranks, offset = p % shape.run;
      for (int d = 0; d < kDim; ++d) {
        const int group = block * shape.run / 16 + offset / 16;
        k_pools_[static_cast<std::size_t>(rank)]
                [static_cast<std::size_t>((group * kDim + d) * 16 + offset % 16)] =
                    k_[static_cast<std::size_t>(p * kDim + d)];
        v_pools_[static_cast<std::size_t>(rank)]
                [static_cast<std::size_t>((block * shape.run + offset) * kDim + d)] =
                    v_[static_cast<std::size_t>(p * kDim + d)];
      }
    }
  }

  /// The merged outputs [tokens][heads][dim] of the tokens [first, first + tokens).
  std::vector<float> run(const cpu::KernelTable& kernels, int first, int tokens) const {
    const int rows = tokens * kHeads;
    const auto floats = static_cast<std::size_t>(rows * kDim);
    Aligned<float> scratch(kernels.attention_scratch(rows, kDim), kNan);
    std::vector<float> maximum(static_cast<std::size_t>(rows), -kInf), sum(maximum.size(), 0.0f),
        output(floats, kNan);
    std::vector<float> part_maximum(maximum.size()), part_sum(sum.size()), part_output(floats);
    const cpu::AttentionState total{maximum.data(), sum.data(), output.data()};
    const cpu::AttentionState part{part_maximum.data(), part_sum.data(), part_output.data()};
    for (int rank = 0; rank < shape_.ranks; ++rank) {
      const cpu::TokenShare share{rank, shape_.ranks, shape_.run};
      cpu::QueryView query{q_.data() + first * kHeads * kDim,
                           kHeads * kDim,
                           tokens,
                           kHeads,
                           shape_.first_position + first,
                           shape_.window,
                           0.4f,
                           0.0f,
                           share};
      const std::ptrdiff_t stride = std::ptrdiff_t{shape_.run} * kDim;
      cpu::KvSideView side{nullptr, stride, 0, table_.data(), 0, shape_.run, kDim, kHeads};
      cpu::KvView view{side, side};
      view.k.data = k_pools_[static_cast<std::size_t>(rank)].data();
      view.v.data = v_pools_[static_cast<std::size_t>(rank)].data();
      auto attend = sizeof(T) == 4 ? kernels.attention_split_f32 : kernels.attention_split_bf16;
      for (int split = 0; split * cpu::kKvSplit < share.before(length_); ++split) {
        attend(query, view, split, scratch.data(), part);
        kernels.attention_merge(part, rows, kDim, total);
      }
    }
    std::vector<float> out(floats);
    kernels.attention_finish_f32(total, tokens, kHeads, kDim, out.data(), kHeads * kDim, kDim);
    return out;
  }

  double reference(int token, int head, int d) const {
    const int position = shape_.first_position + token;
    const int first = shape_.window > 0 ? std::max(0, position - shape_.window + 1) : 0;
    double sum = 0, out = 0;
    for (int p = first; p <= position; ++p) {
      double score = 0;
      for (int j = 0; j < kDim; ++j) {
        score += q_[static_cast<std::size_t>((token * kHeads + head) * kDim + j)] *
                 wide(k_[static_cast<std::size_t>(p * kDim + j)]);
      }
      const double weight = std::exp(score * static_cast<double>(0.4f));
      sum += weight;
      out += weight * wide(v_[static_cast<std::size_t>(p * kDim + d)]);
    }
    return out / sum;
  }

 private:
  Shape shape_;
  int length_;
  Random random_;
  std::vector<T> k_, v_;
  std::vector<float> q_;
  std::vector<std::int32_t> table_;
  std::vector<std::vector<T>> k_pools_, v_pools_;  // of every rank
};

template <typename T>
void expect_ranks_find_all(const cpu::KernelTable& kernels) {
  // Windows that one rank has whole, so that rows between others see nothing, and several splits.
  for (const Shape& shape :
       {Shape{2, 16, 0, 20, 0}, Shape{3, 16, 37, 21, 0}, Shape{2, 16, 30, 21, 5},
        Shape{3, 32, 130, 21, 40}, Shape{2, 32, 900, 7, 0}, Shape{3, 16, 1700, 3, 700}}) {
    SCOPED_TRACE(std::to_string(shape.ranks) + " ranks, from " +
                 std::to_string(shape.first_position));
    const Scene<T> scene(shape);
    const std::vector<float> together = scene.run(kernels, 0, shape.tokens);
    for (int token = 0; token < shape.tokens; ++token) {
      for (int i = 0; i < kHeads * kDim; ++i) {
        ASSERT_NEAR(together[static_cast<std::size_t>(token * kHeads * kDim + i)],
                    scene.reference(token, i / kDim, i % kDim), 1e-5);
      }
      const std::vector<float> alone = scene.run(kernels, token, 1);
      EXPECT_TRUE(same_bits(alone.data(), together.data() + token * kHeads * kDim,
                            kHeads * kDim * sizeof(float)))
          << token;
    }
  }
}

TEST_P(RankAttentionTest, PartsMergeToTheWhole) {
  expect_ranks_find_all<float>(kernels());
  expect_ranks_find_all<bf16>(kernels());
}

DEINFER_FOR_EACH_ISA(RankAttentionTest);

}  // namespace
}  // namespace deinfer::test
