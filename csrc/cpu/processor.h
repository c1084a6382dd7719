// Which vector instructions may be used here: the processor has them, and the system keeps their registers.
#pragma once

#if LOOKAHEAD_FUSED_X86
#include <cpuid.h>

#include <cstdint>

namespace lookahead_fused {

struct Processor {
    bool avx2;    // and F16C
    bool avx512;  // F, BW, DQ and VL
};

namespace detail {

constexpr bool has(uint32_t bits, uint32_t all) { return (bits & all) == all; }

inline Processor ask_processor() {
    uint32_t eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || !has(ecx, bit_OSXSAVE | bit_AVX)) return {};
    const bool f16c = has(ecx, bit_F16C);
    uint32_t kept, high;  // the register XCR0: what the system saves when it switches threads
    __asm__("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
    constexpr uint32_t YMM = 0x06, ZMM = 0xe6;
    if (!has(kept, YMM) || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return {};
    return {f16c && has(ebx, bit_AVX2),
            has(kept, ZMM) && has(ebx, bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL)};
}

}  // namespace detail

// Not __builtin_cpu_supports: it asks the compiler's own library, and zig's answers no to everything.
inline const Processor& processor() {
    static const Processor asked = detail::ask_processor();  // under a hypervisor each question takes microseconds
    return asked;
}

}  // namespace lookahead_fused
#endif
