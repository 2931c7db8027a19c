#include "model/loader.h"

#include <algorithm>

#include "base/check.h"

namespace deinfer {
namespace {

/// Panels of 32 rows stream best; 16 where 32 would leave threads idle.
int choose_panel_rows(int n, int threads) {
  int panels = (n + cpu::kPanelRows - 1) / cpu::kPanelRows;
  int busiest = (panels + threads - 1) / threads;
  return busiest * threads * 10 > panels * 11 ? 16 : cpu::kPanelRows;
}

TensorView part_of(const TensorView& whole, Range rows, Range cols) {
  TensorView part = whole;
  part.data =
      whole.row(rows.begin) + static_cast<std::size_t>(cols.begin) * dtype_size(whole.dtype);
  part.rows = rows.size();
  part.cols = cols.size();
  return part;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::int64_t extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + "]";
}

}  // namespace

WeightLoader::WeightLoader(const std::filesystem::path& directory, const ModelConfig& config,
                           const TensorParallelPlan& plan, int rank, int size, ThreadTeam& team,
                           Progress progress)
    : source_(io::WeightSource::open(directory)),
      config_(config),
      plan_(plan),
      rank_(rank),
      size_(size),
      team_(team),
      progress_(std::move(progress)) {}

DType WeightLoader::checkpoint_dtype(const std::string& embedding_name) const {
  check_argument(source_.contains(embedding_name), "checkpoint lacks the tensor ", embedding_name);
  return source_.info(embedding_name).dtype == "BF16" ? DType::kBFloat16 : DType::kFloat32;
}

void WeightLoader::used(const std::string& tensor, std::uint64_t elements) {
  used_.insert(tensor);
  parameters_ += elements;
  source_.release(tensor);
  bytes_done_ += elements * (source_.info(tensor).dtype == "F32" ? 4 : 2);
  if (progress_) progress_(bytes_done_, source_.total_bytes());
}

cpu::PackedMatrix WeightLoader::pack(DType dtype, const std::string& tensor, int n, int k,
                                     Range rows, Range cols,
                                     const std::vector<std::int32_t>& row_map) {
  TensorView whole = source_.matrix(tensor, n, k);
  TensorView part = part_of(whole, rows, cols);
  int packed_rows = row_map.empty() ? rows.size() : static_cast<int>(row_map.size());
  bool free_choice = row_map.empty() && dtype != DType::kInt8;
  int panel_rows = free_choice ? choose_panel_rows(packed_rows, team_.size()) : cpu::kPanelRows;
  cpu::PackedMatrix packed =
      cpu::allocate_packed(dtype, packed_rows, cols.size(), panel_rows, &arena_);
  team_.run([&](TeamMember& member) {
    auto [first, last] = member.share(packed.num_panels());
    cpu::pack_rows(part, row_map, first, last, packed);
  });
  used(tensor, static_cast<std::uint64_t>(n) * static_cast<std::uint64_t>(k));
  return packed;
}

LowRankLinear WeightLoader::linear(const std::string& name, LinearRole role, int n, int k,
                                   const std::vector<std::int32_t>& row_map) {
  LowRankLinear linear;
  linear.name = name;
  std::string dense = name + ".weight";
  std::string v = name + ".v.weight";
  std::string u = name + ".u.weight";
  bool is_dense = source_.contains(dense);
  bool is_low_rank = source_.contains(v) || source_.contains(u);
  check_argument(is_dense || is_low_rank, "checkpoint lacks ", dense, " (or ", v, " and ", u, ")");
  check_argument(!is_dense || !is_low_rank, "checkpoint has both ", dense, " and its factors");
  int rank = 0;
  if (is_low_rank) {
    check_argument(source_.contains(v) && source_.contains(u), "checkpoint has only one of ", v,
                   " and ", u);
    const auto& shape = source_.info(v).shape;
    check_argument(shape.size() == 2 && shape[0] > 0 && shape[0] <= 1 << 24, v,
                   ": expected shape [rank, ", k, "], file has ", shape_text(shape));
    rank = static_cast<int>(shape[0]);
  }
  auto declared = config_.lowrank_ranks.find(name);
  int declared_rank = declared == config_.lowrank_ranks.end() ? 0 : declared->second;
  check_argument(declared_rank == rank, name, ": config.json's low_rank.ranks says ",
                 declared_rank == 0 ? "dense" : std::to_string(declared_rank), ", the tensors say ",
                 rank == 0 ? "dense" : std::to_string(rank));

  LinearPlacement place = plan_.place(role, {n, k, rank}, rank_, size_);
  if (place.after_v != Exchange::kNone || place.after_u != Exchange::kNone) {
    fail(ErrorCode::kUnsupported, "plan ", plan_.name(), " exchanges after ", name,
         ", which the decoder does not do yet");
  }
  if (is_low_rank) {
    linear.v = pack(dtype_, v, rank, k, place.v_rows, place.v_cols, {});
    linear.u = pack(dtype_, u, n, rank, place.u_rows, place.u_cols, row_map);
  } else {
    linear.w = pack(dtype_, dense, n, k, place.u_rows, place.u_cols, row_map);
  }
  for (const std::string& bias : {name + ".bias", name + ".u.bias"}) {
    if (!source_.contains(bias)) continue;
    check_argument(linear.bias.empty(), "checkpoint has both ", name, ".bias and ", bias);
    std::vector<float> values = vector(bias, n);
    auto padded = static_cast<std::size_t>(linear.output_factor().n_pad + cpu::kPanelRows);
    linear.bias.assign(padded, 0.0f);
    for (int i = 0; i < linear.output_factor().n; ++i) {
      auto row = static_cast<std::size_t>(i);
      std::int32_t source_row = row_map.empty() ? i : row_map[row];
      if (source_row >= 0) {
        linear.bias[row] = values[static_cast<std::size_t>(place.u_rows.begin + source_row)];
      }
    }
  }
  return linear;
}

cpu::PackedMatrix WeightLoader::matrix(DType dtype, const std::string& name, int n, int k) {
  return pack(dtype, name, n, k, {0, n}, {0, k}, {});
}

std::vector<float> WeightLoader::vector(const std::string& name, int n) {
  check_argument(source_.contains(name), "checkpoint lacks the tensor ", name);
  std::vector<float> values = source_.vector(name, n);
  used(name, static_cast<std::uint64_t>(n));
  return values;
}

void WeightLoader::check_all_used() const {
  for (const std::string& name : source_.names()) {
    bool derived = name.ends_with("rotary_emb.inv_freq") ||
                   (config_.tie_word_embeddings && name == "lm_head.weight");
    check_argument(derived || used_.contains(name), "unexpected tensor ", name, ": a ",
                   config_.model_type, " model has no such weight");
  }
}

}  // namespace deinfer
