// panel_gemm_add_bf16 by AMX tiles, on the software model: parts of k have the bits of the whole.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "amx_model.h"
#include "kernels/cpu/amx_gemm_impl.h"
#include "kernels/cpu/packing.h"
#include "reference.h"

namespace deinfer::test {
namespace {

TEST(AmxParts, HaveTheBitsOfTheWhole) {
  for (int rows : {16, 32}) {
    for (int k : {56, 100, 331}) {
      for (int m : {1, 15, 16, 17, 33, 48, 50, 70}) {
        SCOPED_TRACE(testing::Message() << "m=" << m << " k=" << k << " rows=" << rows);
        Random random(static_cast<unsigned>(m * 131 + k));
        auto weights = random.vector<bf16>(static_cast<std::size_t>(rows * k), 0.1f);
        cpu::PackedMatrix packed = cpu::allocate_packed(DType::kBFloat16, rows, k, rows);
        cpu::pack_rows({weights.data(), DType::kBFloat16, rows, k, k}, {}, 0, 1, packed);
        const std::ptrdiff_t ldx = packed.k_pad;
        std::vector<bf16> x(static_cast<std::size_t>(m * ldx), bf16{0});
        for (int i = 0; i < m; ++i) {
          for (int j = 0; j < k; ++j) {
            x[static_cast<std::size_t>(i * ldx + j)] = to_bf16(random.normal());
          }
        }
        const auto* panel = static_cast<const bf16*>(packed.panel(0));
        Aligned<float> whole(static_cast<std::size_t>(m * cpu::kPanelRows), 0.0f);
        TileModel tiles;
        cpu::amx_panel_gemm(tiles, x.data(), ldx, m, panel, rows, packed.k_pad, nullptr,
                            whole.data());
        for (int border : {32, 64, 96}) {
          if (border >= packed.k_pad) continue;
          Aligned<float> parts(static_cast<std::size_t>(m * cpu::kPanelRows), 0.0f);
          cpu::amx_panel_gemm(tiles, x.data(), ldx, m, panel, rows, border, nullptr, parts.data());
          cpu::amx_panel_gemm<true>(tiles, x.data() + border, ldx, m, panel + border * rows, rows,
                                    packed.k_pad - border, nullptr, parts.data());
          EXPECT_EQ(tiles.fault(), nullptr) << tiles.fault();
          EXPECT_EQ(std::memcmp(parts.data(), whole.data(),
                                static_cast<std::size_t>(m * cpu::kPanelRows) * sizeof(float)),
                    0)
              << "border " << border;
        }
      }
    }
  }
}

}  // namespace
}  // namespace deinfer::test
