// The plans by name.
#include <array>
#include <string>

#include "base/check.h"
#include "plan/plans.h"

namespace deinfer {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<TensorParallelPlan> (*make)(const ModelShape& model, int size);
};

constexpr std::array kPlans = {
    Entry{"dense", make_dense_plan},
    Entry{"naive", make_naive_plan},
    Entry{"rank_gather", make_rank_gather_plan},
    Entry{"hidden_sharded", make_hidden_sharded_plan},
    Entry{"two_collective", make_two_collective_plan},
    Entry{"token_sharded", make_token_sharded_plan},
};

}  // namespace

std::vector<std::string_view> plan_names() {
  std::vector<std::string_view> names;
  for (const Entry& entry : kPlans) names.push_back(entry.name);
  return names;
}

std::unique_ptr<TensorParallelPlan> make_plan(std::string_view name, const ModelShape& model,
                                              int size) {
  std::string known;
  for (const Entry& entry : kPlans) {
    if (entry.name == name) return entry.make(model, size);
    known += ", " + std::string(entry.name);
  }
  fail(ErrorCode::kInvalidArgument, "tensor_parallel_plan=\"", name,
       "\" is unknown; there are auto", known);
}

}  // namespace deinfer
