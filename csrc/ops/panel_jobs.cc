#include "ops/panel_jobs.h"

#include <algorithm>

#include "kernels/cpu/compressed_panel.h"

namespace deinfer {
namespace {

/// Where the columns from `k` on of a panel begin; null behind the last.
const void* columns_of(const cpu::PackedMatrix& matrix, int panel, Range k) {
  if (panel >= matrix.num_panels()) return nullptr;
  if (matrix.is_compressed(panel)) {
    const auto* first = static_cast<const std::byte*>(matrix.panel(panel));
    return first + (k.begin == 0 ? 0 : cpu::compressed_offset(matrix.k_pad, k.begin));
  }
  return static_cast<const std::byte*>(matrix.panel(panel)) +
         std::ptrdiff_t{k.begin} * matrix.rows_of(panel) *
             static_cast<std::ptrdiff_t>(dtype_size(matrix.dtype));
}

/// x[m, cols] expanded, or null where the product is to read it as it is. Panels of the same matrix
/// follow one another, so the last is kept.
const float* expanded_inputs(const cpu::KernelTable& kernels, const cpu::PackedMatrix& matrix,
                             const Activations& x, int m, int cols, ExpandedInputs& expanded) {
  if (kernels.expand_inputs == nullptr || matrix.dtype == DType::kFloat32) return nullptr;
  if (kernels.expanded_inputs_size(m, cols) > ExpandedInputs::kMostFloats) return nullptr;
  auto* floats = expanded.floats.as<float>();
  if (expanded.data != x.data || expanded.rows != m || expanded.cols != cols) {
    kernels.expand_inputs(x.b16(), x.ld, m, cols, floats);
    expanded.data = x.data;
    expanded.rows = m;
    expanded.cols = cols;
  }
  return floats;
}

/// multiply_panel of expanded inputs.
void multiply_expanded(const cpu::KernelTable& kernels, const cpu::PackedMatrix& matrix, Range k,
                       const float* x, int m, int panel, const void* next, float* tile) {
  const int rows = matrix.rows_of(panel);
  const std::ptrdiff_t first = std::ptrdiff_t{k.begin} * rows;
  const bool add = k.begin > 0;
  if (matrix.is_compressed(panel)) {
    kernels.panel_gemm_expanded_compressed(x, m, static_cast<const std::byte*>(matrix.panel(panel)),
                                           matrix.k_pad, k.begin, k.end, next, tile);
  } else if (matrix.dtype == DType::kInt8) {
    const float* scales = matrix.scales.data() + panel * matrix.panel_rows;
    kernels.panel_gemm_expanded_int8(
        x, m, static_cast<const std::int8_t*>(matrix.panel(panel)) + first,
        k.end == matrix.k_pad ? scales : nullptr, k.size(), next, add, tile);
  } else {
    kernels.panel_gemm_expanded_bf16(x, m, static_cast<const bf16*>(matrix.panel(panel)) + first,
                                     rows, k.size(), next, add, tile);
  }
}

/// multiply_panel of inputs as they are.
void multiply_plain(const cpu::KernelTable& kernels, const cpu::PackedMatrix& matrix, Range k,
                    const Activations& from, int m, int panel, const void* next, float* tile) {
  const int rows = matrix.rows_of(panel);
  const std::ptrdiff_t first = std::ptrdiff_t{k.begin} * rows;
  if (matrix.is_compressed(panel)) {
    kernels.panel_gemm_compressed(from.b16(), from.ld, m,
                                  static_cast<const std::byte*>(matrix.panel(panel)), matrix.k_pad,
                                  k.begin, k.end, next, tile);
  } else if (matrix.dtype == DType::kInt8) {
    auto* gemm = k.begin == 0 ? kernels.panel_gemm_int8 : kernels.panel_gemm_add_int8;
    const float* scales = matrix.scales.data() + panel * matrix.panel_rows;
    gemm(from.b16(), from.ld, m, static_cast<const std::int8_t*>(matrix.panel(panel)) + first,
         k.end == matrix.k_pad ? scales : nullptr, k.size(), next, tile);
  } else if (matrix.dtype == DType::kFloat32) {
    auto* gemm = k.begin == 0 ? kernels.panel_gemm_f32 : kernels.panel_gemm_add_f32;
    gemm(from.f32(), from.ld, m, static_cast<const float*>(matrix.panel(panel)) + first, rows,
         k.size(), next, tile);
  } else {
    auto* gemm = k.begin == 0 ? kernels.panel_gemm_bf16 : kernels.panel_gemm_add_bf16;
    gemm(from.b16(), from.ld, m, static_cast<const bf16*>(matrix.panel(panel)) + first, rows,
         k.size(), next, tile);
  }
}

/// The rows [begin, end) of a pass that begins at `row` and has m.
void run_panel(ExecutionContext& ctx, const PanelJob& job, int row, int m, int begin, int end,
               int panel) {
  const cpu::PackedMatrix& matrix = *job.matrix;
  const int count = end - begin;
  auto* tile = ctx.scratch.tile_a.as<float>();
  float* second = job.second == nullptr ? nullptr : ctx.scratch.tile_b.as<float>();
  Range k{0, matrix.k_pad};
  Range second_k{0, job.second == nullptr ? 0 : job.second->k_pad};
  if (job.part) {
    auto sums_of = [&](int index) {
      return job.part->sums + (std::ptrdiff_t{index} * m + begin) * cpu::kPanelRows;
    };
    tile = sums_of(panel);
    if (second != nullptr) second = sums_of(matrix.num_panels() + panel);
    k = job.part->k;
    second_k = job.part->second_k;
  }
  if (k.size() > 0) {
    const void* next = job.second != nullptr ? columns_of(*job.second, panel, second_k)
                                             : columns_of(matrix, panel + 1, k);
    multiply_panel(ctx.kernels, matrix, k, job.x.rows_from(row + begin), count, panel, next,
                   ctx.scratch.expanded, tile);
  }
  if (second_k.size() > 0) {
    multiply_panel(ctx.kernels, *job.second, second_k, job.second_x.rows_from(row + begin), count,
                   panel, columns_of(matrix, panel + 1, k), ctx.scratch.second_expanded, second);
  }
  if (job.part && !job.part->last) return;
  job.epilogue->apply(ctx.kernels, tile, second, row + begin, count, panel * matrix.panel_rows,
                      matrix.rows_of(panel));
}

/// The panel, counted over all jobs, at which the share that begins at byte `share` begins: a panel
/// belongs to the share in which its middle lies.
int first_panel(std::span<const PanelJob> jobs, std::int64_t share) {
  std::int64_t offset = 0;
  int before = 0;
  for (const PanelJob& job : jobs) {
    std::int64_t bytes = job.panel_bytes();
    int panels = job.num_panels();
    if (share < offset + bytes * panels) {
      return before +
             static_cast<int>(std::max<std::int64_t>(0, share - offset + bytes / 2) / bytes);
    }
    offset += bytes * panels;
    before += panels;
  }
  return before;
}

/// How the members of a team share m tokens: each takes whole parts, one after the other, or
/// several members divide the panels of a part.
class Division {
 public:
  /// Parts of at least part_tokens while members share them, and of up to about most_tokens.
  Division(int m, int part_tokens, int most_tokens, int team)
      : tokens_(m), parts_(std::clamp(m / part_tokens, 1, team)) {
    while (team % parts_ != 0) --parts_;
    members_ = team / parts_;
    if (members_ > 1) return;
    parts_of_member_ = (m + parts_ * most_tokens - 1) / (parts_ * most_tokens);
    parts_ *= parts_of_member_;
  }
  int first_token(int part) const {
    return static_cast<int>(std::int64_t{tokens_} * part / parts_);
  }
  int first_part(int member) const { return member / members_ * parts_of_member_; }
  /// Where the share of a member begins in `bytes` of panels.
  std::int64_t first_byte(int member, std::int64_t bytes) const {
    return bytes * (member % members_) / members_;
  }

 private:
  int tokens_;
  int parts_;
  int members_;
  int parts_of_member_ = 1;
};

/// Tokens whose inputs stay in a core's share of the last cache while it goes through the panels.
int tokens_in_cache(const cpu::KernelTable& kernels, std::span<const PanelJob> jobs, int m) {
  if (kernels.expand_inputs == nullptr) return m;
  constexpr int kFloats = 1 << 20;
  int columns = 0;
  for (const PanelJob& job : jobs) {
    columns = std::max(columns, job.matrix->k_pad);
    if (job.second != nullptr) columns = std::max(columns, job.second->k_pad);
  }
  return std::max(32, kFloats / columns);
}

}  // namespace

void multiply_panel(const cpu::KernelTable& kernels, const cpu::PackedMatrix& matrix, Range k,
                    const Activations& x, int m, int panel, const void* next,
                    ExpandedInputs& expanded, float* tile) {
  const Activations from = x.columns_from(k.begin);
  const float* floats = expanded_inputs(kernels, matrix, from, m, k.size(), expanded);
  if (floats != nullptr) {
    multiply_expanded(kernels, matrix, k, floats, m, panel, next, tile);
  } else {
    multiply_plain(kernels, matrix, k, from, m, panel, next, tile);
  }
}

void run_jobs(ExecutionContext& ctx, std::span<const PanelJob> jobs, int row, int m) {
  std::int64_t total = 0;
  int panels = 0;
  for (const PanelJob& job : jobs) {
    total += job.panel_bytes() * job.num_panels();
    panels += job.num_panels();
  }
  if (m == 0 || panels == 0) return;
  ctx.scratch.expanded.forget();
  ctx.scratch.second_expanded.forget();
  const Division division(m, ctx.kernels.part_tokens, tokens_in_cache(ctx.kernels, jobs, m),
                          ctx.member.size());
  auto first_of = [&](int member) {  // items: the panels of the first part, of the second, ...
    return division.first_part(member) * panels +
           first_panel(jobs, division.first_byte(member, total));
  };
  ctx.member.work(first_of(ctx.member.id()), first_of(ctx.member.id() + 1), [&](int item) {
    int begin = division.first_token(item / panels);
    int end = division.first_token(item / panels + 1);
    int panel = item % panels;
    const PanelJob* job = jobs.data();
    for (; panel >= job->num_panels(); ++job) panel -= job->num_panels();
    run_panel(ctx, *job, row, m, begin, end, job->first_panel() + panel);
  });
}

}  // namespace deinfer
