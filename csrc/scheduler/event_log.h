// Everything that a scheduler was told, to be told again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <variant>
#include <vector>

#include "scheduler/scheduler.h"

namespace deinfer {

/// The calls that change a Scheduler, in order. The same calls to a scheduler of the same
/// configuration and policy give the same batches, to the last block number.
class EventLog {
 public:
  struct Abort {
    SequenceId id = 0;
  };
  struct Expect {
    SequenceId id = 0;
    LengthDistribution length;
  };
  struct Part {
    SequenceId id = 0;
    int num_tokens = 0;
    bool operator==(const Part&) const = default;
  };
  struct Step {
    std::int64_t now_us = 0;
    std::vector<Part> plan = {};  // what the step computed
  };
  struct Update {
    std::vector<SampledToken> sampled;
  };
  using Event = std::variant<Sequence, Abort, Expect, Step, Update>;

  /// An event of one of the kinds above. Built in its place: g++ 12 warns of moved variants under
  /// the thread sanitizer.
  template <typename Kind>
  void add(Kind event) {
    events_.emplace_back(std::in_place_type<Kind>, std::move(event));
  }
  std::size_t size() const { return events_.size(); }
  std::span<const Event> events() const { return events_; }
  void clear() { events_.clear(); }
  static std::vector<Part> plan_of(const ScheduledBatch& batch);
  /// Repeats the calls, of which the log holds only those that succeeded; `visit` sees each planned
  /// batch. Throws Error(kInternal) naming the step whose plan is not the log's.
  void replay(Scheduler& scheduler, const std::function<void(const ScheduledBatch&)>& visit) const;

 private:
  std::vector<Event> events_;
};

}  // namespace deinfer
