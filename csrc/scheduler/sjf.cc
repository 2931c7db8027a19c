// Shortest job first: whoever is expected to end soonest starts next. Running sequences run on.
#include "scheduler/waiting_queue.h"

namespace deinfer {
namespace {

class SjfPolicy final : public KeyedPolicy {
 protected:
  double key(float remaining) const override { return remaining; }
};

}  // namespace

std::unique_ptr<SchedulingPolicy> make_sjf_policy(const PolicyConfig&) {
  return std::make_unique<SjfPolicy>();
}

}  // namespace deinfer
