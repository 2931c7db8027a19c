// Stands for kernels/cuda in builds without CUDA: there is no device, and whatever needs one says
// why.
#include "base/check.h"
#include "kernels/cuda/devices.h"
#include "kernels/cuda/exchange.h"
#include "kernels/cuda/latents.h"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/sampling.h"

namespace deinfer::cuda {
namespace {

[[noreturn]] void unavailable() {
  fail(ErrorCode::kUnsupported,
       "this build of deinfer has no CUDA; configure with DEINFER_CUDA=ON");
}

}  // namespace

bool is_compiled() { return false; }
std::vector<DeviceInfo> devices() { return {}; }

void use_device(int) { unavailable(); }
int multiprocessors(int) { unavailable(); }
bool can_read_memory_of(int, int) { unavailable(); }
void read_memory_of(int) { unavailable(); }
std::uint64_t free_memory() { unavailable(); }
void check_launch(int, const char*) { unavailable(); }

void* allocate(MemoryKind, std::size_t) { unavailable(); }
void release(MemoryKind, void*) noexcept {}
Graph::~Graph() = default;

DeviceStream::DeviceStream() { unavailable(); }
DeviceStream::~DeviceStream() = default;
void DeviceStream::upload(void*, const void*, std::size_t) { unavailable(); }
void DeviceStream::download(void*, const void*, std::size_t) { unavailable(); }
void DeviceStream::clear(const DeviceBuffer&) { unavailable(); }
void DeviceStream::begin_capture() { unavailable(); }
Graph DeviceStream::end_capture() { unavailable(); }
void DeviceStream::launch(const Graph&) { unavailable(); }
void DeviceStream::synchronize() { unavailable(); }
bool DeviceStream::is_done() { unavailable(); }

int launch_tile_weights(const TileLaunch&, Stream) { unavailable(); }
int launch_tile_activations(const TileLaunch&, Stream) { unavailable(); }
int launch_widen(const void*, int, int, float*, Stream) { unavailable(); }
int launch_linear(const LinearLaunch&, Stream) { unavailable(); }
int launch_norm(const NormLaunch&, Stream) { unavailable(); }
int launch_embed(const EmbedLaunch&, Stream) { unavailable(); }
int launch_rope(const RopeLaunch&, Stream) { unavailable(); }
int launch_qk_norm(const QkNormLaunch&, Stream) { unavailable(); }
int launch_kv_write(const KvWriteLaunch&, Stream) { unavailable(); }
int launch_pad_heads(const PadHeadsLaunch&, Stream) { unavailable(); }
int launch_attention_plan(const AttentionPlanLaunch&, Stream) { unavailable(); }
int launch_attention(const AttentionLaunch&, Stream) { unavailable(); }
int launch_latent_attention(const LatentAttentionLaunch&, Stream) { unavailable(); }
int launch_latent_write(const LatentWriteLaunch&, Stream) { unavailable(); }
int launch_sample(const SampleLaunch&, Stream) { unavailable(); }
int launch_activate(const ActivateLaunch&, Stream) { unavailable(); }
int launch_argmax(const ArgmaxLaunch&, Stream) { unavailable(); }

int load_attention_kernels() { unavailable(); }
int load_exchange_kernels() { unavailable(); }
int load_latent_kernels() { unavailable(); }
int load_linear_kernels() { unavailable(); }
int load_row_kernels() { unavailable(); }
int load_sampling_kernels() { unavailable(); }

int launch_copy_blocks(const CopyBlocksLaunch&, Stream) { unavailable(); }
int launch_tell(const PeerExchange&, Stream) { unavailable(); }
int launch_reduce(const ReduceLaunch&, Stream) { unavailable(); }
int launch_gather_activations(const GatherActivationsLaunch&, Stream) { unavailable(); }
int launch_gather_floats(const GatherFloatsLaunch&, Stream) { unavailable(); }
int launch_best_of_ranks(const BestOfRanksLaunch&, Stream) { unavailable(); }

}  // namespace deinfer::cuda
