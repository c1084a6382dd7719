// What one launch reads: plain data, one layout for every backend, no mathematics.
//
// A row is one parameter tensor and everything that belongs to it, a group is one torch parameter group, a chunk is a
// piece of a row. All rows of a table share a rule, a device and one pattern of dtypes.
#pragma once

#include <cstdint>

namespace lookahead_fused {

enum Column {
    PARAM,        // theta, in the parameter's dtype
    GRAD,         // null where the parameter has no gradient in this step: the row is then left alone. A rule that
                  // reads no gradient looks no further
    MASTER,       // theta in the compute type, or null: then PARAM is read
    SLOW,         // phi, in the compute type
    STEP,         // one fp64: updates applied so far
    SLOW_MOMENT,  // the first moment as the last sync left it, or null without pullback
    MOMENT,       // the rule's moments, in the compute type, from here on; null where not in use
    COLUMNS = MOMENT + 3
};

struct Row {
    void* column[COLUMNS];
    int64_t numel;
    int32_t group;
    int32_t moments_loaded;  // the moments came without a step (torch's SGD saves none), and count all the same
};

// No rule so far has more than eight; the binding checks.
constexpr int MAX_HYPERS = 10;

struct Group {
    double hyper[MAX_HYPERS];  // in the order of the rule's hyper_names
    double alpha;
    int64_t k;
    int32_t pullback;  // rules/sync.h: Pullback
    int32_t lr_is_double;
    const void* lr;  // null, or the address of a learning rate that is a tensor; hyper[0] is then not read
};

// Offsets are 64-bit: a tensor may have more than 2^31 elements.
struct Chunk {
    int64_t offset;
    int32_t row;
    int32_t count;
};

struct Table {
    const Row* rows;
    int64_t row_count;
    const Group* groups;
    int64_t group_count;
    const Chunk* chunks;
    int64_t chunk_count;
};

// Values that may differ in every step, without the table being touched.
struct StepArguments {
    const float* grad_scale;  // null, or what the gradients were multiplied by
    const float* found_inf;   // null, or non-zero: nothing at all may change
};

enum class Dtype : int32_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

}  // namespace lookahead_fused
