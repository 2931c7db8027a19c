#include "io/json_file.h"

#include <cctype>
#include <fstream>
#include <functional>
#include <ios>
#include <set>
#include <system_error>
#include <vector>

#include "base/check.h"

namespace deinfer::io {
namespace {

constexpr std::uintmax_t kMaxFileBytes = 100'000'000;
constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxReasonLength = 300;

/// The parser's messages quote what it read: any length, any bytes.
std::string printable(std::string_view reason) {
  std::string text(reason.substr(0, kMaxReasonLength));
  for (char& c : text) {
    if (std::isprint(static_cast<unsigned char>(c)) == 0) c = '?';
  }
  return text;
}

/// A parser callback that throws at what the parser itself lets pass.
class Checks {
 public:
  Checks(const std::string& origin, DuplicateKeys duplicates)
      : origin_(origin), duplicates_(duplicates) {}

  bool operator()(int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    // Parsing uses no recursion, but writing a value out does.
    check_argument(depth <= kMaxDepth, origin_, ": nested deeper than ", kMaxDepth, " levels");
    if (duplicates_ == DuplicateKeys::kKeepLast) return true;
    if (event == Event::object_start) {
      open_objects_.emplace_back();
    } else if (event == Event::object_end) {
      open_objects_.pop_back();
    } else if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      check_argument(open_objects_.back().insert(key).second, origin_, ": duplicate key '", key,
                     "'");
    }
    return true;
  }

 private:
  const std::string& origin_;
  const DuplicateKeys duplicates_;
  std::vector<std::set<std::string>> open_objects_;
};

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& origin,
                          DuplicateKeys duplicates) {
  try {
    Checks checks(origin, duplicates);
    return nlohmann::json::parse(text.begin(), text.end(), std::ref(checks));
  } catch (const nlohmann::json::exception& e) {
    fail(ErrorCode::kInvalidArgument, origin, ": invalid JSON: ", printable(e.what()));
  }
}

nlohmann::json read_json(const std::filesystem::path& path, DuplicateKeys duplicates) {
  std::error_code error;
  check_argument(std::filesystem::is_regular_file(path, error), path.string(), ": no such file");
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  check_argument(!error, path.string(), ": ", error.message());
  check_argument(size <= kMaxFileBytes, path.string(), ": ", size, " bytes of JSON, at most ",
                 kMaxFileBytes, " are accepted");
  std::ifstream file(path, std::ios::binary);
  std::string text(static_cast<std::size_t>(size), '\0');
  file.read(text.data(), static_cast<std::streamsize>(size));
  check_argument(file.good() && static_cast<std::uintmax_t>(file.gcount()) == size, path.string(),
                 ": cannot be read");
  return parse_json(text, path.string(), duplicates);
}

}  // namespace deinfer::io
