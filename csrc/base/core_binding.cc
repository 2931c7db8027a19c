#include "base/core_binding.h"

#include <algorithm>
#include <map>
#include <string>

#include "base/cpu_topology.h"

namespace deinfer {
namespace {

namespace fs = std::filesystem;

/// The memory node of a CPU; 0 where sysfs does not say.
int node_of(const fs::path& cpu) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(cpu, error)) {
    std::string name = entry.path().filename().string();
    if (name.starts_with("node")) return std::atoi(name.c_str() + 4);
  }
  return 0;
}

}  // namespace

std::vector<int> cpus_of_rank(const std::vector<int>& cpus, int rank, int size,
                              const fs::path& root) {
  // Cores in the order of (node, first CPU), each with its hardware threads.
  std::map<std::pair<int, int>, std::vector<int>> cores;
  std::map<std::string, std::pair<int, int>> places;
  for (int cpu : cpus) {
    fs::path path = root / "sys/devices/system/cpu" / ("cpu" + std::to_string(cpu));
    auto place = places.try_emplace(core_of(cpu, root), node_of(path), cpu).first->second;
    cores[place].push_back(cpu);
  }
  auto count = static_cast<std::int64_t>(cores.size());
  std::int64_t begin = count * rank / size;
  std::int64_t end = count * (rank + 1) / size;
  std::vector<int> own;
  std::int64_t index = 0;
  for (const auto& [place, threads] : cores) {
    if (index >= begin && index < end) own.insert(own.end(), threads.begin(), threads.end());
    ++index;
  }
  return own;
}

CoreBinding::CoreBinding(int rank, int size, int threads) {
  std::vector<int> cpus = allowed_cpus();
  if (size == 1 || count_cores(cpus, "/") < size * threads) return;
  if (sched_getaffinity(0, sizeof before_, &before_) != 0) return;
  cpu_set_t own;
  CPU_ZERO(&own);
  for (int cpu : cpus_of_rank(cpus, rank, size, "/")) CPU_SET(static_cast<unsigned>(cpu), &own);
  bound_ = sched_setaffinity(0, sizeof own, &own) == 0;
}

CoreBinding::~CoreBinding() {
  if (bound_) sched_setaffinity(0, sizeof before_, &before_);
}

}  // namespace deinfer
