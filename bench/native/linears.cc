// Linears on a team of threads, called as models call them.
#include <cstring>
#include <memory>
#include <span>
#include <string_view>

#include "base/check.h"
#include "bench.h"
#include "ops/lowrank_linear.h"

namespace deinfer::bench {
namespace {

/// The type called `name`; whether weights can have it is for allocate_packed to say.
DType dtype_of(std::string_view name) {
  for (int i = 0; i < 32; ++i) {
    auto dtype = static_cast<DType>(i);
    if (name != "unknown" && name == dtype_name(dtype)) return dtype;
  }
  fail(ErrorCode::kInvalidArgument, "there is no type ", name);
}

/// The type of x and z that go with weights.
DType activation_dtype(DType weights) {
  return weights == DType::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
}

cpu::PackedMatrix pack(Team& team, DType dtype, bool compressed, const TensorView& source) {
  cpu::PackedMatrix packed =
      cpu::allocate_packed(dtype, static_cast<int>(source.rows), static_cast<int>(source.cols),
                           cpu::kPanelRows, &team.weights, compressed);
  team.team.run([&](TeamMember& member) {
    auto [first, last] = member.share(packed.num_panels());
    cpu::pack_rows(source, {}, first, last, packed);
  });
  return packed;
}

/// The stored bytes of a matrix without its padding.
double payload_bytes(const cpu::PackedMatrix& matrix) {
  if (matrix.empty()) return 0;
  double padded = static_cast<double>(matrix.n_pad) * matrix.k_pad;
  return static_cast<double>(matrix.bytes()) * matrix.n * matrix.k / padded;
}

/// Inputs and outputs of linears of one shape: x[m, k], z[m, r], out[m, n].
struct Workspace {
  int m;
  int n;
  ActivationBuffer x;
  ActivationBuffer z;
  Buffer out;
};

}  // namespace
}  // namespace deinfer::bench

using namespace deinfer;
using bench::guarded;
using bench::Team;
using bench::Workspace;

/// Packs first[n, k] as a dense linear when r is 0, else first = U[n, r] and second = V[r, k] as a
/// low-rank one. Sources are contiguous, of type `source`; weights get the type `dtype`, of which
/// "compressed" is bfloat16 in 12 bits.
BENCH_API LowRankLinear* bench_linear_create(Team* team, const char* dtype, const char* source,
                                             const void* first, const void* second, int n, int k,
                                             int r) {
  return guarded<LowRankLinear*>(nullptr, [&] {
    DType from = bench::dtype_of(source);
    const bool compressed = std::string_view(dtype) == "compressed";
    if (compressed && team->kernels.panel_gemm_compressed == nullptr) {
      fail(ErrorCode::kUnsupported, "there are no kernels for compressed weights in ",
           isa_name(team->kernels.isa));
    }
    DType to = compressed ? DType::kBFloat16 : bench::dtype_of(dtype);
    auto linear = std::make_unique<LowRankLinear>();
    if (r == 0) {
      linear->w = bench::pack(*team, to, compressed, {first, from, n, k, k});
    } else {
      linear->u = bench::pack(*team, to, compressed, {first, from, n, r, r});
      linear->v = bench::pack(*team, to, compressed, {second, from, r, k, k});
    }
    return linear.release();
  });
}

BENCH_API void bench_linear_destroy(LowRankLinear* linear) { delete linear; }

/// Bytes of the weights as stored, scales included, padding not.
BENCH_API double bench_linear_bytes(const LowRankLinear* linear) {
  return bench::payload_bytes(linear->w) + bench::payload_bytes(linear->u) +
         bench::payload_bytes(linear->v);
}

/// The packed weights as fp32: first[n, k] = W, or first[n, r] = U and second[r, k] = V.
BENCH_API int bench_linear_unpack(const LowRankLinear* linear, float* first, float* second) {
  auto unpack = [](const cpu::PackedMatrix& matrix, float* out) {
    for (int row = 0; row < matrix.n; ++row) {
      matrix.read_row(row, out + std::ptrdiff_t{row} * matrix.k);
    }
  };
  return guarded(-1, [&] {
    unpack(linear->output_factor(), first);
    if (linear->is_low_rank()) unpack(linear->v, second);
    return 0;
  });
}

/// Memory for m rows through linears of the shape of `linear`; x[m, k] is contiguous, in the type
/// of the activations (float for float32 weights, else bf16).
BENCH_API Workspace* bench_workspace_create(const LowRankLinear* linear, int m, const void* x) {
  return guarded<Workspace*>(nullptr, [&] {
    check_argument(m > 0, "workspace: m must be at least 1, got ", m);
    const cpu::PackedMatrix& input = linear->is_low_rank() ? linear->v : linear->w;
    DType dtype = bench::activation_dtype(input.dtype);
    int n = linear->output_factor().n;
    std::size_t row_bytes = static_cast<std::size_t>(input.k) * dtype_size(dtype);
    auto work = std::make_unique<Workspace>(Workspace{
        m, n, ActivationBuffer(dtype, m, input.k), ActivationBuffer(dtype, m, linear->z_cols()),
        Buffer(static_cast<std::size_t>(m) * static_cast<std::size_t>(n) * sizeof(float))});
    for (int row = 0; row < m; ++row) {
      std::memcpy(work->x.view().rows_from(row).data,
                  static_cast<const std::byte*>(x) + static_cast<std::size_t>(row) * row_bytes,
                  row_bytes);
    }
    return work.release();
  });
}

BENCH_API void bench_workspace_destroy(Workspace* work) { delete work; }

/// out[m, n], contiguous: the result of the last call of bench_run.
BENCH_API const float* bench_workspace_output(const Workspace* work) {
  return work->out.as<float>();
}

/// Applies `count` linears of one shape, one after the other: nanoseconds[count].
BENCH_API int bench_run(Team* team, Workspace* work, const LowRankLinear* const* linears, int count,
                        double* nanoseconds) {
  return guarded(-1, [&] {
    std::unique_ptr<Communicator> alone = make_single_communicator(0);
    TeamExchange exchange(*alone);
    bench::time_steps(team->team, count, nanoseconds, [&](TeamMember& member, int i) {
      ExecutionContext ctx{team->kernels, member,
                           team->scratch[static_cast<std::size_t>(member.id())], exchange};
      lowrank_linear(ctx, work->m, GroupInput(work->x.view()), *linears[i], work->z.view(),
                     work->out.as<float>(), work->n);
    });
    return 0;
  });
}
