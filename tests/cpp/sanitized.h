// Sanitizers look for what a test does, not for how often: loops over seeds, trials and sizes may
// be shorter where they make every step several times slower.
#pragma once

namespace deinfer::test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

/// `count`, or under a sanitizer `few`.
constexpr int repeats(int count, int few) { return kSanitized ? few : count; }

}  // namespace deinfer::test
