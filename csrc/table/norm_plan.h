// How a table's gradients are cut into the blocks of norm.h, as it is sent to a device: the blocks, and room to work
// in.
//
//   blocks       of all rows, one after the other
//   first_block  of each row, and at the end the number of all
//   done         of each row how many of its blocks have been added up; 0 between two norms
//   partial      of each block the sum of its squares
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "norm.h"
#include "packed.h"
#include "table.h"

namespace lookahead_fused {

// Where the parts lie.
struct NormLayout {
    int64_t count;                             // of blocks
    size_t first_block, done, partial, bytes;  // where these begin, and the size of all
};

class NormPlan : public NormLayout {
   public:
    explicit NormPlan(const Table& table) {
        std::vector<int64_t> first(table.row_count + 1, 0);
        for (int64_t i = 0; i < table.row_count; ++i) first[i + 1] = first[i] + norm_blocks(table.rows[i].numel);
        // A launch has no more, and 2^31 of them are 32 TiB of fp32 numbers.
        if (first.back() > std::numeric_limits<int32_t>::max())
            throw std::length_error("a norm over too many elements");
        count = first.back();
        first_block = padded(count * sizeof(Chunk));
        done = first_block + padded(first.size() * sizeof(int64_t));
        partial = done + padded(table.row_count * sizeof(uint32_t));
        bytes = partial + count * sizeof(double);
        sent_.resize(partial);
        auto* const blocks = reinterpret_cast<Chunk*>(sent_.data());
        for (int64_t row = 0; row < table.row_count; ++row) {
            for (int64_t block = first[row]; block < first[row + 1]; ++block) {
                const int64_t offset = (block - first[row]) * NORM_BLOCK;
                const int64_t elements = std::min(table.rows[row].numel - offset, NORM_BLOCK);
                blocks[block] = {offset, static_cast<int32_t>(row), static_cast<int32_t>(elements)};
            }
        }
        std::memcpy(sent_.data() + first_block, first.data(), first.size() * sizeof(int64_t));
    }

    // What a device has to be sent before the first norm: all but `partial`.
    const std::vector<std::byte>& sent() const { return sent_; }

   private:
    std::vector<std::byte> sent_;
};

}  // namespace lookahead_fused
