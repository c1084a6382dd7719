// Switches callgrind's counting on and off from within the program. Outside of valgrind these do nothing.

#include <valgrind/callgrind.h>

extern "C" {
void start() {
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
}
void stop(const char* name) {
    CALLGRIND_DUMP_STATS_AT(name);
    CALLGRIND_STOP_INSTRUMENTATION;
}
}
