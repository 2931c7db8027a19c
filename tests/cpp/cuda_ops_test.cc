// deinfer/cuda_ops.h: the linears on other programs' device memory.
#include "deinfer/cuda_ops.h"
#include "expect_error.h"

#include "cuda_fixture.h"

namespace deinfer {
namespace {

using test::expect_error;

using cuda::DeviceBuffer;

/// One linear of random weights; rank 0: dense.
struct Linear {
  CudaLinearShape shape;
  std::vector<bf16> v, u, bias;  // bias may be empty

  double exact(const bf16* x, int k, int row, bool rounds_z) const {
    const int n_inner = shape.rank > 0 ? static_cast<int>(shape.rank) : k;
    double sum = bias.empty() ? 0 : test::wide(bias[static_cast<std::size_t>(row)]);
    for (int i = 0; i < n_inner; ++i) {
      double inner = shape.rank > 0 ? 0 : test::wide(x[i]);
      for (int j = 0; shape.rank > 0 && j < k; ++j) {
        inner += test::wide(v[static_cast<std::size_t>(i * k + j)]) * test::wide(x[j]);
      }
      if (shape.rank > 0 && rounds_z) inner = test::wide(to_bf16(static_cast<float>(inner)));
      sum += test::wide(u[static_cast<std::size_t>(row * n_inner + i)]) * inner;
    }
    return sum;
  }
};

class CudaOps : public test::CudaTest {
 protected:
  Linear linear(int n, int k, int rank, bool has_bias) {
    const int inner = rank > 0 ? rank : k;
    Linear out{{n, rank}, {}, {}, {}};
    auto random = [&](int rows, int cols) {
      return random_.vector<bf16>(static_cast<std::size_t>(rows * cols),
                                  1.0f / std::sqrt(static_cast<float>(cols)));
    };
    if (rank > 0) out.v = random(rank, k);
    out.u = random(n, inner);
    if (has_bias) out.bias = random(1, n);
    return out;
  }

  /// The linears, packed on the device by copies that do not outlive this.
  CudaPackedLinears pack(const std::vector<Linear>& linears, int k) {
    shapes_.clear();
    for (const Linear& from : linears) shapes_.push_back(from.shape);
    std::vector<DeviceBuffer> memory;
    std::vector<LinearWeights> weights;
    auto view = [&](const std::vector<bf16>& values, std::int64_t rows) -> TensorView {
      if (values.empty()) return {};
      const auto cols = static_cast<std::int64_t>(values.size()) / rows;
      return {memory.emplace_back(on_device(values)).as<void>(), DType::kBFloat16, rows, cols,
              cols};
    };
    for (const Linear& from : linears) {
      weights.push_back(
          {view(from.v, from.shape.rank), view(from.u, from.shape.n), view(from.bias, 1)});
    }
    const std::size_t bytes = cuda_packed_bytes(k, shapes_);
    packed_ = DeviceBuffer(bytes);
    const CudaPackedLinears packed{packed_.as<void>(), bytes, k, shapes_};
    cuda_pack(weights, packed, on());
    stream_->synchronize();
    return packed;
  }
  CudaStream on() { return {0, stream_->get()}; }

  /// x with rows `stride` apart; rows of outputs in order.
  std::vector<std::vector<bf16>> run(const std::vector<bf16>& x, int m, int stride,
                                     const CudaPackedLinears& packed, bool gated = false) {
    const DeviceBuffer input = on_device(x);
    std::vector<DeviceBuffer> memory;
    std::vector<MutableTensorView> outs;
    for (const CudaLinearShape& shape : packed.shapes) {
      const auto bytes = static_cast<std::size_t>(m * shape.n) * sizeof(bf16);
      outs.push_back(
          {memory.emplace_back(bytes).as<void>(), DType::kBFloat16, m, shape.n, shape.n});
      if (gated) break;
    }
    const std::size_t bytes = cuda_workspace_bytes(m, packed);
    const DeviceBuffer workspace(bytes);
    const TensorView view{input.as<void>(), DType::kBFloat16, m, packed.k, stride};
    if (gated) {
      cuda_lowrank_gated_mlp(view, packed, outs[0], workspace.as<void>(), bytes, on());
    } else {
      cuda_lowrank_linears(view, packed, outs, workspace.as<void>(), bytes, on());
    }
    std::vector<std::vector<bf16>> results;
    for (const DeviceBuffer& out : memory) results.push_back(on_host<bf16>(out));
    return results;
  }

  test::Random random_{5};
  std::vector<CudaLinearShape> shapes_;
  DeviceBuffer packed_;
};

TEST_F(CudaOps, LinearsOfAnyShape) {
  for (auto [m, k, first, second] :
       {std::array{1, 37, 13, 0}, {5, 64, 32, 33}, {70, 96, 0, 40}, {130, 40, 20, 1}}) {
    SCOPED_TRACE(m);
    const int stride = k + 3;
    const std::vector<Linear> linears = {linear(29, k, first, true), linear(50, k, second, false),
                                         linear(16, k, 7, true)};
    const std::vector<bf16> x = random_.vector<bf16>(static_cast<std::size_t>(m * stride));
    const CudaPackedLinears packed = pack(linears, k);
    const auto got = run(x, m, stride, packed);
    for (std::size_t i = 0; i < linears.size(); ++i) {
      const int n = static_cast<int>(linears[i].shape.n);
      for (int token = 0; token < m; token += std::max(1, m / 7)) {
        for (int row = 0; row < n; ++row) {
          const double exact = linears[i].exact(x.data() + token * stride, k, row, true);
          EXPECT_NEAR(test::wide(got[i][static_cast<std::size_t>(token * n + row)]), exact,
                      0.01 * std::abs(exact) + 0.01)
              << "linear " << i << " token " << token << " row " << row;
        }
      }
    }
    // The last row alone has the same bits.
    const std::vector<bf16> last(x.end() - stride, x.end());
    const auto alone = run(last, 1, stride, packed);
    for (std::size_t i = 0; i < linears.size(); ++i) {
      const std::size_t n = alone[i].size();
      EXPECT_TRUE(test::same_bits(alone[i].data(), &got[i][got[i].size() - n], n * sizeof(bf16)));
    }
  }
}

TEST_F(CudaOps, GatedMlp) {
  for (int m : {3, 90}) {
    const int k = 48, n = 75;
    const std::vector<Linear> linears = {linear(n, k, 20, true), linear(n, k, 0, false)};
    const std::vector<bf16> x = random_.vector<bf16>(static_cast<std::size_t>(m * k));
    const CudaPackedLinears packed = pack(linears, k);
    const std::vector<bf16> got =
        test::in_every_order<bf16>([&] { return run(x, m, k, packed, true)[0]; });
    for (int token : {0, m - 1}) {
      for (int row = 0; row < n; ++row) {
        const bf16* input = x.data() + token * k;
        const double exact = test::silu(linears[0].exact(input, k, row, true)) *
                             linears[1].exact(input, k, row, true);
        EXPECT_NEAR(test::wide(got[static_cast<std::size_t>(token * n + row)]), exact,
                    0.01 * std::abs(exact) + 0.01);
      }
    }
  }
}

TEST_F(CudaOps, NoRows) {
  const CudaPackedLinears packed = pack({linear(8, 6, 3, false)}, 6);
  EXPECT_TRUE(run({}, 0, 6, packed)[0].empty());
}

TEST_F(CudaOps, NamesBadInput) {
  const CudaPackedLinears packed = pack({linear(8, 6, 3, false)}, 6);
  const DeviceBuffer memory(4096);
  auto call = [&](auto change) {
    return [&, change] {
      TensorView x{memory.as<void>(), DType::kBFloat16, 2, 6, 6};
      MutableTensorView out{memory.as<void>(), DType::kBFloat16, 2, 8, 8};
      CudaPackedLinears weights = packed;
      std::size_t bytes = 1 << 20;
      change(x, out, weights, bytes);
      cuda_lowrank_linears(x, weights, std::span(&out, 1), memory.as<void>(), bytes, on());
    };
  };
  using X = TensorView&;
  using Out = MutableTensorView&;
  using W = CudaPackedLinears&;
  using Bytes = std::size_t&;
  const auto invalid = ErrorCode::kInvalidArgument;
  expect_error(ErrorCode::kUnsupported, "x is float32: on CUDA devices the kernels are bfloat16",
               call([](X x, Out, W, Bytes) { x.dtype = DType::kFloat32; }));
  expect_error(invalid, "x has 5 columns, the linears take 6",
               call([](X x, Out, W, Bytes) { x.cols = 5; }));
  expect_error(invalid, "out has shape [2, 7], not [2, 8]",
               call([](X, Out out, W, Bytes) { out.cols = 7; }));
  expect_error(invalid, "the packed weights have 100 bytes",
               call([](X, Out, W weights, Bytes) { weights.bytes = 100; }));
  expect_error(invalid, "the workspace has 3 bytes",
               call([](X, Out, W, Bytes bytes) { bytes = 3; }));
  expect_error(invalid, "device=\"cuda:7\"", [&] {
    TensorView x{memory.as<void>(), DType::kBFloat16, 2, 6, 6};
    MutableTensorView out{memory.as<void>(), DType::kBFloat16, 2, 8, 8};
    cuda_lowrank_linears(x, packed, std::span(&out, 1), memory.as<void>(), 1 << 20,
                         {7, stream_->get()});
  });
  LinearWeights weights;
  weights.u = {memory.as<void>(), DType::kBFloat16, 8, 3, 3};
  weights.v = {memory.as<void>(), DType::kBFloat16, 4, 6, 6};
  expect_error(invalid, "v of linear 0 is [4, 6], not [3, 6]",
               [&] { cuda_pack(std::span(&weights, 1), packed, on()); });
  expect_error(invalid, "one to 3 linears", [&] { cuda_packed_bytes(6, {}); });
}

}  // namespace
}  // namespace deinfer
