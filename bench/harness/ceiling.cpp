// The ceiling of a step: a loop that moves exactly its bytes and computes next to nothing.
//
// For each row it reads param, grad and one or two moments and writes all but grad; a pass with slow weights reads and
// writes those too. What it "computes" is x ^ (grad & mask): every output needs both loads, and with mask = 0, which
// the compiler cannot know, each value is written back as it was. So it runs over an optimizer's own live tensors, on
// the very pages the optimizer has: no luck of placement separates the two. It shares no code with the package.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t kLanes = 16;  // one cache line of 32-bit words, an AVX-512 register; narrower machines use several
typedef uint32_t Line __attribute__((vector_size(kLanes * 4), may_alias));

// One parameter. Param and grad may be of 16 bits, two elements a word; the moments and slow are of 32.
struct Row {
    uint32_t* param;
    const uint32_t* grad;
    uint32_t* first;
    uint32_t* second;  // null for a rule with one moment
    uint32_t* slow;
    size_t elements;
};

// What a loop may try that could make it faster; nobody knows beforehand which one does on a given machine.
enum class Variant { kPlain, kPrefetchNear, kPrefetchFar, kNonTemporal, kChunked, kCount };

constexpr size_t kNear = 128, kFar = 512;   // how many elements ahead to prefetch; first caches of 32 KiB want fewer
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

// Elements begin to end of a row, begin a multiple of `kLanes * PerWord`; Ahead = 0 is no prefetch.
template <bool NonTemporal, size_t Ahead, size_t PerWord, bool Second, bool Slow>
void walk(const Row& row, size_t begin, size_t end, uint32_t mask) {
    size_t i = begin;
    for (; i + kLanes * PerWord <= end; i += kLanes * PerWord) {
        const size_t word = i / PerWord;
        if constexpr (Ahead != 0) {
            __builtin_prefetch(row.param + word + Ahead / PerWord, 1);
            __builtin_prefetch(row.grad + word + Ahead / PerWord, 0);
        }
        const Line bits = load(row.grad + word) & mask;
        store<NonTemporal>(row.param + word, load(row.param + word) ^ bits);
        for (size_t j = i; j < i + kLanes * PerWord; j += kLanes) {
            if constexpr (Ahead != 0) {
                __builtin_prefetch(row.first + j + Ahead, 1);
                if constexpr (Second) __builtin_prefetch(row.second + j + Ahead, 1);
                if constexpr (Slow) __builtin_prefetch(row.slow + j + Ahead, 1);
            }
            store<NonTemporal>(row.first + j, load(row.first + j) ^ bits);
            if constexpr (Second) store<NonTemporal>(row.second + j, load(row.second + j) ^ bits);
            if constexpr (Slow) store<NonTemporal>(row.slow + j, load(row.slow + j) ^ bits);
        }
    }
    // Half a word at the end of a row of 16 bits stays as it is.
    for (; i < end; ++i) {
        const size_t word = i / PerWord;
        if ((word + 1) * PerWord > row.elements) break;
        const uint32_t bits = row.grad[word] & mask;
        if (i % PerWord == 0) row.param[word] ^= bits;
        row.first[i] ^= bits;
        if constexpr (Second) row.second[i] ^= bits;
        if constexpr (Slow) row.slow[i] ^= bits;
    }
#if defined(__AVX__)
    if constexpr (NonTemporal) _mm_sfence();
#endif
}

// What is the same for all rows of a pass.
struct Pass {
    Variant variant;
    const Row* rows;
    size_t count, total;
    size_t per_word;
    bool slow;
    uint32_t mask;
    size_t threads;
};

template <bool NonTemporal, size_t Ahead, size_t PerWord>
void walk(const Pass& pass, const Row& row, size_t begin, size_t end) {
    if (row.second)
        pass.slow ? walk<NonTemporal, Ahead, PerWord, true, true>(row, begin, end, pass.mask)
                  : walk<NonTemporal, Ahead, PerWord, true, false>(row, begin, end, pass.mask);
    else
        pass.slow ? walk<NonTemporal, Ahead, PerWord, false, true>(row, begin, end, pass.mask)
                  : walk<NonTemporal, Ahead, PerWord, false, false>(row, begin, end, pass.mask);
}

template <bool NonTemporal, size_t Ahead>
void walk(const Pass& pass, const Row& row, size_t begin, size_t end) {
    pass.per_word == 1 ? walk<NonTemporal, Ahead, 1>(pass, row, begin, end)
                       : walk<NonTemporal, Ahead, 2>(pass, row, begin, end);
}

void walk(const Pass& pass, const Row& row, size_t begin, size_t end) {
    switch (pass.variant) {
        case Variant::kPrefetchNear:
            return walk<false, kNear>(pass, row, begin, end);
        case Variant::kPrefetchFar:
            return walk<false, kFar>(pass, row, begin, end);
        case Variant::kNonTemporal:
            return walk<true, 0>(pass, row, begin, end);
        default:
            return walk<false, 0>(pass, row, begin, end);
    }
}

size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
size_t larger(size_t a, size_t b) { return a > b ? a : b; }

// The elements begin to end of all rows, counted as if they were one.
void range(const Pass& pass, size_t begin, size_t end) {
    // Parts end at whole lines of a row, so that no two threads write one line.
    const size_t unit = kLanes * pass.per_word;
    size_t before = 0;
    for (size_t r = 0; r < pass.count && before < end; before += pass.rows[r++].elements) {
        const size_t n = pass.rows[r].elements;
        if (before + n <= begin) continue;
        const size_t from = begin > before ? smaller((begin - before + unit - 1) / unit * unit, n) : 0;
        const size_t to = end < before + n ? smaller((end - before + unit - 1) / unit * unit, n) : n;
        if (from < to) walk(pass, pass.rows[r], from, to);
    }
}

// Thread `thread`'s share: one contiguous part, or every threads-th chunk.
void share(const Pass& pass, size_t thread) {
    const size_t part =
        pass.variant == Variant::kChunked ? kChunk : larger((pass.total + pass.threads - 1) / pass.threads, 1);
    for (size_t begin = thread * part; begin < pass.total; begin += pass.threads * part)
        range(pass, begin, smaller(begin + part, pass.total));
}

bool unaligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % (kLanes * 4) != 0; }

}  // namespace

extern "C" {

int ceiling_variants() { return static_cast<int>(Variant::kCount); }

const char* ceiling_variant_name(int variant) {
    static const char* const names[] = {"plain", "prefetch 128 ahead", "prefetch 512 ahead", "non-temporal", "chunked"};
    return names[variant];
}

// Moves the bytes of one step. 0: done; 1: this machine has no such variant; 2: an address is not 64-byte aligned.
int ceiling_pass(int variant, const Row* rows, size_t count, size_t per_word, int slow, uint32_t mask, size_t threads) {
    Pass pass{static_cast<Variant>(variant), rows, count, 0, per_word, slow != 0, mask, threads};
    if (pass.variant == Variant::kNonTemporal && !has_non_temporal()) return 1;
    for (size_t r = 0; r < count; ++r) {
        pass.total += rows[r].elements;
        const Row& row = rows[r];
        for (const void* address : {(const void*)row.param, (const void*)row.grad, (const void*)row.first,
                                    (const void*)row.second, (const void*)row.slow})
            if (unaligned(address)) return 2;
    }
    // Threads are started anew in each pass: some ten microseconds beside milliseconds.
    std::vector<std::thread> others;
    for (size_t thread = 1; thread < threads; ++thread) others.emplace_back(share, std::cref(pass), thread);
    share(pass, 0);
    for (auto& other : others) other.join();
    return 0;
}
}
