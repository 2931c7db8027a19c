// The linears on a CUDA device's memory: packed like the engine's, a launch for V and one for U.
#include "deinfer/cuda_ops.h"

#include <array>
#include <limits>

#include "base/bf16.h"
#include "base/check.h"
#include "functional/cuda_checks.h"
#include "functional/executor_impl.h"
#include "kernels/cuda/runtime.h"

namespace deinfer {
namespace {

using cuda::kTileCols;
using cuda::kTileRows;
using cuda::tiles_of;

constexpr std::size_t kTileBytes = std::size_t{kTileRows} * kTileCols * sizeof(bf16);
static_assert(cuda::LinearLaunch::kMaxSegments == static_cast<int>(kMaxLinears));

/// Where the parts of a packed linear lie.
struct Part {
  int n = 0;
  int rank = 0;
  int v_tiles = 0;  // of rows; those of z's padding included, as products read it
  int u_tiles = 0;
  int z_chunks = 0;
  int z_first = 0;                     // chunk of z
  std::size_t v = 0, u = 0, bias = 0;  // bytes before
};

struct Layout {
  int k_chunks = 0;
  int z_chunks = 0;  // of all
  std::size_t bytes = 0;
  std::array<Part, kMaxLinears> parts;
};

void check_extent(const char* name, std::int64_t value, std::int64_t least) {
  check_argument(least <= value && value <= std::int64_t{1} << 20, name, " is ", value);
}

Layout layout_of(std::int64_t k, std::span<const CudaLinearShape> shapes) {
  check_argument(!shapes.empty() && shapes.size() <= kMaxLinears, "one to ", kMaxLinears,
                 " linears are packed together, not ", shapes.size());
  check_extent("the number of inputs", k, 1);
  Layout layout;
  layout.k_chunks = tiles_of(static_cast<int>(k), kTileCols);
  auto take = [&](std::size_t bytes) { return std::exchange(layout.bytes, layout.bytes + bytes); };
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    check_extent("the number of outputs", shapes[i].n, 1);
    check_extent("the rank", shapes[i].rank, 0);
    Part& part = layout.parts[i];
    part.n = static_cast<int>(shapes[i].n);
    part.rank = static_cast<int>(shapes[i].rank);
    part.z_chunks = tiles_of(part.rank, kTileCols);
    part.v_tiles = part.z_chunks * (kTileCols / kTileRows);
    part.u_tiles = tiles_of(part.n, kTileRows);
    part.z_first = std::exchange(layout.z_chunks, layout.z_chunks + part.z_chunks);
    const int u_chunks = part.rank > 0 ? part.z_chunks : layout.k_chunks;
    part.v = take(kTileBytes * static_cast<std::size_t>(part.v_tiles) *
                  static_cast<std::size_t>(layout.k_chunks));
    part.u = take(kTileBytes * static_cast<std::size_t>(part.u_tiles) *
                  static_cast<std::size_t>(u_chunks));
    part.bias = take(sizeof(float) * static_cast<std::size_t>(part.u_tiles * kTileRows));
  }
  return layout;
}

Layout check_packed(const CudaPackedLinears& packed) {
  const Layout layout = layout_of(packed.k, packed.shapes);
  check_argument(packed.bytes == layout.bytes, "the packed weights have ", packed.bytes,
                 " bytes, linears of these shapes ", layout.bytes,
                 ": shapes and ranks must be those that were packed on the device");
  check_memory("the packed memory", packed.memory, packed.bytes, layout.bytes);
  return layout;
}

/// Weights [rows, cols] or nothing.
void check_weights(const TensorView& view, const char* name, std::size_t index, std::int64_t rows,
                   std::int64_t cols) {
  check_argument(view.data != nullptr && view.rows == rows && view.cols == cols, name,
                 " of linear ", index, " is [", view.rows, ", ", view.cols, "], not [", rows, ", ",
                 cols, "]");
  check_bfloat16(name, view.dtype);
  check_matrix(name, view);
}

void pack_matrix(const TensorView& from, int tiles, int chunks, std::byte* to,
                 const CudaStream& on) {
  cuda::TileLaunch launch;
  launch.from = from.data;
  launch.ld = from.row_stride;
  launch.rows = static_cast<int>(from.rows);
  launch.cols = static_cast<int>(from.cols);
  launch.tiles = tiles;
  launch.chunks = chunks;
  launch.out = to;
  cuda::check_launch(cuda::launch_tile_weights(launch, stream_of(on)), "packing of weights");
}

/// One call: what it reads, in the order of the kernels.
class Call {
 public:
  Call(const TensorView& x, const CudaPackedLinears& packed, void* workspace,
       std::size_t workspace_bytes, const CudaStream& on)
      : layout_(check_packed(packed)),
        memory_(static_cast<std::byte*>(packed.memory)),
        m_(static_cast<int>(x.rows)),
        on_(on) {
    check_matrix("x", x);
    check_bfloat16("x", x.dtype);
    check_argument(x.cols == packed.k, "x has ", x.cols, " columns, the linears take ", packed.k);
    if (m_ == 0) return;
    check_memory("the workspace", workspace, workspace_bytes, cuda_workspace_bytes(x.rows, packed));
    x_ = static_cast<bf16*>(workspace);
    z_ = x_ + std::int64_t{padded_rows(m_)} * layout_.k_chunks * kTileCols;
    cuda::use_device(on.device);
    tile(x);
    run_v(packed.shapes.size());
  }

  static int padded_rows(int m) { return tiles_of(m, cuda::kTokenPadding) * cuda::kTokenPadding; }

  int m() const { return m_; }
  const Part& part(std::size_t i) const { return layout_.parts[i]; }

  /// The factor that ends linear i.
  cuda::LinearFactor outer(std::size_t i) const {
    const Part& part = layout_.parts[i];
    const auto* bias = reinterpret_cast<const float*>(memory_ + part.bias);
    if (part.rank == 0) {
      return {memory_ + part.u, x_, layout_.k_chunks, layout_.k_chunks, bias};
    }
    return {memory_ + part.u, z_at(part), part.z_chunks, layout_.z_chunks, bias};
  }
  /// Its outputs as rows of `out`; the epilogue and second factor are left to fill in.
  cuda::LinearSegment segment(std::size_t i, const MutableTensorView& out) const {
    cuda::LinearSegment segment;
    segment.first = outer(i);
    segment.n = part(i).n;
    segment.tiles = part(i).u_tiles;
    segment.out = out.data;
    segment.ld = out.row_stride;
    return segment;
  }
  void run(const cuda::LinearLaunch& launch) const {
    cuda::check_launch(cuda::launch_linear(launch, stream_of(on_)), "linear");
  }

 private:
  bf16* z_at(const Part& part) const { return z_ + part.z_first * cuda::kTileTokens * kTileCols; }
  void tile(const TensorView& x) const {
    cuda::TileLaunch launch;
    launch.from = x.data;
    launch.ld = x.row_stride;
    launch.rows = m_;
    launch.cols = static_cast<int>(x.cols);
    launch.tiles = tiles_of(m_, cuda::kTileTokens);
    launch.chunks = layout_.k_chunks;
    launch.out = x_;
    cuda::check_launch(cuda::launch_tile_activations(launch, stream_of(on_)), "tiling of x");
  }
  void run_v(std::size_t count) const {
    cuda::LinearLaunch launch;
    launch.m = m_;
    for (std::size_t i = 0; i < count; ++i) {
      const Part& part = layout_.parts[i];
      if (part.rank == 0) continue;
      cuda::LinearSegment& segment = launch.segments[launch.num_segments++];
      segment.first = {memory_ + part.v, x_, layout_.k_chunks, layout_.k_chunks, nullptr};
      segment.n = part.rank;
      segment.tiles = part.v_tiles;
      segment.out = z_at(part);
      segment.out_chunks = layout_.z_chunks;
    }
    if (launch.num_segments > 0) run(launch);
  }

  Layout layout_;
  std::byte* memory_;
  int m_;
  CudaStream on_;
  bf16* x_ = nullptr;
  bf16* z_ = nullptr;
};

void check_output(const MutableTensorView& out, std::int64_t rows, std::int64_t cols) {
  check_matrix("out", out);
  check_bfloat16("out", out.dtype);
  check_argument(out.rows == rows && out.cols == cols, "out has shape [", out.rows, ", ", out.cols,
                 "], not [", rows, ", ", cols, "]");
}

}  // namespace

std::size_t DEINFER_ABI::cuda_packed_bytes(std::int64_t k,
                                           std::span<const CudaLinearShape> shapes) {
  return layout_of(k, shapes).bytes;
}

void DEINFER_ABI::cuda_pack(std::span<const LinearWeights> linears, const CudaPackedLinears& packed,
                            const CudaStream& on) {
  const Layout layout = check_packed(packed);
  check_argument(linears.size() == packed.shapes.size(), "there are ", linears.size(),
                 " linears and ", packed.shapes.size(), " shapes");
  for (std::size_t i = 0; i < linears.size(); ++i) {
    const CudaLinearShape& shape = packed.shapes[i];
    const bool low_rank = shape.rank > 0;
    if (low_rank) check_weights(linears[i].v, "v", i, shape.rank, packed.k);
    check_weights(linears[i].u, low_rank ? "u" : "w", i, shape.n, low_rank ? shape.rank : packed.k);
    if (linears[i].bias.data != nullptr) check_weights(linears[i].bias, "bias", i, 1, shape.n);
  }
  cuda::use_device(on.device);
  auto* memory = static_cast<std::byte*>(packed.memory);
  for (std::size_t i = 0; i < linears.size(); ++i) {
    const Part& part = layout.parts[i];
    const bool low_rank = part.rank > 0;
    if (low_rank) {
      pack_matrix(linears[i].v, part.v_tiles, layout.k_chunks, memory + part.v, on);
    }
    pack_matrix(linears[i].u, part.u_tiles, low_rank ? part.z_chunks : layout.k_chunks,
                memory + part.u, on);
    cuda::check_launch(
        cuda::launch_widen(linears[i].bias.data, part.n, part.u_tiles * kTileRows,
                           reinterpret_cast<float*>(memory + part.bias), stream_of(on)),
        "packing of a bias");
  }
}

std::size_t DEINFER_ABI::cuda_workspace_bytes(std::int64_t m, const CudaPackedLinears& packed) {
  check_argument(0 <= m && m <= std::numeric_limits<int>::max() / 2, "x has ", m, " rows");
  const Layout layout = layout_of(packed.k, packed.shapes);
  return static_cast<std::size_t>(Call::padded_rows(static_cast<int>(m))) *
         static_cast<std::size_t>((layout.k_chunks + layout.z_chunks) * kTileCols) * sizeof(bf16);
}

void DEINFER_ABI::cuda_lowrank_linears(const TensorView& x, const CudaPackedLinears& packed,
                                       std::span<const MutableTensorView> outs, void* workspace,
                                       std::size_t workspace_bytes, const CudaStream& on) {
  check_argument(outs.size() == packed.shapes.size(), "there are ", outs.size(), " outputs and ",
                 packed.shapes.size(), " linears");
  for (std::size_t i = 0; i < outs.size(); ++i) check_output(outs[i], x.rows, packed.shapes[i].n);
  const Call call(x, packed, workspace, workspace_bytes, on);
  if (call.m() == 0) return;
  cuda::LinearLaunch launch;
  launch.m = call.m();
  for (std::size_t i = 0; i < outs.size(); ++i) {
    launch.segments[launch.num_segments++] = call.segment(i, outs[i]);
  }
  call.run(launch);
}

void DEINFER_ABI::cuda_lowrank_gated_mlp(const TensorView& x, const CudaPackedLinears& gate_up,
                                         const MutableTensorView& out, void* workspace,
                                         std::size_t workspace_bytes, const CudaStream& on) {
  const std::span<const CudaLinearShape> shapes = gate_up.shapes;
  check_argument(shapes.size() == 2, "this operation takes 2 packed linears, not ", shapes.size());
  check_argument(shapes[0].n == shapes[1].n, "gate has ", shapes[0].n, " outputs and up ",
                 shapes[1].n);
  check_output(out, x.rows, shapes[0].n);
  const Call call(x, gate_up, workspace, workspace_bytes, on);
  if (call.m() == 0) return;
  cuda::LinearLaunch launch;
  launch.m = call.m();
  launch.num_segments = 1;
  launch.segments[0] = call.segment(0, out);
  launch.segments[0].second = call.outer(1);
  launch.segments[0].epilogue = cuda::LinearEpilogue::kGatedSilu;
  call.run(launch);
}

}  // namespace deinfer
