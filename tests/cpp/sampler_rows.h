// Random rows of logits and sampling parameters, the extreme ones included.
#pragma once

#include <cmath>
#include <initializer_list>
#include <random>
#include <vector>

#include "deinfer/sampling_params.h"
#include "reference.h"

namespace deinfer::test {

class Dice {
 public:
  explicit Dice(unsigned seed) : engine_(seed) {}
  int below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }
  bool one_in(int n) { return below(n) == 0; }
  float normal() { return normal_(engine_); }
  double uniform() { return std::uniform_real_distribution<double>()(engine_); }
  template <typename T>
  T any(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int>(values.size()))];
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

inline int random_vocab(Dice& dice, int i) {
  if (i % 25 == 0) return 1 + dice.below(70000);
  if (i % 3 == 0) return dice.any({1, 2, 3, 16, 17, 63, 64, 65, 66, 256, 257, 1024, 1025, 2049});
  return 1 + dice.below(3000);
}

inline std::vector<float> random_row(Dice& dice, int vocab) {
  std::vector<float> row(static_cast<std::size_t>(vocab));
  int shape = dice.below(8);
  float sigma = dice.any({0.01f, 0.5f, 2.0f, 8.0f});
  float offset = dice.any({0.0f, 0.0f, 0.0f, -40.0f, 5000.0f, 3e7f});
  for (std::size_t j = 0; j < row.size(); ++j) {
    auto place = static_cast<float>(j) / static_cast<float>(vocab);
    switch (shape) {
      case 0: row[j] = 0.25f; break;                                          // all equal
      case 1: row[j] = static_cast<float>(dice.below(4)); break;              // ties
      case 2: row[j] = std::round(dice.normal() * 16) / 8; break;             // as of bf16 logits
      case 3: row[j] = sigma * place; break;                                  // ascending
      case 4: row[j] = -sigma * place; break;                                 // descending
      case 5: row[j] = dice.normal() + (dice.one_in(50) ? 12.0f : 0); break;  // peaked
      case 6: row[j] = j % 2 == 0 ? 1e-30f * dice.normal() : -1.0f; break;    // close to each other
      default: row[j] = sigma * dice.normal(); break;
    }
    row[j] += offset;
  }
  float special = dice.any({0.0f, 0.0f, -kInf, kNan, -3e38f});
  if (special != 0.0f) {
    int rarity = dice.any({2, 10, 500});
    for (float& logit : row) {
      if (dice.one_in(rarity)) logit = special;
    }
    row[static_cast<std::size_t>(dice.below(vocab))] = offset;  // something can be drawn
  }
  return row;
}

inline SamplingParams random_params(Dice& dice, int vocab) {
  SamplingParams params;
  params.temperature = dice.any({1.0f, 1.0f, 0.7f, 1.5f, 0.05f, 20.0f, 1e-30f, 1e-40f, 1e30f});
  if (dice.one_in(2)) {
    params.top_k = dice.any({1, 2, 5, 50, 64, 65, 100, 1000, 1 + dice.below(vocab + 5)});
  }
  if (dice.one_in(2)) {
    params.top_p = dice.any({1e-9f, 0.1f, 0.5f, 0.9f, 0.99f, 0.999999f, std::nextafter(1.0f, 0.0f),
                             1e-6f + 0.99f * static_cast<float>(dice.uniform())});
  }
  if (dice.one_in(3)) params.min_p = dice.any({1e-6f, 0.05f, 0.5f, 0.99f, 1.0f});
  return params;
}

}  // namespace deinfer::test
