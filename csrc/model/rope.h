// Rotary position embedding (arXiv 2104.09864) and its context-extension variants.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace deinfer {

/// Fields of config.json's rope_parameters (or rope_scaling and rope_theta), by their names there.
struct RopeConfig {
  std::string type = "default";  // default, linear, dynamic, llama3, yarn, longrope
  double theta = 10000.0;
  double factor = 1.0;
  double low_freq_factor = 1.0;                   // llama3
  double high_freq_factor = 4.0;                  // llama3
  int original_max_position = 0;                  // llama3, yarn, longrope
  std::optional<double> attention_factor;         // yarn, longrope
  double beta_fast = 32.0;                        // yarn
  double beta_slow = 1.0;                         // yarn
  double mscale = 0.0;                            // yarn
  double mscale_all_dim = 0.0;                    // yarn
  bool truncate = true;                           // yarn
  std::vector<double> short_factor, long_factor;  // longrope, [head_dim / 2]
  bool operator==(const RopeConfig&) const = default;
};

/// Angles of every position: pair j of a head turns by position * frequency[j].
class Rope {
 public:
  /// `max_model_len` decides between longrope's short and long factors once for the engine's life,
  /// because cached keys cannot change theirs. Throws kUnsupported for an unknown type and
  /// kInvalidArgument for factors of the wrong length.
  Rope(const RopeConfig& config, int head_dim, int max_model_len);

  /// Writes cos and sin of one position, [head_dim / 2] each, times the attention scaling.
  void angles(int position, float* cos, float* sin) const;
  const std::vector<float>& frequencies() const { return frequencies_; }
  float attention_scaling() const { return scaling_; }

 private:
  std::vector<float> frequencies_;
  float scaling_ = 1.0f;
};

}  // namespace deinfer
