// Memory and data for tests of CUDA kernels, on the emulated device or on a real one.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <vector>

#include "kernels/cpu/packing.h"
#include "kernels/cuda/devices.h"
#include "kernels/cuda/packing.h"
#include "kernels/cuda/runtime.h"
#include "reference.h"
#include "thread_order.h"

namespace deinfer::test {

/// Tests that are skipped where there is no device.
class CudaDeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda::devices().empty()) GTEST_SKIP() << "no CUDA device is visible";
    cuda::use_device(0);
  }
  void TearDown() override { set_thread_order(0); }
};

/// Weights on the device, and the scales of their rows.
struct Int8Weights {
  cuda::DeviceBuffer data, scales;
};

/// What int8 makes of weights [n, k].
inline std::vector<double> rounded_to_int8(const std::vector<bf16>& w, int n, int k) {
  std::vector<double> rounded;
  for (int row = 0; row < n; ++row) {
    const float scale = cpu::int8_scale({w.data(), DType::kBFloat16, n, k, k}, row);
    for (int col = 0; col < k; ++col) {
      const float value = to_float(w[static_cast<std::size_t>(row * k + col)]);
      rounded.push_back(static_cast<double>(cpu::from_int8(cpu::to_int8(value, scale))) *
                        static_cast<double>(scale));
    }
  }
  return rounded;
}

/// A stream, and copies in and out of the device.
class CudaTest : public CudaDeviceTest {
 protected:
  void SetUp() override {
    CudaDeviceTest::SetUp();
    if (!IsSkipped()) stream_.emplace();
  }

  template <typename T>
  cuda::DeviceBuffer on_device(const std::vector<T>& values) {
    cuda::DeviceBuffer buffer(values.size() * sizeof(T));
    stream_->upload(buffer.as<void>(), values.data(), buffer.size());
    stream_->synchronize();
    return buffer;
  }
  template <typename T>
  std::vector<T> on_host(const cuda::DeviceBuffer& buffer) {
    std::vector<T> values(buffer.size() / sizeof(T));
    stream_->download(values.data(), buffer.as<void>(), buffer.size());
    stream_->synchronize();
    return values;
  }
  /// Weights [n, k] in their order on the device.
  cuda::DeviceBuffer weights(const std::vector<bf16>& w, int n, int k, int tiles = 0) {
    if (tiles == 0) tiles = cuda::tiles_of(n, cuda::kTileRows);
    const int chunks = cuda::tiles_of(k, cuda::kTileCols);
    std::vector<bf16> packed(static_cast<std::size_t>(tiles * chunks) * 512);
    cuda::pack_weights({w.data(), DType::kBFloat16, n, k, k}, {}, 0, tiles, packed.data());
    return on_device(packed);
  }
  /// The same in int8.
  Int8Weights int8_weights(const std::vector<bf16>& w, int n, int k, int tiles = 0) {
    if (tiles == 0) tiles = cuda::tiles_of(n, cuda::kTileRows);
    const int chunks = cuda::tiles_of(k, cuda::kTileCols);
    std::vector<std::uint16_t> packed(static_cast<std::size_t>(tiles * chunks) * 256);
    std::vector<float> scales(static_cast<std::size_t>(tiles * cuda::kTileRows));
    cuda::pack_int8_weights({w.data(), DType::kBFloat16, n, k, k}, {}, 0, tiles, packed.data(),
                            scales.data());
    return {on_device(packed), on_device(scales)};
  }
  /// Activations [m, k]; rows beyond m are NaN, columns beyond k zero.
  cuda::DeviceBuffer activations(const std::vector<bf16>& x, int m, int k, int chunks) {
    const int rows = cuda::tiles_of(m, cuda::kTokenPadding) * cuda::kTokenPadding;
    std::vector<bf16> tiled(static_cast<std::size_t>(rows * chunks * cuda::kTileCols),
                            to_bf16(kNan));
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < chunks * cuda::kTileCols; ++j) {
        tiled[static_cast<std::size_t>(cuda::activation_offset(i, j, chunks))] =
            j < k ? x[static_cast<std::size_t>(i * k + j)] : bf16{};
      }
    }
    return on_device(tiled);
  }

  std::optional<cuda::DeviceStream> stream_;
};

/// f() has the same bits whatever the order of threads: there is no race.
template <typename T>
std::vector<T> in_every_order(const std::function<std::vector<T>()>& f) {
  const std::vector<T> first = f();
  for (int order = 1; order < kThreadOrders; ++order) {
    set_thread_order(order);
    const std::vector<T> again = f();
    EXPECT_TRUE(again.size() == first.size() &&
                same_bits(again.data(), first.data(), first.size() * sizeof(T)));
  }
  set_thread_order(0);
  return first;
}

}  // namespace deinfer::test
