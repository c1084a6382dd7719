// The squares of a block's elements, added in SIMD registers in the order that table/norm.h states.
//
// This file is compiled once for each instruction set, as walk.h is.
#pragma once

#include <cstring>

#include "../table/norm.h"
#include "kernels.h"
#include "vector.h"

namespace lookahead_fused {
inline namespace LF_ISA {

// G is a gradient's type in memory.
template <class G>
struct Squares {
    // Of the fp64 numbers in a register, and of the fp32 numbers that are read at once.
    static constexpr int N = LF_REGISTER_BYTES / sizeof(double), READ = std::is_same_v<G, double> ? N : 2 * N;
    static constexpr int REGISTERS = NORM_LANES / N;
    using V = Vec<double, N>;

    static double block(const void* gradient, int64_t offset, int count) {
        const G* const from = static_cast<const G*>(gradient) + offset;
        V lanes[REGISTERS] = {};
        const int whole = count / NORM_LANES * NORM_LANES;
        for (int i = 0; i < whole; i += NORM_LANES) {
            for (int r = 0; r < REGISTERS; r += READ / N) {
                double wide[READ];
                widen<READ>(from + i + r * N, wide);
                for (int half = 0; half < READ / N; ++half) {
                    V value;
                    std::memcpy(&value, wide + half * N, sizeof(value));
                    lanes[r + half] = lanes[r + half] + value * value;
                }
            }
        }
        double lane[NORM_LANES];
        std::memcpy(lane, lanes, sizeof(lane));
        for (int i = whole; i < count; ++i) {
            double value;
            widen<1>(from + i, &value);
            lane[i - whole] = lane[i - whole] + value * value;
        }
        return sum_of_lanes(lane);
    }

   private:
    template <int COUNT>
    static LF_HD void widen(const G* from, double* to) {
        using Part = std::conditional_t<std::is_same_v<G, double>, double, float>;
        const auto read = Memory<Part, COUNT, G>::load(from);
        const auto wide = __builtin_convertvector(read.native, typename Vec<double, COUNT>::Native);
        std::memcpy(to, &wide, sizeof(wide));
    }
};

inline SquaresOfBlock squares_of(Dtype grad) {
    SquaresOfBlock found = nullptr;
    Dtypes::any([&](auto dtype) {
        using Of = decltype(dtype);
        if (Of::value != grad) return false;
        found = &Squares<typename Of::Type>::block;
        return true;
    });
    return found;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
