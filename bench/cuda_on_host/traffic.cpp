#include "traffic.h"

#include <algorithm>
#include <vector>

#include "control.h"
#include "cuda_on_host.h"

namespace {

constexpr unsigned LANES = 32;
constexpr unsigned THREADS = 1024;
constexpr uintptr_t SECTOR_BYTES = 32;

struct Range {
    uintptr_t begin, end;
    int64_t read, written;
};

struct Access {
    uintptr_t address;
    size_t bytes;
};

struct Traffic {
    std::vector<Range> watched;
    int64_t elsewhere = 0;  // accesses outside of what is watched
    // Of a block's threads, in the order of each: lanes that take the same way make the same number of them.
    std::vector<Access> of_thread[THREADS];
    int64_t sectors = 0;
} traffic;

}  // namespace

bool note_access(uintptr_t address, size_t bytes, bool write) {
    const bool aligned = address % bytes == 0;
    if (traffic.watched.empty()) return aligned;
    traffic.of_thread[threadIdx.x].push_back({address, bytes});
    for (Range& range : traffic.watched) {
        if (address >= range.begin && address + bytes <= range.end) {
            (write ? range.written : range.read) += static_cast<int64_t>(bytes);
            return aligned;
        }
    }
    ++traffic.elsewhere;
    return aligned;
}

void end_block_of_traffic() {
    std::vector<uintptr_t> sectors;
    for (unsigned warp = 0; warp < THREADS; warp += LANES) {
        // A warp's access number i: the access number i of each of its lanes.
        bool any = true;
        for (size_t i = 0; any; ++i) {
            sectors.clear();
            for (unsigned thread = warp; thread < warp + LANES; ++thread) {
                if (i >= traffic.of_thread[thread].size()) continue;
                const auto [address, bytes] = traffic.of_thread[thread][i];
                for (uintptr_t s = address / SECTOR_BYTES; s <= (address + bytes - 1) / SECTOR_BYTES; ++s) {
                    if (sectors.empty() || sectors.back() != s) sectors.push_back(s);
                }
            }
            any = !sectors.empty();
            std::sort(sectors.begin(), sectors.end());
            traffic.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
        }
        for (unsigned thread = warp; thread < warp + LANES; ++thread) traffic.of_thread[thread].clear();
    }
}

void forget_traffic() { traffic = Traffic{}; }

CONTROL void control_watch(uintptr_t address, int64_t bytes) {
    traffic.watched.push_back({address, address + bytes, 0, 0});
}
CONTROL int64_t control_read(int range) { return traffic.watched.at(range).read; }
CONTROL int64_t control_written(int range) { return traffic.watched.at(range).written; }
CONTROL int64_t control_elsewhere() { return traffic.elsewhere; }
CONTROL int64_t control_sectors() { return traffic.sectors; }
