// How the linears of a decoder are divided among tensor-parallel ranks.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace deinfer {

/// The linears of a decoder as a plan sees them.
enum class LinearRole { kQuery, kKey, kValue, kAttentionOutput, kGate, kUp, kDown, kHead };

/// Full size of a linear: y[n] = W[n, k] x[k], or U[n, r] V[r, k] x[k]. rank is 0 when dense.
struct LinearShape {
  int n = 0;
  int k = 0;
  int rank = 0;
};

/// Half-open range of rows or columns.
struct Range {
  int begin = 0;
  int end = 0;
  int size() const { return end - begin; }
};

/// What travels between ranks after a product.
enum class Exchange { kNone, kAllReduce };

/// One rank's part of a linear. A dense linear uses the u ranges only.
struct LinearPlacement {
  Range v_rows, v_cols;  // of V[r, k]
  Range u_rows, u_cols;  // of U[n, r], or of W[n, k]
  Exchange after_v = Exchange::kNone;
  Exchange after_u = Exchange::kNone;
};

class TensorParallelPlan {
 public:
  virtual ~TensorParallelPlan() = default;
  virtual std::string_view name() const = 0;
  /// The part of rank `rank` of `size`.
  virtual LinearPlacement place(LinearRole role, const LinearShape& shape, int rank,
                                int size) const = 0;
};

/// The plan called `name` for `size` ranks ("auto" chooses). Throws kInvalidArgument for an unknown
/// name and kUnsupported for a size that no plan of this version serves.
std::unique_ptr<TensorParallelPlan> make_plan(const std::string& name, int size);

/// One rank that holds everything.
std::unique_ptr<TensorParallelPlan> make_single_plan();

}  // namespace deinfer
