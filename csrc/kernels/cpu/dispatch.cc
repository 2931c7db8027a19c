#include "base/check.h"
#include "kernels/cpu/isa_tables.h"

namespace deinfer::cpu {

const KernelTable& kernels_for(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return kScalarKernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx512Bf16: return kAvx512Bf16Kernels;
    case Isa::kAmxBf16: return kAmxBf16Kernels;
  }
  fail(ErrorCode::kInvalidArgument, "no kernels for instruction set ", static_cast<int>(isa));
}

}  // namespace deinfer::cpu
