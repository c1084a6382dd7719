// The ceiling of a step: a loop that moves exactly its bytes and computes next to nothing.
//
// It reads param, grad, exp_avg and exp_avg_sq and writes all but grad; a pass with a slow weight reads and writes
// that too. What it "computes" is x ^ (grad & mask): every output needs both loads, and with mask = 0, which the
// compiler cannot know, each value is written back as it was. So it runs over an optimizer's own live tensors, on the
// very pages the optimizer has: no luck of placement separates the two. It shares no code with the package.

#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t kLanes = 16;  // one cache line of 32-bit words, an AVX-512 register; narrower machines use several
typedef uint32_t Line __attribute__((vector_size(kLanes * 4), may_alias));

struct Tensors {
    uint32_t* param;
    const uint32_t* grad;
    uint32_t* exp_avg;
    uint32_t* exp_avg_sq;
    uint32_t* slow;  // null in a pass without a sync
};

// What a loop may try that could make it faster; nobody knows beforehand which one does on a given machine.
enum class Variant { kPlain, kPrefetch, kNonTemporal, kChunked, kCount };

constexpr size_t kPrefetchAhead = 512;      // elements: 2 KiB, 32 lines of each tensor
constexpr size_t kChunk = size_t{1} << 20;  // elements that one thread walks before it skips the others' chunks

inline bool has_non_temporal() {
#if defined(__AVX__)
    return true;
#else
    return false;
#endif
}

template <bool NonTemporal>
inline void store(uint32_t* to, Line value) {
#if defined(__AVX512F__)
    if constexpr (NonTemporal) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#elif defined(__AVX__)
    if constexpr (NonTemporal) {
        const auto* halves = reinterpret_cast<const __m256i*>(&value);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to), halves[0]);
        return _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, halves[1]);
    }
#endif
    *reinterpret_cast<Line*>(to) = value;
}

inline Line load(const uint32_t* from) { return *reinterpret_cast<const Line*>(from); }

template <bool NonTemporal, bool Prefetch, bool Slow>
void walk(const Tensors& t, size_t begin, size_t end, uint32_t mask) {
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
        if constexpr (Prefetch) {
            __builtin_prefetch(t.param + i + kPrefetchAhead, 1);
            __builtin_prefetch(t.grad + i + kPrefetchAhead, 0);
            __builtin_prefetch(t.exp_avg + i + kPrefetchAhead, 1);
            __builtin_prefetch(t.exp_avg_sq + i + kPrefetchAhead, 1);
            if constexpr (Slow) __builtin_prefetch(t.slow + i + kPrefetchAhead, 1);
        }
        const Line bits = load(t.grad + i) & mask;
        store<NonTemporal>(t.param + i, load(t.param + i) ^ bits);
        store<NonTemporal>(t.exp_avg + i, load(t.exp_avg + i) ^ bits);
        store<NonTemporal>(t.exp_avg_sq + i, load(t.exp_avg_sq + i) ^ bits);
        if constexpr (Slow) store<NonTemporal>(t.slow + i, load(t.slow + i) ^ bits);
    }
    for (; i < end; ++i) {
        const uint32_t bits = t.grad[i] & mask;
        t.param[i] ^= bits;
        t.exp_avg[i] ^= bits;
        t.exp_avg_sq[i] ^= bits;
        if constexpr (Slow) t.slow[i] ^= bits;
    }
#if defined(__AVX__)
    if constexpr (NonTemporal) _mm_sfence();
#endif
}

template <bool NonTemporal, bool Prefetch>
void walk(const Tensors& t, size_t begin, size_t end, uint32_t mask) {
    if (t.slow)
        walk<NonTemporal, Prefetch, true>(t, begin, end, mask);
    else
        walk<NonTemporal, Prefetch, false>(t, begin, end, mask);
}

void walk(Variant variant, const Tensors& t, size_t begin, size_t end, uint32_t mask) {
    switch (variant) {
        case Variant::kPrefetch:
            return walk<false, true>(t, begin, end, mask);
        case Variant::kNonTemporal:
            return walk<true, false>(t, begin, end, mask);
        default:
            return walk<false, false>(t, begin, end, mask);
    }
}

size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// Thread `thread`'s share: one contiguous part, or every threads-th chunk.
void share(Variant variant, const Tensors& t, size_t n, uint32_t mask, size_t thread, size_t threads) {
    if (variant == Variant::kChunked) {
        for (size_t begin = thread * kChunk; begin < n; begin += threads * kChunk)
            walk(variant, t, begin, smaller(begin + kChunk, n), mask);
        return;
    }
    // Parts end at whole lines, so that no two threads write one line.
    const size_t part = (n / threads + kLanes - 1) / kLanes * kLanes;
    walk(variant, t, smaller(thread * part, n), thread + 1 == threads ? n : smaller((thread + 1) * part, n), mask);
}

bool unaligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % (kLanes * 4) != 0; }

}  // namespace

extern "C" {

int ceiling_variants() { return static_cast<int>(Variant::kCount); }

const char* ceiling_variant_name(int variant) {
    static const char* const names[] = {"plain", "prefetch", "non-temporal", "chunked"};
    return names[variant];
}

// Moves the bytes of one step. 0: done; 1: this machine has no such variant; 2: an address is not 64-byte aligned.
int ceiling_pass(int variant, uint32_t* param, const uint32_t* grad, uint32_t* exp_avg, uint32_t* exp_avg_sq,
                 uint32_t* slow, size_t n, uint32_t mask, size_t threads) {
    const auto chosen = static_cast<Variant>(variant);
    if (chosen == Variant::kNonTemporal && !has_non_temporal()) return 1;
    const Tensors t{param, grad, exp_avg, exp_avg_sq, slow};
    for (const void* address :
         {(const void*)param, (const void*)grad, (const void*)exp_avg, (const void*)exp_avg_sq, (const void*)slow})
        if (unaligned(address)) return 2;
    // Threads are started anew in each pass: some ten microseconds beside tens of milliseconds.
    std::vector<std::thread> others;
    for (size_t thread = 1; thread < threads; ++thread) others.emplace_back(share, chosen, t, n, mask, thread, threads);
    share(chosen, t, n, mask, 0, threads);
    for (auto& other : others) other.join();
    return 0;
}
}
