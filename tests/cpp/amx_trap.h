// Runs machine code with AMX instructions on a CPU that lacks them: each raises SIGILL, whose
// handler decodes it and has the TileModel execute it.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "amx_model.h"

namespace deinfer::test {

/// While it lives, AMX instructions of this thread act on model(). One at a time; other illegal
/// instructions end the program as before.
class AmxTrap {
 public:
  AmxTrap() {
    active_ = this;
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &previous_);
  }
  ~AmxTrap() {
    sigaction(SIGILL, &previous_, nullptr);
    active_ = nullptr;
  }
  AmxTrap(const AmxTrap&) = delete;
  AmxTrap& operator=(const AmxTrap&) = delete;

  TileModel& model() { return model_; }
  int instructions() const { return instructions_; }

 private:
  static void handle(int, siginfo_t*, void* context) {
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    if (!active_->execute(registers)) sigaction(SIGILL, &active_->previous_, nullptr);
  }

  static std::int64_t general_register(const gregset_t& registers, int number) {
    constexpr std::array kPlaces = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                    REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                    REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[kPlaces[static_cast<std::size_t>(number)]];
  }

  /// Executes the instruction at RIP and steps over it; false when it is not one of AMX.
  bool execute(gregset_t& registers) {
    const auto* code = reinterpret_cast<const std::uint8_t*>(registers[REG_RIP]);
    // VEX: C4, then R X B inverted and the opcode map, then W vvvv inverted L pp.
    constexpr int kMap0F38 = 2;
    if (code[0] != 0xc4 || (code[1] & 0x1f) != kMap0F38) return false;
    const int index_high = (code[1] & 0x40) ? 0 : 8;
    const int base_high = (code[1] & 0x20) ? 0 : 8;
    const int third = ~(code[2] >> 3) & 0xf;
    const int prefix = code[2] & 3;  // none, 66, F3, F2
    const int opcode = code[3];
    const int mod = code[4] >> 6;
    const int reg = (code[4] >> 3) & 7;
    const int rm = code[4] & 7;

    // The memory operand: base + displacement, and the index, which is the stride of a tile's rows
    // and elsewhere part of the address.
    std::int64_t address = 0;
    std::int64_t stride = 0;
    int length = 5;
    if (mod != 3) {
      int base = rm;
      if (rm == 4) {
        const int sib = code[length++];
        const int index = ((sib >> 3) & 7) + index_high;
        base = sib & 7;
        if (index != 4) stride = general_register(registers, index) << (sib >> 6);
      }
      const bool no_base = mod == 0 && base == 5;
      if (!no_base) address = general_register(registers, base + base_high);
      if (mod == 1) {
        address += static_cast<std::int8_t>(code[length++]);
      } else if (mod == 2 || no_base) {
        std::int32_t displacement;
        std::memcpy(&displacement, code + length, sizeof displacement);
        length += 4;
        address += displacement;
        if (no_base && rm == 5) address += registers[REG_RIP] + length;
      }
    }

    void* memory = reinterpret_cast<void*>(address);
    if (opcode == 0x49 && prefix == 0 && mod != 3) {
      model_.configure(*reinterpret_cast<const cpu::TileConfig*>(address + stride));
    } else if (opcode == 0x49 && prefix == 0 && code[4] == 0xc0) {
      model_.release();
    } else if (opcode == 0x49 && prefix == 3 && mod == 3) {
      model_.zero(reg);
    } else if (opcode == 0x4b && prefix == 3 && mod != 3) {
      model_.load(reg, memory, stride);
    } else if (opcode == 0x4b && prefix == 2 && mod != 3) {
      model_.store(reg, memory, stride);
    } else if (opcode == 0x5c && prefix == 2 && mod == 3) {
      model_.multiply(reg, rm, third);
    } else {
      return false;
    }
    ++instructions_;
    registers[REG_RIP] += length;
    return true;
  }

  static inline AmxTrap* active_ = nullptr;
  struct sigaction previous_{};
  TileModel model_;
  int instructions_ = 0;
};

}  // namespace deinfer::test
