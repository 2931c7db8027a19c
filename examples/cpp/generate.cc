// Generates from token ids, several prompts at once, and prints tokens as they come:
//
//   generate MODEL [--tensor-parallel-size N] [--max-tokens N] [--temperature T] IDS [IDS ...]
//
// IDS are the token ids of a prompt, with commas: 1,4093,253. Each line of the output is
// "<prompt> <sample> <token id>"; "<prompt> <sample> end <reason>" when it has ended.
#include <cstdio>
#include <exception>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "deinfer/engine.h"

namespace {

std::vector<deinfer::TokenId> parse_ids(const std::string& text) {
  std::vector<deinfer::TokenId> ids;
  std::istringstream stream(text);
  for (std::string id; std::getline(stream, id, ',');) {
    std::size_t used = 0;
    ids.push_back(std::stoi(id, &used));
    if (used != id.size()) throw std::invalid_argument("bad token id \"" + id + "\"");
  }
  return ids;
}

const char* reason_name(deinfer::FinishReason reason) {
  switch (reason) {
    case deinfer::FinishReason::kStop: return "stop";
    case deinfer::FinishReason::kLength: return "length";
    case deinfer::FinishReason::kAbort: return "abort";
    case deinfer::FinishReason::kNone: break;
  }
  return "none";
}

int run(int argc, char** argv) {
  deinfer::EngineConfig config;
  deinfer::SamplingParams params;
  params.temperature = 0.0f;
  std::vector<std::vector<deinfer::TokenId>> prompts;
  for (int i = 1; i < argc; ++i) {
    std::string argument = argv[i];
    bool has_value = argument.rfind("--", 0) == 0;
    if (has_value && i + 1 == argc) throw std::invalid_argument(argument + " needs a value");
    if (argument == "--tensor-parallel-size") {
      config.tensor_parallel_size = std::stoi(argv[++i]);
    } else if (argument == "--max-tokens") {
      params.max_tokens = std::stoi(argv[++i]);
    } else if (argument == "--temperature") {
      params.temperature = std::stof(argv[++i]);
    } else if (has_value) {
      throw std::invalid_argument("unknown option " + argument);
    } else if (config.model.empty()) {
      config.model = argument;
    } else {
      prompts.push_back(parse_ids(argument));
    }
  }
  if (prompts.empty()) throw std::invalid_argument("usage: generate MODEL [options] IDS [IDS ...]");

  deinfer::Engine engine(config);
  std::map<deinfer::RequestId, std::size_t> prompt_of;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    prompt_of[engine.submit(prompts[i], params)] = i;
  }
  while (engine.has_unfinished_requests()) {
    for (const deinfer::RequestOutput& request : engine.step()) {
      for (const deinfer::SequenceOutput& sample : request.outputs) {
        std::size_t prompt = prompt_of.at(request.request_id);
        for (deinfer::TokenId token : sample.new_token_ids) {
          std::printf("%zu %d %d\n", prompt, sample.index, token);
        }
        if (sample.finish_reason != deinfer::FinishReason::kNone) {
          std::printf("%zu %d end %s\n", prompt, sample.index, reason_name(sample.finish_reason));
        }
        std::fflush(stdout);
      }
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "generate: %s\n", error.what());
    return 1;
  }
}
