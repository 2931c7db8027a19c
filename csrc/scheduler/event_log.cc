#include "scheduler/event_log.h"

#include "base/check.h"

namespace deinfer {
namespace {

struct Repeat {
  Scheduler& scheduler;
  const std::function<void(const ScheduledBatch&)>& visit;

  void operator()(const Sequence& sequence) const { scheduler.add(sequence); }
  void operator()(const EventLog::Abort& event) const { scheduler.abort(event.id); }
  void operator()(const EventLog::Expect& event) const { scheduler.expect(event.id, event.length); }
  void operator()(const EventLog::Step& event) const {
    const ScheduledBatch& batch = scheduler.schedule(event.now_us);
    if (EventLog::plan_of(batch) != event.plan) {
      fail(ErrorCode::kInternal, "event log: the step at ", event.now_us, " us planned ",
           batch.items.size(), " sequences and ", batch.num_tokens,
           " tokens, not what the log has");
    }
    visit(batch);
  }
  void operator()(const EventLog::Update& event) const { scheduler.update(event.sampled); }
};

}  // namespace

std::vector<EventLog::Part> EventLog::plan_of(const ScheduledBatch& batch) {
  std::vector<Part> plan;
  for (const ScheduledSequence& item : batch.items) {
    plan.push_back({item.sequence->id, item.num_tokens});
  }
  return plan;
}

void EventLog::replay(Scheduler& scheduler,
                      const std::function<void(const ScheduledBatch&)>& visit) const {
  for (const Event& event : events_) std::visit(Repeat{scheduler, visit}, event);
}

}  // namespace deinfer
