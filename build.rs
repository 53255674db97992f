//! Lets programs find ggml's shared libraries: beside themselves, else where they were built. For every
//! crate with a program.

/// Also called by build scripts that do more.
pub fn main() {
    println!("cargo:rerun-if-env-changed=DEP_OPENVLA_KERNELS_LIBRARIES");
    // Set by openvla-kernels if ggml is in shared libraries.
    if let Ok(libraries) = std::env::var("DEP_OPENVLA_KERNELS_LIBRARIES") {
        // As DT_RPATH, which unlike DT_RUNPATH counts for what ggml's modules need, too: CUDA's libraries.
        println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags,-rpath,$ORIGIN:{libraries}");
    }
}
