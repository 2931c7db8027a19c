// Products of packed matrices with activations, shared out among the threads of a team.
//
// With few tokens the threads divide the panels, so that each weight is read once. With many each
// takes tokens of its own: what one op writes of them, the next finds in the same core's cache, as
// do the norms. The weights are then read by every part of the tokens, so a part has at least
// KernelTable::part_tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "kernels/cpu/packing.h"
#include "ops/context.h"

namespace deinfer {

/// Takes a finished tile of the rows [row, row + m) of the batch and the packed rows
/// [first, first + cols) of the output factor. `second` is the tile of a job's second matrix.
class Epilogue {
 public:
  virtual ~Epilogue() = default;
  virtual void apply(const cpu::KernelTable& kernels, float* tile, const float* second, int row,
                     int m, int first, int cols) const = 0;
};

/// The part of a job's k that this call adds to the sums of the calls before.
struct PartOfK {
  Range k, second_k;      // columns of the matrices, up to k_pad; may be empty
  bool last = false;      // the epilogue may take the sums
  float* sums = nullptr;  // [panels][m][kPanelRows], of the first matrix, then of the second
};

/// Bytes of so many columns of a panel, about.
inline std::int64_t bytes_of(const cpu::PackedMatrix& matrix, int columns) {
  if (matrix.empty()) return 0;
  return static_cast<std::int64_t>(matrix.full_panel_bytes()) * columns / matrix.k_pad;
}

/// The product of one matrix, or of two with the same number of rows (gate and up), with x.
struct PanelJob {
  const cpu::PackedMatrix* matrix = nullptr;
  Activations x;
  const Epilogue* epilogue = nullptr;
  const cpu::PackedMatrix* second = nullptr;
  Activations second_x;
  Range panels;                 // of the matrix; all where empty
  std::optional<PartOfK> part;  // none: all of k

  int first_panel() const { return panels.begin; }
  int num_panels() const { return panels.size() > 0 ? panels.size() : matrix->num_panels(); }
  std::int64_t panel_bytes() const {
    std::int64_t bytes = bytes_of(*matrix, part ? part->k.size() : matrix->k_pad);
    if (second == nullptr) return bytes;
    return bytes + bytes_of(*second, part ? part->second_k.size() : second->k_pad);
  }
};

/// tile[m, kPanelRows] = the product of the columns `k` of a panel with the rows of x, on top of
/// the tile unless k begins at 0. `next` (may be null) is memory read soon after. `expanded` may
/// have the rows of x from the call before; whoever changes them lets it forget.
void multiply_panel(const cpu::KernelTable& kernels, const cpu::PackedMatrix& matrix, Range k,
                    const Activations& x, int m, int panel, const void* next,
                    ExpandedInputs& expanded, float* tile);

/// Runs all panels of the jobs for the rows [row, row + m) of the batch, m up to kTileTokens. Every
/// member of the team must call it, and barrier() before the results are read or the next call.
void run_jobs(ExecutionContext& ctx, std::span<const PanelJob> jobs, int row, int m);

}  // namespace deinfer
