// The table of scheduling policies. A new one is a file beside this, a declaration and a line here.
#include <cmath>
#include <string>

#include "base/check.h"
#include "scheduler/scheduling_policy.h"

namespace deinfer {

std::unique_ptr<SchedulingPolicy> make_fcfs_policy(const PolicyConfig&);
std::unique_ptr<SchedulingPolicy> make_hrrn_policy(const PolicyConfig&);
std::unique_ptr<SchedulingPolicy> make_length_bucket_policy(const PolicyConfig&);
std::unique_ptr<SchedulingPolicy> make_longest_tail_policy(const PolicyConfig&);
std::unique_ptr<SchedulingPolicy> make_sjf_policy(const PolicyConfig&);
std::unique_ptr<SchedulingPolicy> make_static_policy(const PolicyConfig&);
std::unique_ptr<SchedulingPolicy> make_static_bucket_policy(const PolicyConfig&);

namespace {

struct PolicyEntry {
  std::string_view name;
  std::unique_ptr<SchedulingPolicy> (*make)(const PolicyConfig&);
  Promotion promotion;
};

/// Whoever comes last in an order that new arrivals can change must not wait forever.
constexpr Promotion kAfterAMinute{.after_s = 60.0};
/// Offline, nobody waits for a single answer.
constexpr Promotion kAfterAnHour{.after_s = 3600.0};

constexpr PolicyEntry kPolicies[] = {
    {"fcfs", make_fcfs_policy, {}},
    {"hrrn", make_hrrn_policy, {}},  // waiting raises the ratio of all
    {"length_bucket", make_length_bucket_policy, kAfterAMinute},
    {"longest_tail", make_longest_tail_policy, kAfterAnHour},
    {"sjf", make_sjf_policy, kAfterAMinute},
    {"static", make_static_policy, {}},  // batches follow each other by arrival
    {"static_bucket", make_static_bucket_policy, {}},
};

const PolicyEntry& find_policy(std::string_view name) {
  std::string known;
  for (const PolicyEntry& entry : kPolicies) {
    if (entry.name == name) return entry;
    known += str_cat(known.empty() ? "" : ", ", entry.name);
  }
  fail(ErrorCode::kInvalidArgument, "scheduling_policy=\"", name, "\" is unknown; known: ", known);
}

}  // namespace

void PolicyConfig::validate() const {
  check_argument(bucket_width >= 1, "bucket_width must be at least 1, got ", bucket_width);
  for (std::size_t i = 0; i < bucket_edges.size(); ++i) {
    check_argument(bucket_edges[i] > (i == 0 ? 0 : bucket_edges[i - 1]),
                   "bucket_edges must be positive and ascending, got ", bucket_edges[i],
                   " at position ", i);
  }
  check_argument(tail_factor >= 0.0 && std::isfinite(tail_factor),
                 "tail_factor must be a finite number >= 0, got ", tail_factor);
  static_batches.validate();
}

std::unique_ptr<SchedulingPolicy> make_policy(std::string_view name, const PolicyConfig& config) {
  const PolicyEntry& entry = find_policy(name);
  config.validate();
  return entry.make(config);
}

Promotion default_promotion(std::string_view name) { return find_policy(name).promotion; }

}  // namespace deinfer
