// The emulated devices: memory, streams, events, graphs.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

using emulation::Work;

struct CUstream_st {
  std::deque<Work> queue;
  CUgraph_st* capture = nullptr;
  bool failed = false;
};
struct CUgraph_st {
  std::vector<Work> nodes;
};
struct CUgraphExec_st {
  std::vector<Work> nodes;
};

namespace emulation {
namespace {

constexpr int kMultiprocessors = 2;
std::mutex mutex;  // of allocations
std::map<void*, std::size_t> allocations;
thread_local int current_device = 0;

void* allocate(std::size_t bytes) {
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  // Memory holds anything; here NaN, which shows where it is used.
  if (memory != nullptr) std::memset(memory, 0xff, bytes);
  return memory;
}

}  // namespace

cudaError_t enqueue(cudaStream_t stream, Work work) {
  if (stream == nullptr) return cudaErrorInvalidValue;
  if (stream->capture != nullptr) {
    stream->capture->nodes.push_back(std::move(work));
  } else {
    stream->queue.push_back(std::move(work));
  }
  return cudaSuccess;
}

bool is_capturing(cudaStream_t stream) { return stream->capture != nullptr; }

DeviceState& device_state() {
  static DeviceState state;
  return state;
}

void check_mask(unsigned mask) {
  if (mask == 0xffffffffu) return;
  std::fprintf(stderr, "emulation: shuffle with the mask %x\n", mask);
  std::abort();
}

cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> body) {
  // As hardware refuses them.
  const dim3 block = config.blockDim;
  const dim3 grid = config.gridDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || block.x * block.y * block.z > 1024 ||
      config.dynamicSmemBytes > 48 << 10) {
    return cudaErrorInvalidValue;
  }
  return enqueue(config.stream, [config, body = std::move(body)] {
    ++device_state().launches;
    run_grid(config.gridDim, config.blockDim, config.dynamicSmemBytes, body);
    return true;
  });
}

}  // namespace emulation

using emulation::device_state;

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_state().count;
  return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  if (device < 0 || device >= device_state().count) return cudaErrorInvalidDevice;
  std::snprintf(properties->name, sizeof properties->name, "emulated device %d", device);
  properties->major = 9;
  properties->minor = 0;
  properties->multiProcessorCount = emulation::kMultiprocessors;
  properties->totalGlobalMem = device_state().memory_bytes;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  if (device < 0 || device >= device_state().count) return cudaErrorInvalidDevice;
  *value = emulation::kMultiprocessors;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_state().count) return cudaErrorInvalidDevice;
  emulation::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = emulation::current_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = device != peer && device_state().reads_peers ? 1 : 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned) {
  return peer == emulation::current_device ? cudaErrorInvalidDevice : cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *total = device_state().memory_bytes;
  *free = *total - device_state().used_bytes;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  std::lock_guard lock(emulation::mutex);
  if (bytes > device_state().memory_bytes - device_state().used_bytes) {
    return cudaErrorMemoryAllocation;
  }
  *memory = emulation::allocate(bytes);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  emulation::allocations[*memory] = bytes;
  device_state().used_bytes += bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  std::lock_guard lock(emulation::mutex);
  if (memory == nullptr) return cudaSuccess;
  auto found = emulation::allocations.find(memory);
  if (found == emulation::allocations.end()) return cudaErrorInvalidValue;
  device_state().used_bytes -= found->second;
  emulation::allocations.erase(found);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
  *memory = emulation::allocate(bytes);
  return *memory != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return emulation::enqueue(stream, [=] {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return true;
  });
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t stream) {
  return emulation::enqueue(stream, [=] {
    std::memset(memory, value, bytes);
    return true;
  });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (stream->capture != nullptr) return cudaErrorInvalidValue;
  if (device_state().fails) stream->failed = true;
  if (stream->failed) return cudaErrorLaunchFailure;
  try {
    for (; !stream->queue.empty(); stream->queue.pop_front()) {
      if (!stream->queue.front()()) return cudaErrorNotReady;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    stream->failed = true;  // for good, as on a device
    stream->queue.clear();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ++device_state().synchronizations;
  for (;;) {
    const cudaError_t status = cudaStreamQuery(stream);
    if (status != cudaErrorNotReady) return status;
    std::this_thread::yield();
  }
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream->capture != nullptr) return cudaErrorInvalidValue;
  stream->capture = new CUgraph_st;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  if (stream->capture == nullptr) return cudaErrorInvalidValue;
  *graph = stream->capture;
  stream->capture = nullptr;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  if (device_state().refuses_graphs) return cudaErrorMemoryAllocation;
  ++device_state().graphs;
  *exec = new CUgraphExec_st{graph->nodes};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  ++device_state().graph_launches;
  for (const Work& node : exec->nodes) emulation::enqueue(stream, node);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorPeerAccessAlreadyEnabled: return "peer access is already enabled";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
  }
  return "unknown error";
}

}  // extern "C"
