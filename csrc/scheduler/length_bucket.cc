// Buckets of similar expected length, the shortest first; first come, first served in each. Like
// sjf, but a predictor's small errors do not change the order.
#include <algorithm>
#include <cmath>
#include <utility>

#include "scheduler/waiting_queue.h"

namespace deinfer {
namespace {

class LengthBucketPolicy final : public KeyedPolicy {
 public:
  explicit LengthBucketPolicy(PolicyConfig config) : config_(std::move(config)) {}

 protected:
  double key(float remaining) const override {
    const std::vector<int>& edges = config_.bucket_edges;
    const auto edge = std::ranges::lower_bound(edges, remaining);
    const auto bucket = static_cast<double>(edge - edges.begin());
    if (edge != edges.end()) return bucket;
    const double beyond = remaining - static_cast<float>(edges.empty() ? 0 : edges.back());
    return bucket + std::ceil(beyond / config_.bucket_width) - 1.0;
  }

 private:
  const PolicyConfig config_;
};

}  // namespace

std::unique_ptr<SchedulingPolicy> make_length_bucket_policy(const PolicyConfig& config) {
  return std::make_unique<LengthBucketPolicy>(config);
}

}  // namespace deinfer
