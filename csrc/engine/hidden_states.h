// What the engine does with the hidden states of rows that sample: reports them, and lets the
// length head read them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "engine/length_head.h"
#include "engine/request.h"
#include "model/model_config.h"
#include "scheduler/scheduler.h"

namespace deinfer {

/// Of step() alone. Per batch: wants() while it is built, then take() or skip() for the rows that
/// were wanted, in the same order, then tell() once the scheduler has been updated.
class HiddenStates {
 public:
  /// Checks `config`, loads the head that it names, and adds the head's layer to
  /// config.hidden_state_layers. Throws Error(kInvalidArgument) naming the value.
  HiddenStates(EngineConfig& config, const ModelConfig& model);

  /// Layers that requests may ask for: all but one that only the head reads.
  int num_reported() const { return num_reported_; }

  /// Whether the states of the rows that sample for this request are needed.
  bool wants(const Request& request) const {
    return head_.has_value() || request.params().hidden_states.has_value();
  }
  /// `states` [layers, rows, hidden] of the batch that has been run.
  void begin(std::span<const float> states, std::size_t rows);
  /// The next row's: of a sample that has `generated` tokens besides the one that the row gave.
  /// `ended`: nothing more is expected of it.
  void take(const Request& request, Request::Sample& sample, int generated, bool ended,
            SequenceOutput& output);
  /// The next row is of no use.
  void skip() { ++row_; }
  /// Tells the scheduler what the head believes of the rows since begin().
  void tell(Scheduler& scheduler);

  std::int64_t predictions() const { return predictions_; }
  std::int64_t predict_us() const { return predict_ns_ / 1000; }

 private:
  std::size_t num_layers_ = 0;
  int num_reported_ = 0;
  std::size_t head_layer_ = 0;  // index into the exported layers
  std::size_t hidden_size_ = 0;
  std::optional<LengthHead> head_;
  std::span<const float> states_;
  std::size_t rows_ = 0;
  std::size_t row_ = 0;
  std::vector<float> mean_;  // [hidden]
  std::vector<std::pair<SequenceId, LengthDistribution>> beliefs_;
  std::int64_t predictions_ = 0;
  std::int64_t predict_ns_ = 0;
};

}  // namespace deinfer
