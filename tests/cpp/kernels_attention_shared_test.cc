// Attention over K and V of different widths, of which one may be shared by more heads than the
// other: what latents need.
#include <algorithm>

#include "reference.h"

namespace deinfer::test {
namespace {

class SharedAttentionTest : public IsaTest {};

/// A side's width, and how many of the heads share one of its heads.
struct Side {
  int dim;
  int group;
};

struct Shape {
  Side k, v;
  int heads;
  int first_position;
  int tokens;
  int window;
};

constexpr int kBlockSize = 32;

template <typename T>
class Scene {
 public:
  explicit Scene(const Shape& shape)
      : shape_(shape), length_(shape.first_position + shape.tokens), random_(3) {
    for (int block = length_ / kBlockSize; block >= 0; --block) table_.push_back(block);
    fill(shape.k, true, k_, k_pool_);
    fill(shape.v, false, v_, v_pool_);
    q_ = random_.vector(static_cast<std::size_t>(shape.tokens * shape.heads * shape.k.dim));
  }

  /// out[tokens][count][v.dim] of the heads [first, first + count).
  std::vector<float> run(const cpu::KernelTable& kernels, int first, int count) const {
    const int rows = shape_.tokens * count;
    const auto floats = static_cast<std::size_t>(rows * shape_.v.dim);
    Aligned<float> scratch(kernels.attention_scratch(rows, shape_.k.dim), kNan);
    std::vector<float> maximum(2 * static_cast<std::size_t>(rows)), sum(maximum),
        output(2 * floats);
    cpu::AttentionState total{maximum.data(), sum.data(), output.data()};
    cpu::AttentionState part{maximum.data() + rows, sum.data() + rows, output.data() + floats};
    cpu::QueryView query{q_.data() + first * shape_.k.dim,
                         std::ptrdiff_t{shape_.heads} * shape_.k.dim,
                         shape_.tokens,
                         count,
                         shape_.first_position,
                         shape_.window,
                         kScale,
                         0.0f};
    cpu::KvView view{view_of(shape_.k, k_pool_, first, count),
                     view_of(shape_.v, v_pool_, first, count)};
    auto attend = sizeof(T) == 4 ? kernels.attention_split_f32 : kernels.attention_split_bf16;
    attend(query, view, 0, scratch.data(), total);
    for (int split = 1; split * cpu::kKvSplit < length_; ++split) {
      attend(query, view, split, scratch.data(), part);
      kernels.attention_merge(part, rows, shape_.v.dim, total);
    }
    std::vector<float> out(floats);
    kernels.attention_finish_f32(total, shape_.tokens, count, shape_.v.dim, out.data(),
                                 count * shape_.v.dim, shape_.v.dim);
    return out;
  }

  double reference(int token, int head, int d) const {
    const int position = shape_.first_position + token;
    const int first = shape_.window > 0 ? std::max(0, position - shape_.window + 1) : 0;
    double sum = 0, out = 0;
    for (int p = first; p <= position; ++p) {
      double score = 0;
      for (int j = 0; j < shape_.k.dim; ++j) {
        score += q_[static_cast<std::size_t>((token * shape_.heads + head) * shape_.k.dim + j)] *
                 element(k_, shape_.k, head, p, j);
      }
      const double weight = std::exp(score * static_cast<double>(kScale));
      sum += weight;
      out += weight * element(v_, shape_.v, head, p, d);
    }
    return out / sum;
  }

 private:
  static constexpr float kScale = 0.2f;

  std::ptrdiff_t head_stride(const Side& side) const {
    return std::ptrdiff_t{kBlockSize} * side.dim;
  }
  std::ptrdiff_t block_stride(const Side& side) const {
    return head_stride(side) * (shape_.heads / side.group);
  }
  double element(const std::vector<T>& values, const Side& side, int head, int p, int j) const {
    return wide(values[static_cast<std::size_t>((head / side.group * length_ + p) * side.dim + j)]);
  }
  void fill(const Side& side, bool is_key, std::vector<T>& values, std::vector<T>& pool) {
    const int heads = shape_.heads / side.group;
    values = random_.vector<T>(static_cast<std::size_t>(heads * length_ * side.dim));
    pool.assign(table_.size() * static_cast<std::size_t>(block_stride(side)),
                TypeTraits<T>::from(kNan));
    for (int head = 0; head < heads; ++head) {
      for (int p = 0; p < length_; ++p) {
        std::ptrdiff_t at = table_[static_cast<std::size_t>(p / kBlockSize)] * block_stride(side) +
                            head * head_stride(side);
        const int offset = p % kBlockSize;
        for (int j = 0; j < side.dim; ++j) {
          const std::ptrdiff_t place = is_key ? (offset / 16 * side.dim + j) * 16 + offset % 16
                                              : std::ptrdiff_t{offset} * side.dim + j;
          pool[static_cast<std::size_t>(at + place)] =
              values[static_cast<std::size_t>((head * length_ + p) * side.dim + j)];
        }
      }
    }
  }
  cpu::KvSideView view_of(const Side& side, const std::vector<T>& pool, int first,
                          int count) const {
    const int group = std::min(side.group, count);
    return {pool.data() + first / side.group * head_stride(side),
            block_stride(side),
            head_stride(side),
            table_.data(),
            0,
            kBlockSize,
            side.dim,
            group};
  }

  Shape shape_;
  int length_;
  Random random_;
  std::vector<std::int32_t> table_;
  std::vector<T> k_, v_, k_pool_, v_pool_;
  std::vector<float> q_;
};

const Shape kShapes[] = {
    {{20, 2}, {52, 6}, 6, 40, 1, 0},    // V shared by all heads
    {{37, 6}, {8, 1}, 6, 300, 5, 0},    // K shared
    {{70, 8}, {131, 8}, 8, 270, 3, 0},  // both
    {{16, 1}, {100, 12}, 12, 90, 2, 50}, {{5, 4}, {3, 2}, 4, 250, 16, 0},
};

template <typename T>
void expect_all_is_well(const cpu::KernelTable& kernels) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(testing::Message() << "k " << shape.k.dim << " v " << shape.v.dim);
    Scene<T> scene(shape);
    const std::vector<float> all = scene.run(kernels, 0, shape.heads);
    std::size_t at = 0;
    for (int token = 0; token < shape.tokens; ++token) {
      for (int head = 0; head < shape.heads; ++head) {
        for (int d = 0; d < shape.v.dim; ++d, ++at) {
          ASSERT_NEAR(all[at], scene.reference(token, head, d), 3 * kSumTolerance) << head;
        }
      }
    }
    // Heads of one head of the finer side by themselves.
    const int count = std::min(shape.k.group, shape.v.group);
    const auto width = static_cast<std::size_t>(shape.v.dim);
    for (int first = 0; first < shape.heads; first += count) {
      const std::vector<float> part = scene.run(kernels, first, count);
      for (int token = 0; token < shape.tokens; ++token) {
        ASSERT_TRUE(
            same_bits(part.data() + static_cast<std::size_t>(token * count) * width,
                      all.data() + static_cast<std::size_t>(token * shape.heads + first) * width,
                      static_cast<std::size_t>(count) * width * sizeof(float)))
            << "head " << first << " token " << token;
      }
    }
  }
}

TEST_P(SharedAttentionTest, MatchesFp64WhateverHeadsAreTogether) {
  expect_all_is_well<float>(kernels());
  expect_all_is_well<bf16>(kernels());
}

TEST_P(SharedAttentionTest, SidesMayBeginLaterAndElsewhere) {
  // V of the second split only, in a pool of its own, as a rebuilt one lies in scratch memory.
  constexpr int kDim = 24;
  Random random(5);
  const int length = cpu::kKvSplit + 40;
  const auto blocks = static_cast<std::size_t>((length + 15) / 16);
  std::vector<std::int32_t> table(blocks);
  for (std::size_t i = 0; i < blocks; ++i) table[i] = static_cast<std::int32_t>(i);
  std::vector<float> k = random.vector(blocks * 16 * kDim);
  std::vector<float> v = random.vector(blocks * 16 * kDim);
  std::vector<float> q = random.vector(kDim);
  cpu::KvView whole{{k.data(), 16 * kDim, 0, table.data(), 0, 16, kDim, 1},
                    {v.data(), 16 * kDim, 0, table.data(), 0, 16, kDim, 1}};
  cpu::KvView part = whole;
  const std::int32_t scratch_table[] = {0, 0};
  part.v.data = v.data() + std::ptrdiff_t{cpu::kKvSplit} * kDim;
  part.v.block_table = scratch_table;
  part.v.first_position = cpu::kKvSplit;
  part.v.block_size = cpu::kKvSplit;
  part.v.block_stride = 0;
  cpu::QueryView query{q.data(), kDim, 1, 1, length - 1, 0, 0.3f, 0.0f};
  Aligned<float> scratch(kernels().attention_scratch(1, kDim));
  std::vector<std::vector<float>> outputs;
  for (const cpu::KvView* view : {&whole, &part}) {
    float maximum = 0, sum = 0;
    std::vector<float> output(kDim);
    kernels().attention_split_f32(query, *view, 1, scratch.data(), {&maximum, &sum, output.data()});
    output.push_back(sum);
    outputs.push_back(output);
  }
  EXPECT_TRUE(same_bits(outputs[0].data(), outputs[1].data(), (kDim + 1) * sizeof(float)));
}

DEINFER_FOR_EACH_ISA(SharedAttentionTest);

}  // namespace
}  // namespace deinfer::test
