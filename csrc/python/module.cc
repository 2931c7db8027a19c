// deinfer._C: the public C++ structs and the engine, nothing more.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <vector>

#include "deinfer/engine.h"
#include "deinfer/fields.h"
#include "deinfer/model_description.h"
#include "deinfer/planner.h"

namespace py = pybind11;

namespace {

using namespace deinfer;

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    PyObject* type = PyExc_RuntimeError;
    switch (error.code()) {
      case ErrorCode::kInvalidArgument: type = PyExc_ValueError; break;
      case ErrorCode::kUnsupported: type = PyExc_NotImplementedError; break;
      case ErrorCode::kOutOfMemory: type = PyExc_MemoryError; break;
      case ErrorCode::kInternal: break;
    }
    PyErr_SetString(type, error.what());
  }
}

/// T(**fields): every keyword is a field of the bound struct, so that fields are listed once.
template <typename T>
T from_keywords(const char* type_name, const py::kwargs& fields) {
  T value;
  py::object self = py::cast(&value, py::return_value_policy::reference);
  for (const std::pair<py::handle, py::handle> item : fields) {
    py::handle key = item.first;
    py::handle field = item.second;
    std::string name = py::str(key);
    if (!py::hasattr(self, key)) {
      throw py::type_error(std::string(type_name) + "() got an unexpected keyword argument '" +
                           name + "'");
    }
    try {
      py::setattr(self, key, field);
    } catch (py::error_already_set& error) {
      throw py::type_error(std::string(type_name) + "(" + name + "=" +
                           std::string(py::repr(field)) + "): wrong type");
    }
  }
  return value;
}

/// A struct with a keyword constructor and all its fields.
template <typename T>
py::class_<T> bind_fields(py::module_& m, const char* name) {
  py::class_<T> bound(m, name);
  bound.def(py::init([name](const py::kwargs& fields) { return from_keywords<T>(name, fields); }));
  visit_fields<T>([&](const char* field, auto member) { bound.def_readwrite(field, member); });
  return bound;
}

/// Token ids of any size, so that one beyond 32 bits is reported by its value.
std::vector<TokenId> to_token_ids(const std::vector<std::int64_t>& ids) {
  std::vector<TokenId> tokens;
  tokens.reserve(ids.size());
  for (std::int64_t id : ids) {
    if (id < 0 || id > std::numeric_limits<TokenId>::max()) {
      throw Error(ErrorCode::kInvalidArgument,
                  "prompt token id " + std::to_string(id) + " is outside the vocabulary");
    }
    tokens.push_back(static_cast<TokenId>(id));
  }
  return tokens;
}

py::object finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone: return py::none();
    case FinishReason::kStop: return py::str("stop");
    case FinishReason::kLength: return py::str("length");
    case FinishReason::kAbort: return py::str("abort");
  }
  return py::none();
}

void bind_params(py::module_& m) {
  bind_fields<SamplingParams>(m, "SamplingParams").def("validate", &SamplingParams::validate);
  bind_fields<EngineConfig>(m, "EngineConfig").def("validate", &EngineConfig::validate);
}

void bind_outputs(py::module_& m) {
  py::class_<TokenLogprob>(m, "TokenLogprob")
      .def_readonly("token", &TokenLogprob::token)
      .def_readonly("logprob", &TokenLogprob::logprob)
      .def_readonly("rank", &TokenLogprob::rank);
  py::class_<SequenceOutput>(m, "SequenceOutput")
      .def_readonly("index", &SequenceOutput::index)
      .def_readonly("new_token_ids", &SequenceOutput::new_token_ids)
      .def_readonly("logprobs", &SequenceOutput::logprobs)
      .def_property_readonly(
          "finish_reason",
          [](const SequenceOutput& output) { return finish_reason_name(output.finish_reason); })
      .def_readonly("stop_token_id", &SequenceOutput::stop_token_id)
      .def_property_readonly("hidden_states",
                             [](const SequenceOutput& output) -> py::object {
                               if (output.hidden_states.empty()) return py::none();
                               auto n = static_cast<py::ssize_t>(output.hidden_states.size());
                               return py::array_t<float>(n, output.hidden_states.data());
                             })
      .def_readonly("hidden_states_position", &SequenceOutput::hidden_states_position);
  py::class_<RequestOutput>(m, "RequestOutput")
      .def_readonly("request_id", &RequestOutput::request_id)
      .def_readonly("outputs", &RequestOutput::outputs)
      .def_readonly("finished", &RequestOutput::finished)
      .def_readonly("prompt_logprobs", &RequestOutput::prompt_logprobs)
      .def_property_readonly("prompt_logits", [](const RequestOutput& output) -> py::object {
        if (output.prompt_logits.empty()) return py::none();
        auto rows = static_cast<py::ssize_t>(output.prompt_length);
        auto elements = static_cast<py::ssize_t>(output.prompt_logits.size());
        return py::array_t<float>({rows, elements / rows}, output.prompt_logits.data());
      });
  py::class_<KvLayerInfo>(m, "KvLayerInfo")
      .def_readonly("k", &KvLayerInfo::k)
      .def_readonly("v", &KvLayerInfo::v)
      .def_readonly("k_bytes", &KvLayerInfo::k_bytes)
      .def_readonly("v_bytes", &KvLayerInfo::v_bytes)
      .def_readonly("ranks", &KvLayerInfo::ranks);
  py::class_<ModelInfo>(m, "ModelInfo")
      .def_readonly("architecture", &ModelInfo::architecture)
      .def_readonly("dtype", &ModelInfo::dtype)
      .def_readonly("weight_compression", &ModelInfo::weight_compression)
      .def_readonly("isa", &ModelInfo::isa)
      .def_readonly("num_layers", &ModelInfo::num_layers)
      .def_readonly("hidden_size", &ModelInfo::hidden_size)
      .def_readonly("vocab_size", &ModelInfo::vocab_size)
      .def_readonly("max_model_len", &ModelInfo::max_model_len)
      .def_readonly("num_threads", &ModelInfo::num_threads)
      .def_readonly("parameters", &ModelInfo::parameters)
      .def_readonly("weight_bytes", &ModelInfo::weight_bytes)
      .def_readonly("kv_cache_bytes", &ModelInfo::kv_cache_bytes)
      .def_readonly("num_kv_blocks", &ModelInfo::num_kv_blocks)
      .def_readonly("block_size", &ModelInfo::block_size)
      .def_readonly("kv_cache", &ModelInfo::kv_cache)
      .def_readonly("kv_reason", &ModelInfo::kv_reason)
      .def_readonly("kv_bytes_per_token", &ModelInfo::kv_bytes_per_token)
      .def_readonly("dense_kv_bytes_per_token", &ModelInfo::dense_kv_bytes_per_token)
      .def_readonly("kv_layers", &ModelInfo::kv_layers)
      .def_readonly("lowrank_matrices", &ModelInfo::lowrank_matrices)
      .def_readonly("dense_matrices", &ModelInfo::dense_matrices)
      .def_readonly("tensor_parallel_size", &ModelInfo::tensor_parallel_size)
      .def_readonly("decode_plan", &ModelInfo::decode_plan)
      .def_readonly("prefill_plan", &ModelInfo::prefill_plan)
      .def_readonly("rank_weight_bytes", &ModelInfo::rank_weight_bytes);
  py::class_<CollectiveStats>(m, "CollectiveStats")
      .def_readonly("name", &CollectiveStats::name)
      .def_readonly("calls", &CollectiveStats::calls)
      .def_readonly("bytes", &CollectiveStats::bytes)
      .def_readonly("wire_bytes", &CollectiveStats::wire_bytes);
  py::class_<LengthAccuracy>(m, "LengthAccuracy")
      .def_readonly("count", &LengthAccuracy::count)
      .def_readonly("mae", &LengthAccuracy::mae)
      .def_readonly("acc_50", &LengthAccuracy::acc_50)
      .def_readonly("acc_100", &LengthAccuracy::acc_100)
      .def_readonly("kendall_tau", &LengthAccuracy::kendall_tau)
      .def_readonly("q90_coverage", &LengthAccuracy::q90_coverage);
  py::class_<EngineStats>(m, "EngineStats")
      .def_readonly("num_waiting", &EngineStats::num_waiting)
      .def_readonly("num_running", &EngineStats::num_running)
      .def_readonly("free_kv_blocks", &EngineStats::free_kv_blocks)
      .def_readonly("num_steps", &EngineStats::num_steps)
      .def_readonly("used_kv_blocks", &EngineStats::used_kv_blocks)
      .def_readonly("promised_kv_blocks", &EngineStats::promised_kv_blocks)
      .def_readonly("forecast_kv_blocks", &EngineStats::forecast_kv_blocks)
      .def_readonly("kv_forecast_error", &EngineStats::kv_forecast_error)
      .def_readonly("num_preemptions", &EngineStats::num_preemptions)
      .def_readonly("evicted_for_decode", &EngineStats::evicted_for_decode)
      .def_readonly("evicted_for_prefill", &EngineStats::evicted_for_prefill)
      .def_readonly("set_aside", &EngineStats::set_aside)
      .def_readonly("paused_steps", &EngineStats::paused_steps)
      .def_readonly("num_promotions", &EngineStats::num_promotions)
      .def_readonly("recomputed_tokens", &EngineStats::recomputed_tokens)
      .def_readonly("effective_token_ratio", &EngineStats::effective_token_ratio)
      .def_readonly("length_accuracy", &EngineStats::length_accuracy)
      .def_readonly("prefix_hit_tokens", &EngineStats::prefix_hit_tokens)
      .def_readonly("prompt_tokens", &EngineStats::prompt_tokens)
      .def_readonly("generated_tokens", &EngineStats::generated_tokens)
      .def_readonly("execute_us", &EngineStats::execute_us)
      .def_readonly("length_predictions", &EngineStats::length_predictions)
      .def_readonly("length_predictor_us", &EngineStats::length_predictor_us)
      .def_readonly("collectives", &EngineStats::collectives);
}

void bind_engine(py::module_& m) {
  using PyProgress = std::function<void(std::uint64_t, std::uint64_t)>;
  py::class_<Engine>(m, "Engine")
      // pybind's function wrapper takes the GIL for each progress call.
      .def(py::init<EngineConfig, const PyProgress&>(), py::arg("config"),
           py::arg("progress") = PyProgress(), py::call_guard<py::gil_scoped_release>())
      .def(
          "submit",
          [](Engine& engine, const std::vector<std::int64_t>& prompt, const SamplingParams& params,
             std::vector<float> lengths, std::vector<float> probabilities) {
            return engine.submit(to_token_ids(prompt), params,
                                 {std::move(lengths), std::move(probabilities)});
          },
          py::arg("prompt"), py::arg("params"), py::arg("lengths") = std::vector<float>(),
          py::arg("probabilities") = std::vector<float>())
      .def("abort", &Engine::abort, py::arg("request_id"), py::arg("index") = std::nullopt)
      .def("step", &Engine::step, py::call_guard<py::gil_scoped_release>())
      .def("has_unfinished_requests", &Engine::has_unfinished_requests)
      .def_property_readonly("model_info", &Engine::model_info,
                             py::return_value_policy::reference_internal)
      .def_property_readonly("stats", &Engine::stats);
}

void bind_planner(py::module_& m) {
  bind_fields<PlannerConfig>(m, "PlannerConfig");
  py::class_<PhaseEstimate>(m, "PhaseEstimate")
      .def_readonly("phase", &PhaseEstimate::phase)
      .def_readonly("seconds", &PhaseEstimate::seconds)
      .def_readonly("product_seconds", &PhaseEstimate::product_seconds)
      .def_readonly("operation_seconds", &PhaseEstimate::operation_seconds)
      .def_readonly("attention_seconds", &PhaseEstimate::attention_seconds)
      .def_readonly("exchange_seconds", &PhaseEstimate::exchange_seconds)
      .def_readonly("chunks", &PhaseEstimate::chunks);
  py::class_<PlanEstimate>(m, "PlanEstimate")
      .def_readonly("plan", &PlanEstimate::plan)
      .def_readonly("layout", &PlanEstimate::layout)
      .def_readonly("all_reduces", &PlanEstimate::all_reduces)
      .def_readonly("all_gathers", &PlanEstimate::all_gathers)
      .def_readonly("reduce_scatters", &PlanEstimate::reduce_scatters)
      .def_readonly("wire_bytes_per_token", &PlanEstimate::wire_bytes_per_token)
      .def_readonly("weight_bytes", &PlanEstimate::weight_bytes)
      .def_readonly("kv_bytes_per_token", &PlanEstimate::kv_bytes_per_token)
      .def_readonly("dense_kv_bytes_per_token", &PlanEstimate::dense_kv_bytes_per_token)
      .def_readonly("latent_kv_bytes_per_token", &PlanEstimate::latent_kv_bytes_per_token)
      .def_readonly("token_sharded_kv_bytes_per_token",
                    &PlanEstimate::token_sharded_kv_bytes_per_token)
      .def_readonly("kv_token_sharded", &PlanEstimate::kv_token_sharded)
      .def_readonly("kv_reason", &PlanEstimate::kv_reason)
      .def_readonly("k_break_even", &PlanEstimate::k_break_even)
      .def_readonly("v_break_even", &PlanEstimate::v_break_even)
      .def_readonly("kv_tokens", &PlanEstimate::kv_tokens)
      .def_readonly("fits", &PlanEstimate::fits)
      .def_readonly("phases", &PlanEstimate::phases);
  py::class_<PhaseChoice>(m, "PhaseChoice")
      .def_readonly("phase", &PhaseChoice::phase)
      .def_readonly("plan", &PhaseChoice::plan)
      .def_readonly("weight", &PhaseChoice::weight)
      .def_readonly("seconds", &PhaseChoice::seconds);
  py::class_<PlanReport>(m, "PlanReport")
      .def_readonly("plans", &PlanReport::plans)
      .def_readonly("layout", &PlanReport::layout)
      .def_readonly("choices", &PlanReport::choices)
      .def_readonly("decode_plan", &PlanReport::decode_plan)
      .def_readonly("prefill_plan", &PlanReport::prefill_plan)
      .def_readonly("reason", &PlanReport::reason)
      .def_readonly("link_latency_s", &PlanReport::link_latency_s)
      .def_readonly("link_bytes_per_s", &PlanReport::link_bytes_per_s)
      .def_readonly("memory_bytes_per_s", &PlanReport::memory_bytes_per_s)
      .def_readonly("flops_per_s", &PlanReport::flops_per_s)
      .def_readonly("memory_bytes", &PlanReport::memory_bytes);
  m.def("plan_tensor_parallelism", &plan_tensor_parallelism, py::arg("config"),
        py::call_guard<py::gil_scoped_release>());
}

void bind_description(py::module_& m) {
  py::class_<LinearDescription>(m, "LinearDescription")
      .def_readonly("name", &LinearDescription::name)
      .def_readonly("out_features", &LinearDescription::out_features)
      .def_readonly("in_features", &LinearDescription::in_features)
      .def_readonly("rank", &LinearDescription::rank);
  py::class_<AttentionDescription>(m, "AttentionDescription")
      .def_readonly("num_layers", &AttentionDescription::num_layers)
      .def_readonly("window", &AttentionDescription::window)
      .def_readonly("rope_type", &AttentionDescription::rope_type)
      .def_readonly("rope_theta", &AttentionDescription::rope_theta)
      .def_readonly("rope_factor", &AttentionDescription::rope_factor);
  py::class_<TensorPrefix>(m, "TensorPrefix")
      .def_readonly("prefix", &TensorPrefix::prefix)
      .def_readonly("replacement", &TensorPrefix::replacement);
  py::class_<ModelDescription>(m, "ModelDescription")
      .def_readonly("model_type", &ModelDescription::model_type)
      .def_readonly("num_layers", &ModelDescription::num_layers)
      .def_readonly("hidden_size", &ModelDescription::hidden_size)
      .def_readonly("intermediate_size", &ModelDescription::intermediate_size)
      .def_readonly("num_heads", &ModelDescription::num_heads)
      .def_readonly("num_kv_heads", &ModelDescription::num_kv_heads)
      .def_readonly("head_dim", &ModelDescription::head_dim)
      .def_readonly("vocab_size", &ModelDescription::vocab_size)
      .def_readonly("max_model_len", &ModelDescription::max_model_len)
      .def_readonly("tied_embeddings", &ModelDescription::tied_embeddings)
      .def_readonly("activation", &ModelDescription::activation)
      .def_readonly("norm", &ModelDescription::norm)
      .def_readonly("norms_inputs", &ModelDescription::norms_inputs)
      .def_readonly("norms_outputs", &ModelDescription::norms_outputs)
      .def_readonly("qk_norm", &ModelDescription::qk_norm)
      .def_readonly("attention_soft_cap", &ModelDescription::attention_soft_cap)
      .def_readonly("logit_soft_cap", &ModelDescription::logit_soft_cap)
      .def_readonly("attention", &ModelDescription::attention)
      .def_readonly("linears", &ModelDescription::linears)
      .def_readonly("embedding", &ModelDescription::embedding)
      .def_readonly("tensor_prefixes", &ModelDescription::tensor_prefixes)
      .def_readonly("parameters", &ModelDescription::parameters)
      .def_readonly("kv_elements_per_token", &ModelDescription::kv_elements_per_token)
      .def_readonly("latent_kv_elements_per_token", &ModelDescription::latent_kv_elements_per_token)
      .def_readonly("latent_kv_factor_bytes_per_token",
                    &ModelDescription::latent_kv_factor_bytes_per_token);
  m.def("describe_config", &describe_config, py::arg("path"));
  m.def("supported_architectures", &supported_architectures);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "deinfer's native runtime; see _C.pyi";
  m.attr("__version__") = version();
  py::register_exception_translator(translate);
  bind_params(m);
  bind_outputs(m);
  bind_engine(m);
  bind_planner(m);
  bind_description(m);
  m.def("supported_isas", &supported_isas);
}
