// What a warp's lanes do together, over the stand-in for CUDA: how they meet, and the codes of a block that they hold
// (cuda/codes.cuh) against those of state/int8.h, number by number. test_warps_on_host.py compiles and runs it, a case
// at a time.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "blocks.h"
#include "cuda/codes.cuh"

using namespace lookahead_fused;

namespace {

bool failed = false;

void expect(bool holds, const char* what) {
    if (!holds && !failed) std::printf("%s\n", what);
    failed = failed || !holds;
}

bool run(unsigned threads, unsigned order, const std::function<void()>& thread) {
    return run_blocks(2, threads, thread, order, [] { return true; });
}

void lanes_meet(unsigned order) {
    const bool finished = run(96, order, [] {
        const unsigned thread = threadIdx.x, warp = thread / 32;
        for (unsigned i = 0; i < 5; ++i) {
            // Some lanes are ahead: nobody reads what they give next.
            expect(largest_in_warp((thread * 7 + i) % 32 + 100 * warp) == 31 + 100 * warp, "largest_in_warp");
            expect(from_first_lane(thread + i) == 32 * warp + i, "from_first_lane");
            expect(from_neighbour({thread, i}).x == (thread ^ 1u), "from_neighbour");
            expect(any_in_warp(thread == 40) == (warp == 1), "any_in_warp");
            if (thread % 3 == 0) __syncwarp();
            if (thread % 3 != 0) __syncwarp();
        }
        __syncthreads();
    });
    expect(finished, "threads wait for others that come");
}

// What a device would do is not defined; here it is a launch that fails.
void lanes_that_part_are_stuck(unsigned order) {
    expect(!run(64, order, [] { threadIdx.x % 2 ? largest_in_warp(1) : from_first_lane(1); }),
           "two operations at once");
    expect(!run(64, order, [] { threadIdx.x == 40 ? true : any_in_warp(true); }), "a lane that does not come");
    expect(!run(64, order, [] { threadIdx.x < 32 ? __syncthreads() : __syncwarp(); }), "a warp at another barrier");
    expect(run(64, order, [] { threadIdx.x < 32 ? 0u : largest_in_warp(1); }), "a warp that has none of it");
}

uint32_t mine[32][CODES_OF_LANE], random_bits[32][CODES_OF_LANE];

template <class Kind>
uint32_t decoded(uint32_t code, uint32_t top) {
    return static_cast<uint32_t>(Kind::decoded(static_cast<uint16_t>(code), top)) << 16;
}

template <class Kind>
void compare(int moment) {
    static uint32_t largest;
    const bool finished = run(32, 0, [=] {
        const unsigned lane = threadIdx.x;
        FourFloats numbers;
        std::memcpy(&numbers, mine[lane], sizeof(numbers));
        FourCodes codes;
        const uint32_t scale = encode_block<Kind>(numbers, random_bits[lane], moment, codes);
        largest = 0;
        for (const auto& own : mine) {
            for (const uint32_t bits : own) largest = std::max(largest, Kind::magnitude(bits));
        }
        const uint32_t top = Kind::top_of(largest);
        expect(scale == Kind::scale_bits(top), "the scale");
        const FourFloats back = decoded_block<Kind>(codes, scale);
        for (int j = 0; j < CODES_OF_LANE; ++j) {
            const uint32_t code = Kind::encoded(mine[lane][j], random_half(random_bits[lane][j], moment), top);
            expect(codes.element[j].bits == code, "a code");
            uint32_t bits;
            std::memcpy(&bits, &back.element[j], sizeof(bits));
            expect(bits == decoded<Kind>(code, top), "a number");
        }
    });
    expect(finished, "the lanes meet");
}

template <class Kind>
void codes(int moment) {
    std::mt19937 draw(moment);
    const auto below = [&](uint32_t end) { return static_cast<uint32_t>(draw() % end); };
    constexpr uint32_t RARE[] = {0,          0x80000000, 1,          0x0fffffff, 0x10000000, 0x7f6fffff,
                                 0x7f700000, 0x7f7fffff, 0x7f800000, 0xff800000, 0x7fc00000, 0xffffffff};
    for (int round = 0; round < 4000; ++round) {
        // Of so many octaves, up to some exponent; with rare numbers in none, a few or all of its places.
        const uint32_t spread = 1 + below(48), highest = below(256), rare = below(3) * below(3), kinds = 1 + below(12);
        for (auto& own : mine) {
            for (uint32_t& bits : own) {
                const uint32_t down = below(spread), exponent = highest > down ? highest - down : 0;
                bits = exponent << 23 | (draw() & 0x807fffffu);
                if (below(4) < rare) bits = RARE[below(kinds)];
                if (Kind::SIGN == 0 && below(8) != 0) bits &= 0x7fffffffu;
            }
        }
        for (auto& own : random_bits) {
            for (uint32_t& bits : own) bits = below(16) == 0 ? 0xffffffffu * below(2) : draw();
        }
        compare<Kind>(moment);
    }
}

// Every code under every scale's bits that matter, garbage among them.
template <class Kind>
void decoding() {
    for (uint32_t top = 0; top < 1u << (32 - Kind::SHIFT); ++top) {
        for (uint32_t first = 0; first < 256; first += CODES_OF_LANE) {
            FourCodes given;
            for (int j = 0; j < CODES_OF_LANE; ++j) given.element[j].bits = static_cast<uint8_t>(first + j);
            const FourFloats numbers = decoded_block<Kind>(given, Kind::scale_bits(top) | (first & 0xff));
            uint32_t bits[CODES_OF_LANE];
            std::memcpy(bits, &numbers, sizeof(bits));
            for (int j = 0; j < CODES_OF_LANE; ++j) expect(bits[j] == decoded<Kind>(first + j, top), "a number");
        }
    }
}

}  // namespace

int main(int, char** arguments) {
    const std::string which = arguments[1];
    const auto order = static_cast<unsigned>(std::atoi(arguments[2]));
    if (which == "meet") lanes_meet(order);
    if (which == "part") lanes_that_part_are_stuck(order);
    if (which == "signed") codes<Codes<false>>(static_cast<int>(order));
    if (which == "squares") codes<Codes<true>>(static_cast<int>(order));
    if (which == "decoding") {
        decoding<Codes<false>>();
        decoding<Codes<true>>();
    }
    return failed ? 1 : 0;
}
