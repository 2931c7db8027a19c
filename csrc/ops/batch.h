// One step's work as the model sees it: a flat list of tokens of several sequences.
#pragma once

#include <cstdint>
#include <vector>

#include "deinfer/sampling_params.h"
#include "ops/sampling.h"

namespace deinfer {

/// Where a token's K and V are stored.
struct KvSlot {
  std::int32_t block = 0;   // -1: nowhere, as another rank keeps them
  std::int32_t offset = 0;  // in the block, tokens
};

/// A run of consecutive tokens of one sequence: prefill chunk or decode.
struct BatchSequence {
  int first_row = 0;
  int num_rows = 0;
  int first_position = 0;                     // of the first row; the KV of all before is cached
  const std::int32_t* block_table = nullptr;  // covers first_position + num_rows tokens
};

struct Batch {
  std::vector<TokenId> token_ids;  // [m]
  std::vector<int> positions;      // [m]
  std::vector<KvSlot> slots;       // [m]
  std::vector<BatchSequence> sequences;
  std::vector<int> logit_rows;      // ascending rows whose logits are wanted
  std::vector<int> argmax_rows;     // ascending rows of which only the most likely token is wanted
  std::vector<int> state_rows;      // ascending rows whose hidden states are wanted
  std::vector<SampledRow> sampled;  // ascending rows that the worker samples; none but as it offers

  int num_tokens() const { return static_cast<int>(token_ids.size()); }
  void clear() {
    token_ids.clear();
    positions.clear();
    slots.clear();
    sequences.clear();
    logit_rows.clear();
    argmax_rows.clear();
    state_rows.clear();
    sampled.clear();
  }
};

/// The rows of a batch that matter once the K and V of the last layer are written: of every
/// sequence, those from its first wanted one on. With prompts that is one row of many.
struct WantedRows {
  std::vector<int> rows;  // in the whole batch, ascending
  Batch batch;            // those rows, renumbered; they have no slots

  void select(const Batch& whole);
};

}  // namespace deinfer
