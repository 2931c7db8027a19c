// From checkpoint tensors to packed weights.
#pragma once

#include <array>
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

/// What the plans leave of a linear to one rank.
struct LinearPart {
  LinearTensors tensors;
  bool multiplied_out = false;  // `place` is of the product of the factors
  LinearPlacement place;        // the same in both kinds of step, but for exchanges:
  std::array<LinearExchanges, kNumStepKinds> exchanges;
  std::vector<Range> v_shares;  // as LowRankLinear, and so on
  Range y_share;
  int x_col = 0;

  int rank() const { return multiplied_out ? 0 : tensors.rank; }
  /// The output travels, so that rows are packed in order.
  bool exchanges_output() const { return exchanges[0].after_u != Exchange::kNone; }
};

/// Rows and columns of a matrix.
TensorView part_of(const TensorView& whole, Range rows, Range cols);

/// Reads one rank's part of a checkpoint, one tensor at a time: resident memory stays near the
/// packed weights plus one tensor.
class WeightLoader {
 public:
  using Progress = std::function<void(std::uint64_t done, std::uint64_t total)>;

  WeightLoader(const std::filesystem::path& directory, const ModelConfig& config,
               const RankShare& share, ThreadTeam& team, Progress progress);

  const io::WeightSource& source() const { return source_; }
  ThreadTeam& team() const { return team_; }
  /// How matrices are packed: fp32, bf16 (all of them in 12 bits where that is asked for), or int8
  /// (weights only).
  void set_format(cpu::WeightFormat format) { format_ = format; }

  /// The linear called `name`[n, k]: `name`.weight, or `name`.v.weight [r, k] and `name`.u.weight
  /// [n, r]; optional bias `name`.bias or `name`.u.bias. `row_map` gives the packed order of output
  /// rows; `all_heads` as place_linear(). Throws kInvalidArgument naming the tensor when one is
  /// missing, doubled or misshapen, or contradicts config.json's ranks.
  LowRankLinear linear(const std::string& name, LinearRole role, int n, int k,
                       const std::vector<std::int32_t>& row_map = {}, bool all_heads = false);

  /// Gate and up, whose output factors lie as they are read, panel by panel.
  std::pair<LowRankLinear, LowRankLinear> gate_and_up(const std::string& gate,
                                                      const std::string& up, int n, int k);

  /// What of it is this rank's, checked as linear() says.
  LinearPart part(const std::string& name, LinearRole role, int n, int k,
                  bool all_heads = false) const;
  /// The values [place.u_rows, place.u_cols] of a product of factors, fp32.
  std::vector<float> product(const LinearPart& part, int n, int k);
  /// The bias of a part that has one: of output row row_map[i] (an empty map is the identity; 0 for
  /// -1), of the outputs that this rank keeps.
  std::vector<float> bias(const LinearPart& part, int n, const std::vector<std::int32_t>& row_map);

  /// Says that a tensor of so many elements has been read and is not needed any more.
  void used(const std::string& tensor, std::uint64_t elements);

  /// The rows of this rank's share of an embedding table [vocabulary, k]. The caller chooses the
  /// type, as a table whose rows are only looked up would lose bits in int8 and gain no time.
  cpu::PackedMatrix embedding(DType dtype, const std::string& name, int n, int k);
  /// A table [n, k] of positions; under hidden shards this rank's columns of it.
  cpu::PackedMatrix positions(DType dtype, const std::string& name, int n, int k);
  std::vector<float> vector(const std::string& name, int n);
  bool contains(const std::string& name) const { return source_.contains(name); }
  const RankShare& share() const { return share_; }

  /// Throws kInvalidArgument naming a tensor of the file that nobody asked for: running without it
  /// would be running another model.
  void check_all_used() const;

  std::uint64_t parameters() const { return parameters_; }

 private:
  LinearTensors linear_tensors(const std::string& name, int k) const;
  /// The output factor's memory is from `arena`, or by itself where that is null.
  LowRankLinear pack_linear(const LinearPart& part, const std::string& name, int n, int k,
                            const std::vector<std::int32_t>& row_map, BufferArena* arena);
  /// Likewise.
  cpu::PackedMatrix pack_part(DType dtype, const TensorView& part,
                              const std::vector<std::int32_t>& row_map, BufferArena* arena);
  cpu::PackedMatrix pack(DType dtype, const std::string& tensor, int n, int k, Range rows,
                         Range cols, const std::vector<std::int32_t>& row_map, BufferArena* arena);

  io::WeightSource source_;
  const ModelConfig& config_;
  const RankShare& share_;
  ThreadTeam& team_;
  Progress progress_;
  cpu::WeightFormat format_;
  BufferArena arena_;
  std::set<std::string> used_;
  std::uint64_t parameters_ = 0;
  std::uint64_t bytes_done_ = 0;
};

}  // namespace deinfer
