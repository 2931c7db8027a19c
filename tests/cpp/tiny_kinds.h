// Small models of one kind each, for tests that run over all of them.
#pragma once

#include <string>

#include "tiny_model.h"

namespace deinfer::test {

struct Kind {
  std::string name;
  TinyConfig config;
};

}  // namespace deinfer::test
