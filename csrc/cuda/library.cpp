#include "library.h"

#include <cstdio>

#include "device.h"
#include "stepper.h"

namespace lookahead_fused {
namespace {

void tell(Fault& fault, Fault::Kind kind, const char* what) noexcept {
    fault.kind = kind;
    std::snprintf(fault.what, sizeof fault.what, "%s", what);
}

// Runs a function; where it throws, the result is nothing and the fault tells.
template <class Function>
auto guarded(Fault& fault, Function function) noexcept -> decltype(function()) {
    try {
        return function();
    } catch (const std::bad_alloc& error) {
        tell(fault, Fault::Kind::MEMORY, error.what());
    } catch (const std::exception& error) {
        tell(fault, Fault::Kind::OTHER, error.what());
    } catch (...) {
        tell(fault, Fault::Kind::OTHER, "what was thrown tells nothing of itself");
    }
    return decltype(function())();
}

// A function, or a member function, as the table has it.
template <auto function, class = decltype(function)>
struct Guarded;

template <auto function, class Result, class... Arguments>
struct Guarded<function, Result (*)(Arguments...)> {
    static Result call(Fault& fault, Arguments... arguments) noexcept {
        return guarded(fault, [&] { return function(arguments...); });
    }
};

template <auto function, class Object, class Result, class... Arguments>
struct Guarded<function, Result (Object::*)(Arguments...)> {
    static Result call(Fault& fault, Object& object, Arguments... arguments) noexcept {
        return guarded(fault, [&] { return (object.*function)(arguments...); });
    }
};

template <auto function>
constexpr auto guard = &Guarded<function>::call;

// A constructor; and a destructor, which throws nothing.
template <class Object, class... Arguments>
Object* make(Fault& fault, Arguments... arguments) noexcept {
    return guarded(fault, [&] { return new Object(arguments...); });
}

template <class Object>
void remove(Object* object) noexcept {
    delete object;
}

}  // namespace

const Library& cuda_library() {
    static constexpr Library library{
        guard<&find_kernel>,
        guard<&sizes>,
        guard<&upload>,
        guard<&make_clip>,
        guard<&retain_for_graph>,
        guard<&load_kernels>,
        guard<&device_count>,
        &make<Stepper, const Table&, const Kernels&, int, const Memory&, cudaStream_t>,
        &remove<Stepper>,
        guard<&Stepper::step>,
        guard<&Stepper::capture>,
        guard<&Stepper::sum_squares>,
        guard<&Stepper::capture_squares>,
        guard<&Stepper::update_fixed>,
        &make<MayWait>,
        &remove<MayWait>,
    };
    return library;
}

}  // namespace lookahead_fused
