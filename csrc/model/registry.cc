#include "model/registry.h"

#include <array>
#include <string>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr std::array kArchitectures = {
    Architecture{"llama", parse_llama},     Architecture{"lowrank_llama", parse_llama},
    Architecture{"mistral", parse_mistral}, Architecture{"lowrank_mistral", parse_mistral},
    Architecture{"olmo2", parse_olmo2},     Architecture{"lowrank_olmo2", parse_olmo2},
    Architecture{"opt", parse_opt},         Architecture{"lowrank_opt", parse_opt},
    Architecture{"qwen2", parse_qwen2},     Architecture{"lowrank_qwen2", parse_qwen2},
    Architecture{"qwen3", parse_qwen3},     Architecture{"lowrank_qwen3", parse_qwen3},
};

}  // namespace

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
