// Two numbers with a colon between them, as links and hardware are written.
#pragma once

#include <charconv>
#include <cmath>
#include <optional>
#include <string_view>

namespace deinfer {

/// The finite number that all of `text` is, if it is one.
inline std::optional<double> parse_number(std::string_view text) {
  double value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return {};
  return value;
}

/// The parts of "a:b", and their values where they are numbers.
struct NumberPair {
  std::string_view first_text, second_text;
  std::optional<double> first, second;
};

/// Nothing for a text without a colon.
inline std::optional<NumberPair> parse_number_pair(std::string_view text) {
  const std::size_t colon = text.find(':');
  if (colon == std::string_view::npos) return {};
  const std::string_view first = text.substr(0, colon), second = text.substr(colon + 1);
  return NumberPair{first, second, parse_number(first), parse_number(second)};
}

}  // namespace deinfer
