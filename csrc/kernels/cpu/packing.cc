#include "kernels/cpu/packing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/bf16.h"
#include "base/check.h"
#include "base/thread_team.h"
#include "kernels/cpu/compressed_panel.h"
#include "kernels/cpu/kernel_table.h"

namespace deinfer::cpu {
namespace {

constexpr int kKMultiple = 2;  // pairs
constexpr int kRowMultiple = kLanes / 2;

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

/// Elements of k that stand together in a panel: pairs of bf16.
template <typename Target>
constexpr int kStep = sizeof(Target) == sizeof(bf16) ? 2 : 1;

float as_float(float v) { return v; }
float as_float(bf16 v) { return to_float(v); }
float as_float(std::uint16_t v) { return half_to_float(v); }

void convert(float v, float* out) { *out = v; }
void convert(float v, bf16* out) { *out = to_bf16(v); }

/// The place of (row, element of the pair) in the 64 bytes of a pair of k (kernel_table.h).
int int8_place(int row, int element) {
  return row % 16 / 4 * 16 + row / 16 * 8 + row % 4 * 2 + element;
}

/// Writes source[k] / scale as row `row` of an int8 panel.
template <typename Source>
void quantize_row(const Source* source, int k, int row, float scale, std::int8_t* panel) {
  for (int i = 0; i < k; ++i) {
    panel[i / 2 * 64 + int8_place(row, i % 2)] =
        static_cast<std::int8_t>(to_int8(as_float(source[i]), scale));
  }
}

template <typename Source>
float row_scale(const Source* source, int k) {
  float largest = 0;
  for (int i = 0; i < k; ++i) {
    float magnitude = std::fabs(as_float(source[i]));
    // A comparison would lose NaN.
    if (!std::isfinite(magnitude)) return std::numeric_limits<float>::quiet_NaN();
    largest = std::max(largest, magnitude);
  }
  return largest / 127.0f;
}

/// f(typed pointer to the first element of a source row).
template <typename F>
auto visit_row(const TensorView& source, std::int64_t row, F f) {
  const std::byte* data = source.row(row);
  switch (source.dtype) {
    case DType::kBFloat16: return f(reinterpret_cast<const bf16*>(data));
    case DType::kFloat16: return f(reinterpret_cast<const std::uint16_t*>(data));
    default: return f(reinterpret_cast<const float*>(data));
  }
}

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

template <typename Target>
void read_packed_row(const Target* panel, int k, int row, int rows, float* out) {
  constexpr int step = kStep<Target>;
  for (int i = 0; i < k; ++i) {
    out[i] = as_float(panel[(std::ptrdiff_t{i / step} * rows + row) * step + i % step]);
  }
}

std::int64_t source_row(std::span<const std::int32_t> row_map, int row, std::int64_t rows) {
  std::int64_t from = row_map.empty() ? row : row_map[static_cast<std::size_t>(row)];
  check_argument(from < rows, "row map names row ", from, " of ", rows);
  return from;
}

}  // namespace

void read_row(const TensorView& source, std::int64_t row, float* out) {
  visit_row(source, row, [&](auto* data) {
    for (std::int64_t i = 0; i < source.cols; ++i) out[i] = as_float(data[i]);
  });
}

float int8_scale(const TensorView& source, std::int64_t row) {
  const auto k = static_cast<int>(source.cols);
  const float scale = visit_row(source, row, [&](auto* data) { return row_scale(data, k); });
  check_argument(!std::isnan(scale), "weights[", row, "] hold NaN or infinity, which int8 ",
                 "cannot represent");
  return scale;
}

std::uint8_t to_int8(float value, float scale) {
  if (scale == 0.0f) return 0;  // of a row of zeros
  // The row's largest magnitude divided by its scale may exceed 127 by a rounding.
  const float q = std::clamp(std::nearbyint(value / scale), -127.0f, 127.0f);
  const auto magnitude = static_cast<unsigned>(std::fabs(q));
  return static_cast<std::uint8_t>(magnitude | (std::signbit(q) ? 0x80u : 0u));
}

float from_int8(std::uint8_t q) {
  const auto magnitude = static_cast<float>(q & 0x7f);
  return (q & 0x80) != 0 ? -magnitude : magnitude;
}

int PackedMatrix::rows_of(int panel) const {
  return std::min(panel_rows, n_pad - panel * panel_rows);
}

const void* PackedMatrix::panel(int panel) const {
  if (compressed && plain[static_cast<std::size_t>(panel)].size() > 0) {
    return plain[static_cast<std::size_t>(panel)].as<std::byte>();
  }
  return slot(panel);
}

bool PackedMatrix::is_compressed(int panel) const {
  return compressed && rows_of(panel) == kPanelRows &&
         plain[static_cast<std::size_t>(panel)].size() == 0;
}

std::size_t PackedMatrix::bytes_of(int panel) const {
  const int rows = rows_of(panel);
  if (rows == panel_rows) return full_panel_bytes();
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(k_pad) * dtype_size(dtype);
}

std::size_t PackedMatrix::full_panel_bytes() const {
  if (compressed) return compressed_panel_bytes(k_pad);
  return static_cast<std::size_t>(panel_rows) * static_cast<std::size_t>(k_pad) * dtype_size(dtype);
}

std::size_t PackedMatrix::panel_bytes() const {
  if (empty()) return 0;
  const int last = num_panels() - 1;
  return static_cast<std::size_t>(last) * full_panel_bytes() + bytes_of(last);
}

std::size_t PackedMatrix::bytes() const {
  std::size_t total = panel_bytes() + scales.size() * sizeof(float);
  for (const Buffer& panel : plain) total += panel.size();
  return total;
}

void PackedMatrix::read_row(int row, float* out) const {
  const int index = row / panel_rows;
  if (is_compressed(index)) {
    read_compressed_row(static_cast<const std::byte*>(panel(index)), k_pad, row % panel_rows, k,
                        out);
    return;
  }
  if (dtype == DType::kInt8) {
    const auto* bytes = static_cast<const std::uint8_t*>(panel(index));
    const float scale = scales[static_cast<std::size_t>(row)];
    for (int i = 0; i < k; ++i) {
      out[i] = from_int8(bytes[i / 2 * 64 + int8_place(row % panel_rows, i % 2)]) * scale;
    }
  } else if (dtype == DType::kBFloat16) {
    read_packed_row(static_cast<const bf16*>(panel(index)), k, row % panel_rows, rows_of(index),
                    out);
  } else {
    read_packed_row(static_cast<const float*>(panel(index)), k, row % panel_rows, rows_of(index),
                    out);
  }
}

PackedMatrix packed_shape(DType dtype, int n, int k, int panel_rows, bool compressed) {
  bool int8 = dtype == DType::kInt8;
  check_argument(dtype == DType::kFloat32 || dtype == DType::kBFloat16 || int8,
                 "packed weights must be float32, bfloat16 or int8, not ", dtype_name(dtype));
  check_argument(n > 0 && k > 0, "packed weights need n > 0 and k > 0, not n=", n, " k=", k);
  check_argument(panel_rows == kPanelRows || (panel_rows == kLanes && !int8), "panel_rows must be ",
                 int8 ? "32" : "32 or 16", ", not ", panel_rows);
  check_argument(!compressed || (dtype == DType::kBFloat16 && panel_rows == kPanelRows),
                 "only bfloat16 in panels of 32 can be compressed, not ", dtype_name(dtype),
                 " in panels of ", panel_rows);
  PackedMatrix packed;
  packed.compressed = compressed;
  packed.dtype = dtype;
  packed.n = n;
  packed.k = k;
  packed.n_pad = round_up(n, int8 ? kPanelRows : kRowMultiple);
  packed.k_pad = round_up(k, kKMultiple);
  packed.panel_rows = panel_rows;
  packed.stride = packed.full_panel_bytes();
  return packed;
}

PackedMatrix allocate_packed(DType dtype, int n, int k, int panel_rows, BufferArena* arena,
                             bool compressed) {
  PackedMatrix packed = packed_shape(dtype, n, k, panel_rows, compressed);
  std::size_t bytes = packed.panel_bytes();
  packed.data = arena == nullptr ? Buffer(bytes) : arena->allocate(bytes);
  if (dtype == DType::kInt8) packed.scales.resize(static_cast<std::size_t>(packed.n_pad));
  if (compressed) packed.plain.resize(static_cast<std::size_t>(packed.num_panels()));
  return packed;
}

void interleave_panels(PackedMatrix& first, PackedMatrix& second, BufferArena& arena,
                       ThreadTeam& team) {
  check_argument(first.num_panels() == second.num_panels(), "matrices of ", first.num_panels(),
                 " and ", second.num_panels(), " panels cannot lie by turns");
  const std::size_t offset = first.full_panel_bytes();
  const std::size_t stride = offset + second.full_panel_bytes();
  Buffer memory = arena.allocate(static_cast<std::size_t>(first.num_panels()) * stride);
  team.run([&](TeamMember& member) {
    auto [begin, end] = member.share(first.num_panels());
    for (int panel = begin; panel < end; ++panel) {
      std::byte* to = memory.as<std::byte>() + static_cast<std::size_t>(panel) * stride;
      std::memcpy(to, first.slot(panel), first.bytes_of(panel));
      std::memcpy(to + offset, second.slot(panel), second.bytes_of(panel));
    }
  });
  second.data = memory.from(offset);
  first.data = std::move(memory);
  first.stride = second.stride = stride;
}

int choose_panel_rows(int n, int threads, bool compressed) {
  auto of_busiest = [&](int rows) {
    const int panels = (n + rows - 1) / rows;
    return (panels + threads - 1) / threads * rows;
  };
  if (compressed) return of_busiest(kPanelRows) * 3 > of_busiest(kLanes) * 4 ? kLanes : kPanelRows;
  int panels = (n + kPanelRows - 1) / kPanelRows;
  int busiest = (panels + threads - 1) / threads;
  return busiest * threads * 10 > panels * 11 ? kLanes : kPanelRows;
}

void pack_rows(const TensorView& source, std::span<const std::int32_t> row_map, int first_panel,
               int last_panel, PackedMatrix& packed) {
  check_argument(source.dtype != DType::kInt32 && source.dtype != DType::kInt8,
                 "weights cannot be ", dtype_name(source.dtype));
  check_argument(source.cols == packed.k, "weights have ", source.cols, " columns, not ", packed.k);
  check_argument(row_map.empty() ? source.rows >= packed.n
                                 : row_map.size() == static_cast<std::size_t>(packed.n),
                 "weights of ", source.rows, " rows and a row map of ", row_map.size(),
                 " do not give ", packed.n, " rows");
  check_argument(0 <= first_panel && last_panel <= packed.num_panels(), "panels [", first_panel,
                 ", ", last_panel, ") of ", packed.num_panels());
  constexpr int kChunk = 128;  // of k: a panel's chunk stays in L1 while its rows are written
  std::vector<bf16> uncompressed;
  for (int index = first_panel; index < last_panel; ++index) {
    const int rows = packed.rows_of(index);
    const int first_row = index * packed.panel_rows;
    const int num_rows = std::min(rows, packed.n - first_row);
    const bool compress = packed.compressed && rows == kPanelRows;
    const auto weights = static_cast<std::size_t>(rows) * static_cast<std::size_t>(packed.k_pad);
    if (compress) {
      uncompressed.resize(weights);
      packed.plain[static_cast<std::size_t>(index)] = {};
    }
    auto* slot = const_cast<void*>(packed.panel(index));
    void* panel = compress ? uncompressed.data() : slot;
    // Padding and rows without a source; also the first touch by this thread.
    std::memset(panel, 0, weights * dtype_size(packed.dtype));
    for (int row = 0; row < num_rows && packed.dtype == DType::kInt8; ++row) {
      std::int64_t from = source_row(row_map, first_row + row, source.rows);
      if (from < 0) continue;
      packed.scales[static_cast<std::size_t>(first_row + row)] = int8_scale(source, from);
    }
    for (int first = 0; first < packed.k; first += kChunk) {
      const int count = std::min(kChunk, packed.k - first);
      for (int row = 0; row < num_rows; ++row) {
        std::int64_t from = source_row(row_map, first_row + row, source.rows);
        if (from < 0) continue;
        visit_row(source, from, [&](auto* data) {
          data += first;
          if (packed.dtype == DType::kInt8) {
            float scale = packed.scales[static_cast<std::size_t>(first_row + row)];
            quantize_row(data, count, row, scale,
                         static_cast<std::int8_t*>(panel) + std::ptrdiff_t{first} * kPanelRows);
          } else if (packed.dtype == DType::kBFloat16) {
            pack_row(data, count, row, rows,
                     static_cast<bf16*>(panel) + std::ptrdiff_t{first} * rows);
          } else {
            pack_row(data, count, row, rows,
                     static_cast<float*>(panel) + std::ptrdiff_t{first} * rows);
          }
        });
      }
    }
    if (compress &&
        !compress_panel(uncompressed.data(), packed.k_pad, static_cast<std::byte*>(slot))) {
      Buffer plain(weights * sizeof(bf16));
      std::memcpy(plain.as<std::byte>(), panel, plain.size());
      packed.plain[static_cast<std::size_t>(index)] = std::move(plain);
    }
  }
}

}  // namespace deinfer::cpu
