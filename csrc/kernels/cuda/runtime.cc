#include "kernels/cuda/runtime.h"

#include <cuda_runtime.h>

#include "base/check.h"

namespace deinfer::cuda {
namespace {

/// Throws kInternal, the text of CUDA's error included.
void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  fail(ErrorCode::kInternal, "CUDA: ", call, ": ", cudaGetErrorString(status));
}

cudaStream_t native(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }
cudaGraphExec_t native(const Graph& graph) {
  return static_cast<cudaGraphExec_t>(graph.executable());
}

}  // namespace

void use_device(int device) {
  const cudaError_t status = cudaSetDevice(device);
  check_argument(status == cudaSuccess, "device=\"cuda:", device,
                 "\": ", cudaGetErrorString(status));
}

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  return count;
}

bool can_read_memory_of(int reader, int other) {
  int can = 0;
  check(cudaDeviceCanAccessPeer(&can, reader, other), "cudaDeviceCanAccessPeer");
  return can != 0;
}

void read_memory_of(int device) {
  int own = 0;
  check(cudaGetDevice(&own), "cudaGetDevice");
  if (!can_read_memory_of(own, device)) {
    fail(ErrorCode::kUnsupported, "tensor parallelism: CUDA device ", own,
         " cannot read the memory of device ", device,
         "; DEINFER_CUDA_TRANSPORT=nccl does without, \"cuda:N\" puts all ranks on one device");
  }
  const cudaError_t status = cudaDeviceEnablePeerAccess(device, 0);
  if (status == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();  // as good
    return;
  }
  check(status, "cudaDeviceEnablePeerAccess");
}

std::uint64_t free_memory() {
  std::size_t free = 0;
  std::size_t total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return free;
}

void check_launch(int status, const char* kernel) {
  check(static_cast<cudaError_t>(status), kernel);
}

void* allocate(MemoryKind kind, std::size_t bytes) {
  void* data = nullptr;
  const bool on_device = kind == MemoryKind::kDevice;
  const cudaError_t status = on_device ? cudaMalloc(&data, bytes) : cudaMallocHost(&data, bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // it is reported here
    if (!on_device) fail(ErrorCode::kOutOfMemory, "CUDA: no ", bytes, " bytes of pinned memory");
    fail(ErrorCode::kOutOfMemory, "CUDA: no ", bytes, " bytes of device memory: ", free_memory(),
         " are free");
  }
  check(status, on_device ? "cudaMalloc" : "cudaMallocHost");
  return data;
}

// Errors of work that is under way are reported by synchronize().
void release(MemoryKind kind, void* data) noexcept {
  if (kind == MemoryKind::kDevice) {
    cudaFree(data);
  } else {
    cudaFreeHost(data);
  }
}

Graph::~Graph() {
  if (executable_ != nullptr) cudaGraphExecDestroy(native(*this));
}

DeviceStream::DeviceStream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  stream_ = reinterpret_cast<Stream>(stream);
}

DeviceStream::~DeviceStream() { cudaStreamDestroy(native(stream_)); }

void DeviceStream::upload(void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, native(stream_)),
        "cudaMemcpyAsync to the device");
}

void DeviceStream::download(void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, native(stream_)),
        "cudaMemcpyAsync to the host");
}

void DeviceStream::clear(const DeviceBuffer& buffer) {
  if (buffer.size() == 0) return;
  check(cudaMemsetAsync(buffer.as<void>(), 0, buffer.size(), native(stream_)), "cudaMemsetAsync");
}

void DeviceStream::begin_capture() {
  check(cudaStreamBeginCapture(native(stream_), cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
}

Graph DeviceStream::end_capture() {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(native(stream_), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "cudaGraphInstantiate");
  return Graph(executable);
}

void DeviceStream::launch(const Graph& graph) {
  check(cudaGraphLaunch(native(graph), native(stream_)), "cudaGraphLaunch");
}

void DeviceStream::synchronize() {
  check(cudaStreamSynchronize(native(stream_)), "cudaStreamSynchronize");
}

bool DeviceStream::is_done() {
  const cudaError_t status = cudaStreamQuery(native(stream_));
  if (status == cudaErrorNotReady) {
    cudaGetLastError();  // it is none
    return false;
  }
  check(status, "cudaStreamQuery");
  return true;
}

}  // namespace deinfer::cuda
