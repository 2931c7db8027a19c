#include "model/registry.h"

#include <array>
#include <string>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr std::array kArchitectures = {
    Architecture{"gemma", parse_gemma},
    Architecture{"lowrank_gemma", parse_gemma},
    Architecture{"gemma2", parse_gemma2},
    Architecture{"lowrank_gemma2", parse_gemma2},
    Architecture{"gemma3", parse_gemma3},
    Architecture{"gemma3_text", parse_gemma3_text},
    Architecture{"lowrank_gemma3_text", parse_gemma3_text},
    Architecture{"llama", parse_llama},
    Architecture{"lowrank_llama", parse_llama},
    Architecture{"ministral", parse_ministral},
    Architecture{"lowrank_ministral", parse_ministral},
    Architecture{"mistral", parse_mistral},
    Architecture{"lowrank_mistral", parse_mistral},
    Architecture{"olmo2", parse_olmo2},
    Architecture{"lowrank_olmo2", parse_olmo2},
    Architecture{"olmo3", parse_olmo3},
    Architecture{"lowrank_olmo3", parse_olmo3},
    Architecture{"opt", parse_opt},
    Architecture{"lowrank_opt", parse_opt},
    Architecture{"qwen2", parse_qwen2},
    Architecture{"lowrank_qwen2", parse_qwen2},
    Architecture{"qwen3", parse_qwen3},
    Architecture{"lowrank_qwen3", parse_qwen3},
};

}  // namespace

std::span<const Architecture> architectures() { return kArchitectures; }

const Architecture& find_architecture(std::string_view model_type) {
  std::string known;
  for (const Architecture& architecture : kArchitectures) {
    if (architecture.model_type == model_type) return architecture;
    known += (known.empty() ? "" : ", ") + std::string(architecture.model_type);
  }
  fail(ErrorCode::kUnsupported, "config.json: model_type \"", model_type,
       "\" is not supported; supported are ", known);
}

}  // namespace deinfer
