#include "comm/device_communicator.h"

#include <charconv>
#include <cstdlib>
#include <string_view>

#include "base/check.h"
#include "comm/nccl.h"
#include "comm/p2p.h"

namespace deinfer {
namespace {

/// The number in an environment variable, or `otherwise` where there is none.
double number_in(const char* name, double otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr) return otherwise;
  const std::string_view all = text;
  double value = 0;
  const auto [end, error] = std::from_chars(all.data(), all.data() + all.size(), value);
  check_argument(error == std::errc{} && end == all.data() + all.size() && value >= 0.0, name, "=",
                 text, " is not a number from 0");
  return value;
}

ExchangeTransport transport_in(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr || std::string_view(text) == "auto") return ExchangeTransport::kAuto;
  if (std::string_view(text) == "p2p") return ExchangeTransport::kP2p;
  check_argument(std::string_view(text) == "nccl", name, "=\"", text,
                 "\" is unknown; use \"auto\", \"p2p\" or \"nccl\"");
  return ExchangeTransport::kNccl;
}

bool all_reach_each_other(const std::vector<int>& devices) {
  for (int reader : devices) {
    for (int other : devices) {
      if (reader != other && !cuda::can_read_memory_of(reader, other)) return false;
    }
  }
  return true;
}

}  // namespace

ExchangeOptions ExchangeOptions::from_environment() {
  ExchangeOptions options;
  options.transport = transport_in("DEINFER_CUDA_TRANSPORT");
  options.lockstep = number_in("DEINFER_CUDA_LOCKSTEP", 0) != 0;
  options.timeout_s = number_in("DEINFER_CUDA_EXCHANGE_TIMEOUT", options.timeout_s);
  options.two_shot_bytes = static_cast<std::size_t>(
      number_in("DEINFER_CUDA_TWO_SHOT", static_cast<double>(options.two_shot_bytes)));
  return options;
}

DeviceCommunicator::DeviceCommunicator(std::unique_ptr<Communicator> host,
                                       const ExchangeOptions& options)
    : host_(std::move(host)), options_(options) {}

Ticket DeviceCommunicator::start(Collective kind, std::size_t bytes) {
  const Ticket ticket = host_->start(kind, bytes);
  count(kind, bytes);
  return ticket;
}

void DeviceCommunicator::use(cuda::DeviceStream& stream, std::byte* contributions,
                             std::size_t contribution_bytes) {
  stream_ = &stream;
  contributions_ = contributions;
  contribution_bytes_ = contribution_bytes;
  for (auto load :
       {cuda::load_attention_kernels, cuda::load_exchange_kernels, cuda::load_latent_kernels,
        cuda::load_linear_kernels, cuda::load_row_kernels, cuda::load_sampling_kernels}) {
    cuda::check_launch(load(), "loading kernels");
  }
}

bool DeviceCommunicator::sums_in_two_shots(std::size_t bytes) const {
  return size() > 2 && bytes >= options_.two_shot_bytes;
}

void DeviceCommunicator::exchange(Collective kind, std::size_t bytes, const char* name,
                                  const Extent& extent, const Receive& receive) {
  if (bytes > contribution_bytes_) {
    fail(ErrorCode::kInternal, "exchange \"", name, "\" of ", bytes, " bytes, there is room for ",
         contribution_bytes_);
  }
  if (logs_) {
    log_.emplace_back(kind, bytes);
  } else {
    begin_exchanges(1);
    count(kind, bytes);
  }
  transfer(kind, name, extent, receive);
  parity_ = 1 - parity_;
}

void DeviceCommunicator::begin_log() {
  log_.clear();
  logs_ = true;
}

ExchangeLog DeviceCommunicator::end_log() {
  logs_ = false;
  return std::exchange(log_, {});
}

void DeviceCommunicator::count_all(const ExchangeLog& log) {
  begin_exchanges(log.size());
  for (const auto& [kind, bytes] : log) count(kind, bytes);
}

std::unique_ptr<DeviceGroup> make_device_group(std::vector<int> devices,
                                               const ExchangeOptions& options) {
  if (devices.size() > cuda::kMaxPeers) {
    fail(ErrorCode::kUnsupported, "tensor_parallel_size=", devices.size(),
         ": on CUDA devices there are at most ", cuda::kMaxPeers, " ranks");
  }
  const bool by_nccl =
      options.transport == ExchangeTransport::kNccl ||
      (options.transport == ExchangeTransport::kAuto && !all_reach_each_other(devices));
  return by_nccl ? make_nccl_group(std::move(devices), options)
                 : make_p2p_group(std::move(devices), options);
}

}  // namespace deinfer
