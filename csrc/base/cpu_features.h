// Which instruction set the kernels use on this machine.
#pragma once

#include <string_view>
#include <vector>

namespace deinfer {

/// Instruction sets with kernels of their own, in ascending order of preference.
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

std::string_view isa_name(Isa isa);

/// The instruction sets that this CPU and OS can run; always contains kScalar. On a CPU with AMX
/// this asks the kernel to let the process use tiles; when it refuses, kAmxBf16 is not among them.
std::vector<Isa> detect_isas();

/// The best supported one, or the one named by the environment variable DEINFER_CPU_ISA ("scalar",
/// "avx2", "avx512", "avx512_bf16", "amx_bf16"). Throws kInvalidArgument when that name is unknown
/// and kUnsupported when this CPU lacks it or the kernel refuses it.
Isa select_isa();

}  // namespace deinfer
