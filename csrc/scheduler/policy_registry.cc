// The table of scheduling policies. A new one is a file beside this, a declaration and a line here.
#include <string>

#include "base/check.h"
#include "scheduler/scheduling_policy.h"
#include "scheduler/static_bucket.h"

namespace deinfer {

std::unique_ptr<SchedulingPolicy> make_fcfs_policy();

namespace {

struct PolicyEntry {
  std::string_view name;
  std::unique_ptr<SchedulingPolicy> (*make)();
};

constexpr PolicyEntry kPolicies[] = {
    {"fcfs", make_fcfs_policy},
    {"static", [] { return make_static_batch_policy(StaticBatchConfig::plain(16)); }},
    {"static_bucket", [] { return make_static_batch_policy({}); }},
};

}  // namespace

std::unique_ptr<SchedulingPolicy> make_policy(std::string_view name) {
  std::string known;
  for (const PolicyEntry& entry : kPolicies) {
    if (entry.name == name) return entry.make();
    known += str_cat(known.empty() ? "" : ", ", entry.name);
  }
  fail(ErrorCode::kInvalidArgument, "scheduling_policy=\"", name, "\" is unknown; known: ", known);
}

}  // namespace deinfer
