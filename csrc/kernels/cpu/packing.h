// Packed weights in the panel layout of kernel_table.h.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/buffer.h"
#include "deinfer/tensor.h"

namespace deinfer {
class ThreadTeam;
}

namespace deinfer::cpu {

/// How weights are stored.
struct WeightFormat {
  DType dtype = DType::kFloat32;
  bool compressed = false;  // bf16 in 12 bits, without loss (compressed_panel.h)
};

/// A weight matrix W[n, k] packed for panel_gemm. Movable, not copyable.
struct PackedMatrix {
  DType dtype = DType::kFloat32;  // kFloat32, kBFloat16 or kInt8
  int n = 0;                      // rows in the packed order, before padding
  int k = 0;
  int n_pad = 0;            // multiple of 8 (int8: 32)
  int k_pad = 0;            // multiple of 2
  int panel_rows = 0;       // 32 or 16; the last panel may have fewer
  bool compressed = false;  // bf16 panels of 32 rows are stored as compressed_panel.h says
  std::size_t stride = 0;   // bytes from one panel to the next
  Buffer data;
  std::vector<float> scales;  // [n_pad] of int8 rows, else empty
  std::vector<Buffer> plain;  // [num_panels] if compressed: those that cannot be, as bf16

  bool empty() const { return n == 0; }
  int num_panels() const { return empty() ? 0 : (n_pad + panel_rows - 1) / panel_rows; }
  int rows_of(int panel) const;        // 8, 16, 24 or 32
  const void* panel(int panel) const;  // its first byte
  bool is_compressed(int panel) const;
  const std::byte* slot(int panel) const {  // its place in `data`
    return data.as<std::byte>() + static_cast<std::size_t>(panel) * stride;
  }
  std::size_t bytes_of(int panel) const;  // in `data`
  std::size_t full_panel_bytes() const;   // of one of panel_rows rows
  std::size_t panel_bytes() const;        // of all in `data`
  std::size_t bytes() const;
  /// out[k] = row `row` (packed order) as fp32, for embedding look-ups.
  void read_row(int row, float* out) const;
};

/// out[source.cols] = row `row` of unpacked fp32, bf16 or fp16 weights as fp32.
void read_row(const TensorView& source, std::int64_t row, float* out);

/// The scale of row `row` of such weights in int8: its largest magnitude / 127. Throws
/// kInvalidArgument where the row holds NaN or infinity.
float int8_scale(const TensorView& source, std::int64_t row);
/// The multiple of `scale` that is nearest to `value`, ties to even: its magnitude, at most 127,
/// and its sign in bit 7.
std::uint8_t to_int8(float value, float scale);
/// That multiple, -127 to 127.
float from_int8(std::uint8_t q);

/// A packed matrix for W[n, k] without memory.
PackedMatrix packed_shape(DType dtype, int n, int k, int panel_rows, bool compressed = false);

/// Allocates the packed matrix (zeros) for W[n, k], from `arena` if there is one; fill it with
/// pack_rows. int8 panels have 32 rows, as those of bf16 that are compressed.
PackedMatrix allocate_packed(DType dtype, int n, int k, int panel_rows,
                             BufferArena* arena = nullptr, bool compressed = false);

/// Moves two matrices with as many panels into memory where these lie by turns, as an operation
/// that combines both reads them: one stream, where the hardware would have to find another with
/// every panel, which takes the longer in proportion the smaller panels are.
void interleave_panels(PackedMatrix& first, PackedMatrix& second, BufferArena& arena,
                       ThreadTeam& team);

/// Rows per panel of n rows that `threads` threads share: panels of 32 stream best, and only they
/// can be compressed; 16 where 32 would leave threads idle for longer than that saves.
int choose_panel_rows(int n, int threads, bool compressed = false);

/// Writes the panels [first_panel, last_panel) of `packed` from `source` (fp32, bf16 or fp16, any
/// row stride): packed row i comes from source row row_map[i], or is zero when row_map[i] < 0.
/// An empty row_map means the identity. Conversion to bf16 rounds to nearest even; to int8 as
/// int8_scale() and to_int8() say. Disjoint panel ranges may be packed by different threads.
void pack_rows(const TensorView& source, std::span<const std::int32_t> row_map, int first_panel,
               int last_panel, PackedMatrix& packed);

}  // namespace deinfer::cpu
