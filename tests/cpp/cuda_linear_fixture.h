// Products of random matrices on a CUDA device.
#pragma once

#include <cmath>
#include <vector>

#include "cuda_fixture.h"
#include "model/cuda_weights.h"

namespace deinfer::test {

/// A product of random matrices, of which W is bf16 or becomes int8.
struct Case {
  Case(bool of_int8, int tokens, int rows, int cols, unsigned seed)
      : int8(of_int8), m(tokens), n(rows), k(cols) {
    Random random(seed);
    w = random.vector<bf16>(static_cast<std::size_t>(n * k));
    x = random.vector<bf16>(static_cast<std::size_t>(m * k));
    bias = random.vector(static_cast<std::size_t>(n));
    round();
  }
  /// To be called when w has changed.
  void round() {
    rounded.clear();
    for (bf16 value : w) rounded.push_back(wide(value));
    if (int8) rounded = rounded_to_int8(w, n, k);
  }
  double exact(int token, int row) const {
    double sum = bias[static_cast<std::size_t>(row)];
    for (int j = 0; j < k; ++j) {
      sum += rounded[static_cast<std::size_t>(row * k + j)] *
             wide(x[static_cast<std::size_t>(token * k + j)]);
    }
    return sum;
  }
  /// Of sums of k products.
  double tolerance() const { return 2e-6 * std::sqrt(k) * 4; }

  bool int8;
  int m, n, k;
  std::vector<bf16> w, x;
  std::vector<double> rounded;  // W as products see it
  std::vector<float> bias;
};

class CudaLinearFixture : public CudaTest {
 protected:
  explicit CudaLinearFixture(bool int8) : int8_(int8) {}
  Case make(int m, int n, int k, unsigned seed = 1) const { return {int8_, m, n, k, seed}; }

  /// A segment whose operands live as long as the test.
  cuda::LinearFactor factor(const Case& c) {
    const int chunks = cuda::tiles_of(c.k, cuda::kTileCols);
    std::vector<float> bias = c.bias;
    bias.resize(static_cast<std::size_t>(cuda::tiles_of(c.n, cuda::kTileCols) * cuda::kTileCols),
                0.0f);
    const int tiles = cuda::tiles_of(c.n, 32) * 2;
    cuda::LinearFactor out;
    if (c.int8) {
      Int8Weights packed = int8_weights(c.w, c.n, c.k, tiles);
      out.w = keep(std::move(packed.data));
      out.scales = static_cast<const float*>(keep(std::move(packed.scales)));
    } else {
      out.w = keep(weights(c.w, c.n, c.k, tiles));
    }
    out.x = keep(activations(c.x, c.m, c.k, chunks + 1));
    out.chunks = chunks;
    out.x_chunks = chunks + 1;
    out.bias = static_cast<const float*>(keep(on_device(bias)));
    return out;
  }
  cuda::LinearSegment segment(const Case& c, cuda::LinearEpilogue epilogue) {
    cuda::LinearSegment out;
    out.first = factor(c);
    out.epilogue = epilogue;
    out.n = c.n;
    out.tiles = cuda::tiles_of(c.n, 16);
    return out;
  }
  void* keep(cuda::DeviceBuffer buffer) { return kept_.emplace_back(std::move(buffer)).as<void>(); }

  /// y[m, n] in fp32; `before` is what it held.
  std::vector<float> product(const Case& c,
                             cuda::LinearEpilogue epilogue = cuda::LinearEpilogue::kFloat,
                             float before = kNan, float soft_cap = 0.0f) {
    cuda::DeviceBuffer y =
        on_device(std::vector<float>(static_cast<std::size_t>(c.m * c.n), before));
    cuda::LinearLaunch launch;
    launch.m = c.m;
    launch.num_segments = 1;
    launch.segments[0] = segment(c, epilogue);
    launch.segments[0].out = y.as<void>();
    launch.segments[0].ld = c.n;
    launch.segments[0].soft_cap = soft_cap;
    cuda::check_launch(cuda::launch_linear(launch, stream_->get()), "linear");
    return on_host<float>(y);
  }
  /// What an epilogue that writes activations leaves, padding of rows included.
  std::vector<bf16> activation(cuda::LinearLaunch launch, int rows) {
    const int chunks = cuda::tiles_of(rows, cuda::kTileCols);
    const int tokens = cuda::tiles_of(launch.m, cuda::kTokenPadding) * cuda::kTokenPadding;
    cuda::DeviceBuffer y = on_device(std::vector<bf16>(
        static_cast<std::size_t>(tokens * chunks * cuda::kTileCols), to_bf16(kNan)));
    launch.num_segments = 1;
    launch.segments[0].out = y.as<void>();
    launch.segments[0].out_chunks = chunks;
    launch.segments[0].tiles = chunks * 2;
    cuda::check_launch(cuda::launch_linear(launch, stream_->get()), "linear");
    std::vector<bf16> tiled = on_host<bf16>(y);
    std::vector<bf16> out;
    for (int i = 0; i < launch.m; ++i) {
      for (int j = 0; j < chunks * cuda::kTileCols; ++j) {
        out.push_back(tiled[static_cast<std::size_t>(cuda::activation_offset(i, j, chunks))]);
      }
    }
    return out;
  }

  bool int8_;
  std::vector<cuda::DeviceBuffer> kept_;
};

}  // namespace deinfer::test
