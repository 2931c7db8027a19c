// How a decoder is divided among tensor-parallel ranks: which part of every weight a rank holds,
// and which exchanges happen where. Mathematics: DeInfer, arXiv 2604.17709 (naive, rank_gather);
// the other plans are ours.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace deinfer {

/// The linears of a decoder as a plan sees them. Query, key, value, gate and up read the residual
/// stream; attention output and down add to it. A plain MLP has up and down only.
enum class LinearRole { kQuery, kKey, kValue, kAttentionOutput, kGate, kUp, kDown, kHead };

/// Full size of a linear: y[n] = W[n, k] x[k], or U[n, r] V[r, k] x[k]. rank is 0 when dense.
struct LinearShape {
  int n = 0;
  int k = 0;
  int rank = 0;
};

/// What plans need to know of a model.
struct ModelShape {
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
};

/// Half-open range of rows or columns.
struct Range {
  int begin = 0;
  int end = 0;
  int size() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

/// Part `index` of [0, n) in `parts` near-equal parts whose borders are multiples of `align` (but
/// for n itself); parts may be empty.
Range split(int n, int parts, int index, int align = 1);

/// What every rank holds of the residual stream x[m, hidden].
enum class ResidualLayout {
  kReplicated,
  kHiddenShards,  // the columns hidden_share(rank)
  kTokenShards,   // the rows split(m, size, rank)
};

/// What travels between ranks. Under kTokenShards gathers and scatters run over tokens, else over
/// columns.
enum class Exchange {
  kNone,
  kAllReduce,      // ranks have partial sums; all get the sum
  kAllGather,      // ranks have different parts; all get all of them
  kReduceScatter,  // ranks have partial sums; each gets the sum of its part
};

/// One rank's part of a linear. A dense linear uses the u ranges only, for W[n, k].
struct LinearPlacement {
  Range v_rows, v_cols;                // of V[r, k]
  Range u_rows, u_cols;                // of U[n, r], or of W[n, k]
  Exchange before = Exchange::kNone;   // of x, ahead of the product
  Exchange after_v = Exchange::kNone;  // of z = V x
  Exchange after_u = Exchange::kNone;  // of y
};

/// Attention heads of one rank. A rank has whole groups of heads, or part of one group: the heads
/// of a rank always share its kv heads evenly.
struct HeadShare {
  Range heads;
  Range kv_heads;
};

class TensorParallelPlan {
 public:
  /// Throws kInvalidArgument when `size` exceeds the number of attention heads.
  TensorParallelPlan(const ModelShape& model, int size);
  virtual ~TensorParallelPlan() = default;

  virtual std::string_view name() const = 0;
  virtual ResidualLayout residual() const { return ResidualLayout::kReplicated; }
  /// The part of rank `rank`. `head_share`, `intermediate_share`, `hidden_share` and `vocab_share`
  /// give the ranges along those dimensions.
  virtual LinearPlacement place(LinearRole role, const LinearShape& shape, int rank) const = 0;
  /// Whether every rank has the attention and KV cache of some heads. naive: of all heads.
  virtual bool divides_heads() const { return true; }
  /// Whether decomposed linears are held as their product W = U V.
  virtual bool multiplies_out() const { return false; }
  /// Whether linears with a common input share their exchanges. naive: no.
  virtual bool merges_exchanges() const { return true; }

  const ModelShape& model() const { return model_; }
  int size() const { return size_; }

  Range hidden_share(int rank) const;        // borders are multiples of 16
  Range intermediate_share(int rank) const;  // likewise
  Range vocab_share(int rank) const;         // borders are multiples of 32
  HeadShare head_share(int rank) const;
  /// The heads whose attention and KV cache a rank has.
  HeadShare heads(int rank) const;

 private:
  ModelShape model_;
  int size_;
};

/// The part of rank `rank` where it attends for `all_heads`, as token-sharded latents want
/// (KvForms): q, k and v of all heads on every rank. Else plan.place(). Not for plans that exchange
/// the outputs of q, k and v.
LinearPlacement place_linear(const TensorParallelPlan& plan, LinearRole role,
                             const LinearShape& shape, int rank, bool all_heads);

/// Likewise, the heads of a rank's attention.
HeadShare attention_heads(const TensorParallelPlan& plan, int rank, bool all_heads);

/// Names of all plans, without "auto".
std::vector<std::string_view> plan_names();

/// The plan called `name`, for any size from 1. Throws kInvalidArgument for an unknown name.
std::unique_ptr<TensorParallelPlan> make_plan(std::string_view name, const ModelShape& model,
                                              int size);

}  // namespace deinfer
