#include "ops/panel_jobs.h"

#include <algorithm>

namespace deinfer {
namespace {

void multiply(const cpu::KernelTable& kernels, const cpu::PackedMatrix& matrix,
              const Activations& x, int row, int m, int panel, const void* next, float* tile) {
  Activations rows = x.rows_from(row);
  if (matrix.dtype == DType::kInt8) {
    kernels.panel_gemm_int8(
        rows.b16(), x.ld, m, static_cast<const std::int8_t*>(matrix.panel(panel)),
        matrix.scales.data() + panel * matrix.panel_rows, matrix.k_pad, next, tile);
  } else if (matrix.dtype == DType::kFloat32) {
    kernels.panel_gemm_f32(rows.f32(), x.ld, m, static_cast<const float*>(matrix.panel(panel)),
                           matrix.rows_of(panel), matrix.k_pad, next, tile);
  } else {
    kernels.panel_gemm_bf16(rows.b16(), x.ld, m, static_cast<const bf16*>(matrix.panel(panel)),
                            matrix.rows_of(panel), matrix.k_pad, next, tile);
  }
}

const void* panel_after(const cpu::PackedMatrix& matrix, int panel) {
  return panel + 1 < matrix.num_panels() ? matrix.panel(panel + 1) : nullptr;
}

void run_panel(ExecutionContext& ctx, const PanelJob& job, int row, int m, int panel) {
  auto* tile = ctx.scratch.tile_a.as<float>();
  float* second = nullptr;
  const void* next =
      job.second != nullptr ? job.second->panel(panel) : panel_after(*job.matrix, panel);
  multiply(ctx.kernels, *job.matrix, job.x, row, m, panel, next, tile);
  if (job.second != nullptr) {
    second = ctx.scratch.tile_b.as<float>();
    multiply(ctx.kernels, *job.second, job.second_x, row, m, panel, panel_after(*job.matrix, panel),
             second);
  }
  job.epilogue->apply(ctx.kernels, tile, second, row, m, panel * job.matrix->panel_rows,
                      job.matrix->rows_of(panel));
}

/// The panel, counted over all jobs, at which the share that begins at byte `share` begins: a panel
/// belongs to the share in which its middle lies.
int first_panel(std::span<const PanelJob> jobs, std::int64_t share) {
  std::int64_t offset = 0;
  int before = 0;
  for (const PanelJob& job : jobs) {
    std::int64_t bytes = job.panel_bytes();
    int panels = job.matrix->num_panels();
    if (share < offset + bytes * panels) {
      return before +
             static_cast<int>(std::max<std::int64_t>(0, share - offset + bytes / 2) / bytes);
    }
    offset += bytes * panels;
    before += panels;
  }
  return before;
}

/// How the members of a team share m tokens: `parts` of them, each by `members` members that divide
/// the panels.
struct Division {
  int tokens;
  int parts;
  int members;

  Division(int m, int team) : tokens(m), parts(std::clamp(m / kPartTokens, 1, team)) {
    while (team % parts != 0) --parts;
    members = team / parts;
  }
  int first_token(int part) const { return static_cast<int>(std::int64_t{tokens} * part / parts); }
};

}  // namespace

void run_jobs(ExecutionContext& ctx, std::span<const PanelJob> jobs, int row, int m) {
  std::int64_t total = 0;
  int panels = 0;
  for (const PanelJob& job : jobs) {
    total += job.panel_bytes() * job.matrix->num_panels();
    panels += job.matrix->num_panels();
  }
  if (m == 0 || panels == 0) return;
  const Division division(m, ctx.member.size());
  auto first_of = [&](int member) {  // items: the panels of the first part, of the second, ...
    int within = member % division.members;
    return member / division.members * panels +
           first_panel(jobs, total * within / division.members);
  };
  ctx.member.work(first_of(ctx.member.id()), first_of(ctx.member.id() + 1), [&](int item) {
    int begin = division.first_token(item / panels);
    int end = division.first_token(item / panels + 1);
    int panel = item % panels;
    const PanelJob* job = jobs.data();
    for (; panel >= job->matrix->num_panels(); ++job) panel -= job->matrix->num_panels();
    run_panel(ctx, *job, row + begin, end - begin, panel);
  });
}

}  // namespace deinfer
