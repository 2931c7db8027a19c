#include "base/cpu_topology.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <fstream>
#include <string>
#include <thread>

#include "base/core_binding.h"
#include "tiny_model.h"

namespace deinfer {
namespace {

class CpuTopology : public testing::Test {
 protected:
  void write(const std::string& path, const std::string& text) {
    std::filesystem::path file = directory_.path() / path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  const std::filesystem::path& root() const { return directory_.path(); }

 private:
  test::TemporaryDirectory directory_;
};

TEST_F(CpuTopology, SiblingsShareACore) {
  for (int cpu = 0; cpu < 8; ++cpu) {
    write("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list",
          std::to_string(cpu % 4) + "," + std::to_string(cpu % 4 + 4) + "\n");
  }
  EXPECT_EQ(count_cores({0, 1, 2, 3, 4, 5, 6, 7}, root()), 4);
  EXPECT_EQ(count_cores({1, 5}, root()), 1);
  EXPECT_EQ(count_cores({1, 6}, root()), 2);
  EXPECT_EQ(count_cores({0, 8, 9}, root()), 3) << "CPUs that sysfs does not describe";
  EXPECT_EQ(count_cores({}, root()), 0);
}

TEST_F(CpuTopology, RanksGetWholeCoresOfOneNode) {
  for (int cpu = 0; cpu < 8; ++cpu) {  // cores 0..3 of two threads; odd cores are on node 1
    std::string path = "sys/devices/system/cpu/cpu" + std::to_string(cpu);
    write(path + "/topology/thread_siblings_list",
          std::to_string(cpu % 4) + "," + std::to_string(cpu % 4 + 4) + "\n");
    write(path + "/node" + std::to_string(cpu % 2) + "/cpulist", "");
  }
  std::vector<int> all{0, 1, 2, 3, 4, 5, 6, 7};
  EXPECT_EQ(cpus_of_rank(all, 0, 2, root()), (std::vector<int>{0, 4, 2, 6}));
  EXPECT_EQ(cpus_of_rank(all, 1, 2, root()), (std::vector<int>{1, 5, 3, 7}));
  EXPECT_EQ(cpus_of_rank(all, 2, 4, root()), (std::vector<int>{1, 5}));
  EXPECT_EQ(cpus_of_rank({8, 9, 10}, 1, 2, root()), (std::vector<int>{9, 10}));
}

TEST_F(CpuTopology, NoQuota) {
  EXPECT_EQ(quota_cpus(root()), 0);
  write("proc/self/cgroup", "0::/a\n3:cpuset:/b\n");
  write("sys/fs/cgroup/a/cpu.max", "max 100000\n");
  EXPECT_EQ(quota_cpus(root()), 0);
}

TEST_F(CpuTopology, SmallestQuotaOfTheAncestorsCounts) {
  write("proc/self/cgroup", "0::/pod/container\n");
  write("sys/fs/cgroup/pod/container/cpu.max", "650000 100000\n");
  EXPECT_EQ(quota_cpus(root()), 6);
  write("sys/fs/cgroup/pod/cpu.max", "400000 100000\n");
  EXPECT_EQ(quota_cpus(root()), 4);
  write("sys/fs/cgroup/cpu.max", "50000 100000\n");
  EXPECT_EQ(quota_cpus(root()), 1) << "half a CPU";
}

TEST_F(CpuTopology, VersionOneAndContainersThatSeeTheirGroupAsTheRoot) {
  write("proc/self/cgroup", "4:cpu,cpuacct:/docker/0123\n1:name=systemd:/docker/0123\n");
  write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "300000\n");
  write("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(quota_cpus(root()), 3);
  write("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n");
  EXPECT_EQ(quota_cpus(root()), 0);
}

TEST(AvailableCores, FollowTheAffinityMask) {
  EXPECT_GE(available_cores(), 1);
  cpu_set_t all;
  ASSERT_EQ(sched_getaffinity(0, sizeof all, &all), 0);
  int cpu = 0;
  while (!CPU_ISSET(cpu, &all)) ++cpu;
  int cores = 0;
  std::thread([&] {  // its own mask: the process keeps its
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
    cores = available_cores();
  })
      .join();
  EXPECT_EQ(cores, 1);
}

}  // namespace
}  // namespace deinfer
