#include "model/loader.h"

#include <algorithm>

#include "base/check.h"

namespace deinfer {
namespace {

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "[";
  for (std::int64_t extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + "]";
}

}  // namespace

TensorView part_of(const TensorView& whole, Range rows, Range cols) {
  TensorView part = whole;
  part.data =
      whole.row(rows.begin) + static_cast<std::size_t>(cols.begin) * dtype_size(whole.dtype);
  part.rows = rows.size();
  part.cols = cols.size();
  return part;
}

io::WeightSource open_weights(const std::filesystem::path& directory, const ModelConfig& config) {
  io::WeightSource source = io::WeightSource::open(directory);
  for (const PrefixRule& rule : config.prefix_rules) source.rename(rule.prefix, rule.replacement);
  return source;
}

DType resolve_dtype(const std::string& dtype, const io::WeightSource& source,
                    const ModelConfig& config) {
  if (dtype == "int8") return DType::kInt8;
  if (dtype != "auto") return dtype == "bfloat16" ? DType::kBFloat16 : DType::kFloat32;
  const std::string embedding = config.names.embedding + ".weight";
  check_argument(source.contains(embedding), "checkpoint lacks the tensor ", embedding);
  return source.info(embedding).dtype == "BF16" ? DType::kBFloat16 : DType::kFloat32;
}

WeightLoader::WeightLoader(const std::filesystem::path& directory, const ModelConfig& config,
                           const RankShare& share, ThreadTeam& team, Progress progress)
    : source_(open_weights(directory, config)),
      config_(config),
      share_(share),
      team_(team),
      progress_(std::move(progress)) {}

void WeightLoader::used(const std::string& tensor, std::uint64_t elements) {
  used_.insert(tensor);
  parameters_ += elements;
  source_.release(tensor);
  bytes_done_ += elements * (source_.info(tensor).dtype == "F32" ? 4 : 2);
  if (progress_) progress_(bytes_done_, source_.total_bytes());
}

cpu::PackedMatrix WeightLoader::pack_part(DType dtype, const TensorView& part,
                                          const std::vector<std::int32_t>& row_map,
                                          BufferArena* arena) {
  int packed_rows =
      static_cast<int>(row_map.empty() ? static_cast<std::size_t>(part.rows) : row_map.size());
  if (packed_rows == 0) return {};
  bool free_choice = row_map.empty() && dtype != DType::kInt8;
  bool compressed = format_.compressed && dtype == DType::kBFloat16;
  int panel_rows =
      free_choice ? cpu::choose_panel_rows(packed_rows, team_.size(), compressed) : cpu::kPanelRows;
  compressed = compressed && panel_rows == cpu::kPanelRows;
  // A factor of which this rank has no column is zero: one column of padding.
  int cols = std::max(static_cast<int>(part.cols), 1);
  cpu::PackedMatrix packed =
      cpu::allocate_packed(dtype, packed_rows, cols, panel_rows, arena, compressed);
  if (part.cols == 0) return packed;
  team_.run([&](TeamMember& member) {
    auto [first, last] = member.share(packed.num_panels());
    cpu::pack_rows(part, row_map, first, last, packed);
  });
  return packed;
}

cpu::PackedMatrix WeightLoader::pack(DType dtype, const std::string& tensor, int n, int k,
                                     Range rows, Range cols,
                                     const std::vector<std::int32_t>& row_map, BufferArena* arena) {
  TensorView whole = source_.matrix(tensor, n, k);
  cpu::PackedMatrix packed = pack_part(dtype, part_of(whole, rows, cols), row_map, arena);
  used(tensor, static_cast<std::uint64_t>(n) * static_cast<std::uint64_t>(k));
  return packed;
}

std::vector<float> WeightLoader::product(const LinearPart& part, int n, int k) {
  const auto& [w, v, u, bias, rank] = part.tensors;
  TensorView factor_u = part_of(source_.matrix(u, n, rank), part.place.u_rows, {0, rank});
  TensorView factor_v = part_of(source_.matrix(v, rank, k), {0, rank}, part.place.u_cols);
  auto rows = static_cast<std::size_t>(factor_u.rows);
  auto cols = static_cast<std::size_t>(factor_v.cols);
  std::vector<float> product(rows * cols, 0.0f);
  std::vector<float> v_rows(static_cast<std::size_t>(rank) * cols);
  team_.run([&, inner = rank](TeamMember& member) {
    auto [v_first, v_last] = member.share(inner);
    for (int j = v_first; j < v_last; ++j) {
      cpu::read_row(factor_v, j, v_rows.data() + static_cast<std::size_t>(j) * cols);
    }
    member.barrier();
    std::vector<float> u_row(static_cast<std::size_t>(inner));
    auto [first, last] = member.share(static_cast<int>(rows));
    for (int i = first; i < last; ++i) {
      cpu::read_row(factor_u, i, u_row.data());
      float* out = product.data() + static_cast<std::size_t>(i) * cols;
      for (std::size_t j = 0; j < u_row.size(); ++j) {
        const float* v_row = v_rows.data() + j * cols;
        for (std::size_t c = 0; c < cols; ++c) out[c] += u_row[j] * v_row[c];
      }
    }
  });
  used(v, static_cast<std::uint64_t>(rank) * static_cast<std::uint64_t>(k));
  used(u, static_cast<std::uint64_t>(n) * static_cast<std::uint64_t>(rank));
  return product;
}

LinearTensors WeightLoader::linear_tensors(const std::string& name, int k) const {
  LinearTensors tensors;
  std::string dense = name + ".weight";
  std::string v = name + ".v.weight";
  std::string u = name + ".u.weight";
  bool is_dense = source_.contains(dense);
  bool is_low_rank = source_.contains(v) || source_.contains(u);
  check_argument(is_dense || is_low_rank, "checkpoint lacks ", dense, " (or ", v, " and ", u, ")");
  check_argument(!is_dense || !is_low_rank, "checkpoint has both ", dense, " and its factors");
  if (is_low_rank) {
    check_argument(source_.contains(v) && source_.contains(u), "checkpoint has only one of ", v,
                   " and ", u);
    const auto& shape = source_.info(v).shape;
    check_argument(shape.size() == 2 && shape[0] > 0 && shape[0] <= 1 << 24, v,
                   ": expected shape [rank, ", k, "], file has ", shape_text(shape));
    tensors.rank = static_cast<int>(shape[0]);
    tensors.v = v;
    tensors.u = u;
  } else {
    tensors.w = dense;
  }
  auto declared = config_.lowrank_ranks.find(name);
  int declared_rank = declared == config_.lowrank_ranks.end() ? 0 : declared->second;
  check_argument(declared_rank == tensors.rank, name, ": config.json's low_rank.ranks says ",
                 declared_rank == 0 ? "dense" : std::to_string(declared_rank), ", the tensors say ",
                 tensors.rank == 0 ? "dense" : std::to_string(tensors.rank));
  for (const std::string& bias : {name + ".bias", name + ".u.bias"}) {
    if (!source_.contains(bias)) continue;
    check_argument(tensors.bias.empty(), "checkpoint has both ", name, ".bias and ", bias);
    tensors.bias = bias;
  }
  return tensors;
}

LinearPart WeightLoader::part(const std::string& name, LinearRole role, int n, int k,
                              bool all_heads) const {
  LinearPart part;
  part.tensors = linear_tensors(name, k);
  part.multiplied_out = part.tensors.rank > 0 && share_.plans[0]->multiplies_out();
  const LinearShape shape{n, k, part.rank()};
  part.place = share_.place(StepKind::kDecode, role, shape, all_heads);
  for (StepKind kind : {StepKind::kDecode, StepKind::kPrefill}) {
    LinearPlacement own = share_.place(kind, role, shape, all_heads);
    part.exchanges[static_cast<std::size_t>(kind)] = {own.before, own.after_v, own.after_u};
  }
  for (int r = 0; r < share_.size && part.rank() > 0; ++r) {
    part.v_shares.push_back(share_.plans[0]->place(role, shape, r).v_rows);
  }
  bool scattered = part.place.after_u == Exchange::kReduceScatter && !share_.hidden.empty();
  part.y_share =
      scattered ? share_.hidden[static_cast<std::size_t>(share_.rank)] : part.place.u_rows;
  // A linear that all-reduces its output while all ranks attend to all heads reads a replicated x.
  bool whole_input = !share_.plans[0]->merges_exchanges() && share_.size > 1;
  if (part.tensors.rank == 0 && whole_input) part.x_col = part.place.u_cols.begin;
  return part;
}

std::vector<float> WeightLoader::bias(const LinearPart& part, int n,
                                      const std::vector<std::int32_t>& row_map) {
  std::vector<float> values = vector(part.tensors.bias, n);
  std::vector<float> own(row_map.empty() ? static_cast<std::size_t>(part.y_share.size())
                                         : row_map.size());
  for (std::size_t i = 0; i < own.size(); ++i) {
    const int row = row_map.empty() ? static_cast<int>(i) : row_map[i];
    if (row >= 0) own[i] = values[static_cast<std::size_t>(part.y_share.begin + row)];
  }
  return own;
}

LowRankLinear WeightLoader::linear(const std::string& name, LinearRole role, int n, int k,
                                   const std::vector<std::int32_t>& row_map, bool all_heads) {
  return pack_linear(part(name, role, n, k, all_heads), name, n, k, row_map, &arena_);
}

LowRankLinear WeightLoader::pack_linear(const LinearPart& part, const std::string& name, int n,
                                        int k, const std::vector<std::int32_t>& row_map,
                                        BufferArena* arena) {
  const LinearTensors& tensors = part.tensors;
  const LinearPlacement& place = part.place;
  LowRankLinear linear;
  linear.name = name;
  linear.exchanges = part.exchanges;
  linear.v_shares = part.v_shares;
  linear.y_share = part.y_share;
  linear.x_col = part.x_col;
  const std::vector<std::int32_t> in_order;
  const std::vector<std::int32_t>& packed_map = part.exchanges_output() ? in_order : row_map;
  if (part.exchanges_output()) linear.y_map = row_map;
  if (part.multiplied_out) {
    const std::vector<float> values = product(part, n, k);
    linear.w = pack_part(format_.dtype,
                         {values.data(), DType::kFloat32, place.u_rows.size(), place.u_cols.size(),
                          place.u_cols.size()},
                         packed_map, arena);
  } else if (tensors.rank > 0) {
    linear.rank = tensors.rank;
    linear.v =
        pack(format_.dtype, tensors.v, tensors.rank, k, place.v_rows, place.v_cols, {}, &arena_);
    linear.u = pack(format_.dtype, tensors.u, n, tensors.rank, place.u_rows, place.u_cols,
                    packed_map, arena);
  } else {
    linear.w = pack(format_.dtype, tensors.w, n, k, place.u_rows, place.u_cols, packed_map, arena);
  }
  if (!tensors.bias.empty()) {
    const std::vector<float> values = bias(part, n, row_map);
    linear.bias = Buffer((values.size() + std::size_t{2} * cpu::kPanelRows) * sizeof(float));
    std::copy(values.begin(), values.end(), linear.bias.as<float>());
  }
  return linear;
}

std::pair<LowRankLinear, LowRankLinear> WeightLoader::gate_and_up(const std::string& gate,
                                                                  const std::string& up, int n,
                                                                  int k) {
  const LinearPart gate_part = part(gate, LinearRole::kGate, n, k);
  const LinearPart up_part = part(up, LinearRole::kUp, n, k);
  const bool combined = !gate_part.exchanges_output();  // else they are not read together
  BufferArena* arena = combined ? nullptr : &arena_;    // for where they stay
  std::pair linears{pack_linear(gate_part, gate, n, k, {}, arena),
                    pack_linear(up_part, up, n, k, {}, arena)};
  if (combined) {
    cpu::interleave_panels(linears.first.output_factor(), linears.second.output_factor(), arena_,
                           team_);
  }
  return linears;
}

cpu::PackedMatrix WeightLoader::embedding(DType dtype, const std::string& name, int n, int k) {
  return pack(dtype, name, n, k, share_.vocabulary(), {0, k}, {}, &arena_);
}

cpu::PackedMatrix WeightLoader::positions(DType dtype, const std::string& name, int n, int k) {
  Range cols{0, k};
  if (!share_.hidden.empty()) cols = share_.hidden[static_cast<std::size_t>(share_.rank)];
  return pack(dtype, name, n, k, {0, n}, cols, {}, &arena_);
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
