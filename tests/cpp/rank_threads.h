// Runs a function on a thread per rank, as an engine does.
#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "comm/communicator.h"
#include "comm/local.h"

namespace deinfer {

using Ranks = std::vector<std::unique_ptr<Communicator>>;

inline Ranks communicators(LocalGroup& group) {
  Ranks ranks;
  for (int rank = 0; rank < group.size(); ++rank) ranks.push_back(group.communicator(rank));
  return ranks;
}

/// fn(communicator) for every rank. A rank that throws releases the others; its exception is
/// rethrown here, and CommunicatorAborted only if no rank has another.
template <typename Function>
void run_ranks(Ranks& ranks, Function fn) {
  std::vector<std::exception_ptr> errors(ranks.size());
  std::vector<char> released(ranks.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    threads.emplace_back([&, i] {
      try {
        fn(*ranks[i]);
        // A rank that an ASSERT has ended must not keep the others waiting.
        if (::testing::Test::HasFatalFailure()) ranks[i]->abort();
      } catch (const CommunicatorAborted&) {
        released[i] = 1;
      } catch (...) {
        errors[i] = std::current_exception();
        ranks[i]->abort();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  for (char aborted : released) {
    if (aborted) throw CommunicatorAborted{};
  }
}

}  // namespace deinfer
