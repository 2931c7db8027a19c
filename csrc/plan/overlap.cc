#include "plan/overlap.h"

#include <algorithm>

namespace deinfer {
namespace {

int units(int columns) { return (columns + kChunkColumns - 1) / kChunkColumns; }

int units(std::span<const int> columns) {
  int sum = 0;
  for (int count : columns) sum += units(count);
  return sum;
}

}  // namespace

Overlap overlap_of(int tokens, int chunks, int most_tokens) {
  if (tokens <= kRankChunkTokens) {
    return {std::max(tokens, 1), std::clamp(chunks, 1, kMaxRankChunks)};
  }
  int tiles = std::min(chunks, tokens / kMinTileTokens);
  tiles = std::max({tiles, 1, (tokens + most_tokens - 1) / most_tokens});
  return {(tokens + tiles - 1) / tiles, 1};
}

int num_rank_chunks(Exchange exchange, std::span<const int> columns, int chunks) {
  return has_rank_chunks(exchange) ? std::clamp(chunks, 1, std::max(units(columns), 1)) : 1;
}

Range chunk_columns(std::span<const int> columns, std::size_t index, int chunk, int chunks) {
  const Range part = split(units(columns), chunks, chunk);
  const int before = units(columns.first(index));
  auto border = [&](int unit) {
    return std::clamp((unit - before) * kChunkColumns, 0, columns[index]);
  };
  return {border(part.begin), border(part.end)};
}

int ExchangeChunks::of(int tokens) const {
  for (const UpTo& size : sizes) {
    if (tokens <= size.tokens) return size.chunks;
  }
  return sizes.empty() ? 1 : sizes.back().chunks;
}

}  // namespace deinfer
