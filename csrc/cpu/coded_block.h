// Moments that lie in codes, a block at a time: what its elements become is held in the first cache until the largest
// of them is known, by which all are encoded. Each array is read once and written once.
#pragma once

#include <cstring>

#include "../table/prologue.h"
#include "vector.h"

namespace lookahead_fused {
inline namespace LF_ISA {

template <class Rule>
class CodedBlock {
   public:
    static constexpr int N = LF_REGISTER_BYTES / sizeof(float);
    static_assert(CODE_BLOCK % N == 0, "a block is a whole number of registers");
    using Word = typename Register<uint32_t, N>::Type;
    using Arrays = StateArrays<Rule, float, Code>;

    // The block-th of a chunk whose arrays these are.
    LF_HD CodedBlock(const Arrays& arrays, const ScaleArrays<Rule>& scales, int64_t block)
        : first_(block * CODE_BLOCK), block_(block) {
        for (int m = 0; m < Rule::MOMENTS; ++m) {
            if (arrays.moment[m] != nullptr) top_[m] = top(m, scales.moment[m]);
        }
        if (arrays.cached != nullptr) cached_top_ = top(0, scales.cached);
    }

    // WIDTH elements of moment m, from place i of the chunk on, which lies in this block.
    template <int WIDTH>
    LF_HD Vec<float, WIDTH> load(const Code* moment, int64_t i, int m) const {
        return Rule::squares[m] ? CodeMemory<WIDTH, true>::load(moment + i, top_[m])
                                : CodeMemory<WIDTH, false>::load(moment + i, top_[m]);
    }
    template <int WIDTH>
    LF_HD Vec<float, WIDTH> load_cached(const Code* cached, int64_t i) const {
        return CodeMemory<WIDTH, false>::load(cached + i, cached_top_);
    }
    template <int WIDTH>
    LF_HD void keep(Vec<float, WIDTH> value, int64_t i, int m) {
        Memory<float, WIDTH, float>::store(made_[m] + (i - first_), value);
    }

    // Writes what was kept of the block's `count` elements. place: of its first element in the row, with the row's key
    // for rounding. with_cached: the first moment's copy becomes what that is.
    LF_HD void write(const Arrays& arrays, const ScaleArrays<Rule>& scales, int count, uint32_t place,
                     bool with_cached) {
        Word random[CODE_BLOCK / N], lane;
        // Lane by lane with `place` in it, GCC would go through memory.
        for (int i = 0; i < N; ++i) lane[i] = i;
        for (int i = 0; i < count; i += N) random[i / N] = mixed(lane + (place + static_cast<uint32_t>(i)));
        write_moments<0>(arrays, scales, count, random, with_cached);
    }

   private:
    template <int M>
    LF_HD void write_moments(const Arrays& arrays, const ScaleArrays<Rule>& scales, int count, const Word* random,
                             bool with_cached) {
        if (arrays.moment[M] != nullptr) {
            alignas(64) Code codes[CODE_BLOCK];
            const uint32_t scale = encode<M>(count, random, codes);
            std::memcpy(scales.moment[M] + block_, &scale, sizeof(scale));
            std::memcpy(arrays.moment[M] + first_, codes, count);
            if (M == 0 && with_cached) {
                std::memcpy(scales.cached + block_, &scale, sizeof(scale));
                std::memcpy(arrays.cached + first_, codes, count);
            }
        }
        if constexpr (M + 1 < Rule::MOMENTS) write_moments<M + 1>(arrays, scales, count, random, with_cached);
    }

    LF_HD uint32_t top(int m, const float* scales) const {
        uint32_t bits;
        std::memcpy(&bits, scales + block_, sizeof(bits));
        return Rule::squares[m] ? Codes<true>::top_in(bits) : Codes<false>::top_in(bits);
    }

    // The bits of the block's new scale. The numbers behind the last element count as zeros.
    template <int M>
    LF_HD uint32_t encode(int count, const Word* random, Code* codes) {
        using Kind = Codes<Rule::squares[M]>;
        using Value = Vec<float, N>;
        using Signed = typename Register<int32_t, N>::Type;
        for (int i = count; i % N != 0; ++i) made_[M][i] = 0.0f;
        Word largest{};
        for (int i = 0; i < count; i += N) {
            const Value value = Memory<float, N, float>::load(made_[M] + i);
            const Word magnitude = Kind::magnitude(bit_cast<Word>(value.native));
            largest = (Signed)magnitude > (Signed)largest ? magnitude : largest;
        }
        uint32_t all = 0;
        for (int i = 0; i < N; ++i) all = largest[i] > all ? largest[i] : all;
        const uint32_t top = Kind::top_of(all);
        for (int i = 0; i < count; i += N) {
            const Value value = Memory<float, N, float>::load(made_[M] + i);
            CodeMemory<N, Rule::squares[M]>::store(codes + i, value, random_half(random[i / N], M), top);
        }
        return Kind::scale_bits(top);
    }

    int64_t first_, block_;
    uint32_t top_[Rule::MOMENTS] = {}, cached_top_ = 0;
    alignas(64) float made_[Rule::MOMENTS][CODE_BLOCK];
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
