//! A second device with memory of its own, without a GPU: ggml's RPC server on this machine's CPU.
//! Nothing of a device is host memory there, so weights, caches and activations must all travel.
//!
//! Needs ggml built with `GGML_RPC=ON`, as `.cargo/config.toml` has it; says so and passes where it is not.

mod common;

use std::ffi::{CStr, CString, c_char, c_void};
use std::net::{TcpListener, TcpStream};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use common::{numbers, read};
use llama_cpp_sys_2 as sys;
use openvla::image::RgbImage;
use openvla::{Devices, OpenVla, Options};
use openvla_kernels::{Backend, DType, Device, Graph, Header, Kernels, State, Weights, shape};

/// What the server's GPU is called, or `None` with a loud word.
fn kind() -> Option<&'static str> {
    static KIND: OnceLock<Option<String>> = OnceLock::new();
    let kind = KIND.get_or_init(serve).as_deref();
    if kind.is_none() {
        eprintln!("SKIPPED: ggml was built without GGML_RPC=ON, so there is no second device");
    }
    kind
}

/// Starts a server in a thread of this process and makes ggml know its device.
fn serve() -> Option<String> {
    type Start = unsafe extern "C" fn(
        *const c_char,
        *const c_char,
        usize,
        usize,
        *mut sys::ggml_backend_dev_t,
    );
    type Add = unsafe extern "C" fn(*const c_char) -> sys::ggml_backend_reg_t;
    assert!(Device::all().is_empty(), "ggml has started, and there is no GPU yet");
    // SAFETY: ggml has started; the registry's name is a C string.
    let rpc = NonNull::new(unsafe { sys::ggml_backend_reg_by_name(c"RPC".as_ptr()) })?;
    let function = |name: &CStr| {
        // SAFETY: a live registry and a C string.
        let found = unsafe { sys::ggml_backend_reg_get_proc_address(rpc.as_ptr(), name.as_ptr()) };
        NonNull::new(found).expect("ggml-rpc.cpp gives it")
    };
    // SAFETY: under these names the registry gives functions of these types (ggml-rpc.h).
    let (start, add) = unsafe {
        (
            std::mem::transmute::<NonNull<c_void>, Start>(function(
                c"ggml_backend_rpc_start_server",
            )),
            std::mem::transmute::<NonNull<c_void>, Add>(function(c"ggml_backend_rpc_add_server")),
        )
    };
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("127.0.0.1:{port}");
    let text = CString::new(endpoint.clone()).unwrap();
    let server = text.clone();
    std::thread::spawn(move || {
        // SAFETY: the CPU device is never freed; the endpoint outlives the call, which never ends.
        unsafe {
            let mut cpu = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
            start(server.as_ptr(), std::ptr::null(), 1, 1, &mut cpu);
        }
    });
    while TcpStream::connect(&endpoint).is_err() {
        std::thread::yield_now();
    }
    // SAFETY: a server answers at that endpoint; its registry is never freed.
    unsafe { sys::ggml_backend_register(add(text.as_ptr())) };
    Some(Device::all().first().expect("the server has a device").kind.clone())
}

/// Tests take turns: the server serves one client after the other.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rows of a table, through two products, each where its matrix is; the result beside the last.
fn two_products(backend: &Arc<Backend>, place: &dyn Fn(&str) -> usize) -> Vec<f32> {
    let mut header = Header::default();
    for name in ["table", "first", "second"] {
        header.tensor(name, DType::F32, shape(&[64, 64]));
    }
    let mut bytes = header.encode();
    bytes.extend(numbers(3 * 64 * 64, 1).iter().flat_map(|x| x.to_le_bytes()));
    let file = read(&bytes).unwrap();
    let mut weights = Weights::placed(&file, backend, &["table"], place).unwrap();
    let mut take = |name| weights.take(name, shape(&[64, 64])).unwrap();
    let (table, first, second) = (take("table"), take("first"), take("second"));
    let ids = State::ids(backend, DType::I32, 2, 64).unwrap();
    let result = State::beside(&second, DType::F32, shape(&[64, 2])).unwrap();
    let mut graph = Graph::build(backend, 16, |g| {
        let x = g.weight(&table).get_rows(g.state(&ids));
        g.store(g.weight(&second).mul_mat(g.weight(&first).mul_mat(x)), &result);
    })
    .unwrap();
    ids.write(&[7_i32, 63]);
    graph.compute().unwrap();
    let once = result.read::<f32>();
    graph.compute().unwrap();
    assert_eq!(once, result.read::<f32>(), "a graph may run again");
    once
}

#[test]
fn a_graph_spans_devices() {
    let Some(kind) = kind() else { return };
    let _turn = turn();
    let cpu = two_products(&Backend::cpu(1).unwrap(), &|_| 0);
    let gpus: Vec<_> = Device::all().into_iter().filter(|gpu| gpu.kind == kind).collect();
    let backend = Backend::open(&gpus, 1, Kernels::default()).unwrap();
    for places in [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 1], [1, 1, 1]] {
        let place = |name: &str| {
            places[["table", "first", "second"].iter().position(|n| *n == name).unwrap()]
        };
        assert_eq!(two_products(&backend, &place), cpu, "{places:?}");
    }
    assert!(
        backend.usage().iter().all(|u| u.weights + u.states + u.graphs == 0),
        "all is given back"
    );
}

#[test]
fn a_model_acts_the_same_on_a_device_on_both_and_on_the_cpu() {
    static EXAMPLE: &[u8] = include_bytes!("../../example/example.gguf");
    let Some(kind) = kind() else { return };
    let _turn = turn();
    let image = RgbImage::from_fn(640, 480, |x, y| [(x % 256) as u8, (y % 256) as u8, 90].into());
    let act = |devices: Devices, n_gpu_layers: Option<usize>| {
        let mut options = Options::default();
        (options.devices, options.n_gpu_layers, options.n_threads) = (devices, n_gpu_layers, 1);
        let mut policy = OpenVla::built_in("example", EXAMPLE, &options).unwrap();
        let tokens = policy.act(&image, "put eggplant into pot", None).unwrap().tokens;
        (tokens, policy.usage())
    };
    let all: usize = read(EXAMPLE).unwrap().tensors().iter().map(|info| info.range.len()).sum();
    let (cpu, usage) = act(Devices::Cpu, None);
    assert!((all..all + all / 50).contains(&usage[0].weights), "{all} bytes, padded: {usage:?}");
    let gpu = Devices::Gpu(kind.to_owned(), None);
    let (tokens, usage) = act(gpu.clone(), None);
    assert_eq!(tokens, cpu);
    assert!((all..all + all / 50).contains(&usage[0].weights), "all of it is there: {usage:?}");
    assert_eq!(usage[1].weights, 0);
    assert!(usage[0].states > 0 && usage[0].graphs > 0, "{usage:?}");
    for n_gpu_layers in [0, 1] {
        let (tokens, usage) = act(gpu.clone(), Some(n_gpu_layers));
        assert_eq!(tokens, cpu, "{n_gpu_layers} layers on the device");
        assert!(usage[0].weights > 0 && usage[1].weights > 0, "{n_gpu_layers}: {usage:?}");
    }
}
