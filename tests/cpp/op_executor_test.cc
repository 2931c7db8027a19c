// OpExecutor against double precision, and what it refuses.
#include "deinfer/ops.h"

#include <gtest/gtest.h>

#include <cstring>

#include "base/buffer.h"
#include "reference.h"

namespace deinfer::test {
namespace {

/// A random fp32 matrix.
struct Matrix {
  Matrix(Random& random, int rows_, int cols_)
      : rows(rows_),
        cols(cols_),
        values(random.vector(static_cast<std::size_t>(rows_) * static_cast<std::size_t>(cols_),
                             1 / std::sqrt(static_cast<float>(cols_)))) {}
  TensorView view() const { return {values.data(), DType::kFloat32, rows, cols, cols}; }
  double at(int row, int col) const { return values[static_cast<std::size_t>(row * cols + col)]; }

  int rows;
  int cols;
  std::vector<float> values;
};

struct Packed {
  Packed(OpExecutor& ops, std::span<const LinearWeights> linears, DType dtype)
      : bytes(packed_bytes(linears, dtype)), memory(bytes) {
    ops.pack(linears, dtype, memory.as<void>(), bytes, 2);
  }
  PackedLinears view() const { return {memory.as<void>(), bytes}; }

  std::size_t bytes;
  Buffer memory;
};

/// u (v x) + bias of row `row`, column `col`.
double expected(const Matrix& x, const Matrix& v, const Matrix& u, const Matrix& bias, int row,
                int col) {
  double sum = bias.at(0, col);
  for (int r = 0; r < v.rows; ++r) {
    double z = 0;
    for (int k = 0; k < v.cols; ++k) z += v.at(r, k) * x.at(row, k);
    sum += u.at(col, r) * z;
  }
  return sum;
}

TEST(OpExecutorTest, LinearMatchesFp64ForAnyThreadsAndBatch) {
  OpExecutor ops;
  Random random(1);
  for (int k : {64, 37}) {  // odd ones are copied
    const int n = 130;
    Matrix v(random, 29, k);
    Matrix u(random, n, 29);
    Matrix bias(random, 1, n);
    const LinearWeights weights{v.view(), u.view(), bias.view()};
    Packed packed(ops, {&weights, 1}, DType::kFloat32);
    EXPECT_EQ(packed.view().rank(0), 29);
    EXPECT_EQ(packed.view().parameters(), 29 * (k + n));
    for (int m : {1, 600}) {
      Matrix x(random, m, k);
      std::vector<float> first;
      for (int threads : {1, 2, 3}) {
        std::vector<float> out(static_cast<std::size_t>(m * n), kNan);
        ops.lowrank_linear(x.view(), packed.view(), {out.data(), DType::kFloat32, m, n, n},
                           threads);
        for (int row = 0; row < m; row += 97) {
          for (int col = 0; col < n; ++col) {
            ASSERT_NEAR(out[static_cast<std::size_t>(row * n + col)],
                        expected(x, v, u, bias, row, col), 1e-5);
          }
        }
        if (first.empty()) first = out;
        EXPECT_TRUE(same_bits(first.data(), out.data(), out.size() * sizeof(float)));
      }
    }
  }
}

TEST(OpExecutorTest, PackedBytesMayBeMoved) {
  OpExecutor ops;
  Random random(2);
  Matrix w(random, 48, 20);
  const LinearWeights weights{{}, w.view(), {}};
  Packed packed(ops, {&weights, 1}, DType::kBFloat16);
  Buffer moved(packed.bytes);
  std::memcpy(moved.as<void>(), packed.memory.as<void>(), packed.bytes);
  std::vector<bf16> x(20, to_bf16(0.5f));
  std::vector<bf16> out[2];
  for (int i = 0; i < 2; ++i) {
    out[i].resize(48);
    const void* memory = i == 0 ? packed.memory.as<void>() : moved.as<void>();
    ops.lowrank_linear({x.data(), DType::kBFloat16, 1, 20, 20}, {memory, packed.bytes},
                       {out[i].data(), DType::kBFloat16, 1, 48, 48}, 1);
  }
  EXPECT_TRUE(same_bits(out[0].data(), out[1].data(), 48 * sizeof(bf16)));
  EXPECT_NE(out[0][0].bits, 0);
}

TEST(OpExecutorTest, EqualWeightsHaveEqualBytes) {
  OpExecutor ops;
  Random random(5);
  Matrix v(random, 3, 6);
  Matrix u(random, 5, 3);
  Matrix bias(random, 1, 5);
  const LinearWeights weights{v.view(), u.view(), bias.view()};
  const std::size_t bytes = packed_bytes({&weights, 1}, DType::kBFloat16);
  Buffer memory[2] = {Buffer(bytes), Buffer(bytes)};
  for (int i = 0; i < 2; ++i) {
    std::memset(memory[i].as<void>(), i == 0 ? 0x11 : 0x77, bytes);
    ops.pack({&weights, 1}, DType::kBFloat16, memory[i].as<void>(), bytes, 1);
  }
  EXPECT_TRUE(same_bits(memory[0].as<char>(), memory[1].as<char>(), bytes));
}

TEST(OpExecutorTest, HeadersThatLieAreRefused) {
  OpExecutor ops;
  Random random(3);
  Matrix w(random, 48, 20);
  const LinearWeights weights{{}, w.view(), {}};
  Packed packed(ops, {&weights, 1}, DType::kFloat32);
  for (std::size_t byte = 0; byte < 96; ++byte) {
    packed.memory.as<unsigned char>()[byte] ^= 0x10;
    EXPECT_THROW(packed.view(), Error) << byte;
    packed.memory.as<unsigned char>()[byte] ^= 0x10;
  }
  EXPECT_NO_THROW(packed.view());
  EXPECT_THROW(PackedLinears(packed.memory.as<char>() + 1, packed.bytes), Error);
  EXPECT_THROW(PackedLinears(nullptr, packed.bytes), Error);
}

TEST(OpExecutorTest, BadArgumentsAreNamed) {
  OpExecutor ops;
  Random random(4);
  Matrix w(random, 48, 20);
  Matrix x(random, 2, 20);
  const LinearWeights weights{{}, w.view(), {}};
  Packed packed(ops, {&weights, 1}, DType::kFloat32);
  std::vector<float> out(96);
  auto message = [&](const TensorView& input, const MutableTensorView& output, int threads) {
    try {
      ops.lowrank_linear(input, packed.view(), output, threads);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  const MutableTensorView right{out.data(), DType::kFloat32, 2, 48, 48};
  EXPECT_EQ(message(x.view(), right, 1), "");
  EXPECT_NE(message(x.view(), right, 0).find("threads must be in [1, 1024], not 0"),
            std::string::npos);
  MutableTensorView wrong = right;
  wrong.cols = 47;
  EXPECT_NE(message(x.view(), wrong, 1).find("out has shape [2, 47], not [2, 48]"),
            std::string::npos);
  wrong = right;
  wrong.row_stride = 40;
  EXPECT_NE(message(x.view(), wrong, 1).find("row stride 40"), std::string::npos);
  TensorView none = x.view();
  none.data = nullptr;
  EXPECT_NE(message(none, right, 1).find("x has no data"), std::string::npos);
}

}  // namespace
}  // namespace deinfer::test
