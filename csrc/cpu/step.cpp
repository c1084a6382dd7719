#include "step.h"

#include <stdexcept>

#include "floating_point.h"
#include "parallel.h"
#include "processor.h"

namespace lookahead_fused {
namespace {

// Small enough that two threads end within a fraction of a millisecond of each other and a tensor of a few hundred
// thousand elements is shared, large enough that taking one costs nothing and the prefetchers are warm most of the way.
constexpr int64_t SPAN_ELEMENTS = 1 << 16;

struct InstructionSet {
    const char* name;
    bool (*present)();
    FindKernel find;
    FindSquares squares;
};

constexpr InstructionSet INSTRUCTION_SETS[] = {
    {"baseline", [] { return true; }, &find_baseline, &squares_baseline},
#if LOOKAHEAD_FUSED_X86
    {"avx2", [] { return processor().avx2; }, &find_avx2, &squares_avx2},
    {"avx512", [] { return processor().avx2 && processor().avx512; }, &find_avx512, &squares_avx512},
#endif
};

const InstructionSet& set_named(const std::string& name) {
    for (const auto& set : INSTRUCTION_SETS) {
        if (name == set.name && set.present()) return set;
    }
    throw std::invalid_argument("instruction set '" + name + "' is not one this machine can run");
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const auto& set : INSTRUCTION_SETS) {
        if (set.present()) names.emplace_back(set.name);
    }
    return names;
}

const Kernel* find_kernel(const std::string& instruction_set, const std::string& rule, Dtype param, Dtype grad,
                          Dtype state) {
    return set_named(instruction_set).find(rule.c_str(), param, grad, state);
}

SquaresOfBlock find_squares(const std::string& instruction_set, Dtype grad) {
    return set_named(instruction_set).squares(grad);
}

void Workspace::step(const Table& table, const Kernel& kernel, const StepArguments& arguments, int threads,
                     bool own_threads) {
    fit(table, kernel);
    const auto span_count = static_cast<int64_t>(spans_.size());
    const DefaultFloatingPoint defaults;
    parallel_for(
        span_count, threads, own_threads, [&] { kernel.rows(table, arguments, steps_.data(), step_of_row_.data()); },
        [&](int64_t i) {
            const int64_t end = i + 1 < span_count ? spans_[i + 1] : chunk_count_;
            kernel.chunks(table, steps_.data(), step_of_row_.data(), spans_[i], end);
        });
}

void Workspace::fit(const Table& table, const Kernel& kernel) {
    const auto rows = static_cast<size_t>(table.row_count);
    if (steps_.size() < rows * kernel.step_bytes) steps_.resize(rows * kernel.step_bytes);
    if (step_of_row_.size() < rows) step_of_row_.resize(rows);
    if (table.chunk_count < chunk_count_) {
        spans_.clear();
        chunk_count_ = 0;
    }
    for (; chunk_count_ < table.chunk_count; ++chunk_count_) {
        const int64_t elements = table.chunks[chunk_count_].count;
        if (spans_.empty() || last_span_elements_ + elements > SPAN_ELEMENTS) {
            spans_.push_back(chunk_count_);
            last_span_elements_ = 0;
        }
        last_span_elements_ += elements;
    }
}

}  // namespace lookahead_fused
