// The few functions of NCCL that exchanges use, found when they are needed: no header and no
// library of NCCL is needed to build. Their meaning and the C ABI, which has not changed since
// send and receive came: NCCL User Guide, "NCCL API" (version 2.32), and nccl.h there.
#pragma once

#include <cstddef>
#include <string>

namespace deinfer::nccl {

using Comm = struct CommTag*;  // an ncclComm_t
struct UniqueId {              // as large as it is passed
  char bytes[128];
};
// Of ncclResult_t.
inline constexpr int kSuccess = 0;
inline constexpr int kInProgress = 7;
inline constexpr int kInt8 = 0;  // of ncclDataType_t

/// The first that CUDA graphs can capture sends and receives of.
inline constexpr int kOldest = 20900;

/// "2.9.1"; versions before 2.9 have a digit less for the second number.
std::string version_text(int version);

/// Streams are cudaStream_t. What returns int returns an ncclResult_t.
struct Library {
  std::string name;
  int version = 0;
  int (*get_version)(int* version) = nullptr;
  int (*get_unique_id)(UniqueId* id) = nullptr;
  int (*comm_init_rank)(Comm* comm, int ranks, UniqueId id, int rank) = nullptr;
  int (*comm_destroy)(Comm comm) = nullptr;
  int (*comm_abort)(Comm comm) = nullptr;
  int (*comm_get_async_error)(Comm comm, int* error) = nullptr;
  int (*group_start)() = nullptr;
  int (*group_end)() = nullptr;
  int (*send)(const void* data, std::size_t count, int type, int peer, Comm comm,
              void* stream) = nullptr;
  int (*receive)(void* data, std::size_t count, int type, int peer, Comm comm,
                 void* stream) = nullptr;
  const char* (*get_error_string)(int result) = nullptr;

  /// Throws kInternal, NCCL's own text included, unless `result` is a success.
  void check(int result, const char* call) const;
};

/// Loads what DEINFER_NCCL_LIBRARY names, else libnccl.so.2 as the dynamic linker finds it (the
/// PyPI package nvidia-nccl-cu13 too, where it is installed beside a wheel of deinfer). It stays
/// loaded. Throws kUnsupported naming the library: there is none, it is none, or it is too old.
Library load();

}  // namespace deinfer::nccl
