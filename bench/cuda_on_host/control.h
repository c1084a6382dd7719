// Marks what the tests call, by ctypes.
#pragma once

#define CONTROL extern "C" __attribute__((visibility("default")))
