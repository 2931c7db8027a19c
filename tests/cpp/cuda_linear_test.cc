// The CUDA products and their epilogues.
#include "cuda_linear_fixture.h"

namespace deinfer {
namespace {

using cuda::DeviceBuffer;
using cuda::kTileCols;
using cuda::LinearEpilogue;
using cuda::LinearLaunch;
using cuda::tiles_of;
using test::Case;
using test::CudaLinearFixture;
using test::kNan;

std::string type_name(bool int8) { return int8 ? "int8" : "bf16"; }

/// By the type of the weights.
class CudaLinear : public CudaLinearFixture, public testing::WithParamInterface<bool> {
 protected:
  CudaLinear() : CudaLinearFixture(GetParam()) {}
};

TEST_P(CudaLinear, IsAProductForAnyShape) {
  for (int m : {1, 7, 8, 9, 16, 30, 33, 64, 65, 130}) {
    for (auto [n, k] : {std::pair{1, 1}, {16, 32}, {17, 33}, {40, 100}, {50, 300}}) {
      const Case c = make(m, n, k);
      const std::vector<float> y = product(c);
      for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
          ASSERT_NEAR(y[static_cast<std::size_t>(i * n + j)], c.exact(i, j), c.tolerance())
              << m << " x " << n << " x " << k << " at " << i << ", " << j;
        }
      }
    }
  }
}

TEST_P(CudaLinear, ATokenHasTheSameBitsInAnyBatch) {
  const Case all = make(130, 37, 700);
  const std::vector<float> expected = product(all);
  for (int m : {1, 8, 9, 31, 64, 66, 129}) {
    Case some = all;
    some.m = m;
    const std::vector<float> y = product(some);
    ASSERT_TRUE(test::same_bits(y.data(), expected.data(), y.size() * sizeof(float))) << m;
  }
}

TEST_P(CudaLinear, HasNoRace) {
  for (int m : {3, 20, 70}) {
    const Case c = make(m, 40, 300);
    test::in_every_order<float>([&] { return product(c); });
  }
}

TEST_P(CudaLinear, AddsToTheResidualStreamAndCapsLogits) {
  for (int m : {2, 66}) {
    const Case c = make(m, 21, 40);
    const std::vector<float> plain = product(c);
    const std::vector<float> added = product(c, LinearEpilogue::kAdd, 3.0f);
    const std::vector<float> capped = product(c, LinearEpilogue::kFloat, kNan, 2.0f);
    for (std::size_t i = 0; i < plain.size(); ++i) {
      EXPECT_EQ(added[i], 3.0f + plain[i]);
      EXPECT_NEAR(capped[i], 2.0f * std::tanh(plain[i] / 2.0f), 1e-6);
    }
  }
}

TEST_P(CudaLinear, WritesActivationsWithTheirPadding) {
  for (int m : {5, 70}) {
    const Case c = make(m, 41, 50);
    const std::vector<float> plain = product(c);
    LinearLaunch launch;
    launch.m = m;
    for (LinearEpilogue epilogue : {LinearEpilogue::kActivation, LinearEpilogue::kRelu}) {
      launch.segments[0] = segment(c, epilogue);
      const std::vector<bf16> y = activation(launch, c.n);
      for (int i = 0; i < m; ++i) {
        for (int j = 0; j < 64; ++j) {
          float expected = j < c.n ? plain[static_cast<std::size_t>(i * c.n + j)] : 0.0f;
          if (epilogue == LinearEpilogue::kRelu) expected = std::max(expected, 0.0f);
          EXPECT_EQ(test::wide(y[static_cast<std::size_t>(i * 64 + j)]),
                    to_float(to_bf16(expected)));
        }
      }
    }
  }
}

TEST_P(CudaLinear, GatesOneProductByAnother) {
  for (int m : {5, 40, 70}) {
    const Case gate = make(m, 33, 50, 2);
    const Case up = make(m, 33, 100, 3);
    const std::vector<float> g = product(gate);
    const std::vector<float> u = product(up);
    LinearLaunch launch;
    launch.m = m;
    for (LinearEpilogue epilogue : {LinearEpilogue::kGatedSilu, LinearEpilogue::kGatedGelu}) {
      launch.segments[0] = segment(gate, epilogue);
      launch.segments[0].second = factor(up);
      const std::vector<bf16> y = activation(launch, gate.n);
      for (int i = 0; i < m; ++i) {
        for (int j = 0; j < gate.n; ++j) {
          const auto at = static_cast<std::size_t>(i * gate.n + j);
          const double act =
              epilogue == LinearEpilogue::kGatedSilu ? test::silu(g[at]) : test::gelu_tanh(g[at]);
          const double expected = act * u[at];
          EXPECT_NEAR(test::wide(y[static_cast<std::size_t>(i * 64 + j)]), expected,
                      4e-3 * std::abs(expected) + 1e-6);
        }
      }
    }
  }
}

/// Every head has its own columns of x, heads of a group have the same W; results with the padding
/// of heads' rows, and without it.
TEST_P(CudaLinear, HeadsHaveTheirOwnProducts) {
  const int heads = 6, group = 3, head_rows = 20, k = 40, head_tiles = 4, chunks = 2;
  const int padded = head_tiles * 16;
  for (int m : {3, 70}) {
    Case w = make(m, heads / group * padded, k);
    const Case all = make(m, padded, heads * chunks * kTileCols);
    for (int row = 0; row < w.n; ++row) {  // padding
      if (row % padded < head_rows) continue;
      w.bias[static_cast<std::size_t>(row)] = 0.0f;
      std::fill_n(w.w.begin() + row * k, k, bf16{});
    }
    w.round();
    LinearLaunch launch;
    launch.m = m;
    launch.num_segments = 1;
    launch.kv.head_dim = head_rows;
    cuda::LinearSegment& segment = launch.segments[0];
    segment.first = factor(w);
    segment.first.x = keep(activations(all.x, m, all.k, heads * chunks));
    segment.first.x_chunks = heads * chunks;
    segment.head_tiles = head_tiles;
    segment.group = group;
    segment.tiles = heads * head_tiles;
    segment.n = heads * padded;
    segment.ld = segment.n;
    auto exact = [&](int token, int head, int row) {
      const int from = head / group * padded + row;
      double sum = w.bias[static_cast<std::size_t>(from)];
      for (int j = 0; j < k; ++j) {
        sum += w.rounded[static_cast<std::size_t>(from * k + j)] *
               test::wide(
                   all.x[static_cast<std::size_t>(token * all.k + head * chunks * kTileCols + j)]);
      }
      return sum;
    };
    auto expect = [&](bf16 got, double expected) {
      EXPECT_NEAR(test::wide(got), expected, 4e-3 * std::abs(expected) + 1e-4);
    };
    segment.epilogue = LinearEpilogue::kHeads;
    segment.out_chunks = tiles_of(heads * head_rows, kTileCols);
    DeviceBuffer y = on_device(
        std::vector<bf16>(static_cast<std::size_t>(128 * segment.out_chunks * kTileCols), bf16{}));
    segment.out = y.as<void>();
    cuda::check_launch(cuda::launch_linear(launch, stream_->get()), "linear");
    const std::vector<bf16> tiled = on_host<bf16>(y);
    segment.out_chunks = 0;
    segment.first.bias = nullptr;
    DeviceBuffer rows =
        on_device(std::vector<bf16>(static_cast<std::size_t>(m * segment.n), to_bf16(kNan)));
    segment.out = rows.as<void>();
    cuda::check_launch(cuda::launch_linear(launch, stream_->get()), "linear");
    const std::vector<bf16> plain = on_host<bf16>(rows);
    for (int i = 0; i < m; ++i) {
      for (int head = 0; head < heads; ++head) {
        for (int row = 0; row < padded; ++row) {
          const double expected = exact(i, head, row);
          const double bias = w.bias[static_cast<std::size_t>(head / group * padded + row)];
          expect(plain[static_cast<std::size_t>(i * segment.n + head * padded + row)],
                 expected - bias);
          if (row >= head_rows) continue;
          expect(tiled[static_cast<std::size_t>(cuda::activation_offset(
                     i, head * head_rows + row, tiles_of(heads * head_rows, kTileCols)))],
                 expected);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Weights, CudaLinear, testing::Bool(),
                         [](const auto& of) { return type_name(of.param); });

/// q, k and v of several heads: rotated or not.
class CudaQkv : public CudaLinearFixture,
                public testing::WithParamInterface<std::tuple<int, bool>> {
 protected:
  CudaQkv() : CudaLinearFixture(std::get<1>(GetParam())) {}
};

TEST_P(CudaQkv, AreStoredForAttention) {
  const int head_dim = std::get<0>(GetParam());
  const int half = head_dim / 2, heads = 3, kv_heads = 2, block_size = 16;
  const int width = cuda::head_width(head_dim);
  for (int m : {3, 66}) {
    for (bool rotates : {false, true}) {
      const Case q = make(m, heads * head_dim, 40, 4), k = make(m, kv_heads * head_dim, 40, 5),
                 v = make(m, kv_heads * head_dim, 72, 6);
      const std::vector<float> plain[] = {product(q), product(k), product(v)};
      test::Random random(7);
      const std::vector<float> cos = random.vector(static_cast<std::size_t>(m * half));
      const std::vector<float> sin = random.vector(static_cast<std::size_t>(m * half));
      std::vector<int> slots;  // backwards from a high one; one token has none
      for (int i = 0; i < m; ++i) slots.push_back(i == 1 ? -1 : 95 - i);
      const std::size_t pool = static_cast<std::size_t>(6 * kv_heads * block_size * width);
      DeviceBuffer k_pool = on_device(std::vector<bf16>(pool));
      DeviceBuffer v_pool = on_device(std::vector<bf16>(pool));
      DeviceBuffer query =
          on_device(std::vector<bf16>(static_cast<std::size_t>(m * heads * width)));
      DeviceBuffer cos_device = on_device(cos), sin_device = on_device(sin),
                   slots_device = on_device(slots);
      LinearLaunch launch;
      launch.m = m;
      launch.num_segments = 3;
      launch.heads = heads;
      launch.rotation = {cos_device.as<float>(), sin_device.as<float>(), half};
      launch.kv = {k_pool.as<void>(), v_pool.as<void>(), block_size, kv_heads, head_dim, width};
      launch.slots = slots_device.as<int>();
      launch.segments[0] =
          segment(q, rotates ? LinearEpilogue::kRotaryQuery : LinearEpilogue::kQuery);
      launch.segments[0].out = query.as<void>();
      launch.segments[1] = segment(k, rotates ? LinearEpilogue::kRotaryKey : LinearEpilogue::kKey);
      launch.segments[2] = segment(v, LinearEpilogue::kValue);
      if (rotates) {
        int of_heads[] = {heads, kv_heads};
        const Case* cases[] = {&q, &k};
        for (int i = 0; i < 2; ++i) {
          const std::vector<std::int32_t> map = cuda_rotary_row_map(of_heads[i], head_dim);
          Case permuted = *cases[i];
          permuted.n = static_cast<int>(map.size());
          permuted.w.assign(map.size() * static_cast<std::size_t>(permuted.k), bf16{});
          permuted.bias.assign(map.size(), 0.0f);
          for (std::size_t row = 0; row < map.size(); ++row) {
            if (map[row] < 0) continue;
            const auto from = static_cast<std::size_t>(map[row]);
            permuted.bias[row] = cases[i]->bias[from];
            for (std::size_t j = 0; j < 40; ++j) {
              permuted.w[row * 40 + j] = cases[i]->w[from * 40 + j];
            }
          }
          launch.segments[i].first = factor(permuted);
          launch.segments[i].n = permuted.n;
          launch.segments[i].tiles = tiles_of(permuted.n, 16);
        }
      }
      cuda::check_launch(cuda::launch_linear(launch, stream_->get()), "linear");
      const std::vector<bf16> got_q = on_host<bf16>(query);
      const std::vector<bf16> got_k = on_host<bf16>(k_pool);
      const std::vector<bf16> got_v = on_host<bf16>(v_pool);
      auto rotated = [&](const std::vector<float>& y, int of, int i, int head, int d) {
        const auto row = static_cast<std::size_t>((i * of + head) * head_dim);
        const auto at = static_cast<std::size_t>(d);
        if (!rotates) return y[row + at];
        const auto j = static_cast<std::size_t>(d % half);
        const float c = cos[static_cast<std::size_t>(i * half) + j];
        const float s = sin[static_cast<std::size_t>(i * half) + j];
        const float low = y[row + j], high = y[row + j + static_cast<std::size_t>(half)];
        return d < half ? low * c - high * s : high * c + low * s;
      };
      auto expect = [&](bf16 got, float expected) {
        EXPECT_NEAR(test::wide(got), expected, 5e-3 * std::abs(expected) + 1e-4);
      };
      std::size_t written = 0;
      for (int i = 0; i < m; ++i) {
        for (int d = 0; d < head_dim; ++d) {
          for (int head = 0; head < heads; ++head) {
            expect(got_q[static_cast<std::size_t>((i * heads + head) * width + d)],
                   rotated(plain[0], heads, i, head, d));
          }
          const int slot = slots[static_cast<std::size_t>(i)];
          if (slot < 0) continue;
          for (int head = 0; head < kv_heads; ++head) {
            const int page = slot / block_size * kv_heads + head;
            expect(got_k[static_cast<std::size_t>((page * block_size + slot % block_size) * width +
                                                  d)],
                   rotated(plain[1], kv_heads, i, head, d));
            expect(got_v[static_cast<std::size_t>((page * width + d) * block_size +
                                                  slot % block_size)],
                   plain[2][static_cast<std::size_t>((i * kv_heads + head) * head_dim + d)]);
            ++written;
          }
        }
      }
      auto nonzero = [](const std::vector<bf16>& all) {
        return static_cast<std::size_t>(
            std::count_if(all.begin(), all.end(), [](bf16 x) { return x.bits != 0; }));
      };
      EXPECT_EQ(nonzero(got_k), written) << "nothing else is written";
      EXPECT_EQ(nonzero(got_v), written);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, CudaQkv,
                         testing::Combine(testing::Values(8, 20, 64, 96), testing::Bool()),
                         [](const auto& of) {
                           return std::to_string(std::get<0>(of.param)) + "_" +
                                  type_name(std::get<1>(of.param));
                         });

}  // namespace
}  // namespace deinfer
