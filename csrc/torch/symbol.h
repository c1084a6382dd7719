// Functions of the torch that this process has loaded, of its stable C ABI: nothing is included from torch, nothing
// linked, and what a release lacks is not found.
#pragma once

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace lookahead_fused {

// False, and a null function, where this torch has none of that name or this system's libraries are named otherwise.
template <class Function>
bool find_in_torch(Function& function, const char* name) {
    function = nullptr;
#if defined(__linux__)
    static void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library != nullptr) function = reinterpret_cast<Function>(dlsym(library, name));
#else
    (void)name;
#endif
    return function != nullptr;
}

}  // namespace lookahead_fused
