// What one launch reads: plain data, one layout for every backend, no mathematics.
//
// A row is one parameter tensor and everything that belongs to it, a group is one torch parameter group, a chunk is a
// piece of a row. All rows of a table share a rule, a policy, a device and one pattern of dtypes.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace lookahead_fused {

// A row's tensors. Where a column is null the row has no such tensor, and its walk neither reads nor writes one.
enum Column : int {
    PARAM,          // theta
    GRAD,           // null where the parameter has no gradient in this step: the row then takes no part in it
    STEP,           // updates applied so far
    AVERAGE_START,  // how many there were when the slow weights were made, and with the next three PolicyNumbers
    Y_INTERP,
    WEIGHT_SUM,
    LR_MAX,
    MASTER,         // what is kept of theta in the compute type (master.h): where it is whole, PARAM is not read
    SLOW,           // phi, the average, or z
    CACHED_MOMENT,  // the first moment as the last sync left it, for pullback
    CACHED_SCALE,   // of its blocks, where moments lie in codes (state/int8.h)
    COMPANION,      // what stands beside phi: its own momentum, or x
    MOMENT,         // the rule's moments, in the order of its moment_names
    MOMENT_SCALE = MOMENT + 3,  // of their blocks, as CACHED_SCALE
    COLUMNS = MOMENT_SCALE + 3
};

// Columns as data: whoever makes, checks or packs a row loops over these.
struct ColumnFacts {
    enum Type { PARAM_TYPE, GRAD_TYPE, MASTER_TYPE, COMPUTE_TYPE, MOMENT_TYPE, FP64, TYPES };
    enum Access { READ, WRITTEN };  // by a step; WRITTEN ones are read too
    // How many numbers: one for the row, as many as the parameter has and laid out like it, or one after the other for
    // each of its blocks of codes.
    enum Extent { ONE, ELEMENTS, BLOCKS };

    const char* name;  // null: a moment or a moment's scale, which its rule names
    Type type;
    Access access;
    Extent extent;
    bool required;  // in every row, in every step that the row takes part in
};

constexpr ColumnFacts COLUMN_FACTS[COLUMNS] = {
    {"param", ColumnFacts::PARAM_TYPE, ColumnFacts::WRITTEN, ColumnFacts::ELEMENTS, true},
    {"grad", ColumnFacts::GRAD_TYPE, ColumnFacts::READ, ColumnFacts::ELEMENTS, false},
    {"step", ColumnFacts::FP64, ColumnFacts::WRITTEN, ColumnFacts::ONE, true},
    {"average_start", ColumnFacts::FP64, ColumnFacts::READ, ColumnFacts::ONE, false},
    {"y_interp", ColumnFacts::FP64, ColumnFacts::WRITTEN, ColumnFacts::ONE, false},
    {"weight_sum", ColumnFacts::FP64, ColumnFacts::WRITTEN, ColumnFacts::ONE, false},
    {"lr_max", ColumnFacts::FP64, ColumnFacts::WRITTEN, ColumnFacts::ONE, false},
    {"master", ColumnFacts::MASTER_TYPE, ColumnFacts::WRITTEN, ColumnFacts::ELEMENTS, false},
    {"slow", ColumnFacts::COMPUTE_TYPE, ColumnFacts::WRITTEN, ColumnFacts::ELEMENTS, false},
    {"cached_momentum", ColumnFacts::MOMENT_TYPE, ColumnFacts::WRITTEN, ColumnFacts::ELEMENTS, false},
    {"cached_momentum_scale", ColumnFacts::COMPUTE_TYPE, ColumnFacts::WRITTEN, ColumnFacts::BLOCKS, false},
    {"companion", ColumnFacts::COMPUTE_TYPE, ColumnFacts::WRITTEN, ColumnFacts::ELEMENTS, false},
    {nullptr, ColumnFacts::MOMENT_TYPE, ColumnFacts::WRITTEN, ColumnFacts::ELEMENTS, false},
    {nullptr, ColumnFacts::MOMENT_TYPE, ColumnFacts::WRITTEN, ColumnFacts::ELEMENTS, false},
    {nullptr, ColumnFacts::MOMENT_TYPE, ColumnFacts::WRITTEN, ColumnFacts::ELEMENTS, false},
    {nullptr, ColumnFacts::COMPUTE_TYPE, ColumnFacts::WRITTEN, ColumnFacts::BLOCKS, false},
    {nullptr, ColumnFacts::COMPUTE_TYPE, ColumnFacts::WRITTEN, ColumnFacts::BLOCKS, false},
    {nullptr, ColumnFacts::COMPUTE_TYPE, ColumnFacts::WRITTEN, ColumnFacts::BLOCKS, false},
};

struct Row {
    void* column[COLUMNS];
    int64_t numel;
    int32_t group;
    int32_t moments_loaded;  // the moments came without a step (torch's SGD saves none), and count all the same
};

// The binding checks that no rule and no policy has more.
constexpr int MAX_RULE_HYPERS = 10, MAX_POLICY_HYPERS = 6;

// A hyperparameter that is a tensor of one element, read where it lies in every step.
struct Live {
    const void* at;  // null: there is none
    int32_t slot;    // of the rule's hyperparameters, or MAX_RULE_HYPERS and the policy's
    int32_t is_double;
};

// A learning rate, a weight decay, and the two interpolations of a policy that averages.
constexpr int MAX_LIVE = 4;

struct Group {
    double rule[MAX_RULE_HYPERS];      // in the order of the rule's hyper_names
    double policy[MAX_POLICY_HYPERS];  // in the order of the policy's
    Live live[MAX_LIVE];               // in place of the numbers above
};

// Offsets are 64-bit: a tensor may have more than 2^31 elements.
struct Chunk {
    int64_t offset;
    int32_t row;
    int32_t count;
};

struct Table {
    int32_t policy;  // its place in the list of policies
    const Row* rows;
    int64_t row_count;
    const Group* groups;
    int64_t group_count;
    const Chunk* chunks;
    int64_t chunk_count;
};

// What a pass over a table does.
enum class Pass : int32_t {
    STEP,  // the rule's update of every row with a gradient, and what its policy does after it
    SYNC,  // the policy's event alone, now, on every row; no counter advances. The rule is External
};

// Values that may differ in every step, without the table being touched.
struct StepArguments {
    const float* grad_scale;  // null, or what the gradients were multiplied by
    const float* found_inf;   // null, or non-zero: nothing at all may change
    const double* clip;       // null, or what the gradients are multiplied by (norm.h)
    Pass pass;
    int32_t event_later;  // of a STEP: its policy's event is a SYNC's, which comes after it
};

}  // namespace lookahead_fused
