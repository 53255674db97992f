//! How long ggml's threads spin before they sleep.
//!
//! All of a graph's threads meet at a barrier after every node. One that arrives early spins, in the hope
//! that the others are about to arrive, and then sleeps. libgomp's default is 300,000 turns, some
//! milliseconds. On a machine with other work to do that is the worst choice: the thread that is waited
//! for has lost its core to another program, or to the very thread that spins, and a graph of a thousand
//! nodes takes a thousand such waits. [`SPINS`] is some tens of microseconds, about what it costs to sleep and to be
//! woken on a virtual machine, so a wait in vain costs little. It is enough where threads arrive together, as they do
//! where each has a core. See `benches/SPEED.md`.
//!
//! libgomp reads the environment once, in its constructor. It is linked statically (the feature
//! `static-openmp` of llama-cpp-sys-2) or, in a `dynamic` build, is loaded with ggml's modules, but not with
//! its core (`ggml-only.cmake`), so our constructor, which has a higher priority, runs first in both.
//!
//! ggml sets a variable too, when its first backend is opened, unless it is set already: `KMP_BLOCKTIME`, for
//! other compilers' OpenMP. By then the program may have threads, and one that starts a process meanwhile
//! would hand it an environment that is being moved. So it is set here as well.

use std::ffi::CStr;

/// Turns at a barrier before a thread sleeps.
const SPINS: &CStr = c"1000";

/// Runs before libgomp's constructor, which has no priority: a smaller number is earlier, and those up to
/// 100 are the implementation's.
#[used]
#[unsafe(link_section = ".init_array.00101")]
static CONSTRUCTOR: extern "C" fn() = set_variables;

/// Sets `GOMP_SPINCOUNT`, unless the user has chosen how threads wait, and what ggml would set later.
extern "C" fn set_variables() {
    // SAFETY: C strings. Before `main` and without other threads, nothing else uses the environment.
    unsafe {
        if libc::getenv(c"OMP_WAIT_POLICY".as_ptr()).is_null() {
            libc::setenv(c"GOMP_SPINCOUNT".as_ptr(), SPINS.as_ptr(), 0);
        }
        libc::setenv(c"KMP_BLOCKTIME".as_ptr(), c"200".as_ptr(), 0); // ggml's own value
    }
}
