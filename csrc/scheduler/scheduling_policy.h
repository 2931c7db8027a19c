// In which order waiting sequences start, and which running one gives way when KV blocks run out.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "scheduler/block_manager.h"
#include "scheduler/scheduler_config.h"
#include "scheduler/sequence.h"
#include "scheduler/static_batch_config.h"

namespace deinfer {

/// What a policy may look at besides the sequences themselves.
struct SchedulingContext {
  std::int64_t now_us = 0;             // the caller's clock
  std::span<Sequence* const> running;  // in order of admission
  int max_num_seqs = 0;                // seats
  int available_blocks = 0;            // KV blocks that are free or can be evicted
  float prior_length = 0.0f;           // mean tokens of earlier answers; 0: unknown
  const BlockManager* blocks = nullptr;
};

/// What the policies may be told; each reads what concerns it.
struct PolicyConfig {
  // length_bucket: bucket k ends with edges[k] expected tokens (ascending); beyond the last edge,
  // or without edges, buckets are `bucket_width` wide.
  std::vector<int> bucket_edges = {};
  int bucket_width = 50;
  // longest_tail: longest first once fewer wait than this many times max_num_seqs.
  double tail_factor = 4.0;
  bool take_turns = true;              // longest_tail: then run more than have seats, in turns
  StaticBatchConfig static_batches{};  // static_bucket; static: its batch_size only

  /// Throws Error(kInvalidArgument) naming the field and its value.
  void validate() const;
};

/// Of the candidates in context.running, at least one, that which gives way with the least harm: of
/// the lowest priority; not promoted; freeing its blocks at the lowest cost of computing them
/// again; with the most tokens to go; the latest arrival.
Sequence* cheapest_victim(const SchedulingContext& context);

/// Owns the waiting queue in whatever structure makes next() cheap. A policy decides only what
/// comes when: any answer costs time at most, never correctness. It reads sequences and never
/// changes them, keeps no clock and draws no random numbers. What is expected of a sequence does
/// not change while it is in the queue: Sequence::expected_remaining and Sequence::promoted.
class SchedulingPolicy {
 public:
  virtual ~SchedulingPolicy() = default;

  /// A new sequence, or a preempted one (preemptions > 0, with its old arrival), starts waiting.
  virtual void push(Sequence& sequence) = 0;
  /// A waiting sequence was admitted or aborted.
  virtual void remove(Sequence& sequence) = 0;
  /// Number of waiting sequences.
  virtual std::size_t size() const = 0;

  /// The waiting sequence to admit next; it stays in the queue until remove(). Null when there is
  /// none, or to hold the others back until running sequences have ended (never when none runs).
  virtual Sequence* next(const SchedulingContext& context) = 0;
  /// The running sequence to preempt. `context.running` lists the candidates, at least one; it
  /// lacks the sequence that the scheduler protects for the sake of progress.
  virtual Sequence* victim(const SchedulingContext& context) { return cheapest_victim(context); }
  /// A running sequence to preempt although it could run, or null. Asked before every step until
  /// the answer is null: for policies that collect overrunning sequences or that favour short ones.
  virtual Sequence* set_aside(const SchedulingContext&) { return nullptr; }
  /// Whether more sequences than there are seats may run, KV permitting: those with the greatest
  /// turn() have a seat in a step, the others rest and keep their KV. Only sequences of which a
  /// length is expected ever rest.
  virtual bool takes_turns(const SchedulingContext&) const { return false; }
  /// Finite; depends on nothing but the sequence's tokens, limit and expected length.
  virtual float turn(const Sequence&) const { return 0.0f; }
  /// Whether what is set aside starts again from its prompt, its generated tokens forgotten.
  virtual bool set_aside_restarts() const { return false; }
};

/// The policy of that name. Throws Error(kInvalidArgument) listing the known ones.
std::unique_ptr<SchedulingPolicy> make_policy(std::string_view name,
                                              const PolicyConfig& config = {});
/// When the policy of that name needs its waiting sequences promoted, unless the user says.
Promotion default_promotion(std::string_view name);

/// True if a comes before b by priority (higher first), promotion, then arrival, then id.
inline bool runs_before(const Sequence& a, const Sequence& b) {
  if (a.priority != b.priority) return a.priority > b.priority;
  if (a.promoted != b.promoted) return a.promoted;
  if (a.arrival != b.arrival) return a.arrival < b.arrival;
  return a.id < b.id;
}

}  // namespace deinfer
