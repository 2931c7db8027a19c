// From checkpoint tensors to packed weights.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/thread_team.h"
#include "io/weight_source.h"
#include "model/model_config.h"
#include "ops/lowrank_linear.h"
#include "plan/rank_share.h"

namespace deinfer {

/// The tensors of a checkpoint under the names of a text model (ModelConfig::prefix_rules).
io::WeightSource open_weights(const std::filesystem::path& directory, const ModelConfig& config);

/// The type that `dtype` of EngineConfig stands for; "auto": bf16 when the embedding is bf16, else
/// fp32. Throws kInvalidArgument when the checkpoint has no embedding.
DType resolve_dtype(const std::string& dtype, const io::WeightSource& source,
                    const ModelConfig& config);

/// Where a linear's weights are in a checkpoint.
struct LinearTensors {
  std::string w;     // dense; or
  std::string v, u;  // factors
  std::string bias;  // or empty
  int rank = 0;      // of the factors; 0: dense
};

/// Reads one rank's part of a checkpoint, one tensor at a time: resident memory stays near the
/// packed weights plus one tensor.
class WeightLoader {
 public:
  using Progress = std::function<void(std::uint64_t done, std::uint64_t total)>;

  WeightLoader(const std::filesystem::path& directory, const ModelConfig& config,
               const RankShare& share, ThreadTeam& team, Progress progress);

  const io::WeightSource& source() const { return source_; }
  ThreadTeam& team() const { return team_; }
  /// The type of packed matrices: fp32, bf16 or int8 (weights only).
  void set_dtype(DType dtype) { dtype_ = dtype; }

  /// The linear called `name`[n, k]: `name`.weight, or `name`.v.weight [r, k] and `name`.u.weight
  /// [n, r]; optional bias `name`.bias or `name`.u.bias. `row_map` gives the packed order of output
  /// rows; `all_heads` as place_linear(). Throws kInvalidArgument naming the tensor when one is
  /// missing, doubled or misshapen, or contradicts config.json's ranks.
  LowRankLinear linear(const std::string& name, LinearRole role, int n, int k,
                       const std::vector<std::int32_t>& row_map = {}, bool all_heads = false);

  /// The tensors of the linear called `name`, checked as linear() says.
  LinearTensors linear_tensors(const std::string& name, int k) const;

  /// Says that a tensor of so many elements has been read and is not needed any more.
  void used(const std::string& tensor, std::uint64_t elements);

  /// The rows of this rank's share of an embedding table [vocabulary, k]. The caller chooses the
  /// type, as a table whose rows are only looked up would lose bits in int8 and gain no time.
  cpu::PackedMatrix embedding(DType dtype, const std::string& name, int n, int k);
  /// A table [n, k] of positions; under hidden shards this rank's columns of it.
  cpu::PackedMatrix positions(DType dtype, const std::string& name, int n, int k);
  std::vector<float> vector(const std::string& name, int n);
  bool contains(const std::string& name) const { return source_.contains(name); }

  /// Throws kInvalidArgument naming a tensor of the file that nobody asked for: running without it
  /// would be running another model.
  void check_all_used() const;

  std::uint64_t parameters() const { return parameters_; }

 private:
  cpu::PackedMatrix multiply_out(const std::string& v, const std::string& u, int n, int k, int rank,
                                 const LinearPlacement& place,
                                 const std::vector<std::int32_t>& row_map);
  cpu::PackedMatrix pack_part(DType dtype, const TensorView& part,
                              const std::vector<std::int32_t>& row_map);
  cpu::PackedMatrix pack(DType dtype, const std::string& tensor, int n, int k, Range rows,
                         Range cols, const std::vector<std::int32_t>& row_map);

  io::WeightSource source_;
  const ModelConfig& config_;
  const RankShare& share_;
  ThreadTeam& team_;
  Progress progress_;
  DType dtype_ = DType::kFloat32;
  BufferArena arena_;
  std::set<std::string> used_;
  std::uint64_t parameters_ = 0;
  std::uint64_t bytes_done_ = 0;
};

}  // namespace deinfer
