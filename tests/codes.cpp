// csrc/state/int8.h as a program: fp32 numbers in, of each block its scale, its codes and what these stand for again,
// encoded and decoded one by one and in SIMD vectors.
//
//   codes SQUARES UPDATES OWN_PASS MOMENT <numbers >blocks
//   codes SQUARES SCALE_BITS              of one scale, what all 256 codes stand for
#define LF_REGISTER_BYTES 16
#include "cpu/code_vectors.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace lookahead_fused;

namespace {

constexpr int N = 4;
using Vector = typename Register<uint32_t, N>::Type;

using Vectors = CodeVectors<N>;

template <class V>
V vector(const uint32_t* from) {
    V lanes;
    for (size_t i = 0; i < sizeof(V) / sizeof(lanes[0]); ++i) lanes[i] = from[i];
    return lanes;
}

template <class V>
bool same(V lanes, const uint32_t* expected) {
    for (size_t i = 0; i < sizeof(V) / sizeof(lanes[0]); ++i) {
        if (static_cast<uint32_t>(lanes[i]) != expected[i]) return false;
    }
    return true;
}

template <bool SQUARES>
int block(const uint32_t* bits, size_t count, uint32_t place, int moment) {
    using Kind = Codes<SQUARES>;
    uint32_t largest = 0;
    for (size_t i = 0; i < count; ++i) largest = std::max(largest, Kind::magnitude(bits[i]));
    const uint32_t top = Kind::top_of(largest), scale = Kind::scale_bits(top);
    if (Kind::top_in(scale) != top) return 2;
    uint32_t codes[CODE_BLOCK] = {}, numbers[CODE_BLOCK] = {}, halves[CODE_BLOCK] = {}, upper[CODE_BLOCK] = {};
    uint32_t random[CODE_BLOCK] = {}, measured[CODE_BLOCK] = {};
    bool regular = true;
    for (size_t i = 0; i < count; ++i) {
        random[i] = random_half(mixed(place + static_cast<uint32_t>(i)), moment);
        codes[i] = Kind::encoded(bits[i], random[i], top);
        if (codes[i] > 255) return 3;
        halves[i] = Kind::decoded(static_cast<uint16_t>(codes[i]), top);
        numbers[i] = halves[i] << 16;
        upper[i] = Kind::rounded(bits[i], random[i]) >> 16;
        measured[i] = Kind::measured(bits[i]);
        const auto number = static_cast<int32_t>(measured[i]);
        regular = regular && number >= static_cast<int32_t>(Kind::least_bits(top)) &&
                  number < static_cast<int32_t>(Kind::LARGEST);
    }
    for (size_t i = 0; i < count && regular; ++i) {
        if (Kind::code_of(static_cast<uint16_t>(upper[i]), top) != codes[i]) return 7;
    }
    // In vectors the same, of two or four at once.
    for (int i = 0; i + 4 * N <= static_cast<int>(count); i += 4 * N) {
        Vector encoded[4], sums[4];
        for (int j = 0; j < 4; ++j) {
            const int at = i + j * N;
            const auto words = vector<Vector>(bits + at), draws = vector<Vector>(random + at);
            encoded[j] = Kind::encoded(words, draws, top);
            sums[j] = Kind::rounded(words, draws);
            if (!same(encoded[j], codes + at)) return 4;
            if (!same(Kind::measured(words), measured + at)) return 5;
            uint32_t magnitudes[N];
            for (int lane = 0; lane < N; ++lane) magnitudes[lane] = Kind::magnitude(bits[at + lane]);
            if (!same(Kind::magnitude(words), magnitudes)) return 6;
        }
        Code bytes[4 * N];
        const auto first = Vectors::upper(encoded[0] << 16, encoded[1] << 16);
        Vectors::store(bytes, first, Vectors::upper(encoded[2] << 16, encoded[3] << 16));
        for (int j = 0; j < 4 * N; ++j) {
            if (bytes[j].bits != codes[i + j]) return 8;
        }
        for (int j = 0; j < 4; j += 2) {
            const int at = i + j * N;
            const auto found = Kind::decoded(Vectors::load(bytes + j * N), top);
            if (!same(found, halves + at)) return 9;
            Vector first, second;
            Vectors::raise(found, first, second);
            if (!same(first, numbers + at) || !same(second, numbers + at + N)) return 12;
            const auto both = Vectors::upper(sums[j], sums[j + 1]);
            if (!same(both, upper + at)) return 10;
            if (regular && !same(Kind::code_of(both, top), codes + at)) return 11;
        }
    }
    std::fwrite(&scale, sizeof(scale), 1, stdout);
    for (size_t i = 0; i < count; ++i) std::fputc(static_cast<int>(codes[i]), stdout);
    std::fwrite(numbers, sizeof(uint32_t), count, stdout);
    return 0;
}

template <bool SQUARES>
int run(uint32_t key, int moment) {
    uint32_t bits[CODE_BLOCK];
    uint32_t place = key;
    for (size_t count; (count = std::fread(bits, sizeof(uint32_t), CODE_BLOCK, stdin)) > 0; place += CODE_BLOCK) {
        const int failed = block<SQUARES>(bits, count, place, moment);
        if (failed != 0) return failed;
    }
    return 0;
}

template <bool SQUARES>
int all_codes(uint32_t scale) {
    const uint32_t top = Codes<SQUARES>::top_in(scale);
    for (uint32_t code = 0; code < 256; ++code) {
        const uint32_t bits = static_cast<uint32_t>(Codes<SQUARES>::decoded(static_cast<uint16_t>(code), top)) << 16;
        std::fwrite(&bits, sizeof(bits), 1, stdout);
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5 && argc != 3) return 1;
    const bool squares = std::atoi(argv[1]) != 0;
    if (argc == 3) {
        const auto scale = static_cast<uint32_t>(std::strtoul(argv[2], nullptr, 10));
        return squares ? all_codes<true>(scale) : all_codes<false>(scale);
    }
    const uint32_t key = rounding_key(std::atoll(argv[2]), std::atoi(argv[3]) != 0);
    const int moment = std::atoi(argv[4]);
    return squares ? run<true>(key, moment) : run<false>(key, moment);
}
