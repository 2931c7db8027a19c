// The order of waiting sequences: by priority, promotion, a policy's key, and arrival.
#pragma once

#include <cstddef>
#include <limits>
#include <set>

#include "scheduler/scheduling_policy.h"

namespace deinfer {

/// Waiting sequences, the least key first. Sequences of unknown length stand in order of arrival
/// and have the key that their expected length, known only when one is picked, would give them. All
/// operations are O(log n).
class WaitingQueue {
 public:
  /// `key` must be the same at push() and remove().
  void push(Sequence& sequence, double key);
  void push_unknown(Sequence& sequence) { unknown_.insert(&sequence); }
  void remove(Sequence& sequence, double key) { known_.erase({rank(sequence, key), &sequence}); }
  void remove_unknown(Sequence& sequence) { unknown_.erase(&sequence); }

  std::size_t size() const { return known_.size() + unknown_.size(); }
  /// The first, where those of unknown length have this key; null when empty.
  Sequence* first(double unknown_key) const;

 private:
  struct Entry {
    double key;
    Sequence* sequence;
  };
  struct ByArrival {
    bool operator()(const Sequence* a, const Sequence* b) const { return runs_before(*a, *b); }
  };
  struct ByKey {
    bool operator()(const Entry& a, const Entry& b) const;
  };

  /// Promoted ones come first, whatever their key.
  static double rank(const Sequence& sequence, double key) {
    return sequence.promoted ? -std::numeric_limits<double>::infinity() : key;
  }

  std::set<Entry, ByKey> known_;
  std::set<Sequence*, ByArrival> unknown_;
};

/// A policy that orders by a key of the expected remaining length.
class KeyedPolicy : public SchedulingPolicy {
 public:
  void push(Sequence& sequence) override;
  void remove(Sequence& sequence) override;
  std::size_t size() const override { return queue_.size(); }
  Sequence* next(const SchedulingContext& context) override;

 protected:
  /// Least first; `remaining`: expected tokens, > 0.
  virtual double key(float remaining) const = 0;

 private:
  WaitingQueue queue_;
};

}  // namespace deinfer
