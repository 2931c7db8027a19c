// Which CPUs the threads of a tensor-parallel rank run on.
#pragma once

#include <sched.h>

#include <filesystem>
#include <vector>

namespace deinfer {

/// The part of rank `rank` of `size` in `cpus`: whole physical cores, near-equal numbers of them,
/// and those of one memory node together, so that a rank's memory is local. From sysfs' topology
/// below `root`; CPUs that it does not describe are cores of their own on one node.
std::vector<int> cpus_of_rank(const std::vector<int>& cpus, int rank, int size,
                              const std::filesystem::path& root);

/// While it lives, the calling thread runs on its rank's CPUs; threads that it creates inherit
/// them for good, and what they touch first is on their node. Does nothing for a single rank, or
/// where the affinity mask has fewer than size * threads cores.
class CoreBinding {
 public:
  CoreBinding(int rank, int size, int threads);
  ~CoreBinding();
  CoreBinding(const CoreBinding&) = delete;
  CoreBinding& operator=(const CoreBinding&) = delete;

 private:
  cpu_set_t before_;
  bool bound_ = false;
};

}  // namespace deinfer
