#include "engine/hidden_states.h"

#include <algorithm>
#include <chrono>

#include "base/check.h"

namespace deinfer {
namespace {

std::filesystem::path head_path(const EngineConfig& config) {
  std::filesystem::path path(config.length_predictor);
  if (path.extension() == ".json") return path;
  check_argument(config.length_predictor == "hidden_state", "length_predictor=\"",
                 config.length_predictor,
                 "\" is unknown to the engine; use \"hidden_state\" or a head's JSON file");
  return std::filesystem::path(config.model) / "perception" / "hidden_state.json";
}

}  // namespace

HiddenStates::HiddenStates(EngineConfig& config, const ModelConfig& model)
    : hidden_size_(static_cast<std::size_t>(model.hidden_size)), mean_(hidden_size_) {
  std::vector<int>& layers = config.hidden_state_layers;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    check_argument(layers[i] >= 0 && layers[i] <= model.num_layers, "hidden_state_layers holds ",
                   layers[i], "; the model has hidden states 0 to ", model.num_layers);
    check_argument(std::find(layers.begin(), layers.begin() + static_cast<std::ptrdiff_t>(i),
                             layers[i]) == layers.begin() + static_cast<std::ptrdiff_t>(i),
                   "hidden_state_layers holds ", layers[i], " twice");
  }
  num_reported_ = static_cast<int>(layers.size());
  if (!config.length_predictor.empty()) {
    head_.emplace(head_path(config), model.hidden_size, model.num_layers);
    auto found = std::find(layers.begin(), layers.end(), head_->layer());
    head_layer_ = static_cast<std::size_t>(found - layers.begin());
    if (found == layers.end()) layers.push_back(head_->layer());
  }
  num_layers_ = layers.size();
}

void HiddenStates::begin(std::span<const float> states, std::size_t rows) {
  states_ = states;
  rows_ = rows;
  row_ = 0;
  beliefs_.clear();
}

void HiddenStates::take(const Request& request, Request::Sample& sample, int generated, bool ended,
                        SequenceOutput& output) {
  auto state = [&](std::size_t layer) {
    return states_.subspan((layer * rows_ + row_) * hidden_size_, hidden_size_);
  };
  sample.state_sum.resize(num_layers_ * hidden_size_);
  for (std::size_t layer = 0; layer < num_layers_; ++layer) {
    float* sum = sample.state_sum.data() + layer * hidden_size_;
    std::span<const float> added = state(layer);
    for (std::size_t i = 0; i < hidden_size_; ++i) sum[i] += added[i];
  }
  auto mean = [&](std::size_t layer) -> std::span<const float> {
    const float* sum = sample.state_sum.data() + layer * hidden_size_;
    for (std::size_t i = 0; i < hidden_size_; ++i) {
      mean_[i] = sum[i] / static_cast<float>(generated + 1);
    }
    return mean_;
  };
  auto due = [&](int every) { return generated == 0 || (every > 0 && generated % every == 0); };
  const std::optional<int>& every = request.params().hidden_states;
  if (every && due(*every)) {
    output.hidden_states_position = generated;
    auto append = [&](std::span<const float> values) {
      output.hidden_states.insert(output.hidden_states.end(), values.begin(), values.end());
    };
    for (int i = 0; i < num_reported_; ++i) append(state(static_cast<std::size_t>(i)));
    for (int i = 0; i < num_reported_; ++i) append(mean(static_cast<std::size_t>(i)));
  }
  if (head_ && !ended && due(head_->refine_every())) {
    auto start = std::chrono::steady_clock::now();
    LengthDistribution belief =
        head_->predict(state(head_layer_), mean(head_layer_), generated, sample.length_prior);
    // What was believed before, from the prompt's text or history, is better than nothing.
    if (belief.known()) beliefs_.emplace_back(sample.sequence, belief);
    ++predictions_;
    predict_ns_ += std::chrono::duration_cast<std::chrono::nanoseconds>(
                       std::chrono::steady_clock::now() - start)
                       .count();
  }
  ++row_;
}

void HiddenStates::tell(Scheduler& scheduler) {
  for (const auto& [sequence, belief] : beliefs_) scheduler.expect(sequence, belief);
}

}  // namespace deinfer
