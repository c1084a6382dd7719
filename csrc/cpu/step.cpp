#include "step.h"

#include <stdexcept>

#include "floating_point.h"
#include "parallel.h"

namespace lookahead_fused {
namespace {

// Small enough that two threads end within a fraction of a millisecond of each other and a tensor of a few hundred
// thousand elements is shared, large enough that taking one costs nothing and the prefetchers are warm most of the way.
constexpr int64_t SPAN_ELEMENTS = 1 << 16;

struct InstructionSet {
    const char* name;
    bool (*present)();
    FindKernel find;
};

constexpr InstructionSet INSTRUCTION_SETS[] = {
    {"baseline", [] { return true; }, &find_baseline},
#if LOOKAHEAD_FUSED_X86
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }, &find_avx2},
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     &find_avx512},
#endif
};

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto& set : INSTRUCTION_SETS) {
        if (set.present()) names.emplace_back(set.name);
    }
    return names;
}

const Kernel* find_kernel(const std::string& instruction_set, const std::string& rule, Dtype param, Dtype grad) {
    for (const auto& set : INSTRUCTION_SETS) {
        if (instruction_set == set.name && set.present()) return set.find(rule.c_str(), param, grad);
    }
    throw std::invalid_argument("instruction set '" + instruction_set + "' is not one this machine can run");
}

Workspace::Workspace(const Table& table, const Kernel& kernel)
    : steps_(static_cast<size_t>(table.row_count) * kernel.step_bytes),
      step_of_row_(static_cast<size_t>(table.row_count)) {
    int64_t elements = 0;
    for (int64_t i = 0; i < table.chunk_count; ++i) {
        if (i == 0 || elements + table.chunks[i].count > SPAN_ELEMENTS) {
            spans_.push_back(i);
            elements = 0;
        }
        elements += table.chunks[i].count;
    }
    spans_.push_back(table.chunk_count);
}

void Workspace::step(const Table& table, const Kernel& kernel, const StepArguments& arguments, int threads,
                     bool own_threads) {
    const DefaultFloatingPoint defaults;
    kernel.rows(table, arguments, steps_.data(), step_of_row_.data());
    parallel_for(static_cast<int64_t>(spans_.size()) - 1, threads, own_threads, [&](int64_t i) {
        kernel.chunks(table, steps_.data(), step_of_row_.data(), spans_[i], spans_[i + 1]);
    });
}

}  // namespace lookahead_fused
