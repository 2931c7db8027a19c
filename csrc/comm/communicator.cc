#include "comm/communicator.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace deinfer {
namespace {

constexpr std::size_t kBlockFloats = 2048;  // 8 KiB, so that partial sums stay in the L1 cache

/// How many of the `left` items of `item_bytes` go into the next exchange.
std::size_t piece_of(std::size_t left, std::size_t item_bytes, std::size_t max_bytes,
                     Collective kind) {
  check_argument(max_bytes >= item_bytes, collective_name(kind), ": needs contributions of ",
                 item_bytes, " bytes, the communicator has at most ", max_bytes);
  std::size_t most = max_bytes / item_bytes;
  // Pieces that begin on cache lines, where they are long enough for it.
  if (most > 64) most = most / 64 * 64;
  return std::min(left, most);
}

/// out[count] = the sum over ranks of their contributions, each `offset` floats on.
void sum_contributions(const Communicator& comm, Ticket ticket, std::size_t offset,
                       std::size_t count, float* out) {
  auto part = [&](int rank) {
    return reinterpret_cast<const float*>(comm.contribution_of(rank, ticket)) + offset;
  };
  for (std::size_t begin = 0; begin < count; begin += kBlockFloats) {
    std::size_t size = std::min(kBlockFloats, count - begin);
    float* sums = out + begin;
    const float* first = part(0) + begin;
    if (comm.size() == 1) {
      std::memcpy(sums, first, size * sizeof(float));
      continue;
    }
    const float* second = part(1) + begin;
    for (std::size_t i = 0; i < size; ++i) sums[i] = first[i] + second[i];
    for (int rank = 2; rank < comm.size(); ++rank) {
      const float* addends = part(rank) + begin;
      for (std::size_t i = 0; i < size; ++i) sums[i] += addends[i];
    }
  }
}

/// memcpy that takes null for nothing.
void copy_bytes(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

}  // namespace

const char* collective_name(Collective kind) {
  switch (kind) {
    case Collective::kAllReduce: return "all_reduce";
    case Collective::kAllGather: return "all_gather";
    case Collective::kReduceScatter: return "reduce_scatter";
    case Collective::kBroadcast: return "broadcast";
    case Collective::kGather: return "gather";
    case Collective::kBarrier: return "barrier";
  }
  return "unknown";
}

std::uint64_t wire_bytes(Collective kind, std::size_t bytes, int ranks) {
  std::uint64_t b = bytes;
  auto n = static_cast<std::uint64_t>(ranks);
  switch (kind) {
    case Collective::kAllReduce: return 2 * (n - 1) * b / n;
    case Collective::kAllGather: return (n - 1) * b;
    case Collective::kReduceScatter:
    case Collective::kBroadcast:
    case Collective::kGather: return (n - 1) * b / n;
    case Collective::kBarrier: return 0;
  }
  return 0;
}

void Communicator::count(Collective kind, std::size_t bytes) {
  TrafficCounter& counter = traffic_[static_cast<std::size_t>(kind)];
  ++counter.calls;
  counter.bytes += bytes;
  counter.wire_bytes += wire_bytes(kind, bytes, size());
}

void Communicator::all_reduce(float* data, std::size_t count) {
  for (std::size_t begin = 0; begin < count;) {
    std::size_t piece = piece_of(count - begin, sizeof(float), max_bytes(), Collective::kAllReduce);
    std::size_t bytes = piece * sizeof(float);
    copy_bytes(contribution(bytes), data + begin, bytes);
    Ticket ticket = start(Collective::kAllReduce, bytes);
    wait(ticket);
    sum_contributions(*this, ticket, 0, piece, data + begin);
    finish(ticket);
    begin += piece;
  }
}

void Communicator::all_gather(const void* part, std::size_t bytes, void* out) {
  for (std::size_t begin = 0; begin < bytes;) {
    std::size_t piece = piece_of(bytes - begin, 1, max_bytes(), Collective::kAllGather);
    copy_bytes(contribution(piece), static_cast<const std::byte*>(part) + begin, piece);
    Ticket ticket = start(Collective::kAllGather, piece);
    wait(ticket);
    for (int other = 0; other < size(); ++other) {
      std::byte* to = static_cast<std::byte*>(out) + static_cast<std::size_t>(other) * bytes;
      copy_bytes(to + begin, contribution_of(other, ticket), piece);
    }
    finish(ticket);
    begin += piece;
  }
}

void Communicator::reduce_scatter(const float* data, std::size_t count, float* out) {
  auto ranks = static_cast<std::size_t>(size());
  for (std::size_t begin = 0; begin < count;) {
    // A contribution has the same piece of the parts of all ranks, one after another.
    std::size_t piece =
        piece_of(count - begin, ranks * sizeof(float), max_bytes(), Collective::kReduceScatter);
    std::size_t bytes = ranks * piece * sizeof(float);
    auto* pieces = reinterpret_cast<float*>(contribution(bytes));
    for (std::size_t part = 0; part < ranks; ++part) {
      copy_bytes(pieces + part * piece, data + part * count + begin, piece * sizeof(float));
    }
    Ticket ticket = start(Collective::kReduceScatter, bytes);
    wait(ticket);
    sum_contributions(*this, ticket, static_cast<std::size_t>(rank()) * piece, piece, out + begin);
    finish(ticket);
    begin += piece;
  }
}

void Communicator::broadcast(void* data, std::size_t bytes, int root) {
  check_argument(root >= 0 && root < size(), "broadcast: there is no rank ", root, " among ",
                 size());
  for (std::size_t begin = 0; begin < bytes;) {
    std::size_t piece = piece_of(bytes - begin, 1, max_bytes(), Collective::kBroadcast);
    std::byte* here = static_cast<std::byte*>(data) + begin;
    std::byte* slot = contribution(piece);
    if (rank() == root) copy_bytes(slot, here, piece);
    Ticket ticket = start(Collective::kBroadcast, piece);
    wait(ticket);
    if (rank() != root) copy_bytes(here, contribution_of(root, ticket), piece);
    finish(ticket);
    begin += piece;
  }
}

void Communicator::barrier() {
  contribution(0);
  Ticket ticket = start(Collective::kBarrier, 0);
  wait(ticket);
  finish(ticket);
}

}  // namespace deinfer
