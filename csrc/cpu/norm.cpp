#include "norm.h"

#include <algorithm>

#include "floating_point.h"
#include "parallel.h"

namespace lookahead_fused {
namespace {

// What a thread takes at a time: as many elements as in a step, where rows are not small.
constexpr int64_t SPAN_BLOCKS = 16;

}  // namespace

void NormWorkspace::sum(const Table& table, SquaresOfBlock squares, const int64_t* places, double* sums, int threads,
                        bool own_threads) {
    if (first_block_.size() != static_cast<size_t>(table.row_count) + 1) {
        std::vector<int64_t> first(table.row_count + 1, 0);
        for (int64_t i = 0; i < table.row_count; ++i) first[i + 1] = first[i] + norm_blocks(table.rows[i].numel);
        blocks_.resize(first.back());
        first_block_ = std::move(first);
    }
    const int64_t count = first_block_.back();
    const auto task = [&](int64_t span) {
        const int64_t end = std::min((span + 1) * SPAN_BLOCKS, count);
        int64_t block = span * SPAN_BLOCKS;
        auto next = std::upper_bound(first_block_.begin(), first_block_.end(), block);
        for (; block < end; ++block) {
            while (*next <= block) ++next;
            const int64_t row = next - first_block_.begin() - 1, offset = (block - first_block_[row]) * NORM_BLOCK;
            const Row& of = table.rows[row];
            if (of.column[GRAD] == nullptr) continue;
            const int64_t left = of.numel - offset;
            blocks_[block] = squares(of.column[GRAD], offset, static_cast<int>(std::min(left, NORM_BLOCK)));
        }
    };
    const DefaultFloatingPoint defaults;
    parallel_for((count + SPAN_BLOCKS - 1) / SPAN_BLOCKS, threads, own_threads, [] {}, task);
    for (int64_t row = 0; row < table.row_count; ++row) {
        const int64_t first = first_block_[row], blocks = first_block_[row + 1] - first;
        const bool has = table.rows[row].column[GRAD] != nullptr;
        sums[places[row]] = has ? sum_in_lanes(blocks_.data() + first, blocks) : 0.0;
    }
}

void make_clip(const ClipArguments& arguments) {
    const DefaultFloatingPoint defaults;
    write_clip(arguments, sum_in_lanes(arguments.sums, arguments.count));
}

}  // namespace lookahead_fused
