// What a pass on the CPU owes its caller, whatever the kernel: every chunk once, also of a table that grew, and where
// the system has no threads or no memory to give. test_workspace.py compiles and runs it, a case at a time.
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/step.h"

using namespace lookahead_fused;

namespace lookahead_fused {
const Kernel* find_baseline(const char*, Dtype, Dtype, Dtype) { return nullptr; }
SquaresOfBlock squares_baseline(Dtype) { return nullptr; }
}  // namespace lookahead_fused

namespace {

bool threads_are_refused = false;
std::atomic<int> threads_made{0};

int rows_called = 0;
size_t step_bytes = 0;
std::mutex seen_mutex;
std::multiset<std::pair<int64_t, int64_t>> seen;  // the runs of chunks of a pass
std::set<std::thread::id> seen_on;

// Writes all that a kernel may write: the sanitizer knows how much room there is.
void rows(const Table& table, const StepArguments&, void* steps, int32_t* step_of_row) {
    ++rows_called;
    std::memset(steps, 1, static_cast<size_t>(table.row_count) * step_bytes);
    std::memset(step_of_row, 1, static_cast<size_t>(table.row_count) * sizeof(int32_t));
}

void chunks(const Table&, const void*, const int32_t*, int64_t begin, int64_t end) {
    const std::lock_guard<std::mutex> lock(seen_mutex);
    seen.insert({begin, end});
    seen_on.insert(std::this_thread::get_id());
}

Kernel kernel_of(size_t bytes) {
    step_bytes = bytes;
    return {&rows, &chunks, bytes};
}

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (false)

struct Growing {
    std::vector<Row> rows;
    std::vector<Chunk> chunks;

    void add_row(int chunk_count, int32_t elements) {
        for (int i = 0; i < chunk_count; ++i) chunks.push_back({0, static_cast<int32_t>(rows.size()), elements});
        rows.push_back({});
    }
    Table view() const {
        const auto count = [](const auto& of) { return static_cast<int64_t>(of.size()); };
        return {0, rows.data(), count(rows), nullptr, 0, chunks.data(), count(chunks)};
    }
};

std::multiset<std::pair<int64_t, int64_t>> pass(Workspace& workspace, const Table& table, size_t bytes) {
    seen.clear();
    seen_on.clear();
    workspace.step(table, kernel_of(bytes), {}, 4, true);
    return seen;
}

// Each chunk in one run, and no run longer than it may be, nor two that could be one.
void check_covered(const std::multiset<std::pair<int64_t, int64_t>>& runs, const Table& table) {
    constexpr int64_t MOST_ELEMENTS = 1 << 16;
    int64_t next = 0, before = MOST_ELEMENTS;
    for (const auto& [begin, end] : runs) {
        CHECK(begin == next && end > begin && end <= table.chunk_count);
        CHECK(before + table.chunks[begin].count > MOST_ELEMENTS);
        before = 0;
        for (int64_t i = begin; i < end; ++i) before += table.chunks[i].count;
        CHECK(end == begin + 1 || before <= MOST_ELEMENTS);
        next = end;
    }
    CHECK(next == table.chunk_count);
}

void a_table_that_grows() {
    Growing table;
    Workspace kept;
    for (int i = 0; i < 60; ++i) {
        table.add_row(i % 4, i % 7 == 0 ? 1 << 18 : 3000 * (i % 11) + 1);
        // A step and a sync in turn: their coefficients differ in size.
        const auto runs = pass(kept, table.view(), i % 2 == 0 ? 24 : 88);
        check_covered(runs, table.view());
        Workspace fresh;
        CHECK(runs == pass(fresh, table.view(), 24));
    }
    Growing other;
    other.add_row(1, 5);
    check_covered(pass(kept, other.view(), 24), other.view());
}

void no_threads_to_be_had() {
    Growing table;
    table.add_row(64, 1 << 16);
    Workspace workspace;
    threads_are_refused = true;
    check_covered(pass(workspace, table.view(), 24), table.view());
    CHECK(rows_called == 1 && threads_made == 0);
    CHECK(seen_on == std::set<std::thread::id>{std::this_thread::get_id()});
    threads_are_refused = false;
    check_covered(pass(workspace, table.view(), 24), table.view());
    CHECK(rows_called == 2 && threads_made == 3);
}

void no_memory_to_be_had() {
    Growing table;
    table.add_row(3, 100);
    Workspace workspace;
    bool thrown = false;
    try {
        pass(workspace, table.view(), size_t{3} << 62);
    } catch (const std::exception&) {
        thrown = true;
    }
    CHECK(thrown && rows_called == 0 && seen.empty());
    check_covered(pass(workspace, table.view(), 24), table.view());
    CHECK(rows_called == 1);
}

}  // namespace

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* with) {
    if (threads_are_refused) return EAGAIN;
    ++threads_made;
    static const auto real = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
    return real(thread, attributes, start, with);
}

int main(int, char** arguments) {
    const std::string name = arguments[1];
    if (name == "a_table_that_grows") return a_table_that_grows(), 0;
    if (name == "no_threads_to_be_had") return no_threads_to_be_had(), 0;
    if (name == "no_memory_to_be_had") return no_memory_to_be_had(), 0;
    return 2;
}
