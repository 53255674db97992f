//! Where ggml's shared libraries are, for this crate and for those with programs.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Set by llama-cpp-sys-2 if it was built with `dynamic-backends`.
    let Ok(modules) = std::env::var("DEP_LLAMA_BACKENDS_DIR") else { return };
    let out = Path::new(&modules).parent().expect("a folder of the build");
    println!("cargo:rustc-env=OPENVLA_GGML_MODULES={modules}");
    println!("cargo:libraries={}", out.join("lib").display());
}
