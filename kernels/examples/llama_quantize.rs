//! llama.cpp's own quantization of a llama file, for `benches/convert` to measure ours against.
//!
//! ```sh
//! cargo run --release -p openvla-llama-cpp --example llama_quantize -- IN.gguf OUT.gguf FTYPE
//! ```
//!
//! `FTYPE` is a number of llama.cpp's `llama_ftype`, such as 15 for Q4_K_M. All cores are used.

use std::ffi::CString;
use std::process::ExitCode;

use llama_cpp_sys_2 as sys;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [from, to, file_type] = args.as_slice() else {
        eprintln!("usage: llama_quantize IN.gguf OUT.gguf FTYPE");
        return ExitCode::from(2);
    };
    let path = |path: &String| CString::new(path.as_str()).expect("arguments have no zero bytes");
    let (from, to) = (path(from), path(to));
    let Ok(file_type) = file_type.parse() else {
        eprintln!("error: {file_type} is not a llama_ftype");
        return ExitCode::from(2);
    };
    // SAFETY: gives a struct by value.
    let mut params = unsafe { sys::llama_model_quantize_default_params() };
    params.ftype = file_type;
    // SAFETY: both are C strings, and the parameters are the defaults but for a number that
    // llama.cpp checks; all of them outlive the call.
    let failed =
        unsafe { sys::llama_model_quantize(from.as_ptr(), to.as_ptr(), &raw const params) };
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
