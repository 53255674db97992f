// Where C++ exceptions end: ggml's Vulkan backend throws what a driver refuses, and Rust has no frames to be
// thrown through. A computation or a start that fails is an error. From elsewhere there is no way back to a state
// that is known, so the program ends there, with words, as where ggml itself gives up.

#include <exception>

#include <ggml-backend.h>

using Said = void (*)(const char * words);

static Said end;

// Hands on the words of the exception that is being handled.
static void tell(Said said) {
    try {
        throw;
    } catch (const std::exception & exception) {
        said(exception.what());
    } catch (...) {
        said("an exception without words");
    }
}

static void terminate() {
    if (std::current_exception()) {
        tell(end);
    }
    end("C++ gave up");
}

// `ends` must not return.
extern "C" void openvla_end_at_exceptions(Said ends) noexcept {
    end = ends;
    std::set_terminate(terminate); // after ggml's own, which prints a backtrace and aborts
}

// What `call` gives; if it throws, `failed`, and the words go to `keep`.
template <typename Result, typename Call>
static Result guarded(Result failed, Said keep, Call call) noexcept {
    try {
        return call();
    } catch (...) {
        tell(keep);
        return failed;
    }
}

extern "C" ggml_status openvla_compute(ggml_backend_t backend, ggml_cgraph * graph, Said keep) noexcept {
    return guarded(GGML_STATUS_FAILED, keep, [&] { return ggml_backend_graph_compute(backend, graph); });
}

extern "C" ggml_status openvla_compute_scheduled(ggml_backend_sched_t scheduler, ggml_cgraph * graph, Said keep) noexcept {
    return guarded(GGML_STATUS_FAILED, keep, [&] { return ggml_backend_sched_graph_compute(scheduler, graph); });
}

extern "C" ggml_backend_t openvla_start(ggml_backend_dev_t device, Said keep) noexcept {
    return guarded(ggml_backend_t(), keep, [&] { return ggml_backend_dev_init(device, nullptr); });
}

// What throws through one of these ends the program by std::terminate.

extern "C" void openvla_tensor_set(ggml_tensor * tensor, const void * data, size_t size) noexcept {
    ggml_backend_tensor_set(tensor, data, 0, size);
}

extern "C" void openvla_tensor_get(const ggml_tensor * tensor, void * data, size_t size) noexcept {
    ggml_backend_tensor_get(tensor, data, 0, size);
}

extern "C" void openvla_buffer_clear(ggml_backend_buffer_t buffer) noexcept {
    ggml_backend_buffer_clear(buffer, 0);
}

extern "C" void openvla_free_scheduler(ggml_backend_sched_t scheduler) noexcept {
    ggml_backend_sched_free(scheduler);
}

extern "C" void openvla_free(ggml_backend_t backend) noexcept {
    ggml_backend_free(backend);
}
