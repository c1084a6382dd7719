// How far ahead of itself a walk asks for memory.
#pragma once

namespace lookahead_fused {

// In elements of every array. Up to nine streams are more than the hardware's prefetchers follow, but what was asked
// for must still be in the first cache when the walk gets there, and how much of it stays there is the machine's. A
// step over 64 Mi elements took, in ms, each line in an interleaved run of its own:
//
//     first cache        not ahead   128   256   512   1024
//     48 KiB (Zen 5)            91    82     -    74     76
//     32 KiB (Zen 4)            32    28    30    31     35
//
// Where the cache's size is not known it is taken for the smaller one.
int prefetch_ahead();

}  // namespace lookahead_fused
