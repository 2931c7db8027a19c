#include "base/cpu_features.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdlib>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr std::array kAllIsas = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16,
                                 Isa::kAmxBf16};

/// Asks Linux (from 5.16) to let this process, all its threads and its forks use AMX tiles, without
/// which the first tile instruction raises SIGILL. Refused where seccomp forbids the call or a
/// thread has an alternate signal stack too small for a frame with tiles. Granting is for good.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool cpu_supports(Isa isa) {
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // VBMI for int8; of all CPUs with BF16 only Cooper Lake lacks it.
  bool avx512_bf16 =
      avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Bf16: return avx512_bf16;
    case Isa::kAmxBf16:
      // The compiler's "amx-*" mean CPUID and that the OS enabled both tile states in XCR0.
      return avx512_bf16 && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && may_use_tiles();
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
    case Isa::kAmxBf16: return "amx_bf16";
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
  if (wanted == nullptr || *wanted == '\0') {
    return detect_isas().back();
  }
  for (Isa isa : kAllIsas) {
    if (isa_name(isa) != wanted) continue;
    if (!cpu_supports(isa)) {
      fail(ErrorCode::kUnsupported, "DEINFER_CPU_ISA=", wanted,
           ": this CPU lacks it or the OS refuses it");
    }
    return isa;
  }
  fail(ErrorCode::kInvalidArgument, "DEINFER_CPU_ISA=", wanted,
       " is unknown; use scalar, avx2, avx512, avx512_bf16 or amx_bf16");
}

}  // namespace deinfer
