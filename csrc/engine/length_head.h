// Predicts the length of an answer from the model's own hidden states.
#pragma once

#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "io/safetensors.h"
#include "scheduler/length_distribution.h"

namespace deinfer {

/// A trained head, as `deinfer perception train` writes it: NAME.json and the safetensors file that
/// it names. It has two stages, each standardize -> linear, or one hidden layer with ReLU ->
/// softmax over the bins -> calibration of the cumulative distribution (Kuleshov, Fenner, Ermon
/// 2018, with split-conformal levels). Its numbers may be anything, NaN and infinity included: what
/// comes out is a distribution or unknown.
class LengthHead {
 public:
  /// `path` is the JSON file. Throws Error(kInvalidArgument) naming the file and what is wrong: not
  /// readable, another format, made for another hidden size or number of layers, bad shapes.
  LengthHead(const std::filesystem::path& path, int hidden_size, int num_layers);

  /// The hidden state that it reads, numbered as in Decoder::hidden_states().
  int layer() const { return layer_; }
  /// After the prompt it wants to see a sample again every so many generated tokens.
  int refine_every() const { return refine_every_; }

  /// `state` and `mean` [hidden_size]: the state of the newest token, and the mean of those of the
  /// prompt's last and all generated tokens; `generated` tokens exist. 0 is the first stage, which
  /// reads `state` alone and leaves in `prior` what the second one, of the same sample, wants to
  /// know of it. Unknown without that.
  LengthDistribution predict(std::span<const float> state, std::span<const float> mean,
                             int generated, std::vector<float>& prior);

 private:
  struct Layer {
    int inputs = 0;
    int outputs = 0;
    std::vector<float> weight;  // [outputs, inputs]
    std::vector<float> bias;    // [outputs]
    void apply(std::span<const float> x, std::vector<float>& y) const;
  };
  struct Stage {
    std::vector<float> shift;  // [inputs]
    std::vector<float> scale;  // [inputs]; input i becomes (x - shift) * scale
    std::vector<Layer> layers;
    float inverse_temperature = 1.0f;
    std::vector<float> levels_from, levels_to;  // knots of the calibration, ascending from 0 to 1
  };

  Stage read_stage(const io::SafetensorsFile& file, const std::string& name, int inputs) const;
  Layer read_layer(const io::SafetensorsFile& file, const std::string& name, int inputs) const;
  std::vector<float> read(const io::SafetensorsFile& file, const std::string& name,
                          std::span<const std::int64_t> shape) const;

  std::filesystem::path path_;
  int layer_ = 0;
  int refine_every_ = 0;
  std::vector<float> lengths_;  // of the bins, ascending
  Stage prompt_;
  Stage refined_;
  std::vector<float> input_, hidden_, output_;  // reused by every call
};

}  // namespace deinfer
