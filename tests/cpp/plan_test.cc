// Tensor-parallel plans: a linear computed by all ranks, with the exchanges that their placements
// state, gives the whole linear's result; each rank ends with the part that its plan promises.
#include "plan/tensor_parallel_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "deinfer/error.h"
#include "plan_shapes.h"

namespace deinfer {
namespace {

using test::describe;
using test::kSizes;
using test::Random;
using test::random_shape;

constexpr LinearRole kRoles[] = {
    LinearRole::kQuery, LinearRole::kKey, LinearRole::kValue, LinearRole::kAttentionOutput,
    LinearRole::kGate,  LinearRole::kUp,  LinearRole::kDown,  LinearRole::kHead};
bool is_output(LinearRole role) {
  return role == LinearRole::kAttentionOutput || role == LinearRole::kDown;
}

/// Integers, so that sums are exact in any order; a rank does not have every element.
struct Matrix {
  int rows = 0;
  int cols = 0;
  std::vector<std::int64_t> value;
  std::vector<char> known;

  Matrix(int rows_in, int cols_in)
      : rows(rows_in),
        cols(cols_in),
        value(static_cast<std::size_t>(rows_in * cols_in)),
        known(static_cast<std::size_t>(rows_in * cols_in)) {}
  std::size_t at(int row, int col) const { return static_cast<std::size_t>(row * cols + col); }

  static Matrix filled(int height, int width, Random& random) {
    Matrix matrix(height, width);
    for (std::int64_t& v : matrix.value) v = random.between(-9, 9);
    return matrix.part({0, height}, {0, width});
  }
  /// The same values, of which only rows x cols are known.
  Matrix part(Range row_range, Range col_range) const {
    Matrix result(rows, cols);
    for (int row = row_range.begin; row < row_range.end; ++row) {
      for (int col = col_range.begin; col < col_range.end; ++col) {
        result.value[at(row, col)] = value[at(row, col)];
        result.known[at(row, col)] = 1;
      }
    }
    return result;
  }
};

/// x[m, k] W[rows, cols]^T where all of x[:, cols] is known; false if it is for no token.
Matrix multiply(const Matrix& x, const Matrix& w, Range rows, Range cols) {
  Matrix y(x.rows, w.rows);
  for (int t = 0; t < x.rows; ++t) {
    bool complete = true;
    for (int c = cols.begin; c < cols.end; ++c) complete &= x.known[x.at(t, c)] != 0;
    if (!complete) continue;
    for (int n = rows.begin; n < rows.end; ++n) {
      std::int64_t sum = 0;
      for (int c = cols.begin; c < cols.end; ++c) sum += x.value[x.at(t, c)] * w.value[w.at(n, c)];
      y.value[y.at(t, n)] = sum;
      y.known[y.at(t, n)] = 1;
    }
  }
  return y;
}

/// The part of an [m, hidden] stream that belongs to a rank.
Matrix residual_part(const TensorParallelPlan& plan, const Matrix& x, int rank) {
  switch (plan.residual()) {
    case ResidualLayout::kReplicated: return x;
    case ResidualLayout::kHiddenShards: return x.part({0, x.rows}, plan.hidden_share(rank));
    case ResidualLayout::kTokenShards: return x.part(split(x.rows, plan.size(), rank), {0, x.cols});
  }
  return x;
}

std::vector<Matrix> exchange(const TensorParallelPlan& plan, Exchange kind,
                             std::vector<Matrix> parts) {
  if (kind == Exchange::kNone) return parts;
  Matrix all(parts[0].rows, parts[0].cols);
  for (const Matrix& part : parts) {
    for (std::size_t i = 0; i < all.value.size(); ++i) {
      if (kind == Exchange::kAllGather) {
        EXPECT_FALSE(all.known[i] && part.known[i]) << "gathered twice";
      } else {
        EXPECT_TRUE(part.known[i]) << "a rank has nothing to add";
      }
      all.value[i] += part.value[i];
      all.known[i] |= part.known[i];
    }
  }
  for (int i = 0; i < plan.size(); ++i) {
    parts[static_cast<std::size_t>(i)] =
        kind == Exchange::kReduceScatter ? residual_part(plan, all, i) : all;
  }
  return parts;
}

Range columns(Range range, int factor) { return {range.begin * factor, range.end * factor}; }

/// The columns of queries, keys, ... that a rank computes with.
Range own_columns(const TensorParallelPlan& plan, LinearRole role, int rank) {
  const ModelShape& model = plan.model();
  switch (role) {
    case LinearRole::kQuery:
    case LinearRole::kAttentionOutput: return columns(plan.heads(rank).heads, model.head_dim);
    case LinearRole::kKey:
    case LinearRole::kValue: return columns(plan.heads(rank).kv_heads, model.head_dim);
    case LinearRole::kHead: return plan.vocab_share(rank);
    default:
      return plan.name() == "naive" ? Range{0, model.intermediate_size}
                                    : plan.intermediate_share(rank);
  }
}

LinearShape shape_of(const ModelShape& model, LinearRole role, int rank) {
  const int q = model.num_heads * model.head_dim;
  switch (role) {
    case LinearRole::kQuery: return {q, model.hidden_size, rank};
    case LinearRole::kKey:
    case LinearRole::kValue: return {model.num_kv_heads * model.head_dim, model.hidden_size, rank};
    case LinearRole::kAttentionOutput: return {model.hidden_size, q, rank};
    case LinearRole::kGate:
    case LinearRole::kUp: return {model.intermediate_size, model.hidden_size, rank};
    case LinearRole::kDown: return {model.hidden_size, model.intermediate_size, rank};
    case LinearRole::kHead: return {model.vocab_size, model.hidden_size, rank};
  }
  return {};
}

void check_linear(const TensorParallelPlan& plan, LinearRole role, int lowrank, int m,
                  Random& random) {
  const int size = plan.size();
  const LinearShape shape = shape_of(plan.model(), role, lowrank);
  Matrix x = Matrix::filled(m, shape.k, random);
  Matrix v = Matrix::filled(lowrank, shape.k, random);
  Matrix u = Matrix::filled(shape.n, std::max(lowrank, 1), random);
  Matrix w = Matrix::filled(shape.n, shape.k, random);
  if (lowrank > 0) {
    for (int n = 0; n < shape.n; ++n) {
      for (int k = 0; k < shape.k; ++k) {
        std::int64_t& sum = w.value[w.at(n, k)] = 0;
        for (int r = 0; r < lowrank; ++r) sum += u.value[u.at(n, r)] * v.value[v.at(r, k)];
      }
    }
  }
  const bool product = lowrank == 0 || plan.multiplies_out();
  const Matrix expected = multiply(x, w, {0, shape.n}, {0, shape.k});

  std::vector<LinearPlacement> places;
  std::vector<Matrix> state;
  for (int i = 0; i < size; ++i) {
    places.push_back(plan.place(role, shape, i));
    if (role == LinearRole::kHead) {
      state.push_back(x);
    } else if (is_output(role)) {
      state.push_back(x.part({0, m}, own_columns(plan, role, i)));
    } else {
      state.push_back(residual_part(plan, x, i));
    }
    const LinearPlacement& place = places.back();
    EXPECT_EQ(place.before, places[0].before);
    EXPECT_EQ(place.after_v, places[0].after_v);
    EXPECT_EQ(place.after_u, places[0].after_u);
    if (product) {
      EXPECT_EQ(place.v_rows.size() + place.v_cols.size(), 0);
      EXPECT_EQ(place.after_v, Exchange::kNone);
    }
  }
  state = exchange(plan, places[0].before, std::move(state));
  if (!product) {
    for (int i = 0; i < size; ++i) {
      auto& place = places[static_cast<std::size_t>(i)];
      auto& own = state[static_cast<std::size_t>(i)];
      own = multiply(own, v, place.v_rows, place.v_cols);
    }
    state = exchange(plan, places[0].after_v, std::move(state));
  }
  for (int i = 0; i < size; ++i) {
    auto& place = places[static_cast<std::size_t>(i)];
    auto& own = state[static_cast<std::size_t>(i)];
    own = multiply(own, product ? w : u, place.u_rows, place.u_cols);
  }
  state = exchange(plan, places[0].after_u, std::move(state));

  for (int i = 0; i < size; ++i) {
    const Matrix wanted = is_output(role) ? residual_part(plan, expected, i)
                                          : expected.part({0, m}, own_columns(plan, role, i));
    const Matrix& own = state[static_cast<std::size_t>(i)];
    for (std::size_t e = 0; e < wanted.value.size(); ++e) {
      if (!wanted.known[e]) continue;
      ASSERT_TRUE(own.known[e]) << "rank " << i << " lacks element " << e;
      ASSERT_EQ(own.value[e], wanted.value[e]) << "rank " << i << " element " << e;
    }
  }
}

TEST(Plan, RanksTogetherComputeTheWholeLinear) {
  Random random(1);
  for (int trial = 0; trial < 6; ++trial) {
    const ModelShape model = random_shape(random);
    for (std::string_view name : plan_names()) {
      for (int size : kSizes) {
        if (size > model.num_heads) continue;
        auto plan = make_plan(name, model, size);
        SCOPED_TRACE(describe(*plan));
        ASSERT_EQ(plan->name(), name);
        for (LinearRole role : kRoles) {
          for (int lowrank : {0, 1, random.between(2, 7), random.between(8, 40)}) {
            SCOPED_TRACE("role " + std::to_string(static_cast<int>(role)) + " rank " +
                         std::to_string(lowrank));
            check_linear(*plan, role, lowrank, random.between(1, 9), random);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

/// Elements of a linear's weights over all ranks.
std::int64_t held(const TensorParallelPlan& plan, LinearRole role, const LinearShape& shape) {
  std::int64_t total = 0;
  for (int i = 0; i < plan.size(); ++i) {
    const LinearPlacement place = plan.place(role, shape, i);
    total += std::int64_t{place.v_rows.size()} * place.v_cols.size() +
             std::int64_t{place.u_rows.size()} * place.u_cols.size();
  }
  return total;
}

TEST(Plan, ReplicationIsThatOfTheDesign) {
  Random random(2);
  for (int trial = 0; trial < 50; ++trial) {
    const ModelShape model = random_shape(random);
    for (std::string_view name : plan_names()) {
      for (int size : kSizes) {
        if (size > model.num_heads) continue;
        auto plan = make_plan(name, model, size);
        SCOPED_TRACE(describe(*plan));
        const bool wide = name == "two_collective" || name == "token_sharded";
        for (LinearRole role : kRoles) {
          if (role == LinearRole::kHead) continue;
          const int r = random.between(1, 40);
          const LinearShape shape = shape_of(model, role, r);
          const bool is_kv = role == LinearRole::kKey || role == LinearRole::kValue;
          // Each rank has one kv head at least.
          const int copies_of_kv = is_kv && name != "naive" && size > model.num_kv_heads
                                       ? size * model.head_dim
                                       : shape.n;
          std::int64_t v = std::int64_t{r} * shape.k;
          std::int64_t u = std::int64_t{r} * (is_kv ? copies_of_kv : shape.n);
          if (is_output(role)) {
            if (wide || name == "rank_gather") u *= size;
          } else if (wide) {
            v *= size;
          }
          const std::int64_t dense = std::int64_t{is_kv ? copies_of_kv : shape.n} * shape.k;
          EXPECT_EQ(held(*plan, role, shape), name == "dense" ? dense : v + u);
          // A linear that stayed dense is never replicated.
          EXPECT_EQ(held(*plan, role, {shape.n, shape.k, 0}), dense);
        }
      }
    }
  }
}

TEST(Plan, NaiveHasAllHeadsOnEveryRank) {
  auto plan = make_plan("naive", {64, 128, 8, 4, 8, 100}, 4);
  EXPECT_EQ(plan->heads(3).heads, (Range{0, 8}));
  EXPECT_EQ(plan->heads(3).kv_heads, (Range{0, 4}));
  EXPECT_FALSE(plan->merges_exchanges());
  EXPECT_TRUE(make_plan("dense", plan->model(), 4)->multiplies_out());
}

TEST(Plan, OneRankStatesItsExchanges) {
  auto plan = make_plan("hidden_sharded", {64, 128, 8, 4, 8, 100}, 1);
  const LinearPlacement place = plan->place(LinearRole::kQuery, {64, 64, 20}, 0);
  EXPECT_EQ(place.after_v, Exchange::kAllReduce);
  EXPECT_EQ(place.u_rows, (Range{0, 64}));
}

std::string message_of(std::string_view name, const ModelShape& model, int size) {
  try {
    make_plan(name, model, size);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    return error.what();
  }
  return "no error";
}

TEST(Plan, ErrorsNameTheValue) {
  const ModelShape model{64, 128, 6, 3, 8, 100};
  EXPECT_NE(message_of("fast", model, 2).find("\"fast\""), std::string::npos);
  EXPECT_NE(message_of("fast", model, 2).find("two_collective"), std::string::npos);
  const std::string heads = message_of("dense", model, 7);
  EXPECT_NE(heads.find("tensor_parallel_size=7"), std::string::npos);
  EXPECT_NE(heads.find("heads, 6"), std::string::npos);
  EXPECT_NE(message_of("dense", model, 0).find("tensor_parallel_size=0"), std::string::npos);
}

}  // namespace
}  // namespace deinfer
