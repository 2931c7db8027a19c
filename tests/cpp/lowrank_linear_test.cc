// Linears over teams: the division of panels and of tokens never shows in the result.
#include "ops/lowrank_linear.h"

#include <gtest/gtest.h>

#include "kernels/cpu/packing.h"
#include "reference.h"

namespace deinfer::test {
namespace {

cpu::PackedMatrix pack(DType dtype, const std::vector<float>& w, int n, int k) {
  cpu::PackedMatrix packed = cpu::allocate_packed(dtype, n, k, cpu::kPanelRows);
  cpu::pack_rows({w.data(), DType::kFloat32, n, k, k}, {}, 0, packed.num_panels(), packed);
  return packed;
}

/// A low-rank linear (rank 0: dense) with its weights as read back from the packed form.
struct Case {
  Case(DType dtype, int rows, int cols, int r, unsigned seed) : n(rows), k(cols), rank(r) {
    Random random(seed);
    auto matrix = [&](int out, int in) {
      auto count = static_cast<std::size_t>(out) * static_cast<std::size_t>(in);
      return pack(dtype, random.vector(count, 1 / std::sqrt(static_cast<float>(in))), out, in);
    };
    if (rank == 0) {
      linear.w = matrix(n, k);
    } else {
      linear.v = matrix(rank, k);
      linear.u = matrix(n, rank);
    }
    activations = dtype == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
  }

  static std::vector<double> product(const cpu::PackedMatrix& w, const std::vector<double>& x,
                                     int m) {
    std::vector<float> row(static_cast<std::size_t>(w.k));
    std::vector<double> out(static_cast<std::size_t>(m * w.n), 0.0);
    for (int j = 0; j < w.n; ++j) {
      w.read_row(j, row.data());
      for (int i = 0; i < m; ++i) {
        for (int p = 0; p < w.k; ++p) {
          out[static_cast<std::size_t>(i * w.n + j)] +=
              row[static_cast<std::size_t>(p)] * x[static_cast<std::size_t>(i * w.k + p)];
        }
      }
    }
    return out;
  }

  /// In fp64, but for z, which is rounded to the activation type.
  std::vector<double> exact(const std::vector<double>& x, int m) const {
    if (rank == 0) return product(linear.w, x, m);
    std::vector<double> z = product(linear.v, x, m);
    if (activations == DType::kBFloat16) {
      for (double& value : z) value = to_float(to_bf16(static_cast<float>(value)));
    }
    return product(linear.u, z, m);
  }

  LowRankLinear linear;
  DType activations = DType::kFloat32;
  int n = 0;
  int k = 0;
  int rank = 0;
};

/// x[m, k] of a case, and its exact values.
struct Input {
  Input(const Case& c, int m) : memory(c.activations, m, c.k) {
    Random random(7);
    for (int i = 0; i < m; ++i) {
      Activations row = memory.view().rows_from(i);
      for (int p = 0; p < c.k; ++p) {
        float value = random.normal();
        if (c.activations == DType::kFloat32) {
          row.f32()[p] = value;
        } else {
          row.b16()[p] = to_bf16(value);
          value = to_float(row.b16()[p]);
        }
        values.push_back(value);
      }
    }
  }
  ActivationBuffer memory;
  std::vector<double> values;
};

std::vector<float> run(const Case& c, const Activations& x, int m, int threads,
                       Isa isa = detect_isas().back()) {
  ThreadTeam team(threads);
  std::vector<ThreadScratch> scratch(static_cast<std::size_t>(threads));
  ActivationBuffer z(c.activations, m, std::max(c.linear.z_cols(), 1));
  std::vector<float> out(static_cast<std::size_t>(m * c.n), kNan);
  const cpu::KernelTable& kernels = cpu::kernels_for(isa);
  std::unique_ptr<Communicator> alone = make_single_communicator(0);
  TeamExchange exchange(*alone);
  team.run([&](TeamMember& member) {
    ExecutionContext ctx{kernels, member, scratch[static_cast<std::size_t>(member.id())], exchange};
    lowrank_linear(ctx, m, GroupInput(x), c.linear, z.view(), out.data(), c.n);
  });
  return out;
}

class LowRankLinearTest : public testing::TestWithParam<DType> {};

TEST_P(LowRankLinearTest, TeamsOfEverySizeGiveTheBitsOfOneThread) {
  for (int rank : {0, 37}) {
    Case c(GetParam(), 200, 72, rank, 3);
    // Around the sizes at which teams divide tokens, and beyond a tile.
    for (int m : {1, 7, 63, 64, 127, 128, 129, 200, 256, 511, 512, 513, 700}) {
      Input x(c, m);
      std::vector<float> one = run(c, x.memory.view(), m, 1);
      for (int threads : {2, 3, 4, 6}) {
        std::vector<float> many = run(c, x.memory.view(), m, threads);
        ASSERT_TRUE(same_bits(one.data(), many.data(), one.size() * sizeof(float)))
            << "rank " << rank << ", " << m << " tokens, " << threads << " threads";
      }
    }
  }
}

TEST_P(LowRankLinearTest, MatchesFp64) {
  for (int rank : {0, 37}) {
    Case c(GetParam(), 200, 72, rank, 5);
    const int m = 130;
    Input x(c, m);
    std::vector<double> exact = c.exact(x.values, m);
    std::vector<float> out = run(c, x.memory.view(), m, 2);
    // z may round to the neighbour of what fp64 rounds to.
    double tolerance =
        rank > 0 && c.activations == DType::kBFloat16 ? TypeTraits<bf16>::kTolerance : 1e-5;
    for (std::size_t i = 0; i < exact.size(); ++i) ASSERT_NEAR(out[i], exact[i], tolerance) << i;
  }
}

// Of many wide rows a thread takes some at a time, or widens none where they would take too much
// memory (ExpandedInputs).
TEST_P(LowRankLinearTest, WideRowsHaveTheBitsOfThoseAlone) {
  struct Size {
    int m, k, threads;
  };
  for (const Size& size : {Size{260, 8200, 1}, Size{260, 8200, 2}, Size{400, 21504, 7}}) {
    if (size.threads == 7 && GetParam() != DType::kBFloat16) continue;  // takes long
    const Case c(GetParam(), 8, size.k, 0, 11);
    Input x(c, size.m);
    for (Isa isa : detect_isas()) {
      if (isa == Isa::kScalar) continue;
      const std::vector<float> all = run(c, x.memory.view(), size.m, size.threads, isa);
      for (int row : {0, 1, size.m / 2, size.m - 1}) {
        const std::vector<float> one = run(c, x.memory.view().rows_from(row), 1, 1, isa);
        EXPECT_TRUE(same_bits(one.data(), all.data() + std::ptrdiff_t{row} * c.n,
                              one.size() * sizeof(float)))
            << isa_name(isa) << ", row " << row << " of " << size.m << " with " << size.k;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, LowRankLinearTest,
                         testing::Values(DType::kFloat32, DType::kBFloat16, DType::kInt8),
                         [](const auto& type) { return std::string(dtype_name(type.param)); });

}  // namespace
}  // namespace deinfer::test
