#include "io/safetensors.h"

#include <gtest/gtest.h>

#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "deinfer/error.h"
#include "io/json_file.h"
#include "safetensors_test_files.h"

namespace deinfer {
namespace {

using io::SafetensorsFile;

/// The message with which a file of this content is refused; empty if it is accepted.
std::string refusal(const TempDirectory& directory, std::string_view content) {
  const auto path = directory.write("file.safetensors", content);
  try {
    const SafetensorsFile file(path);
    // Touch every byte that the file claims: the sanitizer would notice one outside of the mapping.
    unsigned sum = 0;
    for (const auto& [name, info] : file.tensors()) {
      for (std::uint64_t i = 0; i < info.bytes; ++i) {
        sum += std::to_integer<unsigned>(file.data(info)[i]);
      }
      file.release(info);
    }
    EXPECT_LE(sum, 255u * content.size());
    return {};
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(e.what()).find(path.string()), std::string::npos) << e.what();
    return e.what();
  }
}

std::string entry(const std::string& name, const std::string& body) {
  return "\"" + name + "\":{" + body + "}";
}

std::string small_file() {
  return make_safetensors({{"a", "F32", "[2,3]", bytes_of<float>({1, 2, 3, 4, 5, 6})},
                           {"b", "BF16", "[3]", bytes_of<std::uint16_t>({1, 2, 3})},
                           {"c", "F16", "[1,1]", bytes_of<std::uint16_t>({0x3c00})}});
}

TEST(Safetensors, ReadsWhatWasWritten) {
  const TempDirectory directory;
  const std::vector<float> values = {1, -2, 3.5f, 4, 5, 6};
  const SafetensorsFile file(directory.write(
      "file.safetensors", make_safetensors({{"w", "F32", "[2,3]", bytes_of(values)},
                                            {"scalar", "I64", "[]", std::string(8, '\1')},
                                            {"empty", "BF16", "[0,7]", ""},
                                            {"odd", "F4_NEW", "[5]", "xyz"}})));
  ASSERT_EQ(file.tensors().size(), 4u);
  const io::TensorInfo& w = file.tensors().at("w");
  EXPECT_EQ(w.dtype, "F32");
  EXPECT_EQ(w.shape, (std::vector<std::int64_t>{2, 3}));
  ASSERT_EQ(w.bytes, 24u);
  EXPECT_EQ(std::memcmp(file.data(w), values.data(), 24), 0);
  EXPECT_TRUE(file.tensors().at("scalar").shape.empty());
  EXPECT_EQ(file.tensors().at("empty").bytes, 0u);
  EXPECT_EQ(file.tensors().at("odd").dtype, "F4_NEW") << "unknown dtypes are for the caller";
  EXPECT_EQ(io::find_dtype("F4_NEW"), std::nullopt);
  EXPECT_EQ(io::find_dtype("BF16"), DType::kBFloat16);
}

TEST(Safetensors, ReleasedPagesComeBack) {
  const TempDirectory directory;
  std::vector<float> values(100'000);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const SafetensorsFile file(directory.write(
      "file.safetensors", make_safetensors({{"w", "F32", "[100000]", bytes_of(values)}})));
  const io::TensorInfo& w = file.tensors().at("w");
  EXPECT_EQ(std::memcmp(file.data(w), values.data(), w.bytes), 0);
  file.release(w);
  EXPECT_EQ(std::memcmp(file.data(w), values.data(), w.bytes), 0);
}

TEST(Safetensors, AcceptsAFileWithoutTensors) {
  const TempDirectory directory;
  EXPECT_EQ(refusal(directory, raw_safetensors("{}", "")), "");
  EXPECT_EQ(refusal(directory, raw_safetensors(R"({"__metadata__":{"a":"b"}} )", "")), "");
}

TEST(Safetensors, RefusesEveryTruncation) {
  const TempDirectory directory;
  const std::string content = small_file();
  ASSERT_EQ(refusal(directory, content), "");
  for (std::size_t length = 0; length < content.size(); ++length) {
    EXPECT_NE(refusal(directory, std::string_view(content).substr(0, length)), "") << length;
  }
  EXPECT_NE(refusal(directory, content + "x"), "") << "and bytes after the end";
}

TEST(Safetensors, SurvivesFlippedBits) {
  const TempDirectory directory;
  const std::string content = small_file();
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, content.data(), sizeof(header_bytes));
  std::mt19937 random(1);
  int refused = 0;
  for (int i = 0; i < 2000; ++i) {
    std::string damaged = content;
    for (auto flips = 1 + random() % 3; flips > 0; --flips) {
      damaged[random() % (sizeof(header_bytes) + header_bytes)] = static_cast<char>(random());
    }
    refused += refusal(directory, damaged).empty() ? 0 : 1;
  }
  EXPECT_GT(refused, 1000);
}

TEST(Safetensors, NamesTheLieInAHeader) {
  const TempDirectory directory;
  const std::string data(24, '\0');
  const std::string f32 = R"("dtype":"F32","shape":)";
  const std::pair<std::string, std::string> cases[] = {
      // The entry of tensor t, and what the message must say.
      {f32 + R"([2,3],"data_offsets":[0,25])", "[0, 25] are outside of the 24 bytes"},
      {f32 + R"([2,3],"data_offsets":[24,0])", "[24, 0] are outside"},
      {f32 + R"([2,3],"data_offsets":[0,18446744073709551615])", "18446744073709551615] are out"},
      {f32 + R"([2,3],"data_offsets":[-1,24])", "data_offsets [-1,24]"},
      {f32 + R"([2,3],"data_offsets":[0.0,24])", "data_offsets [0.0,24]"},
      {f32 + R"([2,3],"data_offsets":[0])", "data_offsets [0]"},
      {f32 + R"([2,3],"data_offsets":"x")", "data_offsets \"x\""},
      {f32 + R"([2,3])", "no data_offsets"},
      {f32 + R"([2,4],"data_offsets":[0,24])", "F32 of shape [2, 4] takes 32 bytes"},
      {f32 + R"([2,-3],"data_offsets":[0,24])", "the dimension -3"},
      {f32 + R"([2,3.0],"data_offsets":[0,24])", "the dimension 3.0"},
      {f32 + R"([2,"3"],"data_offsets":[0,24])", "the dimension \"3\""},
      {f32 + R"([18446744073709551615],"data_offsets":[0,24])", "dimension 18446744073709551615"},
      {f32 + R"([4611686018427387904,4],"data_offsets":[0,24])", "more than 2^64 bytes"},
      {f32 + R"([4611686018427387910],"data_offsets":[0,24])", "more than 2^64 bytes"},
      {f32 + R"(6,"data_offsets":[0,24])", "shape 6 is not an array"},
      {R"("dtype":7,"shape":[6],"data_offsets":[0,24])", "dtype 7 is not a string"},
      {R"("shape":[6],"data_offsets":[0,24])", "no dtype"},
      {f32 + R"([5],"data_offsets":[0,20])", "the tensors end at byte"},
      {f32 + R"([5],"data_offsets":[4,24])", "belong to no tensor"},
  };
  for (const auto& [body, message] : cases) {
    const std::string header = "{" + entry("t", body) + "}";
    const std::string error = refusal(directory, raw_safetensors(header, data));
    EXPECT_NE(error.find(message), std::string::npos) << header << "\n" << error;
    EXPECT_NE(error.find("t"), std::string::npos);
  }
  EXPECT_EQ(
      refusal(directory, raw_safetensors(
                             "{" + entry("t", f32 + R"([2,3],"data_offsets":[0,24])") + "}", data)),
      "");
}

TEST(Safetensors, RefusesOverlapsDuplicatesAndOtherJson) {
  const TempDirectory directory;
  const std::string data(24, '\0');
  const auto expect = [&](const std::string& header, const char* message) {
    const std::string error = refusal(directory, raw_safetensors(header, data));
    EXPECT_NE(error.find(message), std::string::npos) << error;
  };
  const std::string a = entry("a", R"("dtype":"F32","shape":[4],"data_offsets":[0,16])");
  const std::string b = entry("b", R"("dtype":"F32","shape":[3],"data_offsets":[12,24])");
  const std::string inside = entry("b", R"("dtype":"F32","shape":[0],"data_offsets":[8,8])");
  const std::string rest = entry("c", R"("dtype":"F32","shape":[2],"data_offsets":[16,24])");
  expect("{" + a + "," + b + "}", "tensor 'b' at byte");
  expect("{" + a + "," + inside + "," + rest + "}", "overlaps");
  expect("{" + a + "," + a + "," + rest + "}", "duplicate key 'a'");
  expect(R"({"t":{"dtype":"F32","dtype":"F16"}})", "duplicate key 'dtype'");
  expect(R"({"t":[1,2]})", "expected an object");
  expect("[]", "not an object");
  expect("", "invalid JSON");
  expect("{", "invalid JSON");
  expect(R"({"t":"\xff"})", "invalid JSON");
  expect(R"({"t":{"dtype":"F32","shape":[6],"data_offsets":[0,1e999]}})", "invalid JSON");
  expect("{} {}", "invalid JSON");
  EXPECT_NE(refusal(directory, raw_safetensors("{\"\xff\xfe\":{}}", "")).find("invalid JSON"),
            std::string::npos);
  for (const char c : refusal(directory, raw_safetensors("{\"\xff\xfe\":{}}", ""))) {
    EXPECT_GE(c, ' ') << "a message must be printable, whatever the file holds";
  }
}

TEST(Safetensors, RefusesALyingHeaderLength) {
  const TempDirectory directory;
  for (const std::uint64_t length :
       {std::uint64_t{33}, std::uint64_t{100'000'001}, ~std::uint64_t{0}, std::uint64_t{1} << 63}) {
    std::string content(40, ' ');
    std::memcpy(content.data(), &length, sizeof(length));
    EXPECT_NE(refusal(directory, content).find("header length " + std::to_string(length)),
              std::string::npos);
  }
}

TEST(Safetensors, RefusesWhatIsNoFile) {
  const TempDirectory directory;
  EXPECT_THROW(SafetensorsFile(directory.path() / "absent"), Error);
  EXPECT_THROW(SafetensorsFile(directory.path()), Error);
}

TEST(Safetensors, RefusesDeepNesting) {
  const TempDirectory directory;
  const std::string deep(100'000, '[');
  const std::string closed = "{\"a\":" + deep + std::string(100'000, ']') + "}";
  for (const std::string& header : {"{\"a\":" + deep, closed, deep}) {
    EXPECT_NE(refusal(directory, raw_safetensors(header, "")).find("nested deeper"),
              std::string::npos);
  }
}

TEST(JsonFile, ReadsAndNamesThePath) {
  const TempDirectory directory;
  EXPECT_EQ(io::read_json(directory.write("a.json", R"({"a": 1, "a": 2})")).at("a"), 2);
  const auto error = [](auto&& read) -> std::string {
    try {
      read();
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
      return e.what();
    }
    return {};
  };
  EXPECT_NE(error([&] {
              io::read_json(directory.path() / "a.json", io::DuplicateKeys::kReject);
            }).find("a.json: duplicate key 'a'"),
            std::string::npos);
  const auto bad = directory.write("bad.json", "{\"a\": nope}");
  EXPECT_EQ(error([&] { io::read_json(bad); }).find(bad.string() + ": invalid JSON"), 0u);
  EXPECT_NE(error([&] { io::read_json(directory.write("empty.json", "")); }), "");
  EXPECT_NE(error([&] { io::read_json(directory.path() / "absent.json"); }).find("no such file"),
            std::string::npos);
  EXPECT_NE(error([&] { io::read_json(directory.path()); }), "");
}

}  // namespace
}  // namespace deinfer
