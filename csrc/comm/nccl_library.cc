#include "comm/nccl_library.h"

#include <dlfcn.h>

#include <cstdlib>

#include "base/check.h"

namespace deinfer::nccl {
namespace {

template <typename Function>
void find(void* handle, const std::string& name, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, symbol));
  if (function == nullptr) {
    fail(ErrorCode::kUnsupported, "NCCL: \"", name, "\" has no ", symbol);
  }
}

}  // namespace

std::string version_text(int version) {
  const int unit = version < 10000 ? 1000 : 10000;
  return str_cat(version / unit, ".", version % unit / 100, ".", version % 100);
}

void Library::check(int result, const char* call) const {
  if (result == kSuccess) return;
  fail(ErrorCode::kInternal, "NCCL: ", call, ": ", get_error_string(result));
}

Library load() {
  const char* chosen = std::getenv("DEINFER_NCCL_LIBRARY");
  Library library;
  library.name = chosen != nullptr ? chosen : "libnccl.so.2";
  void* handle = dlopen(library.name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    fail(ErrorCode::kUnsupported,
         "NCCL, by which ranks exchange where CUDA devices cannot read each "
         "other's memory: cannot load \"",
         library.name, "\": ", dlerror(),
         "; install it (pip install nvidia-nccl-cu13, or your system's libnccl2), or say where it "
         "is in DEINFER_NCCL_LIBRARY");
  }
  find(handle, library.name, "ncclGetVersion", library.get_version);
  find(handle, library.name, "ncclGetErrorString", library.get_error_string);
  library.check(library.get_version(&library.version), "ncclGetVersion");
  if (library.version < kOldest) {
    fail(ErrorCode::kUnsupported, "NCCL: \"", library.name, "\" is version ",
         version_text(library.version), ", ", version_text(kOldest), " or later is needed");
  }
  find(handle, library.name, "ncclGetUniqueId", library.get_unique_id);
  find(handle, library.name, "ncclCommInitRank", library.comm_init_rank);
  find(handle, library.name, "ncclCommDestroy", library.comm_destroy);
  find(handle, library.name, "ncclCommAbort", library.comm_abort);
  find(handle, library.name, "ncclCommGetAsyncError", library.comm_get_async_error);
  find(handle, library.name, "ncclGroupStart", library.group_start);
  find(handle, library.name, "ncclGroupEnd", library.group_end);
  find(handle, library.name, "ncclSend", library.send);
  find(handle, library.name, "ncclRecv", library.receive);
  return library;
}

}  // namespace deinfer::nccl
