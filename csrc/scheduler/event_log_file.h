// Event logs as files, one JSON value per line.
#pragma once

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>

#include "scheduler/event_log.h"
#include "scheduler/scheduler.h"

namespace deinfer {

/// What a Scheduler is made of: what a log needs to be replayed.
struct SchedulerSetup {
  SchedulerConfig config;
  std::string policy = "fcfs";
  PolicyConfig policy_config;

  /// Throws as Scheduler and make_policy() do.
  std::unique_ptr<Scheduler> make() const;
};

/// Writes a log while it grows. The first line says what the scheduler is made of; every other one
/// is an event, in order:
///
///   {"add": {"id": 1, "arrival": 0, "arrival_us": 5, "tokens": [..], ...}}
///   {"abort": 1}      {"expect": {"id": 1, "lengths": [..], "probabilities": [..]}}
///   {"step": 17, "plan": [[1, 12], [2, 1]]}      microseconds; [id, tokens] of each item
///   {"update": [[1, 42, false]]}                 [id, token, finished]
class EventLogWriter {
 public:
  /// Begins the file. Throws Error(kInvalidArgument) naming a path that cannot be written.
  EventLogWriter(std::filesystem::path path, const SchedulerSetup& setup);
  /// Adds the events, and empties the log.
  void drain(EventLog& log);

 private:
  const std::filesystem::path path_;
  std::ofstream file_;
};

/// Reads what an EventLogWriter wrote. Throws Error(kInvalidArgument) naming the file, the line and
/// what is wrong with it.
std::pair<SchedulerSetup, EventLog> read_event_log(const std::filesystem::path& path);

}  // namespace deinfer
