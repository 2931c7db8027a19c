// First come, first served: by priority, then arrival.
#include <set>

#include "scheduler/scheduling_policy.h"

namespace deinfer {
namespace {

class FcfsPolicy final : public SchedulingPolicy {
 public:
  void push(Sequence& sequence) override { waiting_.insert(&sequence); }
  void remove(Sequence& sequence) override { waiting_.erase(&sequence); }
  std::size_t size() const override { return waiting_.size(); }

  Sequence* next(const SchedulingContext&) override {
    return waiting_.empty() ? nullptr : *waiting_.begin();
  }

 private:
  struct Before {
    bool operator()(const Sequence* a, const Sequence* b) const { return runs_before(*a, *b); }
  };

  std::set<Sequence*, Before> waiting_;
};

}  // namespace

std::unique_ptr<SchedulingPolicy> make_fcfs_policy(const PolicyConfig&) {
  return std::make_unique<FcfsPolicy>();
}

}  // namespace deinfer
