// Collectives among ranks that are threads of this process, one thread per rank.
#include <algorithm>
#include <memory>
#include <vector>

#include "base/check.h"
#include "bench.h"
#include "comm/local.h"

namespace deinfer::bench {
namespace {

struct Group {
  Group(int ranks, std::size_t max_bytes) : team(ranks), data(static_cast<std::size_t>(ranks)) {
    LocalGroup group(ranks, max_bytes);
    for (int rank = 0; rank < ranks; ++rank) communicators.push_back(group.communicator(rank));
  }

  ThreadTeam team;
  std::vector<std::unique_ptr<Communicator>> communicators;
  std::vector<std::vector<float>> data;  // of each rank
};

/// One all-reduce whose result is known.
void verify(Group& group, std::size_t floats) {
  int ranks = group.team.size();
  group.team.run([&](TeamMember& member) {
    auto rank = static_cast<std::size_t>(member.id());
    std::vector<float>& data = group.data[rank];
    data.assign(floats, static_cast<float>(rank + 1));
    group.communicators[rank]->all_reduce(data.data(), floats);
  });
  auto expected = static_cast<float>(ranks * (ranks + 1) / 2);
  for (const std::vector<float>& data : group.data) {
    for (float value : data) {
      if (value != expected) {
        fail(ErrorCode::kInternal, "all_reduce: expected ", expected, ", got ", value);
      }
    }
  }
}

}  // namespace
}  // namespace deinfer::bench

using namespace deinfer;
using bench::Group;
using bench::guarded;

BENCH_API Group* bench_group_create(int ranks, std::size_t max_bytes) {
  return guarded<Group*>(nullptr, [&] { return new Group(ranks, max_bytes); });
}

BENCH_API void bench_group_destroy(Group* group) { delete group; }

/// All-reduces of `floats` numbers, verified once before: nanoseconds[count], of rank 0.
BENCH_API int bench_all_reduce(Group* group, std::size_t floats, int count, double* nanoseconds) {
  return guarded(-1, [&] {
    bench::verify(*group, floats);
    // Zeros: sums of sums would overflow.
    for (std::vector<float>& data : group->data) std::fill(data.begin(), data.end(), 0.0f);
    bench::time_steps(group->team, count, nanoseconds, [&](TeamMember& member, int) {
      auto rank = static_cast<std::size_t>(member.id());
      group->communicators[rank]->all_reduce(group->data[rank].data(), floats);
    });
    return 0;
  });
}
