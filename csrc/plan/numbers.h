// Two positive numbers with a colon between them, as links and hardware are written.
#pragma once

#include <charconv>
#include <cmath>
#include <string_view>
#include <utility>

#include "base/check.h"

namespace deinfer {

/// "a:b" of `numbers`. Throws kInvalidArgument with the `operand`, the `whole` text that it came in
/// and what was expected, unless both are positive and finite.
inline std::pair<double, double> parse_two_numbers(std::string_view operand, std::string_view whole,
                                                   std::string_view numbers, const char* expected) {
  auto parse = [](std::string_view part, double& value) {
    auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), value);
    return error == std::errc() && end == part.data() + part.size() && std::isfinite(value) &&
           value > 0;
  };
  double first = 0, second = 0;
  const std::size_t colon = numbers.find(':');
  check_argument(colon != std::string_view::npos && parse(numbers.substr(0, colon), first) &&
                     parse(numbers.substr(colon + 1), second),
                 operand, "=\"", whole, "\" is not ", expected);
  return {first, second};
}

}  // namespace deinfer
