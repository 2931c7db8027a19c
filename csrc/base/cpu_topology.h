// How many threads are worth running: cores of the affinity mask and CPU quotas of containers.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace deinfer {

/// The threads that this process can run at full speed, at least 1: the physical cores among the
/// CPUs of its affinity mask (threads on one core share its bandwidth and arithmetic units), but
/// no more than the whole CPUs of its cgroup's quota (threads beyond it are stopped in turns, and
/// every barrier waits for them).
int available_cores();

/// The CPUs of the calling thread's affinity mask, ascending.
std::vector<int> allowed_cpus();

/// The physical core of a CPU, by the list of its hardware threads in sysfs' topology below `root`;
/// a CPU that sysfs does not describe is a core of its own.
std::string core_of(int cpu, const std::filesystem::path& root);

/// The physical cores among `cpus`, from sysfs' topology below `root`.
int count_cores(const std::vector<int>& cpus, const std::filesystem::path& root);

/// The whole CPUs that the cgroups (version 1 and 2) of this process allow, at least 1, or 0 when
/// there is no quota. `root` holds proc/self/cgroup and sys/fs/cgroup.
int quota_cpus(const std::filesystem::path& root);

}  // namespace deinfer
