// csrc/state/int8.h as a program: fp32 numbers in, of each block its scale, its codes and what these stand for again,
// encoded and decoded one by one and in SIMD vectors.
//
//   codes SQUARES UPDATES OWN_PASS MOMENT <numbers >blocks
//   codes SQUARES SCALE_BITS              of one scale, what all 256 codes stand for
#define LF_REGISTER_BYTES 16
#include "cpu/vector.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace lookahead_fused;

namespace {

constexpr int N = 4;
using Vector = typename Register<uint32_t, N>::Type;

Vector vector(const uint32_t* from) {
    Vector words;
    std::memcpy(&words, from, sizeof(words));
    return words;
}

template <bool SQUARES>
int block(const uint32_t* bits, size_t count, uint32_t place, int moment) {
    using Kind = Codes<SQUARES>;
    uint32_t largest = 0;
    for (size_t i = 0; i < count; ++i) largest = std::max(largest, Kind::magnitude(bits[i]));
    const uint32_t top = Kind::top_of(largest), scale = Kind::scale_bits(top);
    if (Kind::top_in(scale) != top) return 2;
    uint32_t codes[CODE_BLOCK] = {}, numbers[CODE_BLOCK] = {};
    for (size_t i = 0; i < count; ++i) {
        const uint32_t random = random_half(mixed(place + static_cast<uint32_t>(i)), moment);
        codes[i] = Kind::encoded(bits[i], random, top);
        if (codes[i] > 255) return 3;
        numbers[i] = Kind::decoded(codes[i], top);
    }
    for (int i = 0; i + N <= static_cast<int>(count); i += N) {
        Vector places;
        for (int lane = 0; lane < N; ++lane) places[lane] = place + i + lane;
        Vec<float, N> value;
        std::memcpy(&value, bits + i, sizeof(value));
        Code bytes[N];
        CodeMemory<N, SQUARES>::store(bytes, value, random_half(mixed(places), moment), top);
        const Vec<float, N> back = CodeMemory<N, SQUARES>::load(bytes, top);
        if (std::memcmp(&back, numbers + i, sizeof(back)) != 0) return 4;
        for (int lane = 0; lane < N; ++lane) {
            if (bytes[lane].bits != codes[i + lane]) return 5;
        }
        const Vector magnitudes = Kind::magnitude(vector(bits + i));
        for (int lane = 0; lane < N; ++lane) {
            if (magnitudes[lane] != Kind::magnitude(bits[i + lane])) return 6;
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
        const uint32_t bits = Codes<SQUARES>::decoded(code, top);
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
