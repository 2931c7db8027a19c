// The CUDA kernels of rows: embedding, norms, angles, q and k with norms, the most likely token.
#include "cuda_fixture.h"

namespace deinfer {
namespace {

using cuda::DeviceBuffer;
using test::kInf;
using test::kNan;

class CudaRows : public test::CudaTest {};

TEST_F(CudaRows, NormalizesAsItsKindSays) {
  for (int n : {1, 40, 700}) {
    const int m = 3;
    test::Random random(1);
    const std::vector<float> x = random.vector(static_cast<std::size_t>(5 * n));
    const std::vector<float> gain = random.vector(static_cast<std::size_t>(n));
    const std::vector<float> bias = random.vector(static_cast<std::size_t>(n));
    const std::vector<int> rows = {4, 0, 2};
    DeviceBuffer x_device = on_device(x), gain_device = on_device(gain),
                 bias_device = on_device(bias), rows_device = on_device(rows);
    for (int kind : {0, 1, 2}) {
      cuda::NormLaunch launch;
      launch.x = x_device.as<float>();
      launch.ld = n;
      launch.rows = rows_device.as<int>();
      launch.m = m;
      launch.n = n;
      launch.kind = kind;
      launch.eps = 0.01f;
      if (kind > 0) launch.gain = gain_device.as<float>();
      if (kind == 2) launch.bias = bias_device.as<float>();
      auto run = [&](bool adds) {
        DeviceBuffer out = on_device(std::vector<float>(static_cast<std::size_t>(m * n), 5.0f));
        (adds ? launch.add_to : launch.out_float) = out.as<float>();
        (adds ? launch.out_float : launch.add_to) = nullptr;
        launch.out_ld = n;
        cuda::check_launch(cuda::launch_norm(launch, stream_->get()), "norm");
        return on_host<float>(out);
      };
      const std::vector<float> y = test::in_every_order<float>([&] { return run(false); });
      const std::vector<float> sum = run(true);
      const int chunks = cuda::tiles_of(n, 32);
      DeviceBuffer tiles(static_cast<std::size_t>(128 * chunks * 32) * 2);
      launch.add_to = nullptr;
      launch.out = tiles.as<void>();
      launch.out_chunks = chunks;
      cuda::check_launch(cuda::launch_norm(launch, stream_->get()), "norm");
      const std::vector<bf16> tiled = on_host<bf16>(tiles);
      for (int i = 0; i < m; ++i) {
        const float* row = x.data() + rows[static_cast<std::size_t>(i)] * n;
        double mean = 0, square = 0;
        for (int j = 0; j < n; ++j) mean += kind == 2 ? row[j] / static_cast<double>(n) : 0.0;
        for (int j = 0; j < n; ++j) square += (row[j] - mean) * (row[j] - mean) / n;
        for (int j = 0; j < n; ++j) {
          const auto at = static_cast<std::size_t>(j);
          double expected = row[j];
          if (kind > 0) expected = (row[j] - mean) / std::sqrt(square + 0.01) * gain[at];
          if (kind == 2) expected += bias[at];
          const float got = y[static_cast<std::size_t>(i * n + j)];
          ASSERT_NEAR(got, expected, 1e-5) << n << ", kind " << kind;
          EXPECT_EQ(sum[static_cast<std::size_t>(i * n + j)], 5.0f + got);
          EXPECT_EQ(tiled[static_cast<std::size_t>(cuda::activation_offset(i, j, chunks))].bits,
                    to_bf16(got).bits);
        }
      }
    }
  }
}

TEST_F(CudaRows, EmbedsTokensAndPositions) {
  const int vocabulary = 50, hidden = 70, m = 4;
  test::Random random(2);
  const auto table = random.vector<bf16>(static_cast<std::size_t>(vocabulary * hidden));
  const auto places = random.vector<bf16>(static_cast<std::size_t>(20 * hidden));
  DeviceBuffer table_device = weights(table, vocabulary, hidden);
  DeviceBuffer places_device = weights(places, 20, hidden);
  const std::vector<int> tokens = {49, 0, 17, 3}, positions = {0, 5, 6, 17};
  DeviceBuffer tokens_device = on_device(tokens), positions_device = on_device(positions);
  DeviceBuffer x(static_cast<std::size_t>(m * hidden) * 4);
  for (bool learned : {false, true}) {
    cuda::EmbedLaunch launch;
    launch.indices = tokens_device.as<int>();
    launch.m = m;
    launch.cols = hidden;
    launch.table = table_device.as<void>();
    launch.table_rows = vocabulary;
    launch.chunks = cuda::tiles_of(hidden, 32);
    launch.scale = 2.5f;
    launch.x = x.as<float>();
    launch.ld = hidden;
    cuda::check_launch(cuda::launch_embed(launch, stream_->get()), "embed");
    if (learned) {
      launch.indices = positions_device.as<int>();
      launch.offset = 2;
      launch.table = places_device.as<void>();
      launch.table_rows = 20;
      launch.scale = 1.0f;
      launch.adds = true;
      cuda::check_launch(cuda::launch_embed(launch, stream_->get()), "embed");
    }
    const std::vector<float> got = on_host<float>(x);
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < hidden; ++j) {
        const auto row = static_cast<std::size_t>(i);
        float expected = 2.5f * to_float(table[static_cast<std::size_t>(tokens[row] * hidden + j)]);
        if (learned) {
          expected += to_float(places[static_cast<std::size_t>((positions[row] + 2) * hidden + j)]);
        }
        EXPECT_EQ(got[static_cast<std::size_t>(i * hidden + j)], expected);
      }
    }
  }
}

/// Of an embedding that also is the head.
TEST_F(CudaRows, EmbedsTokensOfInt8) {
  const int vocabulary = 50, hidden = 70;
  test::Random random(3);
  const auto table = random.vector<bf16>(static_cast<std::size_t>(vocabulary * hidden));
  const std::vector<double> rounded = test::rounded_to_int8(table, vocabulary, hidden);
  const test::Int8Weights on_the_device = int8_weights(table, vocabulary, hidden);
  const std::vector<int> tokens = {49, 0, 17, 3, 12, 50};
  DeviceBuffer tokens_device = on_device(tokens);
  DeviceBuffer x(tokens.size() * static_cast<std::size_t>(hidden) * 4);
  cuda::EmbedLaunch launch;
  launch.indices = tokens_device.as<int>();
  launch.m = static_cast<int>(tokens.size());
  launch.cols = hidden;
  launch.table = on_the_device.data.as<void>();
  launch.scales = on_the_device.scales.as<float>();
  launch.table_rows = vocabulary;
  launch.chunks = cuda::tiles_of(hidden, 32);
  launch.x = x.as<float>();
  launch.ld = hidden;
  cuda::check_launch(cuda::launch_embed(launch, stream_->get()), "embed");
  const std::vector<float> got = on_host<float>(x);
  for (std::size_t i = 0; i < got.size(); ++i) {
    const auto token = static_cast<std::size_t>(tokens[i / 70]);
    EXPECT_EQ(got[i], token < 50 ? static_cast<float>(rounded[token * 70 + i % 70]) : 0.0f);
  }
}

TEST_F(CudaRows, TurnsByPositions) {
  const std::vector<int> positions = {0, 3, 100000};
  const std::vector<float> frequencies = {1.0f, 0.1f, 0.0001f};
  DeviceBuffer positions_device = on_device(positions), frequencies_device = on_device(frequencies);
  DeviceBuffer cos(9 * 4), sin(9 * 4);
  cuda::RopeLaunch launch{positions_device.as<int>(),
                          3,
                          frequencies_device.as<float>(),
                          3,
                          1.5f,
                          cos.as<float>(),
                          sin.as<float>()};
  cuda::check_launch(cuda::launch_rope(launch, stream_->get()), "rope");
  const std::vector<float> got_cos = on_host<float>(cos), got_sin = on_host<float>(sin);
  for (std::size_t i = 0; i < 3; ++i) {
    for (std::size_t j = 0; j < 3; ++j) {
      const float angle = static_cast<float>(positions[i]) * frequencies[j];
      EXPECT_NEAR(got_cos[i * 3 + j], 1.5 * std::cos(static_cast<double>(angle)), 1e-6);
      EXPECT_NEAR(got_sin[i * 3 + j], 1.5 * std::sin(static_cast<double>(angle)), 1e-6);
    }
  }
}

TEST_F(CudaRows, NormalizesQueriesAndKeys) {
  const int m = 3, heads = 9, kv_heads = 2, head_dim = 20, half = 10, width = 64;
  test::Random random(3);
  auto values = [&](int count) { return random.vector(static_cast<std::size_t>(count)); };
  const std::vector<float> q = values(m * heads * head_dim), k = values(m * kv_heads * head_dim);
  const std::vector<float> q_gain = values(heads * head_dim), k_gain = values(kv_heads * head_dim);
  const std::vector<float> cos = values(m * half), sin = values(m * half);
  const std::vector<int> slots = {18, -1, 3};
  DeviceBuffer q_device = on_device(q), k_device = on_device(k), q_weights = on_device(q_gain),
               k_weights = on_device(k_gain), cos_device = on_device(cos),
               sin_device = on_device(sin), slots_device = on_device(slots);
  for (bool all_heads : {false, true}) {
    auto run = [&] {
      DeviceBuffer out = on_device(std::vector<bf16>(static_cast<std::size_t>(m * heads * width)));
      DeviceBuffer pool = on_device(std::vector<bf16>(2 * 2 * 16 * width));
      cuda::QkNormLaunch launch;
      launch.q = q_device.as<float>();
      launch.k = k_device.as<float>();
      launch.m = m;
      launch.heads = heads;
      launch.query_gain = q_weights.as<float>();
      launch.key_gain = k_weights.as<float>();
      launch.all_heads = all_heads;
      launch.query_eps = 0.01f;
      launch.key_eps = 0.02f;
      launch.rotation = {cos_device.as<float>(), sin_device.as<float>(), half};
      launch.out = out.as<void>();
      launch.kv = {pool.as<void>(), nullptr, 16, kv_heads, head_dim, width};
      launch.slots = slots_device.as<int>();
      cuda::check_launch(cuda::launch_qk_norm(launch, stream_->get()), "qk_norm");
      std::vector<bf16> all = on_host<bf16>(out);
      const std::vector<bf16> keys = on_host<bf16>(pool);
      all.insert(all.end(), keys.begin(), keys.end());
      return all;
    };
    const std::vector<bf16> got = test::in_every_order<bf16>(run);
    auto expected = [&](bool keys, int i, int head, int d) {
      const int of = keys ? kv_heads : heads;
      const float* row = (keys ? k : q).data() + i * of * head_dim;
      const float* gain = (keys ? k_gain : q_gain).data() + (all_heads ? head * head_dim : 0);
      const int first = all_heads ? 0 : head * head_dim;
      const int count = all_heads ? of * head_dim : head_dim;
      double square = 0;
      for (int j = first; j < first + count; ++j) square += row[j] * row[j] / count;
      const double scale = 1 / std::sqrt(square + (keys ? 0.02 : 0.01));
      const int j = d % half;
      const double low = row[head * head_dim + j] * scale * gain[j];
      const double high = row[head * head_dim + j + half] * scale * gain[j + half];
      const double c = cos[static_cast<std::size_t>(i * half + j)];
      const double s = sin[static_cast<std::size_t>(i * half + j)];
      return d < half ? low * c - high * s : high * c + low * s;
    };
    auto expect = [](bf16 value, double exact) {
      EXPECT_NEAR(test::wide(value), exact, 5e-3 * std::abs(exact) + 1e-5);
    };
    std::size_t keys_written = 0;
    for (int i = 0; i < m; ++i) {
      for (int d = 0; d < head_dim; ++d) {
        for (int head = 0; head < heads; ++head) {
          expect(got[static_cast<std::size_t>((i * heads + head) * width + d)],
                 expected(false, i, head, d));
        }
        const int slot = slots[static_cast<std::size_t>(i)];
        for (int head = 0; slot >= 0 && head < kv_heads; ++head) {
          const int place = (slot / 16 * kv_heads + head) * 16 + slot % 16;
          expect(got[static_cast<std::size_t>(m * heads * width + place * width + d)],
                 expected(true, i, head, d));
          ++keys_written;
        }
      }
    }
    EXPECT_EQ(static_cast<std::size_t>(std::count_if(got.begin() + m * heads * width, got.end(),
                                                     [](bf16 x) { return x.bits != 0; })),
              keys_written);
  }
}

TEST_F(CudaRows, FindsTheFirstOfTheLargestLogits) {
  const int vocabulary = 1000;
  test::Random random(4);
  std::vector<float> logits = random.vector(std::size_t{6} * vocabulary);
  auto row = [&](int i) { return logits.data() + i * vocabulary; };
  row(0)[999] = 9.0f;
  row(1)[700] = row(1)[444] = row(1)[445] = 9.0f;
  row(2)[0] = kNan;
  row(2)[300] = 9.0f;
  std::fill_n(row(3), vocabulary, kNan);
  std::fill_n(row(4), vocabulary, -kInf);
  row(5)[77] = kInf;
  DeviceBuffer device = on_device(logits);
  DeviceBuffer tokens(6 * 4);
  cuda::ArgmaxLaunch launch{device.as<float>(), 6, vocabulary, tokens.as<int>()};
  const std::vector<int> got = test::in_every_order<int>([&] {
    cuda::check_launch(cuda::launch_argmax(launch, stream_->get()), "argmax");
    return on_host<int>(tokens);
  });
  EXPECT_EQ(got, (std::vector<int>{999, 444, 300, 0, 0, 77}));
}

}  // namespace
}  // namespace deinfer
