#include "io/weight_source.h"

#include <algorithm>
#include <cstring>
#include <system_error>
#include <utility>

#include "base/bf16.h"
#include "base/check.h"
#include "io/json_file.h"

namespace deinfer::io {
namespace {

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr std::string_view kSuffix = ".safetensors";

bool file_exists(const std::filesystem::path& path) {
  std::error_code error;
  return std::filesystem::exists(path, error);
}

/// Names of files in which other tools keep weights, for the message when there is no safetensors.
std::string find_pickles(const std::filesystem::path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator it(directory, error), end; !error && it != end;
       it.increment(error)) {
    const std::string extension = it->path().extension().string();
    if (extension == ".bin" || extension == ".pt" || extension == ".pth") {
      names.push_back(it->path().filename().string());
    }
  }
  if (names.empty()) return {};
  return *std::min_element(names.begin(), names.end());
}

/// A shard is a plain file name: nothing in an index may reach outside of its directory.
const std::string& shard_name(const nlohmann::json& shard, const std::string& origin) {
  check_argument(shard.is_string(), origin, ": shard ", shard.dump(-1, ' ', true),
                 " is not a string");
  const auto& name = shard.get_ref<const std::string&>();
  const bool plain = name.find('/') == std::string::npos && name.find('\0') == std::string::npos &&
                     name.size() > kSuffix.size() && std::string_view(name).ends_with(kSuffix);
  check_argument(plain, origin, ": shard ", shard.dump(-1, ' ', true),
                 " is not the name of a .safetensors file");
  return name;
}

DType float_dtype(const TensorInfo& info) {
  const std::optional<DType> dtype = find_dtype(info.dtype);
  if (!dtype || *dtype == DType::kInt32) {
    fail(ErrorCode::kUnsupported, info.name, ": dtype ", info.dtype,
         " is not supported here; F32, BF16 and F16 are");
  }
  return *dtype;
}

void check_shape(const TensorInfo& info, std::span<const std::int64_t> expected) {
  check_argument(std::equal(info.shape.begin(), info.shape.end(), expected.begin(), expected.end()),
                 info.name, ": expected shape ", shape_string(expected), ", file has ",
                 shape_string(info.shape));
}

/// Element i of unaligned data as float.
float load_float(const std::byte* data, std::size_t i, DType dtype) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, data + i * sizeof(value), sizeof(value));
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, data + i * sizeof(bits), sizeof(bits));
  return dtype == DType::kBFloat16 ? to_float(bf16{bits}) : half_to_float(bits);
}

}  // namespace

WeightSource WeightSource::open(const std::filesystem::path& directory) {
  std::error_code error;
  check_argument(std::filesystem::is_directory(directory, error), directory.string(),
                 ": no such directory");
  WeightSource source;
  source.directory_ = directory;
  if (file_exists(directory / kSingleFile)) {
    source.files_.push_back(std::make_unique<SafetensorsFile>(directory / kSingleFile));
    const SafetensorsFile& file = *source.files_.back();
    for (const auto& [name, info] : file.tensors()) source.insert(file, info);
    return source;
  }
  if (file_exists(directory / kIndexFile)) {
    source.open_index(directory / kIndexFile);
    return source;
  }
  const std::string pickle = find_pickles(directory);
  check_argument(pickle.empty(), directory.string(), ": has ", pickle, " but no ", kSingleFile,
                 "; pickles are not read, convert the checkpoint to safetensors first");
  fail(ErrorCode::kInvalidArgument, directory.string(), ": has neither ", kSingleFile, " nor ",
       kIndexFile);
}

void WeightSource::open_index(const std::filesystem::path& index_path) {
  const std::string origin = index_path.string();
  const nlohmann::json index = read_json(index_path, DuplicateKeys::kReject);
  check_argument(
      index.is_object() && index.contains("weight_map") && index.at("weight_map").is_object(),
      origin, ": no weight_map object");
  std::map<std::string, const SafetensorsFile*> shards;
  for (const auto& [name, shard] : index.at("weight_map").items()) {
    const std::string& file_name = shard_name(shard, origin);
    const SafetensorsFile*& file = shards[file_name];
    if (file == nullptr) {
      check_argument(file_exists(directory_ / file_name), origin, ": shard ", file_name,
                     " is missing");
      files_.push_back(std::make_unique<SafetensorsFile>(directory_ / file_name));
      file = files_.back().get();
    }
    const auto found = file->tensors().find(name);
    check_argument(found != file->tensors().end(), origin, ": tensor '", name, "' is not in ",
                   file->path().string());
    insert(*file, found->second);
  }
}

void WeightSource::insert(const SafetensorsFile& file, const TensorInfo& info) {
  tensors_.emplace(info.name, Location{&file, &info});
  total_bytes_ += info.bytes;
}

void WeightSource::rename(std::string_view prefix, const std::optional<std::string>& replacement) {
  for (auto it = tensors_.lower_bound(prefix);
       it != tensors_.end() && it->first.starts_with(prefix);) {
    const Location location = it->second;
    const std::string old_name = it->first;
    it = tensors_.erase(it);
    if (!replacement) {
      total_bytes_ -= location.info->bytes;
      continue;
    }
    const std::string name = *replacement + old_name.substr(prefix.size());
    const bool is_new = tensors_.emplace(name, location).second;
    check_argument(is_new, directory_.string(), ": has both ", old_name, " and ", name);
  }
}

std::vector<std::string> WeightSource::names() const {
  std::vector<std::string> result;
  result.reserve(tensors_.size());
  for (const auto& [name, location] : tensors_) result.push_back(name);
  return result;
}

const WeightSource::Location& WeightSource::find(std::string_view name) const {
  const auto found = tensors_.find(name);
  check_argument(found != tensors_.end(), directory_.string(), ": no tensor '", name, "'");
  return found->second;
}

const TensorInfo& WeightSource::info(std::string_view name) const { return *find(name).info; }

TensorView WeightSource::matrix(std::string_view name, std::int64_t rows, std::int64_t cols) const {
  const Location& location = find(name);
  const std::int64_t expected[] = {rows, cols};
  check_shape(*location.info, expected);
  const DType dtype = float_dtype(*location.info);
  return {aligned_data(location, dtype_size(dtype)), dtype, rows, cols, cols};
}

std::vector<float> WeightSource::vector(std::string_view name, std::int64_t n) const {
  const Location& location = find(name);
  const std::int64_t expected[] = {n};
  check_shape(*location.info, expected);
  const DType dtype = float_dtype(*location.info);
  const std::byte* data = location.file->data(*location.info);
  std::vector<float> result(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < result.size(); ++i) result[i] = load_float(data, i, dtype);
  return result;
}

const std::byte* WeightSource::aligned_data(const Location& location, std::size_t alignment) const {
  const std::byte* data = location.file->data(*location.info);
  if (reinterpret_cast<std::uintptr_t>(data) % alignment == 0) return data;
  const std::scoped_lock lock(copies_->mutex);
  auto& copy = copies_->data[location.info->name];
  if (!copy) {
    copy = std::make_unique<std::byte[]>(location.info->bytes);
    std::copy_n(data, location.info->bytes, copy.get());
  }
  return copy.get();
}

void WeightSource::release(std::string_view name) const {
  const Location& location = find(name);
  location.file->release(*location.info);
  const std::scoped_lock lock(copies_->mutex);
  copies_->data.erase(location.info->name);
}

}  // namespace deinfer::io
