#include "base/cpu_topology.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>

namespace deinfer {
namespace {

namespace fs = std::filesystem;

/// CPUs that quota / period allow; 0 for none.
int whole_cpus(long long quota, long long period) {
  if (quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::clamp<long long>(quota / period, 1, 1 << 20));
}

int quota_of(const fs::path& group) {
  std::string quota;
  long long period = 0;
  if (std::ifstream v2(group / "cpu.max"); v2 >> quota >> period) {
    return quota == "max" ? 0 : whole_cpus(std::atoll(quota.c_str()), period);
  }
  long long quota_us = 0;
  std::ifstream v1_quota(group / "cpu.cfs_quota_us");
  std::ifstream v1_period(group / "cpu.cfs_period_us");
  return v1_quota >> quota_us && v1_period >> period ? whole_cpus(quota_us, period) : 0;
}

}  // namespace

std::string core_of(int cpu, const fs::path& root) {
  std::string name = "cpu" + std::to_string(cpu);
  std::ifstream file(root / "sys/devices/system/cpu" / name / "topology/thread_siblings_list");
  std::string siblings;
  return file >> siblings ? siblings : name;
}

int count_cores(const std::vector<int>& cpus, const fs::path& root) {
  std::set<std::string> cores;
  for (int cpu : cpus) cores.insert(core_of(cpu, root));
  return static_cast<int>(cores.size());
}

int quota_cpus(const fs::path& root) {
  int least = 0;
  auto consider = [&](const fs::path& group) {
    int cpus = quota_of(group);
    if (cpus > 0) least = least == 0 ? cpus : std::min(least, cpus);
  };
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    // hierarchy:controllers:path; version 2 has no controllers.
    std::size_t first = line.find(':');
    std::size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    fs::path mount = root / "sys/fs/cgroup";
    if (controllers.find(",cpu,") != std::string::npos) {
      mount /= "cpu";
    } else if (controllers != ",,") {
      continue;
    }
    // Every ancestor limits too; a container may see its own group as the root.
    fs::path path = fs::path(line.substr(second + 1)).relative_path();
    for (; !path.empty(); path = path.parent_path()) consider(mount / path);
    consider(mount);
  }
  return least;
}

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    }
  }
  return cpus;
}

int available_cores() {
  int cores = std::max(1, count_cores(allowed_cpus(), "/"));
  int quota = quota_cpus("/");
  return quota > 0 ? std::min(cores, quota) : cores;
}

}  // namespace deinfer
