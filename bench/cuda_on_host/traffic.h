// What kernels read and write of global memory: bytes of each watched array, and 32-byte sectors of each warp's
// accesses.
#pragma once

#include <cstddef>
#include <cstdint>

// False where the hardware would refuse the address.
bool note_access(uintptr_t address, size_t bytes, bool write);

// The thread that runs has come out of a barrier, of its block or its warp: from there on its lanes' accesses are
// counted anew.
void end_run_of_accesses();

// All threads of a block have run: their accesses are put together to what a warp asked for at once.
void end_block_of_traffic();

void forget_traffic();
