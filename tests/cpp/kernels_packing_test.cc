#include "kernels/cpu/packing.h"

#include <utility>

#include "base/thread_team.h"
#include "deinfer/error.h"
#include "reference.h"

namespace deinfer::test {
namespace {

struct half {
  std::uint16_t bits;
};

/// Exact halves: small integers times a power of two.
half to_half(int value) {
  if (value == 0) return {0};
  std::uint32_t u = std::bit_cast<std::uint32_t>(static_cast<float>(value) / 64.0f);
  auto exponent = static_cast<std::int32_t>((u >> 23) & 0xff) - 112;
  return {static_cast<std::uint16_t>(
      ((u >> 16) & 0x8000u) | (static_cast<std::uint32_t>(exponent) << 10) | ((u >> 13) & 0x3ffu))};
}

/// A source matrix with a row stride, whose elements are exact in all types.
struct Source {
  Source(DType type, int rows_, int k_, int stride_) : dtype(type), rows(rows_), k(k_) {
    std::size_t count = static_cast<std::size_t>(rows) * static_cast<std::size_t>(stride_);
    bytes.assign(count * dtype_size(type), std::byte{0x7f});
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < k; ++j) {
        auto at = static_cast<std::size_t>(i * stride_ + j);
        float v = value(i, j);
        if (type == DType::kFloat32) {
          reinterpret_cast<float*>(bytes.data())[at] = v;
        } else if (type == DType::kBFloat16) {
          reinterpret_cast<bf16*>(bytes.data())[at] = to_bf16(v);
        } else {
          reinterpret_cast<half*>(bytes.data())[at] = to_half((i * 37 + j * 11) % 251 - 125);
        }
      }
    }
    view = {bytes.data(), type, rows, k, stride_};
  }
  static float value(int i, int j) {
    return static_cast<float>((i * 37 + j * 11) % 251 - 125) / 64.0f;
  }

  DType dtype;
  int rows, k;
  std::vector<std::byte> bytes;
  TensorView view;
};

/// Element (row, j) by the formula of kernel_table.h.
float packed_element(const cpu::PackedMatrix& p, int row, int j) {
  int panel = row / p.panel_rows;
  int rows = p.rows_of(panel);
  int r = row % p.panel_rows;
  if (p.dtype == DType::kFloat32) {
    return static_cast<const float*>(p.panel(panel))[j * rows + r];
  }
  return to_float(static_cast<const bf16*>(p.panel(panel))[(j / 2 * rows + r) * 2 + j % 2]);
}

TEST(Int8Packing, RoundsToTheNearestMultipleOfTheRowsScale) {
  for (DType from : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    Source source(from, 40, 37, 41);
    std::vector<std::int32_t> map;
    for (int i = 0; i < 50; ++i) map.push_back(i % 7 == 3 ? -1 : (i * 13) % 40);
    cpu::PackedMatrix packed = cpu::allocate_packed(DType::kInt8, 50, 37, 32);
    ASSERT_EQ(packed.n_pad, 64);
    cpu::pack_rows(source.view, map, 1, 2, packed);
    cpu::pack_rows(source.view, map, 0, 1, packed);
    std::vector<float> row(37);
    for (int i = 0; i < 50; ++i) {
      std::int32_t target = map[static_cast<std::size_t>(i)];
      float largest = 0;
      for (int j = 0; j < 37; ++j) {
        if (target >= 0) largest = std::max(largest, std::abs(Source::value(target, j)));
      }
      float scale = packed.scales[static_cast<std::size_t>(i)];
      EXPECT_FLOAT_EQ(scale, largest / 127.0f);
      packed.read_row(i, row.data());
      for (int j = 0; j < 37; ++j) {
        float want = target < 0 ? 0.0f : Source::value(target, j);
        float got = row[static_cast<std::size_t>(j)];
        EXPECT_LE(std::abs(got - want), 0.501f * scale) << i << ", " << j;
        EXPECT_EQ(got, scale == 0 ? 0 : std::nearbyint(want / scale) * scale) << i << ", " << j;
      }
    }
  }
}

TEST(Int8Packing, RefusesWhatItCannotRepresent) {
  std::vector<float> weights(64 * 8, 1.0f);
  weights[5 * 8 + 3] = kNan;
  cpu::PackedMatrix packed = cpu::allocate_packed(DType::kInt8, 64, 8, 32);
  TensorView view{weights.data(), DType::kFloat32, 64, 8, 8};
  try {
    cpu::pack_rows(view, {}, 0, 2, packed);
    FAIL() << "NaN was accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("weights[5]"), std::string::npos) << error.what();
  }
  EXPECT_THROW(cpu::allocate_packed(DType::kInt8, 64, 8, 16), Error);
}

TEST(BufferArena, GivesZeroedDisjointBuffersThatOutliveIt) {
  Buffer first;
  Buffer last;
  {
    BufferArena arena(1 << 12);
    first = arena.allocate(100);
    EXPECT_EQ(arena.allocate(0).size(), 0u);
    Buffer large = arena.allocate(1 << 20);
    EXPECT_EQ(large.as<char>()[(1 << 20) - 1], 0);
    last = arena.allocate(4096);
  }
  for (Buffer* buffer : {&first, &last}) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer->as<char>()) % 64, 0u);
    for (std::size_t i = 0; i < buffer->size(); ++i) ASSERT_EQ(buffer->as<char>()[i], 0);
    std::fill_n(buffer->as<char>(), buffer->size(), 1);
  }
}

class PackingTest : public testing::TestWithParam<std::pair<DType, DType>> {};

TEST_P(PackingTest, RoundTrip) {
  auto [from, to] = GetParam();
  for (int panel_rows : {16, 32}) {
    for (auto [n, k] : {std::pair{1, 1}, {16, 8}, {33, 13}, {47, 114}, {50, 9}, {64, 301}}) {
      SCOPED_TRACE(testing::Message() << "n=" << n << " k=" << k << " panel_rows=" << panel_rows);
      Source source(from, n, k, k + 3);
      cpu::PackedMatrix packed = cpu::allocate_packed(to, n, k, panel_rows);
      EXPECT_EQ(packed.n_pad, (n + 7) / 8 * 8);
      EXPECT_EQ(packed.k_pad, (k + 1) / 2 * 2);
      int middle = packed.num_panels() / 2;
      cpu::pack_rows(source.view, {}, middle, packed.num_panels(), packed);
      cpu::pack_rows(source.view, {}, 0, middle, packed);
      std::vector<float> row(static_cast<std::size_t>(k));
      for (int i = 0; i < packed.n_pad; ++i) {
        for (int j = 0; j < packed.k_pad; ++j) {
          float want = i < n && j < k ? Source::value(i, j) : 0.0f;
          ASSERT_EQ(packed_element(packed, i, j), want) << i << ", " << j;
        }
        if (i >= n) continue;
        packed.read_row(i, row.data());
        for (int j = 0; j < k; ++j)
          ASSERT_EQ(row[static_cast<std::size_t>(j)], Source::value(i, j));
      }
    }
  }
}

TEST_P(PackingTest, RowMap) {
  auto [from, to] = GetParam();
  Source source(from, 40, 21, 21);
  std::vector<std::int32_t> map;
  for (int i = 0; i < 50; ++i) map.push_back(i % 7 == 3 ? -1 : (i * 13) % 40);
  cpu::PackedMatrix packed = cpu::allocate_packed(to, 50, 21, 32);
  ASSERT_EQ(packed.num_panels(), 2);
  EXPECT_EQ(packed.rows_of(0), 32);
  EXPECT_EQ(packed.rows_of(1), 24);
  cpu::pack_rows(source.view, map, 0, 2, packed);
  for (int i = 0; i < packed.n_pad; ++i) {
    std::int32_t row = i < 50 ? map[static_cast<std::size_t>(i)] : -1;
    for (int j = 0; j < packed.k_pad; ++j) {
      float want = row >= 0 && j < 21 ? Source::value(row, j) : 0.0f;
      ASSERT_EQ(packed_element(packed, i, j), want) << i << ", " << j;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, PackingTest,
                         testing::Values(std::pair{DType::kFloat32, DType::kFloat32},
                                         std::pair{DType::kFloat32, DType::kBFloat16},
                                         std::pair{DType::kBFloat16, DType::kBFloat16},
                                         std::pair{DType::kBFloat16, DType::kFloat32},
                                         std::pair{DType::kFloat16, DType::kFloat32},
                                         std::pair{DType::kFloat16, DType::kBFloat16}),
                         [](const auto& test) {
                           return std::string(dtype_name(test.param.first)) + "_to_" +
                                  dtype_name(test.param.second);
                         });

TEST(Packing, LastPanelHasTheRowsThatAreLeft) {
  for (int left : {8, 16, 24}) {
    cpu::PackedMatrix packed = cpu::allocate_packed(DType::kBFloat16, 32 + left - 7, 8, 32);
    EXPECT_EQ(packed.n_pad, 32 + left);
    EXPECT_EQ(packed.num_panels(), 2);
    EXPECT_EQ(packed.rows_of(0), 32);
    EXPECT_EQ(packed.rows_of(1), left);
  }
}

TEST(Packing, InterleavedPanelsLieByTurnsAndKeepTheirRows) {
  ThreadTeam team(2);
  BufferArena arena;
  for (auto [dtype, compressed] : {std::pair{DType::kBFloat16, true},
                                   {DType::kBFloat16, false},
                                   {DType::kFloat32, false},
                                   {DType::kInt8, false}}) {
    SCOPED_TRACE(testing::Message() << dtype_name(dtype) << (compressed ? " in 12 bits" : ""));
    std::vector<cpu::PackedMatrix> matrices;
    std::vector<std::vector<float>> rows;
    for (int k : {70, 18}) {
      Source source(DType::kFloat32, 72, k, k);
      matrices.push_back(cpu::allocate_packed(dtype, 72, k, 32, nullptr, compressed));
      cpu::pack_rows(source.view, {}, 0, 3, matrices.back());
    }
    auto read = [&](const cpu::PackedMatrix& matrix) {
      std::vector<float> values(static_cast<std::size_t>(72 * matrix.k));
      for (int i = 0; i < 72; ++i) matrix.read_row(i, values.data() + i * matrix.k);
      return values;
    };
    for (const auto& matrix : matrices) rows.push_back(read(matrix));
    cpu::PackedMatrix& first = matrices[0];
    cpu::PackedMatrix& second = matrices[1];
    const std::size_t bytes = first.bytes() + second.bytes();
    cpu::interleave_panels(first, second, arena, team);
    EXPECT_EQ(first.bytes() + second.bytes(), bytes);
    EXPECT_EQ(second.slot(0), first.slot(0) + first.full_panel_bytes());
    EXPECT_EQ(first.slot(1), second.slot(0) + second.full_panel_bytes());
    EXPECT_EQ(read(first), rows[0]);
    EXPECT_EQ(read(second), rows[1]);
    matrices[0] = {};
    EXPECT_EQ(read(matrices[1]), rows[1]) << "in memory that both own";
  }
  cpu::PackedMatrix small = cpu::allocate_packed(DType::kFloat32, 32, 8, 32);
  cpu::PackedMatrix large = cpu::allocate_packed(DType::kFloat32, 33, 8, 32);
  EXPECT_THROW(cpu::interleave_panels(small, large, arena, team), Error);
}

TEST(Packing, RoundsToNearestEven) {
  std::vector<float> values = {1.00390625f, 1.01171875f, -1.0039064f, kInf, kNan, 3e38f, 0, -0.0f};
  cpu::PackedMatrix packed = cpu::allocate_packed(DType::kBFloat16, 1, 8, 16);
  cpu::pack_rows({values.data(), DType::kFloat32, 1, 8, 8}, {}, 0, 1, packed);
  std::vector<float> row(8);
  packed.read_row(0, row.data());
  EXPECT_EQ(row[0], 1.0f);
  EXPECT_EQ(row[1], 1.015625f);
  EXPECT_EQ(row[2], -1.0078125f);
  EXPECT_EQ(row[3], kInf);
  EXPECT_TRUE(std::isnan(row[4]));
  for (std::size_t j = 0; j < 8; ++j) {
    if (j == 4) continue;
    EXPECT_EQ(row[j], to_float(to_bf16(values[j])));
  }
}

TEST(Packing, RejectsWrongInput) {
  EXPECT_THROW(cpu::allocate_packed(DType::kFloat16, 1, 1, 32), Error);
  EXPECT_THROW(cpu::allocate_packed(DType::kFloat32, 0, 1, 32), Error);
  EXPECT_THROW(cpu::allocate_packed(DType::kFloat32, 1, 1, 24), Error);
  cpu::PackedMatrix packed = cpu::allocate_packed(DType::kFloat32, 4, 4, 32);
  std::vector<float> data(16);
  EXPECT_THROW(cpu::pack_rows({data.data(), DType::kFloat32, 4, 3, 3}, {}, 0, 1, packed), Error);
  EXPECT_THROW(cpu::pack_rows({data.data(), DType::kFloat32, 3, 4, 4}, {}, 0, 1, packed), Error);
  std::vector<std::int32_t> map = {0, 1, 2, 4};
  EXPECT_THROW(cpu::pack_rows({data.data(), DType::kFloat32, 4, 4, 4}, map, 0, 1, packed), Error);
}

}  // namespace
}  // namespace deinfer::test
