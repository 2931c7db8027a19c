// WeightSource: one file or shards, by tensor name.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "deinfer/error.h"
#include "io/weight_source.h"
#include "safetensors_test_files.h"

namespace deinfer {
namespace {

using io::WeightSource;

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

/// The message of the Error that fn throws; fails the test unless it has this code.
template <typename Fn>
std::string error_of(ErrorCode code, Fn&& fn) {
  try {
    fn();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    return e.what();
  }
  ADD_FAILURE() << "no error";
  return {};
}

std::string open_error(const TempDirectory& directory) {
  return error_of(ErrorCode::kInvalidArgument, [&] { WeightSource::open(directory.path()); });
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(WeightSource, ReadsMatricesAndVectorsOfAllFloatTypes) {
  const TempDirectory directory;
  const std::vector<float> f32 = {1, 2, 3, 4, 5, 6};
  directory.write(
      kSingle,
      make_safetensors(
          {{"f32", "F32", "[2,3]", bytes_of(f32)},
           {"bf16", "BF16", "[2,1]", bytes_of<std::uint16_t>({0x3f80, 0xc000})},
           {"f32.bias", "F32", "[3]", bytes_of<float>({1.5f, -2, 0})},
           {"bf16.bias", "BF16", "[3]", bytes_of<std::uint16_t>({0x3f80, 0xc000, 0x7f80})},
           {"f16.bias", "F16", "[4]", bytes_of<std::uint16_t>({0x3c00, 0xc000, 0x0001, 0x7e00})},
           {"empty", "F32", "[0,5]", ""},
           {"nothing", "F16", "[0]", ""}}));
  const WeightSource source = WeightSource::open(directory.path());
  EXPECT_EQ(source.names(), (std::vector<std::string>{"bf16", "bf16.bias", "empty", "f16.bias",
                                                      "f32", "f32.bias", "nothing"}));
  EXPECT_TRUE(source.contains("f32"));
  EXPECT_FALSE(source.contains("f3"));
  EXPECT_EQ(source.total_bytes(), 24u + 4 + 12 + 6 + 8);
  EXPECT_EQ(source.info("bf16").shape, (std::vector<std::int64_t>{2, 1}));

  const TensorView w = source.matrix("f32", 2, 3);
  EXPECT_EQ(w.dtype, DType::kFloat32);
  EXPECT_EQ(w.rows, 2);
  EXPECT_EQ(w.cols, 3);
  EXPECT_EQ(w.row_stride, 3);
  EXPECT_EQ(reinterpret_cast<const float*>(w.row(1))[2], 6.0f);
  EXPECT_EQ(source.matrix("bf16", 2, 1).dtype, DType::kBFloat16);
  EXPECT_EQ(source.matrix("empty", 0, 5).rows, 0);

  EXPECT_EQ(source.vector("f32.bias", 3), (std::vector<float>{1.5f, -2, 0}));
  EXPECT_EQ(source.vector("bf16.bias", 3),
            (std::vector<float>{1, -2, std::numeric_limits<float>::infinity()}));
  const std::vector<float> f16 = source.vector("f16.bias", 4);
  EXPECT_EQ(f16[0], 1.0f);
  EXPECT_EQ(f16[1], -2.0f);
  EXPECT_EQ(f16[2], std::ldexp(1.0f, -24));
  EXPECT_TRUE(std::isnan(f16[3]));
  EXPECT_TRUE(source.vector("nothing", 0).empty());
}

TEST(WeightSource, RenamesAndDropsByPrefix) {
  const TempDirectory directory;
  directory.write(kSingle, make_safetensors({{"text.a", "F32", "[1]", bytes_of<float>({1})},
                                             {"text.b", "F32", "[1]", bytes_of<float>({2})},
                                             {"texture", "F32", "[1]", bytes_of<float>({3})},
                                             {"vision.a", "F32", "[2]", std::string(8, '\0')}}));
  WeightSource source = WeightSource::open(directory.path());
  source.rename("text.", "model.");
  source.rename("vision.", {});
  source.rename("absent.", "b.");
  EXPECT_EQ(source.names(), (std::vector<std::string>{"model.a", "model.b", "texture"}));
  EXPECT_EQ(source.total_bytes(), 12u);
  EXPECT_EQ(source.vector("model.b", 1), std::vector<float>{2});
  source.release("model.b");
  EXPECT_TRUE(
      contains(error_of(ErrorCode::kInvalidArgument, [&] { source.rename("model.a", "texture"); }),
               "has both model.a and texture"));
}

TEST(WeightSource, NamesShapesTypesAndMissingTensors) {
  const TempDirectory directory;
  directory.write(kSingle, make_safetensors({{"q.v.weight", "F32", "[2,1]", std::string(8, '\0')},
                                             {"ids", "I64", "[1,1]", std::string(8, '\0')},
                                             {"odd", "F4", "[1,1]", "x"}}));
  const WeightSource source = WeightSource::open(directory.path());
  EXPECT_EQ(error_of(ErrorCode::kInvalidArgument, [&] { source.matrix("q.v.weight", 2, 3); }),
            "q.v.weight: expected shape [2, 3], file has [2, 1]");
  EXPECT_EQ(error_of(ErrorCode::kInvalidArgument, [&] { source.vector("q.v.weight", 2); }),
            "q.v.weight: expected shape [2], file has [2, 1]");
  EXPECT_TRUE(contains(error_of(ErrorCode::kUnsupported, [&] { source.matrix("ids", 1, 1); }),
                       "ids: dtype I64"));
  EXPECT_TRUE(contains(error_of(ErrorCode::kUnsupported, [&] { source.matrix("odd", 1, 1); }),
                       "odd: dtype F4"));
  for (const auto& use : {+[](const WeightSource& s) { s.info("k"); },
                          +[](const WeightSource& s) { s.matrix("k", 1, 1); },
                          +[](const WeightSource& s) { s.vector("k", 1); },
                          +[](const WeightSource& s) { s.release("k"); }}) {
    EXPECT_TRUE(
        contains(error_of(ErrorCode::kInvalidArgument, [&] { use(source); }), "no tensor 'k'"));
  }
}

TEST(WeightSource, AlignsDataThatTheFileDoesNot) {
  for (std::size_t misalignment = 0; misalignment < 8; ++misalignment) {
    const TempDirectory directory;
    const std::vector<float> values = {1, 2, 3, 4};
    directory.write(kSingle,
                    make_safetensors({{"w", "F32", "[2,2]", bytes_of(values)},
                                      {"h", "BF16", "[1,2]", bytes_of<std::uint16_t>({1, 2})},
                                      {"v", "F32", "[4]", bytes_of(values)}},
                                     misalignment));
    const WeightSource source = WeightSource::open(directory.path());
    for (int round = 0; round < 2; ++round) {
      const TensorView w = source.matrix("w", 2, 2);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(w.data) % 4, 0u);
      EXPECT_EQ(std::memcmp(w.data, values.data(), 16), 0);
      EXPECT_EQ(source.matrix("w", 2, 2).data, w.data);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(source.matrix("h", 1, 2).data) % 2, 0u);
      EXPECT_EQ(source.vector("v", 4), values);
      source.release("w");
    }
  }
}

TEST(WeightSource, ViewsSurviveAMove) {
  const TempDirectory directory;
  const std::vector<float> values = {1, 2};
  for (const std::size_t misalignment : {0u, 1u}) {
    directory.write(kSingle,
                    make_safetensors({{"w", "F32", "[1,2]", bytes_of(values)}}, misalignment));
    WeightSource first = WeightSource::open(directory.path());
    const TensorView view = first.matrix("w", 1, 2);
    const WeightSource second = std::move(first);
    EXPECT_EQ(second.matrix("w", 1, 2).data, view.data);
    EXPECT_EQ(std::memcmp(view.data, values.data(), 8), 0);
  }
}

TEST(WeightSource, ReadsShards) {
  const TempDirectory directory;
  directory.write("model-1.safetensors",
                  make_safetensors({{"a", "F32", "[1]", bytes_of<float>({1})},
                                    {"unlisted", "F32", "[1]", bytes_of<float>({9})}}));
  directory.write("model-2.safetensors",
                  make_safetensors({{"b", "F32", "[1]", bytes_of<float>({2})},
                                    {"c", "F32", "[1]", bytes_of<float>({3})}}));
  directory.write(kIndex, R"({"metadata":{"total_size":12},"weight_map":{
      "a":"model-1.safetensors","b":"model-2.safetensors","c":"model-2.safetensors"}})");
  const WeightSource source = WeightSource::open(directory.path());
  EXPECT_EQ(source.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(source.vector("a", 1)[0], 1.0f);
  EXPECT_EQ(source.vector("c", 1)[0], 3.0f);
  EXPECT_EQ(source.total_bytes(), 12u);
}

TEST(WeightSource, RefusesABrokenIndex) {
  const TempDirectory directory;
  directory.write("one.safetensors", make_safetensors({{"a", "F32", "[1]", bytes_of<float>({1})}}));
  const auto expect = [&](const std::string& index, const std::string& message) {
    directory.write(kIndex, index);
    const std::string error = open_error(directory);
    EXPECT_TRUE(contains(error, message)) << error;
    EXPECT_TRUE(contains(error, kIndex)) << error;
  };
  expect(R"({"weight_map":{"a":"two.safetensors"}})", "shard two.safetensors is missing");
  expect(R"({"weight_map":{"a":"one.safetensors","b":"one.safetensors"}})", "tensor 'b' is not in");
  expect(R"({"weight_map":{"a":"one.safetensors","a":"one.safetensors"}})", "duplicate key 'a'");
  for (const char* shard : {"../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "",
                            ".safetensors", "one.bin", "one.safetensors\\u0000.safetensors"}) {
    expect(std::string(R"({"weight_map":{"a":")") + shard + R"("}})", "is not the name of a");
  }
  expect(R"({"weight_map":{"a":7}})", "is not a string");
  expect(R"({"weight_map":[]})", "no weight_map");
  expect("{}", "no weight_map");
  expect("[]", "no weight_map");
  expect("", "invalid JSON");
}

TEST(WeightSource, SaysWhatADirectoryLacks) {
  const TempDirectory directory;
  EXPECT_TRUE(contains(open_error(directory), "has neither model.safetensors nor"));
  directory.write("pytorch_model.bin", "pickle");
  const std::string error = open_error(directory);
  EXPECT_TRUE(contains(error, "has pytorch_model.bin but no model.safetensors")) << error;
  EXPECT_TRUE(contains(error, "convert")) << error;
  EXPECT_TRUE(contains(error_of(ErrorCode::kInvalidArgument,
                                [&] { WeightSource::open(directory.path() / "absent"); }),
                       "absent: no such directory"));
}

}  // namespace
}  // namespace deinfer
