#include "io/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <limits>
#include <ostream>
#include <system_error>
#include <utility>

#include "base/check.h"
#include "io/json_file.h"

namespace deinfer::io {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors data is little endian");

constexpr std::uint64_t kLengthFieldBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // as in the reference implementation
constexpr std::size_t kMaxQuotedLength = 80;

/// Bytes per element of the dtypes whose sizes the format fixes to whole bytes; 0: not known here.
std::uint64_t element_bytes(std::string_view dtype) {
  constexpr std::pair<std::string_view, std::uint64_t> kSizes[] = {
      {"F64", 8},  {"I64", 8},     {"U64", 8},     {"F32", 4}, {"I32", 4},
      {"U32", 4},  {"F16", 2},     {"I16", 2},     {"U16", 2}, {"I8", 1},
      {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U8", 1},  {"BOOL", 1}};
  for (const auto& [name, bytes] : kSizes) {
    if (name == dtype) return bytes;
  }
  return 0;
}

/// Product of the shape and the element size; empty on overflow.
std::optional<std::uint64_t> checked_bytes(std::span<const std::int64_t> shape,
                                           std::uint64_t element) {
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  std::uint64_t bytes = element;
  for (const std::int64_t dim : shape) {
    if (__builtin_mul_overflow(bytes, static_cast<std::uint64_t>(dim), &bytes)) return std::nullopt;
  }
  return bytes;
}

/// A value as text when, and only when, it is streamed into a message.
struct Quoted {
  const json& value;
};
std::ostream& operator<<(std::ostream& out, const Quoted& quoted) {
  return out << quoted.value.dump(-1, ' ', true).substr(0, kMaxQuotedLength);
}

/// Reads one entry of the header; `origin` is "path: tensor 'name'".
TensorInfo parse_entry(const std::string& name, const json& entry, std::uint64_t data_begin,
                       std::uint64_t data_size, const std::string& origin) {
  const auto field = [&](const char* key) -> const json& {
    const auto found = entry.find(key);
    check_argument(found != entry.end(), origin, ": no ", key);
    return *found;
  };
  check_argument(entry.is_object(), origin, ": expected an object, got ", Quoted{entry});
  TensorInfo info;
  info.name = name;
  const json& dtype = field("dtype");
  check_argument(dtype.is_string(), origin, ": dtype ", Quoted{dtype}, " is not a string");
  info.dtype = dtype.get<std::string>();

  const json& shape = field("shape");
  check_argument(shape.is_array(), origin, ": shape ", Quoted{shape}, " is not an array");
  for (const json& dim : shape) {
    check_argument(dim.is_number_unsigned() &&
                       dim.get<std::uint64_t>() <= std::numeric_limits<std::int64_t>::max(),
                   origin, ": shape has the dimension ", Quoted{dim});
    info.shape.push_back(dim.get<std::int64_t>());
  }

  const json& offsets = field("data_offsets");
  check_argument(offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() &&
                     offsets[1].is_number_unsigned(),
                 origin, ": data_offsets ", Quoted{offsets}, " are not two offsets");
  const auto begin = offsets[0].get<std::uint64_t>();
  const auto end = offsets[1].get<std::uint64_t>();
  check_argument(begin <= end && end <= data_size, origin, ": data_offsets [", begin, ", ", end,
                 "] are outside of the ", data_size, " bytes of data");
  info.offset = data_begin + begin;
  info.bytes = end - begin;

  if (const std::uint64_t element = element_bytes(info.dtype); element != 0) {
    const auto expected = checked_bytes(info.shape, element);
    check_argument(expected == info.bytes, origin, ": ", info.dtype, " of shape ",
                   shape_string(info.shape), " takes ",
                   expected ? str_cat(*expected) : "more than 2^64", " bytes, data_offsets span ",
                   info.bytes);
  }
  return info;
}

}  // namespace

std::optional<DType> find_dtype(std::string_view name) {
  if (name == "F32") return DType::kFloat32;
  if (name == "BF16") return DType::kBFloat16;
  if (name == "F16") return DType::kFloat16;
  if (name == "I32") return DType::kInt32;
  return std::nullopt;
}

std::string shape_string(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

SafetensorsFile::SafetensorsFile(std::filesystem::path path) : path_(std::move(path)) {
  map_file();
  parse_header();
}

void SafetensorsFile::Unmap::operator()(const std::byte* mapping) const {
  ::munmap(const_cast<std::byte*>(mapping), size);
}

void SafetensorsFile::map_file() {
  const auto system_failure = [this](const char* action) {
    fail(ErrorCode::kInvalidArgument, path_.string(), ": cannot ", action, ": ",
         std::generic_category().message(errno));
  };
  struct Descriptor {
    int fd;
    ~Descriptor() {
      if (fd >= 0) ::close(fd);
    }
  };
  // O_NONBLOCK: opening a FIFO must fail below instead of waiting for a writer.
  const Descriptor file{::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) system_failure("open");
  struct stat status = {};
  if (::fstat(file.fd, &status) != 0) system_failure("stat");
  check_argument(S_ISREG(status.st_mode), path_.string(), ": not a regular file");
  size_ = static_cast<std::uint64_t>(status.st_size);
  check_argument(size_ >= kLengthFieldBytes, path_.string(), ": ", size_,
                 " bytes are too few for a safetensors file");
  void* mapping = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (mapping == MAP_FAILED) system_failure("map");
  mapping_ = {static_cast<const std::byte*>(mapping), Unmap{size_}};
}

void SafetensorsFile::parse_header() {
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, mapping_.get(), kLengthFieldBytes);
  check_argument(header_bytes <= kMaxHeaderBytes, path_.string(), ": header length ", header_bytes,
                 " exceeds ", kMaxHeaderBytes);
  check_argument(header_bytes <= size_ - kLengthFieldBytes, path_.string(), ": header length ",
                 header_bytes, " exceeds the file's ", size_, " bytes");
  const std::string_view text(reinterpret_cast<const char*>(mapping_.get()) + kLengthFieldBytes,
                              header_bytes);
  const json header = parse_json(text, path_.string(), DuplicateKeys::kReject);
  check_argument(header.is_object(), path_.string(), ": the header is not an object");

  const std::uint64_t data_begin = kLengthFieldBytes + header_bytes;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const std::string origin = str_cat(path_.string(), ": tensor '", name, "'");
    tensors_.emplace(name, parse_entry(name, entry, data_begin, size_ - data_begin, origin));
  }
  check_coverage(data_begin);
}

void SafetensorsFile::check_coverage(std::uint64_t data_begin) const {
  std::vector<const TensorInfo*> by_offset;
  by_offset.reserve(tensors_.size());
  for (const auto& [name, info] : tensors_) by_offset.push_back(&info);
  std::sort(by_offset.begin(), by_offset.end(), [](const TensorInfo* a, const TensorInfo* b) {
    return std::pair(a->offset, a->bytes) < std::pair(b->offset, b->bytes);
  });
  std::uint64_t end = data_begin;
  const TensorInfo* previous = nullptr;
  for (const TensorInfo* info : by_offset) {
    check_argument(info->offset >= end, path_.string(), ": tensor '", info->name, "' at byte ",
                   info->offset, " overlaps '", previous ? previous->name : "", "', which ends at ",
                   end);
    check_argument(info->offset == end, path_.string(), ": bytes ", end, " to ", info->offset,
                   ", before tensor '", info->name, "', belong to no tensor");
    end = info->offset + info->bytes;
    previous = info;
  }
  check_argument(end == size_, path_.string(), ": the tensors end at byte ", end, ", the file at ",
                 size_);
}

void SafetensorsFile::release(const TensorInfo& tensor) const {
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t begin = (tensor.offset + page - 1) / page * page;
  const std::uint64_t end = (tensor.offset + tensor.bytes) / page * page;
  if (begin >= end) return;
  // Advice only: a failure costs memory, nothing else.
  ::madvise(const_cast<std::byte*>(mapping_.get()) + begin, end - begin, MADV_DONTNEED);
}

}  // namespace deinfer::io
