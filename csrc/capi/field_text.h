// Fields of the public structs from text, by name.
#pragma once

#include <charconv>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <vector>

#include "deinfer/error.h"
#include "deinfer/fields.h"

namespace deinfer::capi {

// One overload per type of field; false unless all of `text` is a value of that type.

inline bool parse(std::string_view text, std::string& value) {
  value = text;
  return true;
}

inline bool parse(std::string_view text, bool& value) {
  value = text == "true";
  return value || text == "false";
}

template <typename T>
  requires(std::is_arithmetic_v<T> && !std::is_same_v<T, bool>)
bool parse(std::string_view text, T& value) {
  const char* end = text.data() + text.size();
  std::from_chars_result result = std::from_chars(text.data(), end, value);
  return result.ec == std::errc() && result.ptr == end;
}

template <typename T>
bool parse(std::string_view text, std::optional<T>& value) {
  value.reset();
  if (text == "none") return true;
  T inner{};
  if (!parse(text, inner)) return false;
  value = std::move(inner);
  return true;
}

template <typename T>
bool parse(std::string_view text, std::vector<T>& value) {
  value.clear();
  while (!text.empty()) {
    std::size_t comma = text.find(',');
    if (!parse(text.substr(0, comma), value.emplace_back())) return false;
    if (comma == std::string_view::npos) break;
    text.remove_prefix(comma + 1);
    if (text.empty()) return false;  // a trailing comma
  }
  return true;
}

/// Sets the field of that name. Throws Error(kInvalidArgument) for an unknown name, or for text
/// that is no value of the field's type, which keeps its value then.
template <typename T>
void set_field(T& object, const char* type_name, std::string_view name, std::string_view text) {
  bool known = false;
  visit_fields<T>([&](const char* field, auto member) {
    if (known || name != field) return;
    known = true;
    std::remove_reference_t<decltype(object.*member)> value{};
    if (!parse(text, value)) {
      throw Error(ErrorCode::kInvalidArgument, std::string(type_name) + "." + field + "=\"" +
                                                   std::string(text) + "\" is not of its type");
    }
    object.*member = std::move(value);
  });
  if (!known) {
    throw Error(ErrorCode::kInvalidArgument,
                std::string(type_name) + " has no field \"" + std::string(name) + "\"");
  }
}

}  // namespace deinfer::capi
