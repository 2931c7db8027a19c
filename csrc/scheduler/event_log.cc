#include "scheduler/event_log.h"

namespace deinfer {
namespace {

struct Repeat {
  Scheduler& scheduler;
  const std::function<void(const ScheduledBatch&)>& visit;

  void operator()(const Sequence& sequence) const { scheduler.add(sequence); }
  void operator()(const EventLog::Abort& event) const { scheduler.abort(event.id); }
  void operator()(const EventLog::Expect& event) const { scheduler.expect(event.id, event.length); }
  void operator()(const EventLog::Step& event) const { visit(scheduler.schedule(event.now_us)); }
  void operator()(const EventLog::Update& event) const { scheduler.update(event.sampled); }
};

}  // namespace

void EventLog::replay(Scheduler& scheduler,
                      const std::function<void(const ScheduledBatch&)>& visit) const {
  for (const Event& event : events_) std::visit(Repeat{scheduler, visit}, event);
}

}  // namespace deinfer
