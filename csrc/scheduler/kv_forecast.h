// How many KV blocks a set of sequences will hold at most until all of them have ended.
#pragma once

#include <cstdint>
#include <vector>

namespace deinfer {

/// The peak of future KV use, if every sequence grows by a token per step and ends after its
/// `remaining` steps (the idea of the Past-Future scheduler, ASPLOS 2025, here exact in blocks):
/// the maximum over i of what the i sequences with the most steps left hold when the i-th ends.
class KvForecast {
 public:
  struct Item {
    std::uint64_t owner = 0;  // any name
    int remaining = 0;        // steps, >= 0
    int tokens = 0;           // known now
    int shared = 0;           // leading blocks that others hold, too, counted in the shared blocks
  };

  explicit KvForecast(int block_size);

  void clear() { items_.clear(); }
  /// Blocks that several sequences hold; they count as long as any runs.
  void set_shared_blocks(std::int64_t blocks) { shared_blocks_ = blocks; }
  /// Adds an item that counts from the next sort() on.
  void add(const Item& item) { items_.push_back(item); }
  void sort();
  /// Adds an item in order.
  void insert(const Item& item);

  /// So many (or, negative, fewer) more leading blocks of the owner's item are shared.
  void share(std::uint64_t owner, int blocks);

  /// The peak in blocks, 0 without items. O(items).
  std::int64_t peak() const { return scan(nullptr); }
  /// The peak with one more.
  std::int64_t peak_with(const Item& item) const { return scan(&item); }

 private:
  std::int64_t scan(const Item* extra) const;

  int block_size_;
  std::int64_t shared_blocks_ = 0;
  std::vector<Item> items_;  // most steps left first
  // Of the items seen by scan(): how many fill their last block up to `phase` tokens, as a binary
  // indexed tree over phases in [0, block_size).
  mutable std::vector<int> phases_;
};

}  // namespace deinfer
