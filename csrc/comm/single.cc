#include "comm/local.h"

namespace deinfer {

// A group of one waits for nobody but keeps all the rules.
std::unique_ptr<Communicator> make_single_communicator(std::size_t max_bytes) {
  return LocalGroup(1, max_bytes).communicator(0);
}

}  // namespace deinfer
