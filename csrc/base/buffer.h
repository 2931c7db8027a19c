// Owning memory for weights, KV blocks and workspaces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace deinfer {

/// What the kernel says can be taken without swapping, bytes; 0 where it does not say.
std::uint64_t available_memory();

/// Zero-filled memory from the OS, 64-byte aligned, 2 MiB aligned with huge pages from 2 MiB on
/// (a weight stream is about 15 % faster on them). Pages are taken when first touched.
class Buffer {
 public:
  Buffer() = default;
  /// Throws kOutOfMemory naming the size when the OS refuses.
  explicit Buffer(std::size_t bytes);
  /// Somebody else's memory, which must outlive the buffer and is only read.
  static Buffer borrow(const void* data, std::size_t bytes) {
    Buffer buffer;
    buffer.data_ = const_cast<void*>(data);
    buffer.size_ = bytes;
    return buffer;
  }
  /// Its memory from byte `offset` on, which lives as long as one of the two.
  Buffer from(std::size_t offset) const {
    Buffer rest;
    rest.data_ = static_cast<std::byte*>(data_) + offset;
    rest.size_ = size_ - offset;
    rest.mapping_ = mapping_;
    return rest;
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::size_t size() const { return size_; }
  template <typename T>
  T* as() {
    return static_cast<T*>(data_);
  }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data_);
  }

 private:
  friend class BufferArena;

  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    mapping_.swap(other.mapping_);
  }

  void* data_ = nullptr;
  std::size_t size_ = 0;
  std::shared_ptr<void> mapping_;  // shared by the buffers of an arena, and by from()
};

/// Asks the OS for huge pages behind memory that has not been touched yet; advice only.
void advise_huge_pages(void* data, std::size_t bytes);

/// Hands out buffers that lie one after another in large mappings, so that small matrices have
/// huge pages too and weights stream in the order in which they were loaded. A mapping is freed
/// with the last of its buffers. Not thread-safe.
class BufferArena {
 public:
  explicit BufferArena(std::size_t chunk_bytes = std::size_t{64} << 20)
      : chunk_bytes_(chunk_bytes) {}
  /// Zero-filled and 64-byte aligned; throws kOutOfMemory naming the size.
  Buffer allocate(std::size_t bytes);

 private:
  std::size_t chunk_bytes_;
  std::size_t used_ = 0;
  Buffer chunk_;
};

}  // namespace deinfer
