// Moments that lie in memory as bf16, half of what fp32 takes, and how they are rounded to it: without bias.
//
// A number between two neighbours becomes the upper one as often as it lies nearer to it, so that its mean is the
// number itself. Rounded to the nearest, a second moment would stall: beta2 = 0.999 takes a thousandth off in a step,
// and neighbours are a 128th to a 256th apart.
//
// What is drawn for a number is a hash of the parameter's count of updates, of the element's place in its row and of
// the moment's among the rule's. There is no generator and no state of one: the same bits on every backend, whatever
// the threads, chunks and order, and a resumed run goes on with those of an uninterrupted one.
//
// Word is a uint32_t or a SIMD vector of them.
#pragma once

#include <cstdint>

#include "../rules/numeric.h"

namespace lookahead_fused {
inline namespace LF_ISA {

// A bijection of 32 bits in which each depends on all (lowbias32: Wellons, hash-prospector, 2018).
template <class Word>
LF_HD Word mixed(Word x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// What all of a row's elements have in common after so many updates. A sync that is a pass of its own rounds anew.
LF_HD uint32_t rounding_key(int64_t updates, bool own_pass) {
    return mixed(static_cast<uint32_t>(2 * updates + (own_pass ? 1 : 0)) + 0x9e3779b9u);
}

// 16 random bits for one of a rule's moments, of the 32 of an element, mixed(its place in the row + the row's key): a
// half for each of two, and for the third, which few steps have, what any of the bits may change.
template <class Word>
LF_HD Word random_half(Word bits, int moment) {
    return moment == 0 ? bits & 0xffffu : (moment == 1 ? bits : bits * 0x9e3779b9u) >> 16;
}

// The bf16 number's bits, of an fp32 number's and 16 random ones: the carry out of the lower half is as likely as the
// half is large. What bf16 has is kept, of subnormal numbers too, and no finite number becomes an infinity: beyond the
// largest of bf16 all are that one.
template <class Word>
LF_HD Word rounded_without_bias(Word bits, Word random) {
    const Word magnitude = bits & 0x7fffffffu;
    const Word rounded = magnitude < 0x7f7f0000u ? bits + random : bits;
    // The NaN that NVIDIA's conversion gives.
    const Word nan = Word{} + 0x7fff0000u;
    return (magnitude > 0x7f800000u ? nan : rounded) >> 16;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
