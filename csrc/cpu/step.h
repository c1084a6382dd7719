// A step on the CPU: the kernel that this machine runs best, over a table, in one parallel region.
#pragma once

#include <string>
#include <vector>

#include "../table/table.h"
#include "kernels.h"

namespace lookahead_fused {

// The instruction sets of this build that this machine has, the preferred one last.
std::vector<std::string> instruction_sets();

// Null where the rule has no walk for the dtypes.
const Kernel* find_kernel(const std::string& instruction_set, const std::string& rule, Dtype param, Dtype grad);

// Room for what a step computes once for each row; made with the table, not in the step.
class Workspace {
   public:
    Workspace(const Table& table, const Kernel& kernel);
    void step(const Table& table, const Kernel& kernel, const StepArguments& arguments, int threads, bool own_threads);

   private:
    std::vector<unsigned char> steps_;
    std::vector<int32_t> step_of_row_;
    // Runs of chunks of about equal size: what a thread takes at a time. spans_[i] to spans_[i + 1] are chunk numbers.
    std::vector<int64_t> spans_;
};

}  // namespace lookahead_fused
