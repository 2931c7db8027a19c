#include <array>

#include "base/check.h"
#include "plan/tensor_parallel_plan.h"

namespace deinfer {
namespace {

struct Entry {
  std::string_view name;
  std::unique_ptr<TensorParallelPlan> (*make)();
};

constexpr std::array kPlans = {Entry{"single", make_single_plan}};

}  // namespace

std::unique_ptr<TensorParallelPlan> make_plan(const std::string& name, int size) {
  if (size != 1) {
    fail(ErrorCode::kUnsupported, "tensor_parallel_size=", size,
         ": this version runs one rank only");
  }
  std::string_view wanted = name == "auto" ? std::string_view("single") : std::string_view(name);
  for (const Entry& entry : kPlans) {
    if (entry.name == wanted) return entry.make();
  }
  fail(ErrorCode::kInvalidArgument, "tensor_parallel_plan=\"", name,
       "\" is unknown; this version has \"auto\" and \"single\"");
}

}  // namespace deinfer
