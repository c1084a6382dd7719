// csrc/state/bfloat16.h as a program: fp32 numbers in, their bf16 numbers out, rounded one by one and in SIMD vectors.
//
//   rounding UPDATES OWN_PASS MOMENT <numbers >rounded
#include "state/bfloat16.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

using namespace lookahead_fused;

namespace {

constexpr int N = 8;
typedef uint32_t Vector __attribute__((vector_size(N * sizeof(uint32_t))));

template <int MOMENT, class Word>
Word rounded(Word bits, Word place) {
    return rounded_without_bias(bits, random_half<MOMENT>(random_bits<MOMENT / 2>(place)));
}

template <int MOMENT>
int run(uint32_t key) {
    uint32_t words[N];
    uint32_t place = key;
    for (size_t count; (count = std::fread(words, sizeof(uint32_t), N, stdin)) > 0; place += N) {
        Vector bits{}, places{};
        std::memcpy(&bits, words, count * sizeof(uint32_t));
        for (int i = 0; i < N; ++i) places[i] = place + i;
        const Vector many = rounded<MOMENT>(bits, places);
        for (size_t i = 0; i < count; ++i) {
            const uint32_t one = rounded<MOMENT>(words[i], place + static_cast<uint32_t>(i));
            if (one != many[i]) return 2;
            const auto half = static_cast<uint16_t>(one);
            std::fwrite(&half, sizeof(half), 1, stdout);
        }
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return 1;
    const uint32_t key = rounding_key(std::atoll(argv[1]), std::atoi(argv[2]) != 0);
    switch (std::atoi(argv[3])) {
        case 0:
            return run<0>(key);
        case 1:
            return run<1>(key);
        case 2:
            return run<2>(key);
    }
    return 1;
}
