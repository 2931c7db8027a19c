#include "functional/packed_format.h"

#include <cstddef>

#include "base/check.h"

namespace deinfer {
namespace {

// Sizes of six such matrices add up without overflow.
constexpr std::int64_t kMostRows = std::int64_t{1} << 28;

std::size_t bias_bytes(int n) {
  constexpr auto kRows = static_cast<std::size_t>(cpu::kPanelRows);
  return (static_cast<std::size_t>(n) + kRows - 1) / kRows * kRows * sizeof(float);
}

/// FNV-1a of the header before its checksum.
std::uint32_t checksum_of(const PackedHeader& header) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&header);
  std::uint32_t hash = 2166136261u;
  for (std::size_t i = 0; i < offsetof(PackedHeader, checksum); ++i) {
    hash = (hash ^ bytes[i]) * 16777619u;
  }
  return hash;
}

void check_weights(const TensorView& view, const char* name, int index) {
  check_argument(view.dtype == DType::kFloat32 || view.dtype == DType::kBFloat16 ||
                     view.dtype == DType::kFloat16,
                 name, " of linear ", index, " must be float32, bfloat16 or float16, not ",
                 dtype_name(view.dtype));
  check_argument(view.rows > 0 && view.cols > 0 && view.rows <= kMostRows && view.cols <= kMostRows,
                 name, " of linear ", index, " has shape [", view.rows, ", ", view.cols, "]");
  check_argument(view.rows == 1 || view.row_stride >= view.cols, name, " of linear ", index,
                 " has ", view.cols, " columns and row stride ", view.row_stride);
}

/// The matrix at `offset`, which moves on.
cpu::PackedMatrix view_at(DType dtype, int n, int k, int panel_rows, const std::byte* memory,
                          std::size_t& offset) {
  cpu::PackedMatrix matrix = cpu::packed_shape(dtype, n, k, panel_rows);
  std::size_t bytes = matrix.panel_bytes();
  if (memory != nullptr) matrix.data = Buffer::borrow(memory + offset, bytes);
  offset += packed_aligned(bytes);
  return matrix;
}

}  // namespace

PackedHeader make_header(std::span<const LinearWeights> linears, DType dtype, int threads) {
  check_argument(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
                 "packed linears are float32 or bfloat16, not ", dtype_name(dtype));
  check_argument(!linears.empty() && linears.size() <= kMaxLinears, "one to ", kMaxLinears,
                 " linears are packed together, not ", linears.size());
  check_argument(threads >= 1, "threads must be at least 1, got ", threads);
  PackedHeader header;
  header.dtype = static_cast<std::uint32_t>(dtype);
  header.count = static_cast<std::int32_t>(linears.size());
  for (std::size_t i = 0; i < linears.size(); ++i) {
    const LinearWeights& weights = linears[i];
    const int index = static_cast<int>(i);
    const bool low_rank = weights.v.data != nullptr;
    check_argument(weights.u.data != nullptr, "linear ", index, " has no ", low_rank ? "u" : "w");
    check_weights(weights.u, low_rank ? "u" : "w", index);
    if (low_rank) check_weights(weights.v, "v", index);
    check_argument(!low_rank || weights.v.rows == weights.u.cols, "v of linear ", index, " is [",
                   weights.v.rows, ", ", weights.v.cols, "] and u [", weights.u.rows, ", ",
                   weights.u.cols, "]: v's rows must be u's columns");
    const std::int64_t k = low_rank ? weights.v.cols : weights.u.cols;
    if (i == 0) header.k = static_cast<std::int32_t>(k);
    check_argument(k == header.k, "linear ", index, " has ", k, " inputs and linear 0 has ",
                   header.k);
    if (weights.bias.data != nullptr) {
      check_weights(weights.bias, "bias", index);
      check_argument(weights.bias.rows == 1 && weights.bias.cols == weights.u.rows,
                     "bias of linear ", index, " is [", weights.bias.rows, ", ", weights.bias.cols,
                     "], not [1, ", weights.u.rows, "]");
    }
    PackedHeader::Linear& linear = header.linears[i];
    linear.n = static_cast<std::int32_t>(weights.u.rows);
    linear.rank = low_rank ? static_cast<std::int32_t>(weights.v.rows) : 0;
    linear.v_panel_rows = low_rank ? cpu::choose_panel_rows(linear.rank, threads) : 0;
    // Outputs that an epilogue combines need panels of the same rows; n is mostly large anyway.
    linear.u_panel_rows = cpu::choose_panel_rows(linear.n, threads);
    linear.has_bias = weights.bias.data != nullptr ? 1 : 0;
  }
  LinearGroup group;
  header.bytes = lay_out(header, nullptr, group);
  header.checksum = checksum_of(header);
  return header;
}

std::size_t lay_out(const PackedHeader& header, const void* memory, LinearGroup& group) {
  const auto* bytes = static_cast<const std::byte*>(memory);
  const auto dtype = static_cast<DType>(header.dtype);
  std::size_t offset = kPackedHeaderBytes;
  for (std::size_t i = 0; i < static_cast<std::size_t>(header.count); ++i) {
    const PackedHeader::Linear& from = header.linears[i];
    LowRankLinear& linear = group[i];
    if (from.rank > 0) {
      linear.v = view_at(dtype, from.rank, header.k, from.v_panel_rows, bytes, offset);
      linear.u = view_at(dtype, from.n, from.rank, from.u_panel_rows, bytes, offset);
    } else {
      linear.w = view_at(dtype, from.n, header.k, from.u_panel_rows, bytes, offset);
    }
    if (from.has_bias == 0) continue;
    if (bytes != nullptr) linear.bias = Buffer::borrow(bytes + offset, bias_bytes(from.n));
    offset += packed_aligned(bias_bytes(from.n));
  }
  check_argument(memory == nullptr || offset == header.bytes,
                 "the header of packed linears has shapes of ", offset, " bytes, and says ",
                 header.bytes);
  return offset;
}

void check_aligned(const void* memory) {
  check_argument(reinterpret_cast<std::uintptr_t>(memory) % kPackedAlignment == 0,
                 "packed linears must lie at a multiple of ", kPackedAlignment, " bytes, not at ",
                 memory);
}

std::size_t DEINFER_ABI::packed_bytes(std::span<const LinearWeights> linears, DType dtype) {
  return make_header(linears, dtype, 1).bytes;
}

PackedLinears::PackedLinears(const void* memory, std::size_t bytes) : memory_(memory) {
  check_argument(memory != nullptr && bytes >= kPackedHeaderBytes, "packed linears have ", bytes,
                 " bytes, less than a header");
  check_aligned(memory);
  const PackedHeader& header = header_of(*this);
  check_argument(header.magic == PackedHeader::kMagic, "these bytes are no packed linears");
  check_argument(header.version == PackedHeader::kVersion, "packed linears have layout version ",
                 header.version, ", this deinfer reads ", PackedHeader::kVersion,
                 "; pack the weights again");
  check_argument(header.checksum == checksum_of(header), "the header of packed linears is damaged");
  check_argument(header.bytes == bytes, "packed linears need ", header.bytes, " bytes, not ",
                 bytes);
  bool possible =
      1 <= header.count && header.count <= static_cast<int>(kMaxLinears) && header.k <= kMostRows;
  for (const PackedHeader::Linear& linear : header.linears) {
    possible = possible && linear.n <= kMostRows && linear.rank <= kMostRows;
  }
  check_argument(possible, "the header of packed linears has impossible shapes");
}

int PackedLinears::count() const { return header_of(*this).count; }

DType PackedLinears::dtype() const { return static_cast<DType>(header_of(*this).dtype); }

std::int64_t PackedLinears::in_features() const { return header_of(*this).k; }

std::int64_t PackedLinears::out_features(int index) const {
  check_argument(0 <= index && index < count(), "linear ", index, " of ", count());
  return header_of(*this).linears[static_cast<std::size_t>(index)].n;
}

std::int64_t PackedLinears::rank(int index) const {
  check_argument(0 <= index && index < count(), "linear ", index, " of ", count());
  return header_of(*this).linears[static_cast<std::size_t>(index)].rank;
}

std::int64_t PackedLinears::parameters() const {
  std::int64_t sum = 0;
  for (int i = 0; i < count(); ++i) {
    const std::int64_t inner = rank(i) > 0 ? rank(i) : in_features();
    sum += inner * out_features(i) + (rank(i) > 0 ? inner * in_features() : 0);
  }
  return sum;
}

}  // namespace deinfer
