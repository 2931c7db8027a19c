// Everything that a scheduler was told, to be told again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
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
  struct Step {
    std::int64_t now_us = 0;
  };
  struct Update {
    std::vector<SampledToken> sampled;
  };
  using Event = std::variant<Sequence, Abort, Expect, Step, Update>;

  void add(Event event) { events_.push_back(std::move(event)); }
  std::size_t size() const { return events_.size(); }
  /// Repeats the calls, of which the log holds only those that succeeded; `visit` sees each planned
  /// batch.
  void replay(Scheduler& scheduler, const std::function<void(const ScheduledBatch&)>& visit) const;

 private:
  std::vector<Event> events_;
};

}  // namespace deinfer
