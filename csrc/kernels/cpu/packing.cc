#include "kernels/cpu/packing.h"

#include <algorithm>
#include <cstring>

#include "base/bf16.h"
#include "base/check.h"
#include "kernels/cpu/kernel_table.h"

namespace deinfer::cpu {
namespace {

constexpr int kKMultiple = 8;

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

/// Elements of k that stand together in a panel: pairs of bf16.
template <typename Target>
constexpr int kStep = sizeof(Target) == sizeof(bf16) ? 2 : 1;

float as_float(float v) { return v; }
float as_float(bf16 v) { return to_float(v); }
float as_float(std::uint16_t v) { return half_to_float(v); }

void convert(float v, float* out) { *out = v; }
void convert(float v, bf16* out) { *out = to_bf16(v); }

/// Writes source[k] as row `row` of a panel of `rows` rows.
template <typename Source, typename Target>
void pack_row(const Source* source, int k, int row, int rows, Target* panel) {
  constexpr int step = kStep<Target>;
  Target* out = panel + row * step;
  int i = 0;
  for (; i + step <= k; i += step, out += rows * step) {
    for (int j = 0; j < step; ++j) convert(as_float(source[i + j]), out + j);
  }
  for (int j = 0; i + j < k; ++j) convert(as_float(source[i + j]), out + j);
}

/// The part [first, first + count) of a source row; first is even.
template <typename Target>
void pack_row(const TensorView& source, std::int64_t source_row, int first, int count, int row,
              int rows, Target* panel) {
  const std::byte* data =
      source.row(source_row) + static_cast<std::size_t>(first) * dtype_size(source.dtype);
  panel += std::ptrdiff_t{first} * rows;
  switch (source.dtype) {
    case DType::kFloat32:
      return pack_row(reinterpret_cast<const float*>(data), count, row, rows, panel);
    case DType::kBFloat16:
      return pack_row(reinterpret_cast<const bf16*>(data), count, row, rows, panel);
    case DType::kFloat16:
      return pack_row(reinterpret_cast<const std::uint16_t*>(data), count, row, rows, panel);
    case DType::kInt32: break;
  }
}

template <typename Target>
void read_packed_row(const Target* panel, int k, int row, int rows, float* out) {
  constexpr int step = kStep<Target>;
  for (int i = 0; i < k; ++i) {
    out[i] = as_float(panel[(std::ptrdiff_t{i / step} * rows + row) * step + i % step]);
  }
}

}  // namespace

int PackedMatrix::rows_of(int panel) const {
  return std::min(panel_rows, n_pad - panel * panel_rows);
}

const void* PackedMatrix::panel(int panel) const {
  auto elements = static_cast<std::size_t>(panel) * static_cast<std::size_t>(panel_rows) *
                  static_cast<std::size_t>(k_pad);
  return data.as<std::byte>() + elements * dtype_size(dtype);
}

void PackedMatrix::read_row(int row, float* out) const {
  const int index = row / panel_rows;
  if (dtype == DType::kBFloat16) {
    read_packed_row(static_cast<const bf16*>(panel(index)), k, row % panel_rows, rows_of(index),
                    out);
  } else {
    read_packed_row(static_cast<const float*>(panel(index)), k, row % panel_rows, rows_of(index),
                    out);
  }
}

PackedMatrix allocate_packed(DType dtype, int n, int k, int panel_rows) {
  check_argument(dtype == DType::kFloat32 || dtype == DType::kBFloat16,
                 "packed weights must be float32 or bfloat16, not ", dtype_name(dtype));
  check_argument(n > 0 && k > 0, "packed weights need n > 0 and k > 0, not n=", n, " k=", k);
  check_argument(panel_rows == kPanelRows || panel_rows == kLanes,
                 "panel_rows must be 32 or 16, not ", panel_rows);
  PackedMatrix packed;
  packed.dtype = dtype;
  packed.n = n;
  packed.k = k;
  packed.n_pad = round_up(n, kLanes);
  packed.k_pad = round_up(k, kKMultiple);
  packed.panel_rows = panel_rows;
  packed.data = Buffer(static_cast<std::size_t>(packed.n_pad) *
                       static_cast<std::size_t>(packed.k_pad) * dtype_size(dtype));
  return packed;
}

void pack_rows(const TensorView& source, std::span<const std::int32_t> row_map, int first_panel,
               int last_panel, PackedMatrix& packed) {
  check_argument(source.dtype != DType::kInt32, "weights cannot be int32");
  check_argument(source.cols == packed.k, "weights have ", source.cols, " columns, not ", packed.k);
  check_argument(row_map.empty() ? source.rows >= packed.n
                                 : row_map.size() == static_cast<std::size_t>(packed.n),
                 "weights of ", source.rows, " rows and a row map of ", row_map.size(),
                 " do not give ", packed.n, " rows");
  check_argument(0 <= first_panel && last_panel <= packed.num_panels(), "panels [", first_panel,
                 ", ", last_panel, ") of ", packed.num_panels());
  constexpr int kChunk = 128;  // of k: a panel's chunk stays in L1 while its rows are written
  for (int index = first_panel; index < last_panel; ++index) {
    const int rows = packed.rows_of(index);
    const int first_row = index * packed.panel_rows;
    auto* panel = const_cast<void*>(packed.panel(index));
    // Padding and rows without a source; also the first touch by this thread.
    std::memset(panel, 0,
                static_cast<std::size_t>(rows) * static_cast<std::size_t>(packed.k_pad) *
                    dtype_size(packed.dtype));
    for (int first = 0; first < packed.k; first += kChunk) {
      const int count = std::min(kChunk, packed.k - first);
      for (int row = 0; row < rows && first_row + row < packed.n; ++row) {
        auto target = static_cast<std::size_t>(first_row + row);
        std::int64_t from = row_map.empty() ? first_row + row : row_map[target];
        if (from < 0) continue;
        check_argument(from < source.rows, "row map names row ", from, " of ", source.rows);
        if (packed.dtype == DType::kBFloat16) {
          pack_row(source, from, first, count, row, rows, static_cast<bf16*>(panel));
        } else {
          pack_row(source, from, first, count, row, rows, static_cast<float*>(panel));
        }
      }
    }
  }
}

}  // namespace deinfer::cpu
