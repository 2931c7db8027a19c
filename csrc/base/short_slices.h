// How long a thread's turns on a core are, where Linux (6.12 and later) lets threads choose.
#pragma once

namespace deinfer {

/// While it lives, the calling thread asks for the shortest turns, as suits one that often waits:
/// since Linux 6.18 a yield gives up the rest of the turn for good, so that threads with ordinary
/// ones (milliseconds) soon owe others more than they ever had; and when it wakes up, it need not
/// wait for another's turn to end. Its share of the core stays the same. Does nothing inside
/// another one's life, or where the OS does not know such turns.
class ShortSlices {
 public:
  /// Whether the OS knows them.
  static bool known();

  ShortSlices();
  ~ShortSlices();
  ShortSlices(const ShortSlices&) = delete;
  ShortSlices& operator=(const ShortSlices&) = delete;
};

}  // namespace deinfer
