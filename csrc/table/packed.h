// A table as it is sent to a device: two blocks of bytes, what is fixed for the life of a table and what moves.
//
//   fixed   the rows, then the chunks
//   moving  the groups, then for each row the address of its gradient, null where the row takes no part
//
// The gradients have an array of their own, since they move more often than all else in a row.
#pragma once

#include <cstddef>
#include <cstring>

#include "prologue.h"
#include "table.h"

namespace lookahead_fused {

// Of each array in a block: what a 16-byte access wants, and more than any element type asks for.
constexpr size_t PACKED_ALIGNMENT = 16;

constexpr size_t padded(size_t bytes) { return (bytes + PACKED_ALIGNMENT - 1) / PACKED_ALIGNMENT * PACKED_ALIGNMENT; }

struct Packed {
    explicit Packed(const Table& table)
        : chunks(padded(table.row_count * sizeof(Row))),
          fixed(chunks + padded(table.chunk_count * sizeof(Chunk))),
          gradients(padded(table.group_count * sizeof(Group))),
          moving(gradients + table.row_count * sizeof(void*)) {}

    size_t chunks, fixed;      // in the first block: where the chunks begin, its size
    size_t gradients, moving;  // in the second: where the gradients begin, its size
};

inline void pack_fixed(const Table& table, std::byte* to) {
    if (table.row_count > 0) std::memcpy(to, table.rows, table.row_count * sizeof(Row));
    if (table.chunk_count > 0) {
        std::memcpy(to + Packed(table).chunks, table.chunks, table.chunk_count * sizeof(Chunk));
    }
}

// reads_gradient is the rule's that makes the pass.
inline void pack_moving(const Table& table, Pass pass, bool reads_gradient, std::byte* to) {
    // No address: where no element of a gradient is read, it says no more than that the row takes part.
    static const char marker = 0;
    if (table.group_count > 0) std::memcpy(to, table.groups, table.group_count * sizeof(Group));
    auto* gradients = reinterpret_cast<const void**>(to + Packed(table).gradients);
    for (int64_t i = 0; i < table.row_count; ++i) {
        const Row& row = table.rows[i];
        const bool read = row.numel > 0 && reads_gradient;
        gradients[i] = !takes_part(row, pass) ? nullptr : read ? row.column[GRAD] : &marker;
    }
}

}  // namespace lookahead_fused
