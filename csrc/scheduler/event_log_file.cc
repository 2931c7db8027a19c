#include "scheduler/event_log_file.h"

#include <concepts>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <type_traits>
#include <variant>
#include <vector>

#include "base/check.h"

namespace deinfer {

NLOHMANN_JSON_SERIALIZE_ENUM(Admission, {{Admission::kPeak, "peak"},
                                         {Admission::kPrompt, "prompt"},
                                         {Admission::kMaxTokens, "max_tokens"}})

namespace {

using Json = nlohmann::json;

constexpr const char* kFormat = "deinfer.event_log";
constexpr int kVersion = 1;

// The members of each struct, once for writing and for reading: visit("name", member).

template <typename Config, typename Visitor>
void members(Config& config, Visitor&& visit)
  requires std::same_as<std::remove_const_t<Config>, SchedulerConfig>
{
  visit("max_num_seqs", config.max_num_seqs);
  visit("max_num_batched_tokens", config.max_num_batched_tokens);
  visit("block_size", config.block_size);
  visit("num_blocks", config.num_blocks);
  visit("max_prefill_chunk", config.max_prefill_chunk);
  visit("enable_prefix_caching", config.enable_prefix_caching);
  visit("watermark", config.watermark);
  visit("admission", config.admission);
  visit("safety", config.safety);
  visit("history_window", config.history_window);
  visit("promote_after_s", config.promotion.after_s);
  visit("promote_per_token_s", config.promotion.per_token_s);
  visit("readmission_steps", config.readmission_steps);
  visit("max_pause", config.max_pause);
  visit("preempt_limit", config.preempt_limit);
  visit("graph_sizes", config.graph_sizes);
}

template <typename Config, typename Visitor>
void members(Config& config, Visitor&& visit)
  requires std::same_as<std::remove_const_t<Config>, PolicyConfig>
{
  visit("bucket_edges", config.bucket_edges);
  visit("bucket_width", config.bucket_width);
  visit("tail_factor", config.tail_factor);
  visit("take_turns", config.take_turns);
  auto& batches = config.static_batches;
  visit("group", batches.group);
  visit("batch_size", batches.batch_size);
  visit("sort", batches.sort);
  visit("bucket_tokens", batches.bucket_tokens);
  visit("bucket_batch_sizes", batches.bucket_batch_sizes);
  visit("collect_failures", batches.collect_failures);
  visit("restart_failures", batches.restart_failures);
}

template <typename Item, typename Visitor>
void members(Item& sequence, Visitor&& visit)
  requires std::same_as<std::remove_const_t<Item>, Sequence>
{
  visit("id", sequence.id);
  visit("arrival", sequence.arrival);
  visit("arrival_us", sequence.arrival_us);
  visit("priority", sequence.priority);
  visit("tokens", sequence.tokens);
  visit("prompt_length", sequence.prompt_length);
  visit("max_new_tokens", sequence.max_new_tokens);
  visit("hinted", sequence.hinted);
  visit("reuse_prefix", sequence.reuse_prefix);
}

template <typename Struct>
Json written(const Struct& value) {
  Json json = Json::object();
  members(value, [&](const char* name, const auto& member) { json[name] = member; });
  return json;
}

template <typename Struct>
void read(const Json& json, Struct& value) {
  members(value, [&](const char* name, auto& member) { json.at(name).get_to(member); });
}

Json written(const LengthDistribution& length) {
  return {{"lengths", length.lengths()}, {"probabilities", length.probabilities()}};
}

LengthDistribution read_length(const Json& json) {
  const auto lengths = json.at("lengths").get<std::vector<float>>();
  const auto probabilities = json.at("probabilities").get<std::vector<float>>();
  if (lengths.empty()) return {};
  return {lengths, probabilities};
}

struct Write {
  Json operator()(const Sequence& sequence) const {
    Json json = written(sequence);
    json.update(written(sequence.expected_length));
    return {{"add", std::move(json)}};
  }
  Json operator()(const EventLog::Abort& event) const { return {{"abort", event.id}}; }
  Json operator()(const EventLog::Expect& event) const {
    Json json = written(event.length);
    json["id"] = event.id;
    return {{"expect", std::move(json)}};
  }
  Json operator()(const EventLog::Step& event) const {
    Json plan = Json::array();
    for (const EventLog::Part& part : event.plan) plan.push_back({part.id, part.num_tokens});
    return {{"step", event.now_us}, {"plan", std::move(plan)}};
  }
  Json operator()(const EventLog::Update& event) const {
    Json sampled = Json::array();
    for (const SampledToken& s : event.sampled) sampled.push_back({s.id, s.token, s.finished});
    return {{"update", std::move(sampled)}};
  }
};

void read_event(const Json& json, EventLog& log) {
  if (json.contains("add")) {
    Sequence sequence;
    read(json["add"], sequence);
    sequence.expected_length = read_length(json["add"]);
    log.add(std::move(sequence));
  } else if (json.contains("abort")) {
    log.add(EventLog::Abort{json["abort"].get<SequenceId>()});
  } else if (json.contains("expect")) {
    log.add(
        EventLog::Expect{json["expect"].at("id").get<SequenceId>(), read_length(json["expect"])});
  } else if (json.contains("step")) {
    EventLog::Step step{json["step"].get<std::int64_t>(), {}};
    for (const Json& part : json.at("plan")) {
      step.plan.push_back({part.at(0).get<SequenceId>(), part.at(1).get<int>()});
    }
    log.add(std::move(step));
  } else if (json.contains("update")) {
    EventLog::Update update;
    for (const Json& s : json["update"]) {
      update.sampled.push_back(
          {s.at(0).get<SequenceId>(), s.at(1).get<TokenId>(), s.at(2).get<bool>()});
    }
    log.add(std::move(update));
  } else {
    fail(ErrorCode::kInvalidArgument, "no event of a known kind: ", json.dump().substr(0, 80));
  }
}

SchedulerSetup read_setup(const Json& json) {
  check_argument(json.is_object() && json.value("format", "") == kFormat, "not a ", kFormat);
  check_argument(json.at("version") == kVersion, "version ", json.at("version").dump(),
                 " is not known, only ", kVersion);
  SchedulerSetup setup;
  read(json.at("scheduler"), setup.config);
  json.at("policy").get_to(setup.policy);
  read(json.at("policy_config"), setup.policy_config);
  return setup;
}

}  // namespace

std::unique_ptr<Scheduler> SchedulerSetup::make() const {
  return std::make_unique<Scheduler>(config, make_policy(policy, policy_config));
}

EventLogWriter::EventLogWriter(std::filesystem::path path, const SchedulerSetup& setup)
    : path_(std::move(path)), file_(path_) {
  file_ << Json{{"format", kFormat},
                {"version", kVersion},
                {"scheduler", written(setup.config)},
                {"policy", setup.policy},
                {"policy_config", written(setup.policy_config)}}
        << '\n';
  check_argument(file_.flush().good(), "event_log=", path_, " cannot be written");
}

void EventLogWriter::drain(EventLog& log) {
  for (const EventLog::Event& event : log.events()) file_ << std::visit(Write{}, event) << '\n';
  log.clear();
  if (!file_.flush())
    fail(ErrorCode::kInternal, "event_log=", path_, " cannot be written any more");
}

std::pair<SchedulerSetup, EventLog> read_event_log(const std::filesystem::path& path) {
  std::ifstream file(path);
  check_argument(file.good(), "event log ", path, " cannot be read");
  std::pair<SchedulerSetup, EventLog> result;
  std::string line;
  int number = 0;
  try {
    while (std::getline(file, line)) {
      ++number;
      const Json json = Json::parse(line);
      if (number == 1) {
        result.first = read_setup(json);
      } else {
        read_event(json, result.second);
      }
    }
    check_argument(number > 0, "not a ", kFormat);
  } catch (const Json::exception& error) {
    fail(ErrorCode::kInvalidArgument, "event log ", path, ", line ", number, ": ", error.what());
  } catch (const Error& error) {
    fail(ErrorCode::kInvalidArgument, "event log ", path, ", line ", number, ": ", error.what());
  }
  return result;
}

}  // namespace deinfer
