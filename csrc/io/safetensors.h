// One safetensors file, mapped into memory and fully validated before any tensor is read.
// Format: u64 header length (little endian), JSON header, tensor data.
// https://huggingface.co/docs/safetensors
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "deinfer/tensor.h"

namespace deinfer::io {

struct TensorInfo {
  std::string name;
  std::string dtype;                // as in the file: "F32", "BF16", "F16", "I64", ...
  std::vector<std::int64_t> shape;  // empty: a scalar
  std::uint64_t offset = 0;         // of the first byte, from the start of the file
  std::uint64_t bytes = 0;
};

/// The element type of a safetensors dtype name, if deinfer has it.
std::optional<DType> find_dtype(std::string_view name);

/// A shape as "[2, 3]".
std::string shape_string(std::span<const std::int64_t> shape);

/// A read-only mapping of one file. Another process that truncates the file while it is mapped
/// ends this one with SIGBUS, as with every memory mapping.
class SafetensorsFile {
 public:
  /// Maps and validates. Throws Error(kInvalidArgument) naming the file and, where one is at fault,
  /// the tensor and its values. As in the reference implementation the data section must be covered
  /// by the tensors without holes or overlaps. A dtype that deinfer does not know is no error here.
  explicit SafetensorsFile(std::filesystem::path path);

  const std::filesystem::path& path() const { return path_; }
  /// By name, ascending.
  const std::map<std::string, TensorInfo, std::less<>>& tensors() const { return tensors_; }
  /// The bytes of one of this file's tensors; any alignment.
  const std::byte* data(const TensorInfo& tensor) const { return mapping_.get() + tensor.offset; }
  /// Lets the OS drop the whole pages of a tensor; reading it again brings them back.
  void release(const TensorInfo& tensor) const;

 private:
  struct Unmap {
    std::size_t size;
    void operator()(const std::byte* mapping) const;
  };

  void map_file();
  void parse_header();
  void check_coverage(std::uint64_t data_begin) const;

  std::filesystem::path path_;
  std::unique_ptr<const std::byte, Unmap> mapping_;
  std::uint64_t size_ = 0;  // of the file
  std::map<std::string, TensorInfo, std::less<>> tensors_;
};

}  // namespace deinfer::io
