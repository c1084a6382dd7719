#include "traffic.h"

#include <algorithm>
#include <map>
#include <utility>
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
    bool write;
    unsigned run;  // how many barriers its thread had passed
};

struct Traffic {
    std::vector<Range> watched;
    int64_t elsewhere = 0;  // accesses outside of what is watched
    // Of a block's threads, in the order of each.
    std::vector<Access> of_thread[THREADS];
    unsigned runs[THREADS] = {};
    int64_t sectors = 0;
} traffic;

unsigned last_run(unsigned warp) {
    unsigned last = 0;
    for (unsigned thread = warp; thread < warp + LANES; ++thread) {
        const auto& own = traffic.of_thread[thread];
        if (!own.empty()) last = std::max(last, own.back().run);
    }
    return last;
}

void count(const Access& access, int64_t times) {
    for (Range& range : traffic.watched) {
        if (access.address >= range.begin && access.address + access.bytes <= range.end) {
            (access.write ? range.written : range.read) += times * static_cast<int64_t>(access.bytes);
            return;
        }
    }
    traffic.elsewhere += times;
}

// Of what the lanes of a warp ask for between two barriers: a word that several of them read is moved once, and one
// that a lane reads twice is moved twice.
void count_bytes(unsigned warp, unsigned run) {
    using Word = std::pair<uintptr_t, size_t>;
    std::map<Word, int64_t> read;
    for (unsigned thread = warp; thread < warp + LANES; ++thread) {
        std::map<Word, int64_t> own;
        for (const Access& access : traffic.of_thread[thread]) {
            if (access.run != run) continue;
            if (access.write) {
                count(access, 1);
            } else {
                int64_t& times = read[{access.address, access.bytes}];
                times = std::max(times, ++own[{access.address, access.bytes}]);
            }
        }
    }
    for (const auto& [word, times] : read) count({word.first, word.second, false, run}, times);
}

void count_sectors(const std::vector<Access>& asked_at_once) {
    std::vector<uintptr_t> sectors;
    for (const auto& [address, bytes, write, run] : asked_at_once) {
        for (uintptr_t s = address / SECTOR_BYTES; s <= (address + bytes - 1) / SECTOR_BYTES; ++s) {
            if (sectors.empty() || sectors.back() != s) sectors.push_back(s);
        }
    }
    std::sort(sectors.begin(), sectors.end());
    traffic.sectors += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
}

}  // namespace

bool note_access(uintptr_t address, size_t bytes, bool write) {
    if (!traffic.watched.empty()) {
        traffic.of_thread[threadIdx.x].push_back({address, bytes, write, traffic.runs[threadIdx.x]});
    }
    return address % bytes == 0;
}

void end_run_of_accesses() { ++traffic.runs[threadIdx.x]; }

void end_block_of_traffic() {
    for (unsigned warp = 0; warp < THREADS; warp += LANES) {
        // A warp's access number i after a barrier: the access number i of each of its lanes, which make the same
        // number of them where they take the same way.
        size_t next[LANES] = {};
        std::vector<Access> asked;
        for (unsigned run = 0; run <= last_run(warp); ++run) {
            count_bytes(warp, run);
            do {
                asked.clear();
                for (unsigned lane = 0; lane < LANES; ++lane) {
                    const auto& own = traffic.of_thread[warp + lane];
                    if (next[lane] == own.size() || own[next[lane]].run != run) continue;
                    asked.push_back(own[next[lane]++]);
                }
                count_sectors(asked);
            } while (!asked.empty());
        }
        for (unsigned thread = warp; thread < warp + LANES; ++thread) {
            traffic.of_thread[thread].clear();
            traffic.runs[thread] = 0;
        }
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
