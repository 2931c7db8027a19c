// Symbol visibility: everything is hidden unless a public header marks it.
#pragma once

#define DEINFER_API __attribute__((visibility("default")))
