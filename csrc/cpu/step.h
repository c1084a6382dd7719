// A pass on the CPU: the kernel that this machine runs best, over a table, in one parallel region.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "../table/table.h"
#include "kernels.h"

namespace lookahead_fused {

// The instruction sets of this build that this machine has, the preferred one last.
std::vector<std::string> instruction_sets();

// Null where there is no such walk.
const Kernel* find_kernel(const std::string& instruction_set, const std::string& rule, Dtype param, Dtype grad,
                          Dtype state);

// Throws as find_kernel does.
SquaresOfBlock find_squares(const std::string& instruction_set, Dtype grad);

// What a table's passes work with, kept from one to the next: room for what is computed once for each row, and how the
// chunks are shared out.
class Workspace {
   public:
    // Memory is allocated in a table's first pass, and where rows and chunks were added to its end since the last one.
    // Where this throws, nothing has changed, not even a counter.
    void step(const Table& table, const Kernel& kernel, const StepArguments& arguments, int threads, bool own_threads);

   private:
    void fit(const Table& table, const Kernel& kernel);

    std::vector<std::byte> steps_;
    std::vector<int32_t> step_of_row_;
    // Runs of chunks of about equal size, what a thread takes at a time: the numbers of their first chunks.
    std::vector<int64_t> spans_;
    int64_t chunk_count_ = 0, last_span_elements_ = 0;
};

}  // namespace lookahead_fused
