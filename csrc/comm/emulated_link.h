// Interconnects emulated in time on top of another communicator: real data, modelled delays.
#pragma once

#include <cstddef>
#include <memory>

#include "comm/communicator.h"
#include "comm/link_model.h"

namespace deinfer {

/// What an emulated link needs of every contribution of the communicator below it.
inline constexpr std::size_t kEmulatedLinkHeaderBytes = 64;

/// `inner` with exchanges that end as they would on such a link: wait() returns no earlier than
/// exchange_seconds() after the last rank has started the exchange and the previous one has ended.
/// Time goes on between start() and wait(), so that computation hides it. All ranks must use the
/// same link; where contributions differ in size the largest counts. max_bytes() is
/// kEmulatedLinkHeaderBytes less than that of `inner`. Throws kInvalidArgument when that is less
/// than 0 or the link has no positive bandwidth.
std::unique_ptr<Communicator> make_emulated_link(std::unique_ptr<Communicator> inner,
                                                 const LinkModel& link);

}  // namespace deinfer
