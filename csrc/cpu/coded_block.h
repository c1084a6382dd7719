// Moments that lie in codes, a block at a time: what its elements become is held in the first cache until the largest
// of them is known, by which all are encoded. Each array is read once and written once.
//
// A block that is not whole is handled as one with zeros behind its last element. So all loops have a known length.
#pragma once

#include <cstring>

#include "../table/prologue.h"
#include "code_vectors.h"

namespace lookahead_fused {
inline namespace LF_ISA {

template <class Rule>
class CodedBlock {
   public:
    static constexpr int N = LF_REGISTER_BYTES / sizeof(float), REGISTERS = CODE_BLOCK / N;
    // So many registers of words make one of codes.
    static constexpr int GROUP = sizeof(uint32_t) / sizeof(Code);
    static_assert(REGISTERS % GROUP == 0, "a block is a whole number of registers of codes");
    using Arrays = StateArrays<Rule, float, Code>;
    using Scales = ScaleArrays<Rule>;
    using Vectors = CodeVectors<N>;
    using Word = typename Vectors::Word;
    using Signed = typename Vectors::Signed;

    // Of `count` elements, which the arrays begin with. with_cached: the first moment's copy is read, and becomes what
    // that is.
    LF_HD CodedBlock(const Arrays& arrays, const Scales& scales, int count, bool with_cached)
        : arrays_(arrays), scales_(scales), count_(count), with_cached_(with_cached) {
        decode_moments<0>();
        if (with_cached) decode<false>(arrays.cached, scales.cached, found_[Rule::MOMENTS]);
    }

    // WIDTH elements of moment m, from place i of the block on.
    template <int WIDTH>
    LF_HD Vec<float, WIDTH> load(int64_t i, int m) const {
        return Memory<float, WIDTH, float>::load(found_[m] + i);
    }
    template <int WIDTH>
    LF_HD Vec<float, WIDTH> load_cached(int64_t i) const {
        return load<WIDTH>(i, Rule::MOMENTS);
    }
    template <int WIDTH>
    LF_HD void keep(Vec<float, WIDTH> value, int64_t i, int m) {
        Memory<float, WIDTH, float>::store(made_[m] + i, value);
    }

    // Writes what was kept. place: of the first element in its row, with the row's key for rounding.
    LF_HD void write(uint32_t place) {
        Word random[REGISTERS], lane = lane_numbers<N>() + place;
        for (int r = 0; r < REGISTERS; ++r, lane += static_cast<uint32_t>(N)) random[r] = mixed(lane);
        write_moments<0>(random);
    }

   private:
    bool is_whole() const { return count_ == CODE_BLOCK; }

    template <int M>
    LF_HD void decode_moments() {
        if (arrays_.moment[M] != nullptr) decode<Rule::squares[M]>(arrays_.moment[M], scales_.moment[M], found_[M]);
        if constexpr (M + 1 < Rule::MOMENTS) decode_moments<M + 1>();
    }

    template <bool SQUARES>
    LF_HD void decode(const Code* codes, const float* scale, float* to) const {
        uint32_t bits;
        std::memcpy(&bits, scale, sizeof(bits));
        const uint32_t top = Codes<SQUARES>::top_in(bits);
        Code part[CODE_BLOCK];
        if (!is_whole()) {
            std::memset(part, 0, sizeof(part));
            std::memcpy(part, codes, count_);
            codes = part;
        }
        for (int i = 0; i < CODE_BLOCK; i += 2 * N) {
            Word first, second;
            Vectors::raise(Codes<SQUARES>::decoded(Vectors::load(codes + i), top), first, second);
            std::memcpy(to + i, &first, sizeof(first));
            std::memcpy(to + i + N, &second, sizeof(second));
        }
    }

    template <int M>
    LF_HD void write_moments(const Word* random) {
        if (arrays_.moment[M] != nullptr) {
            Code part[CODE_BLOCK];
            const uint32_t scale = encode<M>(random, is_whole() ? arrays_.moment[M] : part);
            std::memcpy(scales_.moment[M], &scale, sizeof(scale));
            if (!is_whole()) std::memcpy(arrays_.moment[M], part, count_);
            if (M == 0 && with_cached_) {
                std::memcpy(scales_.cached, &scale, sizeof(scale));
                std::memcpy(arrays_.cached, arrays_.moment[M], count_);
            }
        }
        if constexpr (M + 1 < Rule::MOMENTS) write_moments<M + 1>(random);
    }

    template <int M>
    LF_HD Word bits(int r) const {
        return bit_cast<Word>(Memory<float, N, float>::load(made_[M] + r * N).native);
    }

    // The bits of the block's new scale.
    template <int M>
    LF_HD uint32_t encode(const Word* random, Code* codes) {
        using Kind = Codes<Rule::squares[M]>;
        if (!is_whole()) std::memset(made_[M] + count_, 0, (CODE_BLOCK - count_) * sizeof(float));
        Signed largest{}, least = largest + 0x7fffffff;
        for (int r = 0; r < REGISTERS; ++r) {
            const Signed own = Kind::measured(bits<M>(r));
            largest = Vectors::larger(own, largest);
            least = Vectors::smaller(own, least);
        }
        const uint32_t of_all = Vectors::largest(largest), top = Kind::top_of(of_all);
        if (of_all >= Kind::LARGEST || Vectors::any_below(least, Kind::least_bits(top))) {
            return encode_any<M>(random, codes);
        }
        fill(codes, [&](int r) {
            const auto up = [&](int r) { return Kind::rounded(bits<M>(r), random_half(random[r], M)); };
            return Kind::code_of(Vectors::upper(up(r), up(r + 1)), top);
        });
        return Kind::scale_bits(top);
    }

    // The same of any numbers.
    template <int M>
    __attribute__((noinline)) uint32_t encode_any(const Word* random, Code* codes) const {
        using Kind = Codes<Rule::squares[M]>;
        Signed largest{};
        for (int r = 0; r < REGISTERS; ++r) largest = Vectors::larger((Signed)Kind::magnitude(bits<M>(r)), largest);
        const uint32_t top = Kind::top_of(Vectors::largest(largest));
        fill(codes, [&](int r) {
            const auto code = [&](int r) { return Kind::encoded(bits<M>(r), random_half(random[r], M), top); };
            return Vectors::upper(code(r) << 16, code(r + 1) << 16);
        });
        return Kind::scale_bits(top);
    }

    // half(r): the codes of two registers.
    template <class Halves>
    static LF_HD void fill(Code* codes, Halves half) {
        for (int r = 0; r < REGISTERS; r += GROUP) Vectors::store(codes + r * N, half(r), half(r + 2));
    }

    const Arrays& arrays_;
    const Scales& scales_;
    const int count_;
    const bool with_cached_;
    alignas(64) float found_[Rule::MOMENTS + 1][CODE_BLOCK];
    alignas(64) float made_[Rule::MOMENTS][CODE_BLOCK];
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
