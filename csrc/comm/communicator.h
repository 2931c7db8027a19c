// Collectives among the tensor-parallel ranks of one engine.
#pragma once

#include <cstddef>
#include <memory>

namespace deinfer {

/// One rank's end of a group of ranks. Every rank must make the same calls in the same order; a
/// call returns when this rank's buffer holds the result. Sums run in rank order, so that every
/// rank gets the same bits.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  /// data[count] becomes the sum over ranks.
  virtual void all_reduce(float* data, std::size_t count) = 0;
  /// data[count] becomes that of rank `root`.
  virtual void broadcast(void* data, std::size_t bytes, int root) = 0;
  virtual void barrier() = 0;
};

/// The group of one rank: every collective leaves the data as it is.
std::unique_ptr<Communicator> make_single_communicator();

}  // namespace deinfer
