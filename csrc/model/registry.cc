#include "model/registry.h"

#include <array>
#include <string>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr std::array kArchitectures = {
    Architecture{"llama", parse_llama},
    Architecture{"lowrank_llama", parse_llama},
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
