// What the machine can do at most: stream-read bandwidth, and the rate of the dot instruction.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <utility>

#include "base/check.h"
#include "bench.h"

namespace deinfer::bench {
namespace {

// Every load is consumed by an empty asm, so that all happen, and in address order (which the
// hardware's streamer wants).

/// With kAhead bytes of prefetching into L2, unless 0: some processors' streamers need the help.
template <std::size_t kAhead>
[[gnu::target("avx512f")]] void read_avx512(const std::byte* data, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 256) {
#pragma GCC unroll 4
    for (std::size_t j = 0; j < 256; j += 64) {
      if constexpr (kAhead > 0) __builtin_prefetch(data + i + j + kAhead, 0, 2);
      __m512i line = _mm512_load_si512(data + i + j);
      asm volatile("" : : "v"(line));
    }
  }
}

void read_sse2(const std::byte* data, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) {
#pragma GCC unroll 4
    for (std::size_t j = 0; j < 64; j += 16) {
      __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(data + i + j));
      asm volatile("" : : "x"(part));
    }
  }
}

// Independent sums, enough to hide the latency of any x86: 6 cycles at 2 instructions a cycle.
constexpr int kSums512 = 16;
constexpr int kSums256 = 12;  // of 16 registers

[[gnu::target("avx512f,avx512bf16")]] void dots_avx512_bf16(std::int64_t iterations) {
  __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));  // ones
  __m512bh b = a;
  __m512 sums[kSums512];
#pragma GCC unroll 16
  for (int i = 0; i < kSums512; ++i) {
    sums[i] = _mm512_setzero_ps();
    asm volatile("" : "+v"(sums[i]), "+v"(a), "+v"(b));  // else equal sums would be one
  }
  for (std::int64_t step = 0; step < iterations; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums512; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSums512; ++i) asm volatile("" : : "v"(sums[i]));
}

[[gnu::target("avx512f")]] void dots_avx512(std::int64_t iterations) {
  __m512 a = _mm512_set1_ps(1.0f);
  __m512 b = a;
  __m512 sums[kSums512];
#pragma GCC unroll 16
  for (int i = 0; i < kSums512; ++i) {
    sums[i] = _mm512_setzero_ps();
    asm volatile("" : "+v"(sums[i]), "+v"(a), "+v"(b));
  }
  for (std::int64_t step = 0; step < iterations; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums512; ++i) sums[i] = _mm512_fmadd_ps(a, b, sums[i]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSums512; ++i) asm volatile("" : : "v"(sums[i]));
}

[[gnu::target("avx2,fma")]] void dots_avx2(std::int64_t iterations) {
  __m256 a = _mm256_set1_ps(1.0f);
  __m256 b = a;
  __m256 sums[kSums256];
#pragma GCC unroll 12
  for (int i = 0; i < kSums256; ++i) {
    sums[i] = _mm256_setzero_ps();
    asm volatile("" : "+x"(sums[i]), "+x"(a), "+x"(b));
  }
  for (std::int64_t step = 0; step < iterations; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums256; ++i) sums[i] = _mm256_fmadd_ps(a, b, sums[i]);
  }
#pragma GCC unroll 12
  for (int i = 0; i < kSums256; ++i) asm volatile("" : : "x"(sums[i]));
}

/// Tiles of 16 rows of 64 bytes: four sums of the products of two tiles by two, as in a block of
/// amx_gemm_impl.h. Numbers of many different bits: on zeros the clock rises beyond what products
/// of weights ever see.
[[gnu::target("amx-tile,amx-bf16")]] void dots_amx_bf16(std::int64_t iterations) {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) std::uint16_t numbers[16 * 32];
  for (int i = 0; i < 16 * 32; ++i) {
    numbers[i] = static_cast<std::uint16_t>(0x3c00 + (i * 7919 & 0x80ff));
  }
  asm volatile("" : : : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, numbers, 64);
  _tile_loadd(5, numbers, 64);
  _tile_loadd(6, numbers, 64);
  _tile_loadd(7, numbers, 64);
  for (std::int64_t step = 0; step < iterations; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

/// The loop of the instruction by which an instruction set's bf16 kernels multiply.
struct Dots {
  const char* instruction;
  void (*run)(std::int64_t iterations);
  int flops;  // per iteration
};

Dots dots_of(Isa isa) {
  if (isa == Isa::kAmxBf16) return {"tdpbf16ps", dots_amx_bf16, 4 * 16 * 16 * 64};
  if (isa == Isa::kAvx512Bf16) return {"vdpbf16ps zmm", dots_avx512_bf16, kSums512 * 64};
  if (isa == Isa::kAvx512) return {"vfmadd zmm", dots_avx512, kSums512 * 32};
  if (isa == Isa::kAvx2) return {"vfmadd ymm", dots_avx2, kSums256 * 16};
  fail(ErrorCode::kUnsupported, "no peak is defined for the instruction set ", isa_name(isa));
}

bool has_avx512() {
  std::vector<Isa> found = detect_isas();
  return std::find(found.begin(), found.end(), Isa::kAvx512) != found.end();
}

using ReadLoop = void (*)(const std::byte* data, std::size_t bytes);

/// Whichever reads the buffer faster, by the best of some turns.
ReadLoop faster(ReadLoop a, ReadLoop b, const Buffer& buffer) {
  const std::size_t bytes = std::min<std::size_t>(buffer.size(), 64 << 20) / 256 * 256;
  auto best = std::pair{std::chrono::nanoseconds::max(), std::chrono::nanoseconds::max()};
  for (int turn = 0; turn < 4; ++turn) {
    for (auto [read, time] : {std::pair{a, &best.first}, std::pair{b, &best.second}}) {
      auto start = std::chrono::steady_clock::now();
      read(buffer.as<std::byte>(), bytes);
      *time = std::min<std::chrono::nanoseconds>(*time, std::chrono::steady_clock::now() - start);
    }
  }
  return best.second < best.first ? b : a;
}

}  // namespace

/// Memory to be read, and how.
struct Stream {
  Buffer buffer;
  ReadLoop read;
};

std::string& last_error() {
  thread_local std::string message;
  return message;
}

}  // namespace deinfer::bench

using namespace deinfer;
using bench::guarded;
using bench::Stream;
using bench::Team;

BENCH_API const char* bench_error() { return bench::last_error().c_str(); }

/// The instruction set in use, e.g. "avx512_bf16".
BENCH_API const char* bench_isa() {
  return guarded<const char*>(nullptr, [] { return isa_name(select_isa()).data(); });
}

/// The instruction whose rate bench_peak measures.
BENCH_API const char* bench_instruction() {
  return guarded<const char*>(nullptr, [] { return bench::dots_of(select_isa()).instruction; });
}

BENCH_API Team* bench_team_create(int threads) {
  return guarded<Team*>(nullptr, [&] { return new Team(threads); });
}

BENCH_API void bench_team_destroy(Team* team) { delete team; }

/// Huge pages to be read, written once by the team, and the loop that reads them fastest; null when
/// there is not enough memory.
BENCH_API Stream* bench_stream_create(Team* team, std::size_t bytes) {
  return guarded<Stream*>(nullptr, [&] {
    auto stream = std::make_unique<Stream>(Stream{Buffer(bytes), bench::read_sse2});
    Buffer* buffer = &stream->buffer;
    team->team.run([&](TeamMember& member) {
      auto size = static_cast<std::size_t>(member.size());
      std::size_t part = (bytes + size - 1) / size;
      std::size_t begin = std::min(bytes, part * static_cast<std::size_t>(member.id()));
      std::memset(buffer->as<std::byte>() + begin, 1, std::min(part, bytes - begin));
    });
    if (bench::has_avx512()) {
      stream->read = bench::faster(bench::read_avx512<0>, bench::read_avx512<8192>, *buffer);
    }
    return stream.release();
  });
}

BENCH_API void bench_stream_destroy(Stream* stream) { delete stream; }

/// Reads `count` consecutive slices of `slice` bytes (a multiple of 256 bytes per thread), starting
/// at `first` and going round the buffer: nanoseconds[count].
BENCH_API int bench_stream(Team* team, const Stream* stream, std::size_t slice, int first,
                           int count, double* nanoseconds) {
  return guarded(-1, [&] {
    const Buffer* buffer = &stream->buffer;
    auto threads = static_cast<std::size_t>(team->team.size());
    std::size_t part = slice / threads;
    check_argument(part > 0 && slice % (threads * 256) == 0 && slice <= buffer->size(),
                   "stream: cannot read slices of ", slice, " bytes from ", buffer->size(),
                   " bytes by ", threads, " threads");
    auto slices = static_cast<int>(buffer->size() / slice);
    bench::time_steps(team->team, count, nanoseconds, [&](TeamMember& member, int i) {
      auto index = static_cast<std::size_t>((first + i) % slices);
      stream->read(
          buffer->as<std::byte>() + index * slice + static_cast<std::size_t>(member.id()) * part,
          part);
      member.barrier();
    });
    return 0;
  });
}

/// Floating point operations of one iteration of bench_peak on one thread.
BENCH_API int bench_peak_flops() {
  return guarded(-1, [] { return bench::dots_of(select_isa()).flops; });
}

/// Runs the dot instruction on registers only, `iterations` on each thread: nanoseconds[count].
BENCH_API int bench_peak(Team* team, std::int64_t iterations, int count, double* nanoseconds) {
  return guarded(-1, [&] {
    bench::Dots dots = bench::dots_of(select_isa());
    bench::time_steps(team->team, count, nanoseconds, [&](TeamMember& member, int) {
      dots.run(iterations);
      member.barrier();
    });
    return 0;
  });
}
