//! Operands that do not fit panic in our words. ggml, were it asked, would abort the process, or
//! write where it must not.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::{backend, compute, ids, weight, zeros};
use openvla_kernels::{Backend, Builder, DType, Graph, State, Tensor, shape};

type Case<'a> = (&'a str, Box<dyn Fn(&Builder) + 'a>);

/// What building a graph panics with.
fn panic_of(build: &dyn Fn(&Builder)) -> String {
    let built = || Graph::build(backend(), 16, build).map(drop);
    let panic = catch_unwind(AssertUnwindSafe(built)).expect_err("a panic");
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).expect("a text")
}

fn all_panic(cases: &[Case]) {
    for (wanted, build) in cases {
        let found = panic_of(build);
        assert!(found.contains(wanted), "{found}\nwanted: {wanted}");
    }
}

fn case<'a>(wanted: &'a str, build: impl Fn(&Builder) + 'a) -> Case<'a> {
    (wanted, Box::new(build))
}

/// An operation of one or two states that must not be built.
fn one<'a>(
    wanted: &'a str,
    x: &'a State,
    op: impl for<'g> Fn(Tensor<'g>) -> Tensor<'g> + 'a,
) -> Case<'a> {
    case(wanted, move |g| {
        op(g.state(x));
    })
}

fn two<'a, F>(wanted: &'a str, x: &'a State, y: &'a State, op: F) -> Case<'a>
where
    F: for<'g> Fn(Tensor<'g>, Tensor<'g>) -> Tensor<'g> + 'a,
{
    case(wanted, move |g| {
        op(g.state(x), g.state(y));
    })
}

#[test]
fn products_and_sums() {
    let f32 = |dims: &[usize]| zeros(DType::F32, dims);
    let (a, b, third, half) =
        (f32(&[4, 3]), f32(&[5, 3]), f32(&[4, 3, 3]), zeros(DType::F16, &[4, 3]));
    let (ids, pair, column) = (zeros(DType::I32, &[4, 3]), f32(&[4, 3, 2]), f32(&[3]));
    all_panic(&[
        two("mul_mat: inner sizes differ, [4, 3, 1, 1] · [5, 3, 1, 1]", &a, &b, |a, b| {
            a.mul_mat(b)
        }),
        two("[4, 3, 2, 1] does not repeat over [4, 3, 3, 1]", &pair, &third, |a, b| a.mul_mat(b)),
        two("does not repeat over [4, 3, 1, 1] in f32", &a, &half, |a, b| a.mul_mat(b)),
        two("mul_mat: I32 is not a weight type", &ids, &a, |ids, a| ids.mul_mat(a)),
        two("mul_mat: operands have gaps", &third, &third, |a, b| a.slice(1, 0, 2).mul_mat(b)),
        two("add: [5, 3, 1, 1] does not repeat over [4, 3, 1, 1]", &a, &b, |a, b| a + b),
        two("mul: [4, 3, 3, 1] does not repeat over [4, 3, 1, 1]", &a, &third, |a, b| a * b),
        two("sum_with_bias: shapes differ", &a, &b, |a, b| a.sum_with_bias(b, a)),
        two("sum_with_bias: the bias' shape", &a, &b, |a, b| a.sum_with_bias(a, b)),
        two("sum_with_bias: [4, 3, 3, 1] is not a matrix", &a, &third, |a, b| {
            b.sum_with_bias(b, a)
        }),
        two("add: operands are not f32", &a, &half, |a, half| a + half),
        one("mul_mat: operands have gaps", &column, |x| {
            let row = x.permute([1, 0, 2, 3]);
            row.mul_mat(row)
        }),
        two("add: rows have gaps", &a, &a, |a, b| {
            a.permute([1, 0, 2, 3]) + b.permute([1, 0, 2, 3])
        }),
    ]);
}

#[test]
fn rows_and_activations() {
    let f32 = |dims: &[usize]| zeros(DType::F32, dims);
    let (x, y, half) = (f32(&[4, 3]), f32(&[4, 2]), zeros(DType::F16, &[4, 3]));
    let (thin, blocks) = (f32(&[4, 3, 1]), zeros(DType::Q8_0, &[64, 2]));
    all_panic(&[
        // To ggml's products it is contiguous, to its activations it is not.
        one("swiglu: operands have gaps", &thin, |x| {
            let x = x.permute([0, 2, 1, 3]);
            x.swiglu(x)
        }),
        one("gelu_erf: operand has gaps", &thin, |x| x.permute([0, 2, 1, 3]).gelu_erf()),
        one("relu: operand has gaps", &x, |x| x.slice(0, 0, 2).relu()),
        one("permute: inside blocks", &blocks, |x| x.permute([1, 0, 2, 3])),
        one("slice: inside blocks", &blocks, |x| x.slice(0, 0, 32)),
        one("norm: rows are not contiguous f32", &half, |x| x.norm(1e-6)),
        one("rms_norm: rows are not contiguous", &x, |x| x.permute([1, 0, 2, 3]).rms_norm(1e-6)),
        one("norm: epsilon is -1", &x, |x| x.norm(-1.0)),
        one("rms_norm: epsilon is NaN", &x, |x| x.rms_norm(f32::NAN)),
        one("gelu_erf: rows are not", &half, |x| x.gelu_erf()),
        one("gelu_erf: operand has gaps", &x, |x| x.slice(0, 0, 2).gelu_erf()),
        two("swiglu: shapes differ", &x, &y, |x, y| x.swiglu(y)),
        two("swiglu: operands are not f32", &x, &half, |x, y| x.swiglu(y)),
        one("reshape: [4, 3, 1, 1] to [5, 1, 1, 1]", &x, |x| x.reshape(&[5])),
        // Their number of elements wraps around to 12.
        one("reshape: [4, 3, 1, 1] to [4, 3, 4611686018427387905, 1]", &x, |x| {
            x.reshape(&[4, 3, (1 << 62) + 1])
        }),
        one("at most four dimensions", &x, |x| x.reshape(&[4, 3, 1, 1, 1])),
        one("reshape: operand has gaps", &x, |x| x.slice(0, 0, 2).reshape(&[6])),
        one("permute: [0, 0, 1, 2] is not a permutation", &x, |x| x.permute([0, 0, 1, 2])),
        one("slice: 2 from 2 of dimension 1", &x, |x| x.slice(1, 2, 2)),
        one("slice: 0 from 0 of dimension 0", &x, |x| x.slice(0, 0, 0)),
        one("slice: 1 from 18446744073709551615", &x, |x| x.slice(0, usize::MAX, 1)),
        one("slice: rows have gaps", &x, |x| x.permute([1, 0, 2, 3]).slice(1, 0, 2)),
        two("concat: [4, 3, 1, 1] and [4, 2, 1, 1] along 0", &x, &y, |x, y| x.concat(y, 0)),
        two("concat: [4, 3, 1, 1] and [4, 3, 1, 1] along 4", &x, &x, |x, y| x.concat(y, 4)),
        two("concat: operands are not f32", &x, &half, |x, y| x.concat(y, 0)),
    ]);
}

#[test]
fn rows_by_number() {
    let (table, cube) = (zeros(DType::F32, &[4, 5]), zeros(DType::F32, &[4, 5, 2]));
    let [ids, below_6] = [5, 6].map(|below| ids(DType::I32, 3, below));
    let [places, far] = [5, 6].map(|below| common::ids(DType::I64, 3, below));
    let unbound = [DType::I32, DType::I64].map(|dtype| zeros(dtype, &[3]));
    let (rows, short) = (zeros(DType::F32, &[4, 3]), zeros(DType::F32, &[4, 2]));
    let (square, wide) = (zeros(DType::I32, &[3, 2]), zeros(DType::F32, &[6, 3]));
    let weight = weight(DType::F32, &[4, 5], &[0.0; 20]).0;
    all_panic(&[
        two("get_rows: ids are not i32", &table, &places, |t, ids| t.get_rows(ids)),
        two("get_rows: ids are not a vector", &table, &square, |t, ids| t.get_rows(ids)),
        two("get_rows: the table is not a matrix", &cube, &ids, |t, ids| t.get_rows(ids)),
        two("get_rows: the table's rows", &square, &ids, |t, ids| t.get_rows(ids)),
        two("get_rows: the table's rows", &table, &ids, |t, ids| {
            t.permute([1, 0, 2, 3]).get_rows(ids)
        }),
        two("get_rows: ids are not bound to stay below 5", &table, &below_6, |t, ids| {
            t.get_rows(ids)
        }),
        two("get_rows: ids are not bound", &table, &unbound[0], |t, ids| t.get_rows(ids)),
        case("set_rows: places are not bound to stay below 5", |g| {
            g.state(&table).set_rows(g.state(&rows), g.state(&far));
        }),
        case("set_rows: places are not bound", |g| {
            g.state(&table).set_rows(g.state(&rows), g.state(&unbound[1]));
        }),
        case("set_rows: only states are written", |g| {
            let table = g.state(&table).contiguous();
            table.set_rows(g.state(&rows), g.state(&places));
        }),
        case("set_rows: [4, 3, 2, 1] are not rows of [4, 5, 2, 1]", |g| {
            g.state(&cube).set_rows(g.state(&zeros(DType::F32, &[4, 3, 2])), g.state(&places));
        }),
        case("set_rows: one place per row", |g| {
            g.state(&table).set_rows(g.state(&short), g.state(&places));
        }),
        case("set_rows: places are F32", |g| {
            g.state(&table).set_rows(g.state(&rows), g.state(&zeros(DType::F32, &[3])));
        }),
        case("set_rows", |g| g.state(&table).set_rows(g.state(&wide), g.state(&places))),
        case("set_rows", |g| g.state(&cube).set_rows(g.state(&rows), g.state(&places))),
        case("set_rows: the table's rows", |g| {
            g.state(&zeros(DType::I32, &[4, 5])).set_rows(g.state(&rows), g.state(&places));
        }),
        // A weight may lie in the file itself, which is mapped to be read.
        case("set_rows: weights are only read", |g| {
            g.weight(&weight).set_rows(g.state(&rows), g.state(&places));
        }),
        case("set_rows: weights are only read", |g| {
            g.weight(&weight).slice(1, 0, 4).set_rows(g.state(&rows), g.state(&places));
        }),
    ]);
    let read = compute(&[4, 5], |g| g.weight(&weight).contiguous());
    assert_eq!(read, [0.0; 20], "the weight is as it was");
}

#[test]
fn attention_rope_and_patches() {
    let f32 = |dims: &[usize]| zeros(DType::F32, dims);
    let (q, kv, other) = (f32(&[4, 3, 4]), f32(&[4, 5, 2]), f32(&[4, 6, 2]));
    let (odd, three) = (f32(&[3, 3, 4]), f32(&[4, 5, 3]));
    let ids = zeros(DType::I32, &[4, 5, 2]);
    let [mask, wide, full] =
        [(DType::F16, 5), (DType::F16, 6), (DType::F32, 5)].map(|(t, n)| zeros(t, &[n, 3]));
    let attend = |wanted, q, k, v, mask: Option<_>| {
        case(wanted, move |g: &Builder| {
            let mask = mask.map(|mask| g.state(mask));
            g.state(q).flash_attention(g.state(k), g.state(v), mask, 0.5);
        })
    };
    let (positions, places) = (zeros(DType::I32, &[4]), zeros(DType::I64, &[4]));
    let (planes, kernel) = (f32(&[6, 4, 3]), f32(&[2, 2, 3, 8]));
    let matrix = weight(DType::F32, &[4, 4], &[0.0; 16]).0;
    all_panic(&[
        attend("attention: keys and values differ", &q, &kv, &other, None),
        attend("attention: queries [3, 3, 4, 1], keys [4, 5, 2, 1]", &odd, &kv, &kv, None),
        attend("attention: queries [4, 3, 4, 1], keys [4, 5, 3, 1]", &q, &three, &three, None),
        attend("attention: I32 keys", &q, &ids, &ids, None),
        attend("attention: keys and values are of two types", &q, &kv, &ids, None),
        attend("attention: the mask's shape", &q, &kv, &kv, Some(&wide)),
        attend("attention: the mask", &q, &kv, &kv, Some(&full)),
        case("attention: gaps in rows", |g| {
            let kv = g.state(&kv);
            let q = g.state(&f32(&[3, 4, 4])).permute([1, 0, 2, 3]);
            q.flash_attention(kv, kv, Some(g.state(&mask)), 0.5);
        }),
        case("rope: positions have gaps", |g| {
            let positions = g.state(&zeros(DType::I32, &[2, 4]));
            let every_other = positions.slice(0, 0, 1).permute([1, 0, 2, 3]);
            g.state(&q).rope(every_other, 1e4);
        }),
        two("rope: one position per row", &kv, &positions, |x, at| x.rope(at, 1e4)),
        two("rope: [3, 3, 4, 1]", &odd, &positions, |x, at| x.rope(at, 1e4)),
        two("rope: positions are not i32", &q, &places, |x, at| x.rope(at, 1e4)),
        case("rope_first: weights are only read", |g| {
            g.weight(&matrix).rope_first(2, 2, g.state(&positions), 1e4);
        }),
        two("patches: [2, 2, 3, 8] does not divide [4, 3, 4, 1]", &q, &kernel, |x, k| x.patches(k)),
        two("does not divide [6, 4, 3, 1]", &planes, &q, |x, k| x.patches(k)),
        two("patches: planes have gaps", &f32(&[6, 8, 3]), &kernel, |x, k| {
            x.slice(1, 0, 4).patches(k)
        }),
    ]);
}

#[test]
fn graphs() {
    let (x, y, ids) = (zeros(DType::F32, &[4]), zeros(DType::F32, &[5]), zeros(DType::I32, &[4]));
    let elsewhere = State::zeros(&Backend::cpu(1).unwrap(), DType::F32, shape(&[4])).unwrap();
    all_panic(&[
        case("store: shapes differ", |g| g.store(g.state(&x), &y)),
        case("store: ggml does not convert Q8_0 to F16", |g| {
            g.store(g.state(&zeros(DType::Q8_0, &[32])), &zeros(DType::F16, &[32]));
        }),
        case("store: ggml does not convert Q8_0 to Q4_0", |g| {
            g.store(g.state(&zeros(DType::Q8_0, &[32])), &zeros(DType::Q4_0, &[32]));
        }),
        case("store: rows with gaps are not converted to Q8_0", |g| {
            let columns = g.state(&zeros(DType::F32, &[32, 32])).permute([1, 0, 2, 3]);
            g.store(columns, &zeros(DType::Q8_0, &[32, 32]));
        }),
        case("store: not of floats", |g| g.store(g.state(&ids), &x)),
        case("store: not of floats", |g| g.store(g.state(&x), &ids)),
        case("a graph's weights and states are on its own backend", |g| {
            g.state(&elsewhere);
        }),
        case("the graph is larger than its builder was told", |g| {
            let _ = (0..17).fold(g.state(&x), |x, _| x + x);
        }),
    ]);
}

/// Operations may read more leaves than there are nodes: ggml has room for them.
#[test]
fn a_small_graph_may_read_many_states() {
    let f32 = |dims: &[usize]| zeros(DType::F32, dims);
    let (q, k, v, out) = (f32(&[4, 1, 1]), f32(&[4, 2, 1]), f32(&[4, 2, 1]), f32(&[4, 1, 1]));
    let mask = zeros(DType::F16, &[2, 1]);
    v.write(&[3.0_f32; 8]);
    let build = |g: &Builder| {
        let mask = Some(g.state(&mask));
        let y = g.state(&q).flash_attention(g.state(&k), g.state(&v), mask, 1.0);
        g.store(y, &out);
    };
    Graph::build(backend(), 3, build).unwrap().compute().unwrap();
    assert_eq!(out.read::<f32>(), [3.0; 4]);
}

/// What `act` panics with.
fn panic_text(act: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(act)).expect_err("a panic");
    *panic.downcast::<String>().expect("a text with numbers")
}

#[test]
fn row_numbers_stay_below_their_bound() {
    let (ids, places) = (ids(DType::I32, 3, 5), ids(DType::I64, 3, 5));
    ids.write(&[4_i32, 0, 4]);
    places.write(&[4_i64, 0]);
    for wrong in [5_i32, -1, i32::MAX] {
        let panic = panic_text(|| ids.write(&[0, wrong]));
        assert_eq!(panic, format!("row number {wrong} is not below 5"));
    }
    for wrong in [5_i64, -1, 1 << 40, i64::MIN] {
        let panic = panic_text(|| places.write(&[wrong]));
        assert_eq!(panic, format!("row number {wrong} is not below 5"));
    }
    assert_eq!(ids.read::<i32>(), [4, 0, 4], "nothing of a wrong list is written");
    assert_eq!(places.read::<i64>(), [4, 0, 0]);
}

#[test]
fn states_that_no_memory_holds() {
    let make = |dtype, dims: &[usize]| State::zeros(backend(), dtype, shape(dims));
    for dims in [
        [1 << 20, (1 << 42) + 1], // as many bytes as 4 MiB, in 64 bits
        [1 << 32, 1 << 32],
        [usize::MAX, usize::MAX],
        [1 << 16, 1 << 16], // ggml counts some elements in 32 bits
    ] {
        let error = make(DType::F32, &dims).err().expect("no room").to_string();
        assert!(error.contains("CPU has no room for the model's state"), "{error}");
    }
    let panic = panic_text(|| drop(make(DType::F32, &[4, 0])));
    assert_eq!(panic, "a state of shape [4, 0, 1, 1] holds nothing");
    let panic = panic_text(|| drop(make(DType::Q8_0, &[33])));
    assert_eq!(panic, "rows of 33 elements are not whole blocks of Q8_0");
}

#[test]
fn a_full_graph_stays_full() {
    let x = zeros(DType::F32, &[4]);
    for max_nodes in [0, 1, 3] {
        let build = |g: &Builder| {
            let add = || {
                let _ = g.state(&x) + g.state(&x);
            };
            (0..max_nodes).for_each(|_| add());
            for _ in 0..100 {
                assert_eq!(panic_text(add), "the graph is larger than its builder was told");
            }
        };
        Graph::build(backend(), max_nodes, build).unwrap().compute().unwrap();
    }
    let most = Graph::MAX_NODES;
    let panic = panic_text(|| drop(Graph::build(backend(), most + 1, |_| ())));
    assert_eq!(panic, format!("a graph of {} operations; {most} are possible", most + 1));
}
