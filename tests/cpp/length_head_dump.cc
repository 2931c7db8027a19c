// Prints what a length head says, for the test that compares it with Python's:
// length_head_dump HEAD.json HIDDEN_SIZE NUM_LAYERS GENERATED, with state and mean on stdin. Two
// lines of probabilities: after the prompt, then after GENERATED tokens.
#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <vector>

#include "engine/length_head.h"

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  int hidden = std::atoi(argv[2]);
  deinfer::LengthHead head(argv[1], hidden, std::atoi(argv[3]));
  std::vector<float> state(static_cast<std::size_t>(hidden)), mean(state.size()), prior;
  for (auto* values : {&state, &mean}) {
    for (float& value : *values) std::cin >> value;
  }
  for (int generated : {0, std::atoi(argv[4])}) {
    for (float p : head.predict(state, mean, generated, prior).probabilities()) {
      std::cout << std::setprecision(9) << p << ' ';
    }
    std::cout << '\n';
  }
  return std::cin ? 0 : 1;
}
