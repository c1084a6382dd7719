// The squares of a table's gradients on the CPU, added row by row in one parallel region.
#pragma once

#include <cstdint>
#include <vector>

#include "../table/norm.h"
#include "../table/table.h"
#include "kernels.h"

namespace lookahead_fused {

// What a table's norms work with, kept from one to the next.
class NormWorkspace {
   public:
    // Writes to sums[places[i]] the sum of the squares of row i's gradient, 0 where it has none. Memory is allocated
    // for a table's first norm, and where rows were added since the last one; where this throws, nothing was written.
    void sum(const Table& table, SquaresOfBlock squares, const int64_t* places, double* sums, int threads,
             bool own_threads);

   private:
    std::vector<int64_t> first_block_;  // of each row, and at the end the number of all blocks
    std::vector<double> blocks_;
};

// What the sums of all parameters come to.
void make_clip(const ClipArguments& arguments);

}  // namespace lookahead_fused
