#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/check.h"

namespace deinfer {
namespace {

std::vector<double> base_frequencies(double theta, int head_dim) {
  std::vector<double> frequencies;
  for (int i = 0; i < head_dim; i += 2) {
    frequencies.push_back(1.0 / std::pow(theta, static_cast<double>(i) / head_dim));
  }
  return frequencies;
}

// Llama 3.1: long wavelengths are divided by the factor, short ones kept, a ramp in between.
void scale_llama3(const RopeConfig& config, std::vector<double>& frequencies) {
  double context = config.original_max_position;
  for (double& frequency : frequencies) {
    double turns = context * frequency / (2 * std::numbers::pi);
    double smooth =
        (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor);
    smooth = std::clamp(smooth, 0.0, 1.0);
    frequency = (1 - smooth) * frequency / config.factor + smooth * frequency;
  }
}

// YaRN, arXiv 2309.00071.
float scale_yarn(const RopeConfig& config, int head_dim, std::vector<double>& frequencies) {
  auto dimension_of = [&](double rotations) {
    return head_dim * std::log(config.original_max_position / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(config.theta));
  };
  double low = dimension_of(config.beta_fast);
  double high = dimension_of(config.beta_slow);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(head_dim - 1));
  if (low == high) high += 0.001;
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    double interpolate = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies[i] *= interpolate / config.factor + (1 - interpolate);
  }
  auto magnitude = [&](double mscale) {
    return config.factor <= 1 ? 1.0 : 0.1 * mscale * std::log(config.factor) + 1.0;
  };
  if (config.attention_factor) return static_cast<float>(*config.attention_factor);
  if (config.mscale != 0 && config.mscale_all_dim != 0) {
    return static_cast<float>(magnitude(config.mscale) / magnitude(config.mscale_all_dim));
  }
  return static_cast<float>(magnitude(1.0));
}

// LongRoPE, arXiv 2402.13753.
float scale_longrope(const RopeConfig& config, int max_model_len,
                     std::vector<double>& frequencies) {
  bool is_long = max_model_len > config.original_max_position;
  const std::vector<double>& factors = is_long ? config.long_factor : config.short_factor;
  check_argument(factors.size() == frequencies.size(), "config.json: rope ",
                 is_long ? "long_factor" : "short_factor", " has ", factors.size(),
                 " entries, head_dim / 2 is ", frequencies.size());
  for (std::size_t i = 0; i < frequencies.size(); ++i) frequencies[i] /= factors[i];
  if (config.attention_factor) return static_cast<float>(*config.attention_factor);
  if (config.factor <= 1) return 1.0f;
  return static_cast<float>(
      std::sqrt(1 + std::log(config.factor) / std::log(config.original_max_position)));
}

}  // namespace

Rope::Rope(const RopeConfig& config, int head_dim, int max_model_len) {
  std::vector<double> frequencies = base_frequencies(config.theta, head_dim);
  if (config.type == "linear") {
    for (double& frequency : frequencies) frequency /= config.factor;
  } else if (config.type == "llama3") {
    scale_llama3(config, frequencies);
  } else if (config.type == "yarn") {
    scaling_ = scale_yarn(config, head_dim, frequencies);
  } else if (config.type == "longrope") {
    scaling_ = scale_longrope(config, max_model_len, frequencies);
  } else if (config.type != "default" && config.type != "dynamic") {
    // "dynamic" changes frequencies only beyond max_position_embeddings, which max_model_len
    // cannot exceed.
    fail(ErrorCode::kUnsupported, "config.json: rope_type \"", config.type,
         "\" is not supported; supported are default, linear, dynamic, llama3, yarn, longrope");
  }
  frequencies_.assign(frequencies.begin(), frequencies.end());
}

void Rope::angles(int position, float* cos, float* sin) const {
  for (std::size_t j = 0; j < frequencies_.size(); ++j) {
    // The angle is rounded to fp32 as in transformers, so that long contexts agree with it.
    float angle = static_cast<float>(position) * frequencies_[j];
    cos[j] = std::cos(angle) * scaling_;
    sin[j] = std::sin(angle) * scaling_;
  }
}

}  // namespace deinfer
