#include "scheduler/kv_forecast.h"

#include <algorithm>
#include <cstddef>
#include <functional>

namespace deinfer {

KvForecast::KvForecast(int block_size)
    : block_size_(block_size), phases_(static_cast<std::size_t>(block_size) + 1) {}

void KvForecast::sort() { std::ranges::stable_sort(items_, std::greater<>{}, &Item::remaining); }

void KvForecast::insert(const Item& item) {
  items_.insert(
      std::ranges::upper_bound(items_, item.remaining, std::greater<>{}, &Item::remaining), item);
}

void KvForecast::share(std::uint64_t owner, int blocks) {
  const auto item = std::ranges::find(items_, owner, &Item::owner);
  if (item == items_.end()) return;
  item->shared += blocks;
  shared_blocks_ += blocks;
}

std::int64_t KvForecast::scan(const Item* extra) const {
  // After r = a * block_size + b steps a sequence with c = q * block_size + p tokens holds
  // q + a + ceil((p + b) / block_size) blocks. Summed over sequences that is the sum of q, a for
  // each, 1 for each with p + b > 0 and 1 more for each with p > block_size - b.
  std::ranges::fill(phases_, 0);
  const int size = block_size_;
  std::int64_t whole = 0;  // sum of q, less the shared blocks
  std::int64_t count = 0;
  std::int64_t empty = 0;  // items with p == 0
  std::int64_t peak = 0;
  const auto take = [&](const Item& item) {
    const int phase = item.tokens % size;
    whole += item.tokens / size - item.shared;
    ++count;
    if (phase == 0) ++empty;
    for (int i = phase + 1; i <= size; i += i & -i) ++phases_[static_cast<std::size_t>(i)];
    const int a = item.remaining / size;
    const int b = item.remaining % size;
    std::int64_t beyond = 0;  // items with p > size - b
    if (b > 0) {
      beyond = count;
      for (int i = size - b + 1; i > 0; i -= i & -i) beyond -= phases_[static_cast<std::size_t>(i)];
    }
    peak = std::max(peak, whole + count * a + (b > 0 ? count : count - empty) + beyond);
  };
  for (const Item& item : items_) {
    if (extra != nullptr && extra->remaining > item.remaining) {
      take(*extra);
      extra = nullptr;
    }
    take(item);
  }
  if (extra != nullptr) take(*extra);
  return count > 0 ? peak + shared_blocks_ : 0;
}

}  // namespace deinfer
