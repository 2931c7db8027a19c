#include "base/cpu_features.h"

#include <array>
#include <cstdlib>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr std::array kAllIsas = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

bool cpu_supports(Isa isa) {
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Bf16:  // VBMI for int8; of all CPUs with BF16 only Cooper Lake lacks it
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  }
  return false;
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
  }
  return "unknown";
}

std::vector<Isa> detect_isas() {
  std::vector<Isa> found;
  for (Isa isa : kAllIsas) {
    if (cpu_supports(isa)) found.push_back(isa);
  }
  return found;
}

Isa select_isa() {
  const char* wanted = std::getenv("DEINFER_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return detect_isas().back();
  for (Isa isa : kAllIsas) {
    if (isa_name(isa) != wanted) continue;
    if (!cpu_supports(isa)) {
      fail(ErrorCode::kUnsupported, "DEINFER_CPU_ISA=", wanted, ": this CPU lacks it");
    }
    return isa;
  }
  fail(ErrorCode::kInvalidArgument, "DEINFER_CPU_ISA=", wanted,
       " is unknown; use scalar, avx2, avx512 or avx512_bf16");
}

}  // namespace deinfer
