// JSON text and files with errors that name their origin.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace deinfer::io {

/// What to do with an object that has the same key twice. JSON allows it and common readers keep
/// the last value; in a table of weights it can only be a mistake or an attack.
enum class DuplicateKeys { kKeepLast, kReject };

/// Parses one JSON value, nested at most 64 deep; nothing but white space may follow it. Throws
/// Error(kInvalidArgument) "origin: ..." with the position of the mistake.
nlohmann::json parse_json(std::string_view text, const std::string& origin,
                          DuplicateKeys duplicates = DuplicateKeys::kKeepLast);

/// Reads and parses a file of at most 100 MB. Throws Error(kInvalidArgument) "path: ...".
nlohmann::json read_json(const std::filesystem::path& path,
                         DuplicateKeys duplicates = DuplicateKeys::kKeepLast);

}  // namespace deinfer::io
