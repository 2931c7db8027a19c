// Collectives among the tensor-parallel ranks of one engine.
//
// An exchange has four steps, so that computation fits between them and results need no copy: a
// rank writes its contribution into memory of the communicator, starts the exchange, waits until
// the contributions of all ranks are there, reads them, and says that it has finished. Sums are the
// reader's: over ranks in ascending order, so that every rank gets the same bits. Several exchanges
// may be under way; they are started, and finished, in order.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace deinfer {

/// What an exchange means: for counters and link models. With N ranks and contributions of b bytes,
/// a rank sends: all-reduce 2 (N-1)/N b, all-gather (N-1) b, reduce-scatter (N-1)/N b; broadcast
/// and gather (N-1)/N b on average over the ranks; a barrier nothing.
enum class Collective : std::uint8_t {
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kBroadcast,
  kGather,
  kBarrier,
};
inline constexpr std::size_t kNumCollectives = 6;

/// "all_reduce", ...
const char* collective_name(Collective kind);

/// What a rank sends by the formulas above, rounded down; `bytes` is one rank's contribution.
std::uint64_t wire_bytes(Collective kind, std::size_t bytes, int ranks);

/// What one rank has taken part in.
struct TrafficCounter {
  std::uint64_t calls = 0;
  std::uint64_t bytes = 0;       // of its contributions
  std::uint64_t wire_bytes = 0;  // that it sends by the formulas above, rounded down per call
};
using Traffic = std::array<TrafficCounter, kNumCollectives>;

/// Names an exchange between start() and finish(): exchanges are numbered from 0.
using Ticket = std::uint64_t;

/// Thrown out of the waits of the other ranks when one has failed.
struct CommunicatorAborted {};

/// One rank's end of a group of ranks. Every rank must make the same exchanges in the same order.
/// One thread of a rank at a time calls contribution(), start() and finish(); any number of its
/// threads may call wait() and contribution_of().
class Communicator {
 public:
  static constexpr int kMaxRanks = 64;
  /// Exchanges that may be started and not finished.
  static constexpr int kMaxInFlight = 4;
  /// Waits look by themselves so often: exchanges use no costlier memory order than release.
  static constexpr std::chrono::nanoseconds kLongestSleep = std::chrono::milliseconds(1);

  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// The largest contribution, bytes.
  virtual std::size_t max_bytes() const = 0;

  /// This rank's memory for the next exchange, `bytes` of it, 64-byte aligned; what it holds is
  /// undefined. Asked for again before start(), it is the same memory. Waits until all ranks have
  /// finished the exchange that used it before. Throws kInvalidArgument for more than max_bytes()
  /// or when kMaxInFlight exchanges are under way.
  virtual std::byte* contribution(std::size_t bytes) = 0;
  /// The ticket that the next start() will return.
  virtual Ticket next_ticket() const = 0;
  /// Hands the contribution to the other ranks: its first `bytes`, at most what was asked for.
  /// Throws kInvalidArgument for more, or without contribution() before it.
  virtual Ticket start(Collective kind, std::size_t bytes) = 0;
  /// Returns when all ranks have started the exchange; their contributions are then visible.
  /// Throws kInvalidArgument when this rank has not.
  virtual void wait(Ticket ticket) = 0;
  /// After wait(), until finish(): the contribution of `rank`. Throws kInvalidArgument for a rank
  /// out of range or an exchange that is not under way.
  virtual const std::byte* contribution_of(int rank, Ticket ticket) const = 0;
  /// This rank reads no more of the oldest exchange under way, which is `ticket`; any other throws
  /// kInvalidArgument. To follow wait().
  virtual void finish(Ticket ticket) = 0;

  /// Releases every rank of the group from its waits (in contribution() and wait()) with
  /// CommunicatorAborted, now and later. Any thread may call it.
  virtual void abort() = 0;

  const Traffic& traffic() const { return traffic_; }

  // Whole collectives, for one thread per rank while no exchange is under way. Data longer than
  // max_bytes() go in several exchanges, no data in none.

  /// data[count] becomes the sum over ranks. Throws kInvalidArgument when not even one float fits.
  void all_reduce(float* data, std::size_t count);
  /// out[size * bytes] = the parts[bytes] of all ranks in rank order.
  void all_gather(const void* part, std::size_t bytes, void* out);
  /// out[count] = the sum over ranks of data[rank * count, (rank + 1) * count). Throws
  /// kInvalidArgument when not even one float per rank fits.
  void reduce_scatter(const float* data, std::size_t count, float* out);
  /// data[bytes] becomes that of rank `root`; kInvalidArgument when there is no such rank.
  void broadcast(void* data, std::size_t bytes, int root);
  void barrier();

 protected:
  /// Implementations count every start().
  void count(Collective kind, std::size_t bytes);

 private:
  Traffic traffic_;
};

/// The group of one rank.
std::unique_ptr<Communicator> make_single_communicator(std::size_t max_bytes);

}  // namespace deinfer
