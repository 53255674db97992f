//! Where ggml's shared libraries are, for this crate and for those with programs.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/exceptions.cpp");
    // Set by llama-cpp-sys-2: OUT/lib/cmake, or OUT/lib64/cmake.
    let cmake = std::env::var("DEP_LLAMA_GGML_CMAKE_DIR").expect("llama-cpp-sys-2 installs ggml");
    let libraries = Path::new(&cmake).parent().expect("a folder of the build");
    let mut exceptions = cc::Build::new();
    exceptions.cpp(true).std("c++17").include(libraries.with_file_name("include"));
    exceptions.file("src/exceptions.cpp").compile("openvla-exceptions");
    check_only_ggml(libraries);
    // So that a module of ggml's finds ggml in a test: see tests/null_cuda. Packages hold no tests, without
    // which cargo refuses it.
    if Path::new("tests").is_dir() {
        println!("cargo:rustc-link-arg-tests=-rdynamic");
    }
    // Set by llama-cpp-sys-2 if it was built with `dynamic-backends`.
    let Ok(modules) = std::env::var("DEP_LLAMA_BACKENDS_DIR") else { return };
    println!("cargo:rustc-env=OPENVLA_GGML_MODULES={modules}");
    println!("cargo:libraries={}", libraries.display());
    let own = std::env::var("OUT_DIR").expect("cargo sets it");
    let programs = Path::new(&own).ancestors().nth(3).expect("target/PROFILE/build/CRATE/out");
    for folder in ["", "deps", "examples"] {
        remove_links_to_nothing(&programs.join(folder));
    }
}

/// `.cargo/config.toml` makes llama-cpp-sys-2 build ggml alone. Cargo reads it only inside this repository.
fn check_only_ggml(libraries: &Path) {
    let is_large = |path: std::path::PathBuf| path.metadata().is_ok_and(|it| it.len() > 100_000);
    let is_whole =
        ["libllama.a", "libllama.so"].map(|name| libraries.join(name)).into_iter().any(is_large);
    let is_wanted = libraries.with_file_name("build/common").is_dir(); // with the crate's feature `common`
    if is_whole && !is_wanted {
        println!(
            "cargo:warning=all of llama.cpp was built, where ggml is enough: set CMAKE_PROJECT_INCLUDE to {} \
             under [env] of your .cargo/config.toml, and the build takes a third of the time",
            Path::new(env!("CARGO_MANIFEST_DIR")).join("ggml-only.cmake").display()
        );
    }
}

/// llama-cpp-sys-2 leaves links such as `libggml.so` beside programs, without what they lead to. Its next
/// build, for another architecture or with another feature, would not overwrite them and fail.
fn remove_links_to_nothing(folder: &Path) {
    let entries = folder.read_dir().into_iter().flatten().flatten().map(|entry| entry.path());
    for link in entries.filter(|path| path.is_symlink() && !path.exists()) {
        // Another build may have been faster.
        let _ = std::fs::remove_file(link);
    }
}
