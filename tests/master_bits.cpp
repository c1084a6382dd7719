// Every fp32 number and every pair of a bf16 number and a low half, by the code of csrc/table/master.h: by itself and
// in the SIMD registers of the CPU's walk. Prints the first that is wrong.
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "cpu/vector.h"

using namespace lookahead_fused;

namespace {

constexpr int N = 4;
using Of = Convert<N>;

bool is_nan(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }
bool is_nan_in_16(uint32_t bits) { return (bits & 0x7fffu) > 0x7f80u; }

// To the nearest, ties away from zero, as IEEE-754 states it: of the magnitude, whatever the sign.
uint32_t rounded(uint32_t bits) { return (bits >> 31) << 15 | ((bits & 0x7fffffffu) + 0x8000u) >> 16; }

// All 2^32, N at a time: wrong(first) tells whether one of N from there on is.
template <class Wrong>
bool all(const char* what, Wrong wrong) {
    for (uint64_t first = 0; first < 1ull << 32; first += N) {
        if (wrong(static_cast<uint32_t>(first))) {
            std::printf("%s: among %08x to %08x\n", what, static_cast<uint32_t>(first),
                        static_cast<uint32_t>(first) + N - 1);
            return false;
        }
    }
    return true;
}

bool wrong_master(uint32_t first) {
    uint32_t bits[N];
    for (int i = 0; i < N; ++i) bits[i] = first + static_cast<uint32_t>(i);
    Vec<float, N> masters;
    std::memcpy(&masters, bits, sizeof(bits));
    typename Of::Half params, lows;
    Of::halve_master(masters, params, lows);
    uint32_t wrong = 0;
    for (int i = 0; i < N; ++i) {
        uint32_t param, low;
        halve<uint32_t>(bits[i], param, low);
        const uint32_t back = join_halves<uint32_t>(param, static_cast<uint32_t>(static_cast<int16_t>(low)));
        const bool nan = is_nan(bits[i]);
        wrong |= nan ? !is_nan_in_16(param) | !is_nan(back) : (param != rounded(bits[i])) | (back != bits[i]);
        wrong |= (params[i] != param) | (lows[i] != static_cast<uint16_t>(low));
    }
    return wrong != 0;
}

bool wrong_pair(uint32_t first) {
    // One bf16 number: N low halves follow each other.
    const uint32_t param = first >> 16;
    typename Of::Half params;
    typename Of::Short lows;
    for (int i = 0; i < N; ++i) {
        params[i] = static_cast<uint16_t>(param);
        lows[i] = static_cast<int16_t>(first + static_cast<uint32_t>(i));
    }
    const Vec<float, N> joined = Of::join_master(params, lows);
    uint32_t simd[N], wrong = 0;
    std::memcpy(simd, &joined, sizeof(simd));
    for (int i = 0; i < N; ++i) {
        const uint32_t low = static_cast<uint32_t>(static_cast<int32_t>(lows[i]));
        const uint32_t master = join_halves<uint32_t>(param, low);
        wrong |= simd[i] != master;
        if (is_nan_in_16(param)) {
            wrong |= !is_nan(master);
        } else {
            // A number that rounds to the parameter: the pair's own, or where that is none, the parameter's.
            wrong |= is_nan(master) | (rounded(master) != param);
            wrong |= (master != (param << 16) + low) & !(is_nan((param << 16) + low) & (master == param << 16));
        }
    }
    return wrong != 0;
}

}  // namespace

int main() { return all("master", wrong_master) && all("pair", wrong_pair) ? 0 : 1; }
