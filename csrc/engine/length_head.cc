#include "engine/length_head.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "io/json_file.h"

namespace deinfer {
namespace {

constexpr const char* kFormat = "deinfer.length_head";
constexpr int kVersion = 1;

/// json[key] as T. Throws Error(kInvalidArgument) naming file and key.
template <typename T>
T field(const nlohmann::json& json, const char* key, const std::filesystem::path& path) {
  try {
    return json.at(key).get<T>();
  } catch (const nlohmann::json::exception& error) {
    fail(ErrorCode::kInvalidArgument, path.string(), ": \"", key, "\": ", error.what());
  }
}

/// The piecewise linear map through the knots (from[i], to[i]).
double interpolate(double x, std::span<const float> from, std::span<const float> to) {
  for (std::size_t i = 1; i < from.size(); ++i) {
    if (x <= from[i]) {
      double width = static_cast<double>(from[i]) - from[i - 1];
      double share = width > 0.0 ? (x - from[i - 1]) / width : 1.0;
      return to[i - 1] + share * (static_cast<double>(to[i]) - to[i - 1]);
    }
  }
  return 1.0;
}

}  // namespace

LengthHead::LengthHead(const std::filesystem::path& path, int hidden_size, int num_layers)
    : path_(path) {
  check_argument(std::filesystem::is_regular_file(path), "length_predictor: ", path.string(),
                 " does not exist; `deinfer perception train` makes it");
  nlohmann::json json = io::read_json(path);
  check_argument(json.is_object() && json.value("format", "") == kFormat &&
                     json.value("version", 0) == kVersion,
                 path.string(), ": is no ", kFormat, " of version ", kVersion);
  int trained_size = field<int>(json, "hidden_size", path);
  int trained_layers = field<int>(json, "num_layers", path);
  check_argument(trained_size == hidden_size && trained_layers == num_layers, path.string(),
                 ": was trained for hidden_size=", trained_size, ", num_layers=", trained_layers,
                 "; the model has ", hidden_size, " and ", num_layers);
  layer_ = field<int>(json, "layer", path);
  check_argument(layer_ >= 0 && layer_ <= num_layers, path.string(), ": layer=", layer_,
                 " is outside [0, ", num_layers, "]");
  refine_every_ = field<int>(json, "refine_every", path);
  check_argument(refine_every_ >= 1, path.string(), ": refine_every must be at least 1, got ",
                 refine_every_);
  lengths_ = field<std::vector<float>>(json, "lengths", path);
  check_argument(!lengths_.empty() && lengths_.size() <= LengthDistribution::kMaxBins &&
                     std::is_sorted(lengths_.begin(), lengths_.end()),
                 path.string(), ": \"lengths\" must be 1 to ", LengthDistribution::kMaxBins,
                 " ascending numbers, got ", lengths_.size());
  io::SafetensorsFile file(path.parent_path() / field<std::string>(json, "weights", path));
  const auto stages = field<nlohmann::json>(json, "stages", path);
  auto read = [&](const char* name, int inputs) {
    Stage stage = read_stage(file, name, inputs);
    const auto entry = field<nlohmann::json>(stages, name, path);
    stage.inverse_temperature = 1.0f / field<float>(entry, "temperature", path);
    stage.levels_from = field<std::vector<float>>(entry, "levels_from", path);
    stage.levels_to = field<std::vector<float>>(entry, "levels_to", path);
    for (const auto* levels : {&stage.levels_from, &stage.levels_to}) {
      check_argument(levels->size() >= 2 && levels->size() == stage.levels_from.size() &&
                         std::is_sorted(levels->begin(), levels->end()) && levels->front() == 0 &&
                         levels->back() == 1,
                     path.string(), ": the levels of stage ", name,
                     " must be as many ascending numbers from 0 to 1");
    }
    return stage;
  };
  prompt_ = read("prompt", hidden_size);
  refined_ = read("refined", 2 * hidden_size + 1 + static_cast<int>(lengths_.size()));
}

std::vector<float> LengthHead::read(const io::SafetensorsFile& file, const std::string& name,
                                    std::span<const std::int64_t> shape) const {
  auto found = file.tensors().find(name);
  check_argument(found != file.tensors().end(), file.path().string(), ": tensor ", name,
                 " is missing");
  const io::TensorInfo& info = found->second;
  check_argument(info.dtype == "F32" && std::ranges::equal(info.shape, shape), file.path().string(),
                 ": tensor ", name, " is ", info.dtype, " ", io::shape_string(info.shape),
                 ", not F32 ", io::shape_string(shape));
  std::vector<float> values(info.bytes / sizeof(float));
  std::memcpy(values.data(), file.data(info), info.bytes);
  return values;
}

LengthHead::Layer LengthHead::read_layer(const io::SafetensorsFile& file, const std::string& name,
                                         int inputs) const {
  auto found = file.tensors().find(name + ".bias");
  check_argument(found != file.tensors().end() && found->second.shape.size() == 1,
                 file.path().string(), ": tensor ", name, ".bias [n] is missing");
  Layer layer;
  layer.inputs = inputs;
  layer.outputs = static_cast<int>(found->second.shape[0]);
  layer.bias = read(file, name + ".bias", std::array<std::int64_t, 1>{layer.outputs});
  layer.weight = read(file, name + ".weight", std::array<std::int64_t, 2>{layer.outputs, inputs});
  return layer;
}

LengthHead::Stage LengthHead::read_stage(const io::SafetensorsFile& file, const std::string& name,
                                         int inputs) const {
  Stage stage;
  stage.shift = read(file, name + ".shift", std::array<std::int64_t, 1>{inputs});
  stage.scale = read(file, name + ".scale", std::array<std::int64_t, 1>{inputs});
  if (file.tensors().contains(name + ".hidden.bias")) {
    stage.layers.push_back(read_layer(file, name + ".hidden", inputs));
    inputs = stage.layers.back().outputs;
  }
  stage.layers.push_back(read_layer(file, name + ".output", inputs));
  check_argument(stage.layers.back().outputs == static_cast<int>(lengths_.size()),
                 file.path().string(), ": stage ", name, " has ", stage.layers.back().outputs,
                 " outputs for ", lengths_.size(), " bins");
  return stage;
}

void LengthHead::Layer::apply(std::span<const float> x, std::vector<float>& y) const {
  y.resize(static_cast<std::size_t>(outputs));
  const auto width = static_cast<std::size_t>(inputs);
  for (std::size_t i = 0; i < y.size(); ++i) {
    // Several sums, so that the loop is not one chain of dependent additions.
    std::array<float, 16> sums{};
    const float* row = weight.data() + i * width;
    std::size_t j = 0;
    for (; j + sums.size() <= width; j += sums.size()) {
      for (std::size_t k = 0; k < sums.size(); ++k) sums[k] += row[j + k] * x[j + k];
    }
    float sum = bias[i];
    for (; j < width; ++j) sum += row[j] * x[j];
    for (float part : sums) sum += part;
    y[i] = sum;
  }
}

LengthDistribution LengthHead::predict(std::span<const float> state, std::span<const float> mean,
                                       int generated, std::vector<float>& prior) {
  const Stage& stage = generated == 0 ? prompt_ : refined_;
  if (generated > 0 && prior.size() != lengths_.size()) return {};
  input_.assign(state.begin(), state.end());
  if (generated > 0) {
    input_.insert(input_.end(), mean.begin(), mean.end());
    input_.push_back(std::log(static_cast<float>(generated)));
    input_.insert(input_.end(), prior.begin(), prior.end());
  }
  for (std::size_t i = 0; i < input_.size(); ++i) {
    input_[i] = (input_[i] - stage.shift[i]) * stage.scale[i];
  }
  std::span<const float> x = input_;
  for (const Layer& layer : stage.layers) {
    bool last = &layer == &stage.layers.back();
    layer.apply(x, last ? output_ : hidden_);
    if (last) break;
    for (float& value : hidden_) value = std::max(value, 0.0f);
    x = hidden_;
  }
  if (generated == 0) {
    float mean_logit = 0.0f;
    for (float logit : output_) mean_logit += logit / static_cast<float>(output_.size());
    prior.resize(output_.size());
    for (std::size_t i = 0; i < prior.size(); ++i) prior[i] = output_[i] - mean_logit;
  }
  // Softmax over the bins that are not passed yet; NaN stays NaN and makes the belief unknown.
  std::size_t first = 0;
  while (first + 1 < lengths_.size() && lengths_[first] <= static_cast<float>(generated)) ++first;
  float largest = output_[first];
  for (std::size_t i = first; i < output_.size(); ++i) largest = std::max(largest, output_[i]);
  double sum = 0.0;
  for (std::size_t i = 0; i < output_.size(); ++i) {
    output_[i] = i < first ? 0.0f : std::exp((output_[i] - largest) * stage.inverse_temperature);
    sum += output_[i];
  }
  double below = 0.0;
  double level = 0.0;
  for (float& probability : output_) {
    below += probability;
    double next = interpolate(below / sum, stage.levels_from, stage.levels_to);
    if (std::isnan(below)) next = below;
    probability = static_cast<float>(next - level);
    level = next;
  }
  return {lengths_, output_};
}

}  // namespace deinfer
