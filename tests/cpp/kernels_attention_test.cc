#include "reference.h"

namespace deinfer::test {
namespace {

class AttentionTest : public IsaTest {};

struct Shape {
  int head_dim;
  int group;
  int block_size;
  int first_position;
  int tokens;
  int window;
  float soft_cap = 0.0f;
};

/// A paged cache of one kv head (of two, the other one poisoned) and the queries of one sequence.
/// Everything that a query token may not see holds NaN unless `poison` is off.
template <typename T>
class Scene {
 public:
  Scene(const cpu::KernelTable& writer, const Shape& shape, unsigned seed = 1)
      : shape_(shape), random_(seed) {
    int length = shape.first_position + shape.tokens;
    int blocks = (length + shape.block_size - 1) / shape.block_size;
    head_stride_ = std::ptrdiff_t{shape.block_size} * shape.head_dim;
    block_stride_ = 2 * head_stride_;
    auto size = static_cast<std::size_t>(2 * blocks * block_stride_);
    k_pool_.assign(size, TypeTraits<T>::from(kNan));
    v_pool_.assign(size, TypeTraits<T>::from(kNan));
    for (int b = 0; b < blocks; ++b) table_.push_back(2 * (blocks - 1 - b) + 1);
    auto dim = static_cast<std::size_t>(shape.head_dim);
    k_ = random_.vector<T>(static_cast<std::size_t>(length) * dim);
    v_ = random_.vector<T>(static_cast<std::size_t>(length) * dim);
    token_stride_ = shape.group * shape.head_dim + 3;
    q_ = random_.vector(static_cast<std::size_t>(shape.tokens * token_stride_ - 3));
    auto write_k = sizeof(T) == 4 ? writer.write_k_f32 : writer.write_k_bf16;
    auto write_v = sizeof(T) == 4 ? writer.write_v_f32 : writer.write_v_bf16;
    std::vector<float> row(dim);
    for (int p = first_visible(0); p < length; ++p) {
      std::ptrdiff_t at = offset_of(p);
      for (std::size_t d = 0; d < dim; ++d) row[d] = static_cast<float>(wide(k_at(p, d)));
      write_k(row.data(), shape.head_dim, 0, shape.head_dim, p % shape.block_size,
              k_pool_.data() + at);
      for (std::size_t d = 0; d < dim; ++d) row[d] = static_cast<float>(wide(v_at(p, d)));
      write_v(row.data(), shape.head_dim, 0, shape.head_dim, p % shape.block_size,
              v_pool_.data() + at);
    }
  }

  int first_visible(int token) const {
    int position = shape_.first_position + token;
    return shape_.window > 0 ? std::max(0, position - shape_.window + 1) : 0;
  }

  /// Overwrites the value and key of a position everywhere with NaN.
  void poison(int position) {
    for (int d = 0; d < shape_.head_dim; ++d) {
      std::ptrdiff_t at = offset_of(position);
      int in_block = position % shape_.block_size;
      k_pool_[static_cast<std::size_t>(at + (in_block / 16 * shape_.head_dim + d) * 16 +
                                       in_block % 16)] = TypeTraits<T>::from(kNan);
      v_pool_[static_cast<std::size_t>(at + in_block * shape_.head_dim + d)] =
          TypeTraits<T>::from(kInf);
    }
  }

  /// out[tokens][group][head_dim] of the tokens [first, first + tokens).
  std::vector<float> run(const cpu::KernelTable& kernels, int first, int tokens) const {
    int rows = tokens * shape_.group;
    auto floats = static_cast<std::size_t>(rows * shape_.head_dim);
    Aligned<float> scratch(kernels.attention_scratch(rows, shape_.head_dim), kNan);
    struct Memory {
      explicit Memory(std::size_t rows, std::size_t floats)
          : maximum(rows, kNan), sum(rows, kNan), output(floats, kNan) {}
      cpu::AttentionState state() { return {maximum.data(), sum.data(), output.data()}; }
      std::vector<float> maximum, sum, output;
    };
    Memory total(static_cast<std::size_t>(rows), floats);
    Memory part(static_cast<std::size_t>(rows), floats);
    cpu::QueryView query{
        q_.data() + first * token_stride_, token_stride_, tokens,  shape_.group,
        shape_.first_position + first,     shape_.window, scale(), shape_.soft_cap};
    cpu::KvSideView side{nullptr, block_stride_,     head_stride_,    table_.data(),
                         0,       shape_.block_size, shape_.head_dim, shape_.group};
    cpu::KvView view{side, side};
    view.k.data = k_pool_.data() + head_stride_;
    view.v.data = v_pool_.data() + head_stride_;
    auto attend = sizeof(T) == 4 ? kernels.attention_split_f32 : kernels.attention_split_bf16;
    int first_split = first_visible(first) / cpu::kKvSplit;
    int last_split = (query.first_position + tokens - 1) / cpu::kKvSplit;
    attend(query, view, first_split, scratch.data(), total.state());
    for (int split = first_split + 1; split <= last_split; ++split) {
      attend(query, view, split, scratch.data(), part.state());
      kernels.attention_merge(part.state(), rows, shape_.head_dim, total.state());
    }
    std::vector<float> out(floats);
    kernels.attention_finish_f32(total.state(), tokens, shape_.group, shape_.head_dim, out.data(),
                                 shape_.group * shape_.head_dim, shape_.head_dim);
    return out;
  }

  std::vector<double> reference(int token, int head) const {
    auto dim = static_cast<std::size_t>(shape_.head_dim);
    int position = shape_.first_position + token;
    const float* q = q_.data() + token * token_stride_ + head * shape_.head_dim;
    std::vector<double> scores;
    for (int p = first_visible(token); p <= position; ++p) {
      double s = 0;
      for (std::size_t d = 0; d < dim; ++d) s += q[d] * wide(k_at(p, d));
      s *= scale();
      if (shape_.soft_cap != 0) s = shape_.soft_cap * std::tanh(s / shape_.soft_cap);
      scores.push_back(s);
    }
    double maximum = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    std::vector<double> out(dim, 0.0);
    for (int p = first_visible(token); p <= position; ++p) {
      double w = std::exp(scores[static_cast<std::size_t>(p - first_visible(token))] - maximum);
      sum += w;
      for (std::size_t d = 0; d < dim; ++d) out[d] += w * wide(v_at(p, d));
    }
    for (double& v : out) v /= sum;
    return out;
  }

 private:
  float scale() const { return 1.3f / std::sqrt(static_cast<float>(shape_.head_dim)); }
  std::ptrdiff_t offset_of(int position) const {
    return table_[static_cast<std::size_t>(position / shape_.block_size)] * block_stride_ +
           head_stride_;
  }
  T k_at(int p, std::size_t d) const {
    return k_[static_cast<std::size_t>(p * shape_.head_dim) + d];
  }
  T v_at(int p, std::size_t d) const {
    return v_[static_cast<std::size_t>(p * shape_.head_dim) + d];
  }

  Shape shape_;
  Random random_;
  std::ptrdiff_t head_stride_ = 0;
  std::ptrdiff_t block_stride_ = 0;
  std::ptrdiff_t token_stride_ = 0;
  std::vector<T> k_pool_, v_pool_, k_, v_;
  std::vector<std::int32_t> table_;
  std::vector<float> q_;
};

const Shape kShapes[] = {
    {4, 1, 16, 0, 1, 0},           {8, 2, 16, 0, 7, 0},
    {24, 3, 16, 50, 16, 0},        {64, 1, 16, 63, 1, 0},
    {64, 1, 16, 64, 3, 0},         {64, 4, 32, 200, 16, 0},
    {80, 5, 48, 129, 5, 0},        {96, 1, 64, 255, 16, 0},
    {128, 1, 16, 700, 1, 0},       {128, 8, 16, 300, 8, 0},
    {256, 2, 128, 250, 9, 0},      {64, 2, 16, 300, 16, 100},
    {32, 1, 16, 70, 16, 5},        {16, 4, 16, 600, 16, 257},
    {20, 7, 16, 500, 9, 1},        {128, 6, 16, 1000, 1, 64},
    {8, 1, 16, 0, 64, 3},          {33, 1, 16, 60, 40, 0},
    {64, 2, 16, 300, 16, 0, 2.0f}, {256, 2, 16, 90, 9, 70, 50.0f},
    {20, 3, 32, 260, 1, 0, 0.5f},
};

std::string describe(const Shape& s) {
  return "head_dim=" + std::to_string(s.head_dim) + " group=" + std::to_string(s.group) +
         " block=" + std::to_string(s.block_size) + " first=" + std::to_string(s.first_position) +
         " tokens=" + std::to_string(s.tokens) + " window=" + std::to_string(s.window) +
         " soft_cap=" + std::to_string(s.soft_cap);
}

template <typename T>
void expect_matches_reference(const cpu::KernelTable& kernels) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(describe(shape));
    Scene<T> scene(kernels, shape);
    std::vector<float> out = scene.run(kernels, 0, shape.tokens);
    std::size_t at = 0;
    for (int token = 0; token < shape.tokens; ++token) {
      for (int head = 0; head < shape.group; ++head) {
        for (double want : scene.reference(token, head)) {
          ASSERT_NEAR(out[at], want, 3 * kSumTolerance) << "token " << token << " head " << head;
          ++at;
        }
      }
    }
  }
}

TEST_P(AttentionTest, MatchesFp64) {
  expect_matches_reference<float>(kernels());
  expect_matches_reference<bf16>(kernels());
}

template <typename T>
void expect_rows_alone_have_the_same_bits(const cpu::KernelTable& kernels) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(describe(shape));
    Scene<T> scene(kernels, shape);
    std::vector<float> all = scene.run(kernels, 0, shape.tokens);
    auto row = static_cast<std::size_t>(shape.group * shape.head_dim);
    for (int tokens : {1, 2, 5, 16}) {
      for (int first = 0; first + tokens <= shape.tokens; first += tokens) {
        std::vector<float> part = scene.run(kernels, first, tokens);
        ASSERT_TRUE(same_bits(part.data(), all.data() + static_cast<std::size_t>(first) * row,
                              part.size() * sizeof(float)))
            << "first=" << first << " tokens=" << tokens;
      }
    }
  }
}

TEST_P(AttentionTest, RowsAloneHaveTheSameBits) {
  expect_rows_alone_have_the_same_bits<float>(kernels());
  expect_rows_alone_have_the_same_bits<bf16>(kernels());
}

TEST_P(AttentionTest, LaterPositionsNeverMatter) {
  // Tokens before a poisoned position keep their bits, though they share its tile in one call.
  for (Shape shape :
       {Shape{64, 1, 16, 100, 16, 0}, Shape{24, 4, 32, 60, 8, 0}, Shape{24, 4, 32, 60, 8, 0, 3}}) {
    Scene<bf16> scene(kernels(), shape);
    std::vector<float> clean = scene.run(kernels(), 0, shape.tokens);
    scene.poison(shape.first_position + 5);
    std::vector<float> out = scene.run(kernels(), 0, shape.tokens);
    auto row = static_cast<std::size_t>(shape.group * shape.head_dim);
    EXPECT_TRUE(same_bits(out.data(), clean.data(), 5 * row * sizeof(float)));
    for (std::size_t j = 5 * row; j < out.size(); ++j) ASSERT_TRUE(std::isnan(out[j]));
  }
}

template <typename T>
void expect_same_as(const cpu::KernelTable& scalar, const cpu::KernelTable& kernels) {
  for (float soft_cap : {0.0f, 4.0f}) {
    Shape shape{40, 3, 16, 290, 11, 0, soft_cap};
    Scene<T> scene(scalar, shape);
    std::vector<float> a = scene.run(scalar, 0, shape.tokens);
    std::vector<float> b = scene.run(kernels, 0, shape.tokens);
    EXPECT_TRUE(same_bits(a.data(), b.data(), a.size() * sizeof(float)));
  }
}

TEST_P(AttentionTest, BitsDoNotDependOnTheInstructionSet) {
  expect_same_as<float>(scalar(), kernels());
  expect_same_as<bf16>(scalar(), kernels());
}

TEST_P(AttentionTest, LargeScoresDoNotOverflow) {
  constexpr int kDim = 16;
  std::vector<float> k(16 * kDim, 0.0f), v(16 * kDim, 0.0f), q(kDim, 100.0f);
  for (int p = 0; p < 3; ++p) {
    std::vector<float> key(kDim, static_cast<float>(p - 1) * 50.0f);
    std::vector<float> value(kDim, static_cast<float>(p));
    kernels().write_k_f32(key.data(), kDim, 0, kDim, p, k.data());
    kernels().write_v_f32(value.data(), kDim, 0, kDim, p, v.data());
  }
  std::int32_t block = 0;
  cpu::KvView view{{k.data(), 16 * kDim, 0, &block, 0, 16, kDim, 1},
                   {v.data(), 16 * kDim, 0, &block, 0, 16, kDim, 1}};
  cpu::QueryView query{q.data(), kDim, 1, 1, 2, 0, 1.0f};
  Aligned<float> scratch(kernels().attention_scratch(1, kDim));
  std::vector<float> output(kDim), out(kDim);
  float maximum = 0, sum = 0;
  cpu::AttentionState state{&maximum, &sum, output.data()};
  kernels().attention_split_f32(query, view, 0, scratch.data(), state);
  kernels().attention_finish_f32(state, 1, 1, kDim, out.data(), kDim, kDim);
  EXPECT_EQ(maximum, 80000.0f);
  for (float o : out) EXPECT_EQ(o, 2.0f);
}

TEST_P(AttentionTest, RowsThatSeeNothingAreEmpty) {
  // Of the positions 250 .. 257, the first six end before the second split.
  std::vector<float> q(8 * 48, 1.0f);
  std::vector<float> ones(16 * 24, 1.0f);
  std::vector<std::int32_t> table(17, 0);
  cpu::KvSideView side{ones.data(), 0, 0, table.data(), 0, 16, 24, 2};
  cpu::KvView view{side, side};
  cpu::QueryView query{q.data(), 48, 8, 2, 250, 0, 0.1f};
  Aligned<float> scratch(kernels().attention_scratch(16, 24));
  std::vector<float> maximum(16, kNan), sum(16, kNan), output(16 * 24, kNan);
  cpu::AttentionState state{maximum.data(), sum.data(), output.data()};
  kernels().attention_split_f32(query, view, 1, scratch.data(), state);
  for (std::size_t row = 0; row < 16; ++row) {
    if (row < 12) {
      EXPECT_EQ(maximum[row], -kInf);
      EXPECT_EQ(sum[row], 0.0f);
      for (std::size_t d = 0; d < 24; ++d) EXPECT_EQ(output[row * 24 + d], 0.0f);
    } else {
      EXPECT_EQ(sum[row], row < 14 ? 1.0f : 2.0f);
    }
  }
}

TEST_P(AttentionTest, FinishWritesBf16AndStrides) {
  constexpr int kDim = 20, kTokens = 3, kGroup = 2;
  Random random(8);
  auto output = random.vector(kTokens * kGroup * kDim);
  std::vector<float> maximum(6, 0.0f), sum = {1, 2, 3, 4, 5, 6};
  cpu::AttentionState state{maximum.data(), sum.data(), output.data()};
  constexpr int kStride = 50;
  std::vector<bf16> out(kTokens * kStride, to_bf16(7.0f));
  kernels().attention_finish_bf16(state, kTokens, kGroup, kDim, out.data(), kStride, kDim);
  for (int i = 0; i < kTokens; ++i) {
    for (int j = 0; j < kStride; ++j) {
      bf16 got = out[static_cast<std::size_t>(i * kStride + j)];
      if (j >= kGroup * kDim) {
        EXPECT_EQ(to_float(got), 7.0f);
        continue;
      }
      auto row = static_cast<std::size_t>(i * kGroup + j / kDim);
      float want = output[row * kDim + static_cast<std::size_t>(j % kDim)] / sum[row];
      EXPECT_EQ(got.bits, to_bf16(want).bits);
    }
  }
}

DEINFER_FOR_EACH_ISA(AttentionTest);

}  // namespace
}  // namespace deinfer::test
