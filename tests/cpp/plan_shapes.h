// Random models for the tests of plans.
#pragma once

#include <random>
#include <string>

#include "plan/tensor_parallel_plan.h"

namespace deinfer::test {

inline constexpr int kSizes[] = {1, 2, 3, 4, 6, 8};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int between(int low, int high) {  // inclusive; the same on every platform
    return low + static_cast<int>(engine_() % static_cast<unsigned>(high - low + 1));
  }

 private:
  std::mt19937 engine_;
};

inline ModelShape random_shape(Random& random) {
  ModelShape model;
  model.num_kv_heads = random.between(1, 8);
  model.num_heads = model.num_kv_heads * random.between(1, 4);
  model.head_dim = 2 * random.between(1, 3);
  model.hidden_size = random.between(1, 90);
  model.intermediate_size = random.between(1, 150);
  model.vocab_size = random.between(1, 120);
  return model;
}

inline std::string describe(const TensorParallelPlan& plan) {
  const ModelShape& model = plan.model();
  return std::string(plan.name()) + " size " + std::to_string(plan.size()) + " heads " +
         std::to_string(model.num_heads) + "/" + std::to_string(model.num_kv_heads) + " hidden " +
         std::to_string(model.hidden_size);
}

}  // namespace deinfer::test
