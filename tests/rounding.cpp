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

template <class Word>
Word rounded(Word bits, Word place, int moment) {
    return rounded_without_bias(bits, random_half(mixed(place), moment));
}

int run(uint32_t key, int moment) {
    uint32_t words[N];
    uint32_t place = key;
    for (size_t count; (count = std::fread(words, sizeof(uint32_t), N, stdin)) > 0; place += N) {
        Vector bits{}, places{};
        std::memcpy(&bits, words, count * sizeof(uint32_t));
        for (int i = 0; i < N; ++i) places[i] = place + i;
        const Vector many = rounded(bits, places, moment);
        for (size_t i = 0; i < count; ++i) {
            const uint32_t one = rounded(words[i], place + static_cast<uint32_t>(i), moment);
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
    return run(key, std::atoi(argv[3]));
}
