// An error that a call must throw.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "base/check.h"

namespace deinfer::test {

/// f() throws an Error of this code, whose text contains `text`.
template <typename F>
void expect_error(ErrorCode code, const std::string& text, F&& f) {
  try {
    f();
    ADD_FAILURE() << "no error; expected one with \"" << text << "\"";
  } catch (const Error& error) {
    EXPECT_EQ(static_cast<int>(error.code()), static_cast<int>(code)) << error.what();
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

}  // namespace deinfer::test
