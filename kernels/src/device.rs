//! What computers have to compute with: ggml's registry, and what ggml says while it looks.

use std::collections::VecDeque;
use std::ffi::{CStr, c_char, c_void};
use std::io::Write;
use std::ptr::NonNull;
use std::sync::{Mutex, Once, PoisonError};

use llama_cpp_sys_2 as sys;

#[cfg(all(target_arch = "x86_64", not(feature = "dynamic")))]
use crate::Error;
use crate::Result;
use crate::exceptions::openvla_end_at_exceptions;

/// A device other than the CPU: one GPU. The CPU is always there and needs no name.
#[derive(Debug, Clone)]
pub struct Device {
    raw: NonNull<sys::ggml_backend_device>,
    /// Its name among all: `CUDA0`.
    pub name: String,
    /// What it is: `NVIDIA H200`.
    pub description: String,
    /// The kind of device, as ggml calls it: `CUDA`.
    pub kind: String,
    /// Whether it has memory of its own.
    pub is_discrete: bool,
}

// SAFETY: ggml makes its devices once, never frees them, and only reads them afterwards.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Every GPU that ggml finds, in its order. The first call loads ggml's modules. None where ggml does
    /// not start: [`crate::Backend::open`] says why.
    pub fn all() -> Vec<Self> {
        if start().is_err() {
            return Vec::new();
        }
        // SAFETY: ggml has started; every index is below the count, and devices are never freed.
        let raws = unsafe {
            let n = sys::ggml_backend_dev_count();
            (0..n).filter_map(|i| NonNull::new(sys::ggml_backend_dev_get(i)))
        };
        raws.filter_map(Self::new).collect()
    }

    fn new(raw: NonNull<sys::ggml_backend_device>) -> Option<Self> {
        // SAFETY: a device of the registry; ggml answers with C strings that live as long.
        unsafe {
            let kind = sys::ggml_backend_dev_type(raw.as_ptr());
            let is_discrete = kind == sys::GGML_BACKEND_DEVICE_TYPE_GPU;
            if !is_discrete && kind != sys::GGML_BACKEND_DEVICE_TYPE_IGPU {
                return None;
            }
            let registry = sys::ggml_backend_dev_backend_reg(raw.as_ptr());
            Some(Self {
                raw,
                name: text(sys::ggml_backend_dev_name(raw.as_ptr())),
                description: text(sys::ggml_backend_dev_description(raw.as_ptr())),
                kind: text(sys::ggml_backend_reg_name(registry)),
                is_discrete,
            })
        }
    }

    /// Bytes that are free on it now, and all of its bytes.
    pub fn memory(&self) -> (usize, usize) {
        let (mut free, mut total) = (0, 0);
        // SAFETY: a live device; ggml writes two numbers.
        unsafe { sys::ggml_backend_dev_memory(self.raw.as_ptr(), &mut free, &mut total) };
        (free, total)
    }

    /// The last errors that ggml logged: why a GPU is missing, or failed. A failed call of CUDA's takes three
    /// lines: what is wrong, where, and in which statement.
    pub fn complaint() -> Option<String> {
        let complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
        (!complaints.is_empty()).then(|| complaints.iter().cloned().collect::<Vec<_>>().join("; "))
    }

    pub(crate) fn raw(&self) -> sys::ggml_backend_dev_t {
        self.raw.as_ptr()
    }
}

/// # Safety
/// `text` must point to a C string.
unsafe fn text(text: *const c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// [`Device::complaint`] in brackets, to end a sentence with.
pub(crate) fn complained() -> String {
    Device::complaint().map(|complaint| format!(" ({complaint})")).unwrap_or_default()
}

/// Keeps a complaint, for [`Device::complaint`].
///
/// # Safety
/// `said` must point to a C string.
pub(crate) unsafe extern "C" fn keep(said: *const c_char) {
    // SAFETY: the caller's promise.
    let said = unsafe { text(said) };
    let mut complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
    if complaints.len() == MAX_COMPLAINTS {
        complaints.pop_front();
    }
    complaints.push_back(said.trim().to_owned());
}

static COMPLAINTS: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// Lines of a complaint that are kept.
const MAX_COMPLAINTS: usize = 3;

/// Starts ggml, once. It logs to stderr by itself; a library has no business there, and what
/// matters comes back with errors.
///
/// # Errors
/// [`Error::Device`] if the CPU lacks instructions that ggml was built for.
pub(crate) fn start() -> Result<()> {
    unsafe extern "C" fn log(level: sys::ggml_log_level, said: *const c_char, _: *mut c_void) {
        if level == sys::GGML_LOG_LEVEL_ERROR && !said.is_null() {
            // SAFETY: ggml logs C strings.
            unsafe { keep(said) };
        }
    }
    #[cfg(all(target_arch = "x86_64", not(feature = "dynamic")))]
    check_instructions()?;
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the callbacks keep to their own memory, and `ONCE` to one thread.
        unsafe {
            sys::ggml_log_set(Some(log), std::ptr::null_mut());
            sys::ggml_set_abort_callback(Some(end));
            openvla_end_at_exceptions(end);
        }
        #[cfg(feature = "dynamic")]
        load_modules();
    });
    Ok(())
}

/// In a static build, ggml's kernels are compiled for one CPU: Haswell, or what RUSTFLAGS says. On an older
/// one the first of them would end the program with an illegal instruction.
#[cfg(all(target_arch = "x86_64", not(feature = "dynamic")))]
fn check_instructions() -> Result<()> {
    type IsNeeded = unsafe extern "C" fn() -> std::ffi::c_int;
    let instructions: [(&str, IsNeeded, bool); 6] = [
        ("AVX", sys::ggml_cpu_has_avx, is_x86_feature_detected!("avx")),
        ("AVX2", sys::ggml_cpu_has_avx2, is_x86_feature_detected!("avx2")),
        ("FMA", sys::ggml_cpu_has_fma, is_x86_feature_detected!("fma")),
        ("F16C", sys::ggml_cpu_has_f16c, is_x86_feature_detected!("f16c")),
        ("BMI2", sys::ggml_cpu_has_bmi2, is_x86_feature_detected!("bmi2")),
        ("AVX-512", sys::ggml_cpu_has_avx512, is_x86_feature_detected!("avx512f")),
    ];
    let mut missing = instructions.iter().filter(|(_, is_needed, is_there)| {
        // SAFETY: returns a constant of the build.
        !is_there && unsafe { is_needed() } != 0
    });
    match missing.next() {
        None => Ok(()),
        Some((name, ..)) => Err(Error::Device {
            device: "CPU".to_owned(),
            why: format!(
                "it has no {name}, which this build needs; one with `--features dynamic` runs on every \
                 x86-64 CPU"
            ),
        }),
    }
}

/// Where ggml cannot go on, it aborts: a GPU out of memory in the middle of a graph, or gone. There
/// is no way back through its frames, so the program ends here, with words and exit code 1 in place
/// of a core dump. So it does where an exception has nowhere to go.
unsafe extern "C" fn end(said: *const c_char) {
    // SAFETY: ggml passes a C string.
    let said = unsafe { text(said) };
    let before = complained();
    let is_foreign = before.contains("no kernel image");
    let hint = if is_foreign {
        "; the module was built for other cards: see CMAKE_CUDA_ARCHITECTURES"
    } else {
        ""
    };
    // `eprintln!` would panic where stderr cannot be written to, which has no way out of here.
    let _ = writeln!(std::io::stderr(), "error: the device failed: {said}{before}{hint}");
    // SAFETY: ends the process at once; a failed device's own clean-up might never end.
    unsafe { libc::_exit(1) }
}

/// The folder of the shared library that this code is part of, if its path is absolute: where it is part of a program,
/// the path may be a bare name.
#[cfg(feature = "dynamic")]
fn folder_of_library() -> Option<std::path::PathBuf> {
    use std::ffi::{CStr, OsStr};
    use std::os::unix::ffi::OsStrExt;

    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    let here = folder_of_library as fn() -> Option<std::path::PathBuf> as *const libc::c_void;
    // SAFETY: any address may be asked about, and there is room for the answer. Its name is a C string that stays as
    // long as the library, which runs this.
    let name = unsafe {
        if libc::dladdr(here, info.as_mut_ptr()) == 0 {
            return None;
        }
        let name = info.assume_init().dli_fname;
        if name.is_null() {
            return None;
        }
        CStr::from_ptr(name)
    };
    let path = std::path::Path::new(OsStr::from_bytes(name.to_bytes()));
    path.parent().filter(|_| path.is_absolute()).map(std::path::Path::to_owned)
}

/// Loads ggml's modules from beside the program or the shared library that this is part of, else from where they were
/// built. ggml by itself would look in the current directory too, where anything may lie.
#[cfg(feature = "dynamic")]
fn load_modules() {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    let program = std::env::current_exe().ok();
    let beside = program.as_deref().and_then(std::path::Path::parent);
    let built = std::path::Path::new(env!("OPENVLA_GGML_MODULES"));
    let path = |path: &std::path::Path| CString::new(path.as_os_str().as_bytes()).ok();
    let library = folder_of_library();
    for folder in beside.into_iter().chain(library.as_deref()).chain([built]) {
        let module = |file| Some(folder.join(file)).filter(|module| module.exists());
        let gpus = [
            (c"CUDA", module("libggml-cuda.so").and_then(|module| path(&module))),
            (c"Vulkan", module("libggml-vulkan.so").and_then(|module| path(&module))),
        ];
        let Some(folder) = path(folder) else { continue };
        // SAFETY: C strings; the registry is used by this thread alone, see `start`.
        unsafe {
            sys::ggml_backend_load_all_from_path(folder.as_ptr());
            if sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU).is_null() {
                continue;
            }
            // ggml keeps to itself why a module did not load, unless it is asked for by its name.
            for (kind, module) in gpus {
                if let Some(module) = module
                    && sys::ggml_backend_reg_by_name(kind.as_ptr()).is_null()
                {
                    sys::ggml_backend_load(module.as_ptr());
                }
            }
            return;
        }
    }
}
