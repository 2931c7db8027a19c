// A library with the functions of NCCL that deinfer uses, for ranks that are threads with streams
// of emulated devices. It is loaded at run time, as NCCL is.
//
// As NCCL does, it begins to send and to receive when the stream comes to it; a send ends when it
// has been received; two ranks cannot be captured before they are connected; and destroying or
// aborting a communicator waits until graphs that have its work are gone.
// NCCL User Guide: "NCCL API", "Group Calls", "Using NCCL with CUDA Graphs".
#include "fake_nccl.h"

#include <cuda_runtime.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace {

enum Result { kSuccess = 0, kInvalidArgument = 4, kInvalidUsage = 5 };

struct UniqueId {
  char bytes[128];
};

/// A send that the sender's stream has come to.
struct Offer {
  const void* data;
  std::size_t bytes;
  bool taken = false;
};

/// Ranks with the same id.
struct Group {
  std::mutex mutex;
  std::condition_variable changed;
  int size = 0;
  int arrived = 0;
  std::map<std::pair<int, int>, std::deque<std::shared_ptr<Offer>>> offers;  // by (from, to)
};

struct Comm {
  std::shared_ptr<Group> group;
  int rank = 0;
  std::atomic<bool> aborted{false};
  std::set<int> peers;                                    // that are connected
  std::shared_ptr<int> graphs = std::make_shared<int>();  // shared by the work that is recorded
};

struct Operation {
  bool sends;
  void* data;
  std::size_t bytes;
  int peer;
  std::shared_ptr<Offer> offer;  // of a send, once the stream has come to it
  bool done = false;
};

struct Call {
  Operation operation;
  Comm* comm;
  cudaStream_t stream;
};

emulation::FakeNccl state;
std::mutex groups_mutex;
std::map<int, std::shared_ptr<Group>> groups;  // by the number in the id
int next_id = 1;
thread_local int depth = 0;
thread_local std::vector<Call> calls;

/// As far as the other ranks let it.
void advance(Group& group, int rank, Operation& operation) {
  if (operation.done) return;
  if (operation.sends) {
    if (operation.offer == nullptr) {
      operation.offer = std::make_shared<Offer>(Offer{operation.data, operation.bytes});
      group.offers[{rank, operation.peer}].push_back(operation.offer);
    }
    operation.done = operation.offer->taken;
    return;
  }
  auto& offers = group.offers[{operation.peer, rank}];
  if (offers.empty()) return;
  if (offers.front()->bytes != operation.bytes) {
    std::fprintf(stderr, "fake NCCL: rank %d sends %zu bytes, rank %d wants %zu\n", operation.peer,
                 offers.front()->bytes, rank, operation.bytes);
    std::abort();
  }
  std::memcpy(operation.data, offers.front()->data, operation.bytes);
  state.bytes += operation.bytes;
  offers.front()->taken = true;
  offers.pop_front();
  operation.done = true;
}

int enqueue_group() {
  std::vector<Call> all = std::exchange(calls, {});
  if (all.empty()) return kSuccess;
  Comm* comm = all[0].comm;
  cudaStream_t stream = all[0].stream;
  const bool captures = emulation::is_capturing(stream);
  std::vector<Operation> operations;
  for (Call& call : all) {
    if (call.comm != comm || call.stream != stream) return kInvalidUsage;
    const bool is_new = comm->peers.insert(call.operation.peer).second;
    if (is_new && captures) return kInvalidUsage;
    operations.push_back(call.operation);
  }
  std::shared_ptr<int> recorded = captures ? comm->graphs : nullptr;
  emulation::enqueue(
      stream, [comm, group = comm->group, rank = comm->rank, recorded, operations]() mutable {
        std::lock_guard lock(group->mutex);
        if (comm->aborted) return true;
        bool done = true;
        for (Operation& operation : operations) {
          advance(*group, rank, operation);
          done = done && operation.done;
        }
        if (done) ++state.groups;
        return done;
      });
  return kSuccess;
}

int add(bool sends, void* data, std::size_t bytes, int peer, Comm* comm, void* stream) {
  if (comm == nullptr || peer < 0 || peer >= comm->group->size || peer == comm->rank) {
    return kInvalidArgument;
  }
  calls.push_back({{sends, data, bytes, peer, nullptr}, comm, static_cast<cudaStream_t>(stream)});
  return depth > 0 ? static_cast<int>(kSuccess) : enqueue_group();
}

/// The work that streams still have may look at the communicator, which therefore stays.
int end(Comm* comm) {
  while (comm->graphs.use_count() > 1) std::this_thread::yield();
  --state.comms;
  return kSuccess;
}

}  // namespace

extern "C" {

EMULATION_EXPORT emulation::FakeNccl* fake_nccl() { return &state; }

EMULATION_EXPORT int ncclGetVersion(int* version) {
  *version = state.version;
  return kSuccess;
}

EMULATION_EXPORT const char* ncclGetErrorString(int result) {
  return result == kSuccess ? "no error" : "fake error";
}

EMULATION_EXPORT int ncclGetUniqueId(UniqueId* id) {
  std::lock_guard lock(groups_mutex);
  *id = {};
  std::memcpy(id->bytes, &next_id, sizeof next_id);
  groups[next_id++] = std::make_shared<Group>();
  return kSuccess;
}

EMULATION_EXPORT int ncclCommInitRank(Comm** comm, int ranks, UniqueId id, int rank) {
  if (state.init_result != kSuccess) return state.init_result;
  int number = 0;
  std::memcpy(&number, id.bytes, sizeof number);
  std::shared_ptr<Group> group;
  {
    std::lock_guard lock(groups_mutex);
    auto found = groups.find(number);
    if (found == groups.end()) return kInvalidArgument;
    group = found->second;
  }
  std::unique_lock lock(group->mutex);
  group->size = ranks;
  ++group->arrived;
  group->changed.notify_all();
  group->changed.wait(lock, [&] { return group->arrived == ranks; });
  // Never deleted: see end().
  static std::deque<std::unique_ptr<Comm>> all;
  std::lock_guard all_lock(groups_mutex);
  all.push_back(std::make_unique<Comm>());
  *comm = all.back().get();
  (*comm)->group = group;
  (*comm)->rank = rank;
  ++state.comms;
  return kSuccess;
}

EMULATION_EXPORT int ncclCommDestroy(Comm* comm) { return end(comm); }

EMULATION_EXPORT int ncclCommAbort(Comm* comm) {
  comm->aborted = true;
  ++state.aborts;
  return end(comm);
}

EMULATION_EXPORT int ncclCommGetAsyncError(Comm*, int* error) {
  *error = state.async_error;
  return kSuccess;
}

EMULATION_EXPORT int ncclGroupStart() {
  ++depth;
  return kSuccess;
}

EMULATION_EXPORT int ncclGroupEnd() {
  if (--depth > 0) return kSuccess;
  return enqueue_group();
}

EMULATION_EXPORT int ncclSend(const void* data, std::size_t count, int type, int peer, Comm* comm,
                              void* stream) {
  if (type != 0) return kInvalidArgument;
  if (state.send_result != kSuccess) return state.send_result;
  return add(true, const_cast<void*>(data), count, peer, comm, stream);
}

EMULATION_EXPORT int ncclRecv(void* data, std::size_t count, int type, int peer, Comm* comm,
                              void* stream) {
  if (type != 0) return kInvalidArgument;
  return add(false, data, count, peer, comm, stream);
}

}  // extern "C"
