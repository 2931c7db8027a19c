// The tensors of a checkpoint directory, by name, from one file or from shards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "deinfer/tensor.h"
#include "io/safetensors.h"

namespace deinfer::io {

/// Reads model.safetensors or, where there is none, the shards of model.safetensors.index.json.
/// Views borrow the file mappings: they live as long as this object (moving it keeps them valid).
/// The const methods may be called from several threads at once.
class WeightSource {
 public:
  /// Maps and validates every file. Throws Error(kInvalidArgument) naming the file when one is
  /// missing or malformed, or when the index promises a tensor that its shard lacks.
  static WeightSource open(const std::filesystem::path& directory);

  /// Tensors called `prefix`... are called `replacement`... from now on, or are not here at all
  /// where there is none. Throws Error(kInvalidArgument) when another has the new name.
  void rename(std::string_view prefix, const std::optional<std::string>& replacement);

  bool contains(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }
  /// Ascending.
  std::vector<std::string> names() const;
  /// Throws Error(kInvalidArgument) for an unknown name, as do all the methods below.
  const TensorInfo& info(std::string_view name) const;

  /// The tensor [rows, cols] as float32, bfloat16 or float16. Throws Error(kInvalidArgument) when
  /// the shape differs and Error(kUnsupported) for another dtype. Data that the file does not align
  /// to its element size (possible in old files; writers pad headers to 8) is copied once and the
  /// copy kept until release().
  TensorView matrix(std::string_view name, std::int64_t rows, std::int64_t cols) const;
  /// The tensor [n], converted to float. Throws like matrix().
  std::vector<float> vector(std::string_view name, std::int64_t n) const;

  /// Says that the tensor has been packed elsewhere: drops its whole pages from memory (a later
  /// read brings them back from the file) and the aligned copy, if any, so views of it must be
  /// gone.
  void release(std::string_view name) const;

  /// Of the data of all tensors.
  std::uint64_t total_bytes() const { return total_bytes_; }

 private:
  struct Location {
    const SafetensorsFile* file;
    const TensorInfo* info;
  };
  /// Behind a pointer, so that a WeightSource can move while views point into it.
  struct AlignedCopies {
    std::mutex mutex;
    std::map<std::string, std::unique_ptr<std::byte[]>, std::less<>> data;
  };

  WeightSource() = default;
  void open_index(const std::filesystem::path& index_path);
  void insert(const SafetensorsFile& file, const TensorInfo& info);
  const Location& find(std::string_view name) const;
  const std::byte* aligned_data(const Location& location, std::size_t alignment) const;

  std::filesystem::path directory_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, Location, std::less<>> tensors_;
  std::unique_ptr<AlignedCopies> copies_ = std::make_unique<AlignedCopies>();
  std::uint64_t total_bytes_ = 0;
};

}  // namespace deinfer::io
