//! Lets programs find ggml's shared libraries: beside themselves, else where they were built. For every
//! crate with a program.

/// Also called by build scripts that do more.
pub fn main() {
    // Set by openvla-kernels if ggml is in shared libraries, and for crates that do not depend on that
    // one directly, by openvla, whose build script this is.
    let variables = ["DEP_OPENVLA_KERNELS_LIBRARIES", "DEP_OPENVLA_LIBRARIES"];
    for variable in variables {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if let Some(libraries) = variables.iter().find_map(|variable| std::env::var(variable).ok()) {
        println!("cargo:libraries={libraries}");
        // As DT_RPATH, which unlike DT_RUNPATH counts for what ggml's modules need, too: CUDA's libraries.
        println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,$ORIGIN:{libraries}");
    }
}
