// The CUDA runtime as host code uses it: memory, one stream, graphs, errors. Builds without CUDA
// have the same names, which throw (unavailable.cc).
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/cuda/kernels.h"

namespace deinfer::cuda {

/// Makes `device` the one that the calling thread uses. Throws kInvalidArgument when there is none.
void use_device(int device);

int multiprocessors(int device);

/// Whether device `reader` can read and write the memory of `other`, another one.
bool can_read_memory_of(int reader, int other);
/// Lets the thread's device read and write the memory of `device`, another one. Throws kUnsupported
/// where it cannot.
void read_memory_of(int device);

/// Bytes of the thread's device that nobody has allocated.
std::uint64_t free_memory();

/// The one place where the results of launches go: throws kInternal naming the kernel.
void check_launch(int status, const char* kernel);

enum class MemoryKind { kDevice, kPinned };

/// Memory that release() takes back. Throws kOutOfMemory naming the size.
void* allocate(MemoryKind kind, std::size_t bytes);
void release(MemoryKind kind, void* data) noexcept;

/// Owns memory of a kind; what it holds at first is undefined. Made at load time only: steps
/// allocate nothing.
template <MemoryKind kKind>
class CudaBuffer {
 public:
  CudaBuffer() = default;
  explicit CudaBuffer(std::size_t bytes)
      : data_(bytes > 0 ? allocate(kKind, bytes) : nullptr), size_(bytes) {}
  ~CudaBuffer() {
    if (data_ != nullptr) release(kKind, data_);
  }
  CudaBuffer(CudaBuffer&& other) noexcept { swap(other); }
  CudaBuffer& operator=(CudaBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  std::size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void swap(CudaBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

using DeviceBuffer = CudaBuffer<MemoryKind::kDevice>;
/// Host memory that the device reads and writes while the host goes on.
using PinnedBuffer = CudaBuffer<MemoryKind::kPinned>;

/// A recorded sequence of launches and copies.
class Graph {
 public:
  Graph() = default;
  explicit Graph(void* executable) : executable_(executable) {}
  ~Graph();
  Graph(Graph&& other) noexcept { std::swap(executable_, other.executable_); }
  Graph& operator=(Graph&& other) noexcept {
    std::swap(executable_, other.executable_);
    return *this;
  }
  void* executable() const { return executable_; }

 private:
  void* executable_ = nullptr;
};

/// A queue of work of the device that was the thread's when it was made. All but synchronize()
/// return before the work is done. Errors of the device surface in synchronize() and is_done(), as
/// kInternal.
class DeviceStream {
 public:
  DeviceStream();
  ~DeviceStream();
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;

  /// `from` must stay as it is until the copy is done.
  void upload(void* to, const void* from, std::size_t bytes);
  void download(void* to, const void* from, std::size_t bytes);
  void clear(const DeviceBuffer& buffer);

  /// From here to end_capture() work is recorded and not done.
  void begin_capture();
  Graph end_capture();
  void launch(const Graph& graph);

  void synchronize();
  /// Whether all work is done; does not wait.
  bool is_done();
  Stream get() const { return stream_; }

 private:
  Stream stream_ = nullptr;
};

}  // namespace deinfer::cuda
