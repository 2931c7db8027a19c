// deinfer/cuda_ops.h: paged attention on other programs' device memory.
#include <numeric>

#include "cuda_fixture.h"
#include "deinfer/cuda_ops.h"
#include "expect_error.h"

namespace deinfer {
namespace {

using test::expect_error;

using cuda::DeviceBuffer;

constexpr int kBlockSize = 32;

/// Sequences of `lengths` tokens, of which the last `queries` ask.
struct Work {
  std::vector<int> lengths, queries;
  int heads = 4;
  int kv_heads = 2;
  int head_dim = 20;
  int window = 0;

  int rows() const { return std::accumulate(queries.begin(), queries.end(), 0); }
};

class CudaOpsAttention : public test::CudaTest {
 protected:
  CudaStream on() { return {0, stream_->get()}; }
  static TensorView view(const DeviceBuffer& data, int rows, int cols) {
    return {data.as<void>(), DType::kBFloat16, rows, cols, cols};
  }

  /// Fills the caches and attends. Blocks are handed out backwards; tables have a gap between rows.
  std::vector<bf16> run(const Work& work) {
    const int width = cuda_head_width(work.head_dim);
    const int kv_cols = work.kv_heads * work.head_dim;
    const int all = std::accumulate(work.lengths.begin(), work.lengths.end(), 0);
    test::Random random(3);
    k_ = random.vector<bf16>(static_cast<std::size_t>(all * kv_cols));
    v_ = random.vector<bf16>(static_cast<std::size_t>(all * kv_cols));
    q_ = random.vector<bf16>(static_cast<std::size_t>(work.rows() * work.heads * work.head_dim));
    const std::size_t count = work.lengths.size();
    const int stride = *std::max_element(work.lengths.begin(), work.lengths.end()) / kBlockSize + 2;
    std::vector<std::int32_t> tables(count * static_cast<std::size_t>(stride), 1 << 30);
    std::vector<std::int32_t> starts = {0};
    std::vector<std::int64_t> slots;
    int blocks = 1;
    for (int length : work.lengths) blocks += cuda::tiles_of(length, kBlockSize);
    int next = blocks;
    for (std::size_t s = 0; s < count; ++s) {
      for (int p = 0; p < work.lengths[s]; ++p) {
        std::int32_t& block =
            tables[s * static_cast<std::size_t>(stride) + static_cast<std::size_t>(p / kBlockSize)];
        if (p % kBlockSize == 0) block = --next;
        slots.push_back(std::int64_t{block} * kBlockSize + p % kBlockSize);
      }
      starts.push_back(starts.back() + work.queries[s]);
    }
    const auto pool = static_cast<std::size_t>(blocks * work.kv_heads * kBlockSize * width);
    DeviceBuffer k_cache = on_device(std::vector<bf16>(pool));
    DeviceBuffer v_cache = on_device(std::vector<bf16>(pool));
    const CudaPagedCache cache{k_cache.as<void>(), v_cache.as<void>(), blocks,
                               work.kv_heads,      work.head_dim,      kBlockSize};
    slots.push_back(-1);  // tokens that are not stored
    slots.push_back(std::int64_t{blocks} * kBlockSize);
    const std::size_t extra = 2 * static_cast<std::size_t>(kv_cols);
    std::vector<bf16> keys = k_, values = v_;
    keys.resize(keys.size() + extra, to_bf16(test::kNan));
    values.resize(values.size() + extra, to_bf16(test::kNan));
    const DeviceBuffer k = on_device(keys), v = on_device(values), q = on_device(q_),
                       places = on_device(slots), lengths = on_device(work.lengths),
                       firsts = on_device(starts), table = on_device(tables);
    cuda_write_kv(view(k, all + 2, kv_cols), view(v, all + 2, kv_cols), places.as<std::int64_t>(),
                  cache, on());
    const CudaPagedSequences sequences{firsts.as<std::int32_t>(), lengths.as<std::int32_t>(),
                                       table.as<std::int32_t>(), stride,
                                       static_cast<std::int64_t>(count)};
    const int cols = work.heads * work.head_dim;
    const std::size_t bytes = cuda_attention_workspace_bytes(work.rows(), work.heads, cache,
                                                             static_cast<std::int64_t>(count));
    const DeviceBuffer workspace(bytes);
    DeviceBuffer out(static_cast<std::size_t>(work.rows() * cols) * sizeof(bf16));
    cuda_paged_attention(view(q, work.rows(), cols), cache, sequences, kScale, work.window,
                         {out.as<void>(), DType::kBFloat16, work.rows(), cols, cols},
                         workspace.as<void>(), bytes, on());
    return on_host<bf16>(out);
  }

  /// Element d of a head, of the query at `position` of a sequence that begins at row `first`.
  double exact(const Work& work, int first, int position, int query, int head, int d) const {
    const int kv_head = head / (work.heads / work.kv_heads);
    auto at = [&](const std::vector<bf16>& from, int row, int all_heads, int which, int e) {
      return test::wide(
          from[static_cast<std::size_t>((row * all_heads + which) * work.head_dim + e)]);
    };
    double sum = 0, total = 0;
    for (int p = 0; p <= position; ++p) {
      if (work.window > 0 && p <= position - work.window) continue;
      double score = 0;
      for (int e = 0; e < work.head_dim; ++e) {
        score += at(q_, query, work.heads, head, e) * at(k_, first + p, work.kv_heads, kv_head, e);
      }
      const double weight = std::exp(score * kScale);
      sum += weight;
      total += weight * at(v_, first + p, work.kv_heads, kv_head, d);
    }
    return total / sum;
  }

  void check(const Work& work) {
    const std::vector<bf16> got = run(work);
    int first = 0;
    int query = 0;
    for (std::size_t s = 0; s < work.lengths.size(); ++s) {
      for (int r = 0; r < work.queries[s]; ++r, ++query) {
        const int position = work.lengths[s] - work.queries[s] + r;
        for (int head = 0; head < work.heads; ++head) {
          for (int d = 0; d < work.head_dim; d += 3) {
            const double want = exact(work, first, position, query, head, d);
            const std::size_t place =
                static_cast<std::size_t>((query * work.heads + head) * work.head_dim + d);
            EXPECT_NEAR(test::wide(got[place]), want, 0.02 * std::abs(want) + 0.02)
                << "sequence " << s << " row " << r << " head " << head;
          }
        }
      }
      first += work.lengths[s];
    }
  }

  static constexpr float kScale = 0.2f;
  std::vector<bf16> k_, v_, q_;
};

TEST_F(CudaOpsAttention, DecodesAndPrefills) {
  check({{1, 70, 300, 33}, {1, 1, 1, 1}});     // splits
  check({{40, 300, 20}, {40, 50, 0}});         // a sequence that does not ask
  check({{40, 300}, {40, 50}, 4, 1, 20, 37});  // windows
  check({{300, 5}, {2, 3}, 6, 3, 64});         // heads without padding
  check({std::vector<int>(300, 9), std::vector<int>(300, 1), 2, 2, 8});  // more than threads
}

TEST_F(CudaOpsAttention, HasNoRace) {
  const Work work{{200, 90, 300}, {1, 20, 3}};
  test::in_every_order<bf16>([&] { return run(work); });
}

TEST_F(CudaOpsAttention, NamesBadInput) {
  expect_error(ErrorCode::kUnsupported, "head_dim=257", [] { cuda_head_width(257); });
  const DeviceBuffer memory(1 << 20);
  CudaPagedCache cache{memory.as<void>(), memory.as<void>(), 4, 2, 20, 32};
  const MutableTensorView out{memory.as<void>(), DType::kBFloat16, 3, 80, 80};
  const auto attend = [&](int cols, std::size_t bytes) {
    const auto* ints = memory.as<std::int32_t>();
    cuda_paged_attention(view(memory, 3, cols), cache, {ints, ints, ints, 4, 2}, 1.0f, 0, out,
                         memory.as<void>(), bytes, on());
  };
  expect_error(ErrorCode::kInvalidArgument, "out has shape [3, 80] and row stride 80, not [3, 60]",
               [&] { attend(60, 0); });
  expect_error(ErrorCode::kInvalidArgument, "the workspace has 7 bytes", [&] { attend(80, 7); });
  cache.block_size = 24;
  expect_error(ErrorCode::kInvalidArgument, "block_size must be a multiple of 16",
               [&] { attend(80, 0); });
  cache.block_size = 32;
  cache.kv_heads = 3;
  expect_error(ErrorCode::kInvalidArgument, "there are 4 heads, no multiple of 3 kv heads",
               [&] { attend(80, 0); });
  expect_error(ErrorCode::kInvalidArgument, "v has shape [3, 60], not [2, 60]", [&] {
    cuda_write_kv(view(memory, 2, 60), view(memory, 3, 60), memory.as<std::int64_t>(), cache, on());
  });
}

}  // namespace
}  // namespace deinfer
