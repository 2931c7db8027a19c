#include "base/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20;

}  // namespace

std::uint64_t available_memory() {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  std::uint64_t kib = 0;
  for (std::string unit; meminfo >> key >> kib; std::getline(meminfo, unit)) {
    if (key == "MemAvailable:") return kib * 1024;
  }
  return 0;
}

Buffer::Buffer(std::size_t bytes) {
  if (bytes == 0) return;
  bool huge = bytes >= kHuge;
  // The tail is advised too, or up to 2 MiB of a matrix would stay on small pages.
  std::size_t advised = huge ? (bytes + kHuge - 1) / kHuge * kHuge : 0;
  std::size_t mapping_size = huge ? advised + kHuge : bytes;
  void* mapping = mapping_size < bytes ? MAP_FAILED
                                       : mmap(nullptr, mapping_size, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) {
    fail(ErrorCode::kOutOfMemory, "cannot allocate ", bytes, " bytes");
  }
  auto address = reinterpret_cast<std::uintptr_t>(mapping);
  if (huge) {
    address = (address + kHuge - 1) / kHuge * kHuge;
    advise_huge_pages(reinterpret_cast<void*>(address), advised);
  }
  mapping_ = {mapping, [mapping_size](void* start) { munmap(start, mapping_size); }};
  data_ = reinterpret_cast<void*>(address);
  size_ = bytes;
}

void advise_huge_pages(void* data, std::size_t bytes) {
  auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (address + kHuge - 1) / kHuge * kHuge;
  const std::uintptr_t last = (address + bytes) / kHuge * kHuge;
  // Without transparent huge pages the memory works all the same.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

Buffer BufferArena::allocate(std::size_t bytes) {
  constexpr std::size_t kAlignment = 64;
  std::size_t first = (used_ + kAlignment - 1) / kAlignment * kAlignment;
  if (first > chunk_.size() || bytes > chunk_.size() - first) {
    chunk_ = Buffer(std::max(bytes, chunk_bytes_));
    first = 0;
  }
  Buffer part;
  part.data_ = chunk_.as<std::byte>() + first;
  part.size_ = bytes;
  part.mapping_ = chunk_.mapping_;
  used_ = first + bytes;
  return part;
}

}  // namespace deinfer
