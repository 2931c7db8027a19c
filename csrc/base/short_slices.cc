#include "base/short_slices.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <utility>

namespace deinfer {
namespace {

constexpr std::uint64_t kShortest = 100'000;  // ns; Linux makes less as much

/// Linux's sched_attr, which libc does not declare.
struct Attributes {
  std::uint32_t size = sizeof(Attributes);
  std::uint32_t policy = 0;
  std::uint64_t flags = 0;
  std::int32_t nice = 0;
  std::uint32_t priority = 0;
  std::uint64_t runtime = 0;  // of SCHED_OTHER and SCHED_BATCH: the slice, ns
  std::uint64_t deadline = 0;
  std::uint64_t period = 0;
};

/// Of the calling thread, outermost first.
struct State {
  int depth = 0;
  std::uint64_t slice_before = 0;  // 0: unchanged
};
thread_local State state;

/// Whether the calling thread has a slice. Older kernels say 0; of real-time threads, runtime means
/// something else.
bool get(Attributes& attributes) {
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return false;
  bool fair = attributes.policy == SCHED_OTHER || attributes.policy == SCHED_BATCH;
  return fair && attributes.runtime != 0;
}

/// The slice that the calling thread had, 0 where it cannot be told or set.
std::uint64_t set_slice(std::uint64_t slice) {
  Attributes attributes;
  if (!get(attributes) || attributes.runtime == slice) return 0;
  std::uint64_t before = std::exchange(attributes.runtime, slice);
  return syscall(SYS_sched_setattr, 0, &attributes, 0) == 0 ? before : 0;
}

}  // namespace

bool ShortSlices::known() {
  Attributes attributes;
  return get(attributes);
}

ShortSlices::ShortSlices() {
  if (state.depth++ == 0) state.slice_before = set_slice(kShortest);
}

ShortSlices::~ShortSlices() {
  if (--state.depth == 0 && state.slice_before != 0) set_slice(state.slice_before);
}

}  // namespace deinfer
