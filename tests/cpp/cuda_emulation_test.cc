// The emulated CUDA device itself: that it runs what is right and refuses what is not.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/runtime.h"

namespace deinfer::cuda {
namespace {

using emulation::Schedule;

class CudaEmulation : public testing::Test {
 protected:
  CudaEmulation() { use_device(0); }
  ~CudaEmulation() override { emulation::set_schedule(Schedule::kAscending); }
};

/// out[i] = the sum of in over the block of thread i.
void sum_kernel(const int* in, int* out) {
  __shared__ int sums[64];
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  sums[threadIdx.x] = in[i];
  __syncthreads();
  int total = 0;
  for (unsigned j = 0; j < blockDim.x; ++j) total += sums[j];
  out[i] = total;
}

/// The same without the barrier that it needs.
void racing_kernel(const int* in, int* out) {
  __shared__ int sums[64];
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  sums[threadIdx.x] = in[i];
  int total = 0;
  for (unsigned j = 0; j < blockDim.x; ++j) total += sums[j];
  out[i] = total;
}

void diverging_kernel(int* out) {
  if (threadIdx.x < 7) __syncthreads();
  out[threadIdx.x] = 1;
}

void two_barriers_kernel(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

void half_a_warp_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}

void add_one_kernel(int* values) { ++values[threadIdx.x]; }

void exchange_kernel(int* out) {
  const int lane = lane_id();
  out[lane] = __shfl_xor_sync(kAllLanes, lane, 5);
  out[lane] = 100 * out[lane] + __shfl_sync(kAllLanes, lane, 3);
}

std::vector<int> run_sum(void (*kernel)(const int*, int*)) {
  DeviceStream stream;
  DeviceBuffer in(192 * 4), out(192 * 4);
  std::vector<int> host(192);
  std::iota(host.begin(), host.end(), 0);
  stream.upload(in.as<void>(), host.data(), in.size());
  EXPECT_EQ(launch(stream.get(), grid_of(3), 64, kernel, static_cast<const int*>(in.as<int>()),
                   out.as<int>()),
            0);
  std::vector<int> result(192);
  stream.download(result.data(), out.as<void>(), out.size());
  stream.synchronize();
  return result;
}

TEST_F(CudaEmulation, BlocksShareMemoryAndWaitForEachOther) {
  for (Schedule how : {Schedule::kAscending, Schedule::kDescending, Schedule::kShuffled}) {
    emulation::set_schedule(how);
    std::vector<int> sums = run_sum(sum_kernel);
    for (int i = 0; i < 192; ++i) {
      const int first = i / 64 * 64;
      EXPECT_EQ(sums[static_cast<std::size_t>(i)], 64 * first + 63 * 32);
    }
  }
}

TEST_F(CudaEmulation, ARaceShowsInTheOrderOfThreads) {
  std::vector<int> ascending = run_sum(racing_kernel);
  emulation::set_schedule(Schedule::kDescending);
  EXPECT_NE(run_sum(racing_kernel), ascending);
}

TEST_F(CudaEmulation, LanesExchange) {
  DeviceStream stream;
  DeviceBuffer out(32 * 4);
  launch(stream.get(), grid_of(1), 32, exchange_kernel, out.as<int>());
  stream.synchronize();
  for (int i = 0; i < 32; ++i) EXPECT_EQ(out.as<int>()[i], 100 * (i ^ 5) + 3);
}

TEST_F(CudaEmulation, DivergenceIsAnError) {
  for (auto* kernel : {diverging_kernel, two_barriers_kernel, half_a_warp_kernel}) {
    DeviceStream stream;
    DeviceBuffer out(64 * 4);
    launch(stream.get(), grid_of(1), 64, kernel, out.as<int>());
    EXPECT_THROW(stream.synchronize(), std::runtime_error);
    EXPECT_THROW(stream.synchronize(), std::runtime_error) << "for good";
  }
}

TEST_F(CudaEmulation, NothingRunsBeforeSomebodyWaits) {
  DeviceStream stream;
  DeviceBuffer values(32 * 4);
  stream.clear(values);
  launch(stream.get(), grid_of(1), 32, add_one_kernel, values.as<int>());
  EXPECT_EQ(values.as<int>()[0], -1) << "memory that nobody has written is all ones";
  stream.synchronize();
  EXPECT_EQ(values.as<int>()[0], 1);
}

TEST_F(CudaEmulation, WorkThatIsNotDoneIsAskedAgain) {
  cudaStream_t stream;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  int asked = 0;
  bool later = false;
  emulation::enqueue(stream, [&] { return ++asked % 3 == 0; });
  emulation::enqueue(stream, [&] { return later = true; });
  EXPECT_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  EXPECT_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  EXPECT_FALSE(later);
  EXPECT_EQ(cudaStreamQuery(stream), cudaSuccess);
  EXPECT_TRUE(later);
  emulation::enqueue(stream, [&] { return ++asked % 3 == 0; });
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(asked, 6);
  cudaStreamDestroy(stream);
}

TEST_F(CudaEmulation, GraphsAreReplayed) {
  DeviceStream stream;
  DeviceBuffer values(32 * 4);
  stream.clear(values);
  stream.begin_capture();
  launch(stream.get(), grid_of(1), 32, add_one_kernel, values.as<int>());
  launch(stream.get(), grid_of(1), 32, add_one_kernel, values.as<int>());
  Graph graph = stream.end_capture();
  stream.synchronize();
  EXPECT_EQ(values.as<int>()[7], 0) << "captured, not run";
  for (int i = 0; i < 3; ++i) stream.launch(graph);
  stream.synchronize();
  EXPECT_EQ(values.as<int>()[7], 6);
}

TEST_F(CudaEmulation, MemoryIsLimitedAndReturned) {
  const std::uint64_t free = free_memory();
  {
    DeviceBuffer some(1 << 20);
    EXPECT_EQ(free_memory(), free - (1 << 20));
    DeviceBuffer moved = std::move(some);
    EXPECT_EQ(free_memory(), free - (1 << 20));
    EXPECT_THROW(DeviceBuffer(std::size_t{1} << 40), std::runtime_error);
  }
  EXPECT_EQ(free_memory(), free);
  EXPECT_THROW(use_device(1), std::runtime_error);
}

TEST_F(CudaEmulation, LaunchesAreChecked) {
  DeviceStream stream;
  const int status =
      launch(stream.get(), grid_of(1), 2048, add_one_kernel, static_cast<int*>(nullptr));
  try {
    check_launch(status, "add_one");
    FAIL();
  } catch (const std::runtime_error& error) {
    EXPECT_STREQ(error.what(), "CUDA: add_one: invalid argument");
  }
}

/// d = a b for integers a[i, k] = i + 3 k, b[k, j] = 1 + k j, laid out as PTX says.
void mma_kernel(float* d) {
  const int row = lane_id() / 4;
  const int col = lane_id() % 4 * 2;
  auto a = [](int i, int k) { return static_cast<float>(i + 3 * k); };
  auto b = [](int k, int j) { return static_cast<float>(1 + k * j); };
  auto pair_a = [&](int i, int k) { return pack_bf16(a(i, k), a(i, k + 1)); };
  const uint4 fragment = {pair_a(row, col), pair_a(row + 8, col), pair_a(row, col + 8),
                          pair_a(row + 8, col + 8)};
  float out[4] = {};
  mma_bf16(out, fragment, pack_bf16(b(col, row), b(col + 1, row)),
           pack_bf16(b(col + 8, row), b(col + 9, row)));
  d[row * 8 + col] = out[0];
  d[row * 8 + col + 1] = out[1];
  d[(row + 8) * 8 + col] = out[2];
  d[(row + 8) * 8 + col + 1] = out[3];
}

TEST_F(CudaEmulation, TheTensorCoreMultipliesMatrices) {
  DeviceStream stream;
  DeviceBuffer d(16 * 8 * 4);
  launch(stream.get(), grid_of(1), 32, mma_kernel, d.as<float>());
  stream.synchronize();
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float expected = 0;
      for (int k = 0; k < 16; ++k) expected += static_cast<float>((i + 3 * k) * (1 + k * j));
      EXPECT_EQ(d.as<float>()[i * 8 + j], expected) << i << ", " << j;
    }
  }
}

}  // namespace
}  // namespace deinfer::cuda
