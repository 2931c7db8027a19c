// Symbol visibility and the ABI's namespace. Everything is hidden unless a public header marks it.
#pragma once

#include "deinfer/version.h"

#define DEINFER_API __attribute__((visibility("default")))
// Keeps a part of an exported class to itself.
#define DEINFER_LOCAL __attribute__((visibility("hidden")))
