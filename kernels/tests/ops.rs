//! Each operation of a graph against a naive twin in f64.

mod common;

use common::{assert_close, backend, compute, numbers, state, weight, zeros};
use openvla_kernels::{Builder, DType, Graph, State, Tensor};

/// Row `j` of `b` times row `i` of `a`, both of `k` numbers: `[m, n]`.
fn product(a: &[f32], b: &[f32], k: usize) -> Vec<f64> {
    let dot = |x: &[f32], y: &[f32]| -> f64 {
        x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
    };
    b.chunks(k).flat_map(|b| a.chunks(k).map(move |a| dot(a, b))).collect()
}

fn exact(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|x| f64::from(*x)).collect()
}

/// By the trapezoid rule: what no shortcut of the real one can share.
fn erf(x: f64) -> f64 {
    let (n, step) = (4000, x / 4000.0);
    let inner: f64 = (1..n).map(|i| (-(f64::from(i) * step).powi(2)).exp()).sum();
    let ends = 0.5 * (1.0 + (-x * x).exp());
    (ends + inner) * step * std::f64::consts::FRAC_2_SQRT_PI
}

#[test]
fn mul_mat_of_every_type() {
    // ggml rounds activations to the weight's type, or to 8 bits; the weights here are rounded too.
    for (dtype, limit) in [
        (DType::F32, 1e-6),
        (DType::F16, 1e-3),
        (DType::BF16, 5e-3),
        (DType::Q8_0, 1e-2),
        (DType::Q4_0, 1e-2),
        (DType::IQ4_NL, 1e-2),
    ] {
        for (k, m, n) in [(64, 5, 1), (256, 33, 7)] {
            let (w, rounded) = weight(dtype, &[k, m], &numbers(k * m, 1));
            let x = numbers(k * n, 2);
            let input = state(&[k, n], &x);
            let got = compute(&[m, n], |g| g.weight(&w).mul_mat(g.state(&input)));
            assert_close(&format!("{dtype} {k}"), &got, &product(&rounded, &x, k), limit);
        }
    }
}

#[test]
fn mul_mat_repeats_over_further_dimensions() {
    let (a, b) = (numbers(6 * 4 * 2, 1), numbers(6 * 3 * 4, 2));
    let (wa, xb) = (state(&[6, 4, 2], &a), state(&[6, 3, 4], &b));
    let got = compute(&[4, 3, 4], |g| g.state(&wa).mul_mat(g.state(&xb)));
    let plane = |i: usize| product(&a[24 * (i / 2)..][..24], &b[18 * i..][..18], 6);
    assert_close("mul_mat", &got, &(0..4).flat_map(plane).collect::<Vec<_>>(), 1e-6);
}

#[test]
fn sums_and_products_repeat_their_right_side() {
    let (x, row) = (numbers(5 * 3, 1), numbers(5, 2));
    let (a, b) = (state(&[5, 3], &x), state(&[5], &row));
    let twin = |f: fn(f64, f64) -> f64| -> Vec<f64> {
        x.iter().enumerate().map(|(i, x)| f(f64::from(*x), f64::from(row[i % 5]))).collect()
    };
    let got = compute(&[5, 3], |g| g.state(&a) + g.state(&b));
    assert_close("add", &got, &twin(|x, y| x + y), 1e-7);
    let got = compute(&[5, 3], |g| g.state(&a) * g.state(&b));
    assert_close("mul", &got, &twin(|x, y| x * y), 1e-7);
    let other = state(&[5, 3], &numbers(5 * 3, 3));
    let mut want = twin(|x, y| x + y);
    want.iter_mut().zip(numbers(5 * 3, 3)).for_each(|(sum, x)| *sum += f64::from(x));
    let got = compute(&[5, 3], |g| g.state(&a).sum_with_bias(g.state(&other), g.state(&b)));
    assert_close("sum_with_bias", &got, &want, 1e-7);
}

/// Where a result is computed in a state, and where that would spoil it, so that it is copied.
#[test]
fn results_are_computed_in_states() {
    let (w, x) = (numbers(6 * 6, 1), numbers(6 * 2, 2));
    let (matrix, want) = (state(&[6, 6], &w), product(&w, &x, 6));
    let sums: Vec<_> = want.iter().zip(&x).map(|(y, x)| y + f64::from(*x)).collect();
    let computed = |to: &State, build: &dyn Fn(&Builder)| {
        Graph::build(backend(), 16, build).unwrap().compute().unwrap();
        to.read::<f32>()
    };
    let (input, out) = (state(&[6, 2], &x), zeros(DType::F32, &[6, 2]));
    let got = computed(&out, &|g| {
        g.compute_in(g.state(&matrix).mul_mat(g.state(&input)), g.state(&out));
    });
    assert_close("a whole state", &got, &want, 1e-6);
    let got = computed(&input, &|g| {
        g.compute_in(g.state(&matrix).mul_mat(g.state(&input)), g.state(&input));
    });
    assert_close("the state that a product reads", &got, &want, 1e-6);
    input.write(&x);
    let got = computed(&input, &|g| {
        let y = g.state(&matrix).mul_mat(g.state(&input));
        g.compute_in(y + g.state(&input), g.state(&input));
    });
    assert_close("the state that a sum and its product read", &got, &sums, 1e-6);
    input.write(&x);
    let wide = zeros(DType::F32, &[8, 2]);
    let got = computed(&wide, &|g| {
        let y = g.state(&matrix).mul_mat(g.state(&input));
        g.compute_in(y, g.state(&wide).slice(0, 1, 6));
    });
    let inside: Vec<_> = [1, 9].iter().flat_map(|i| &got[*i..][..6]).copied().collect();
    assert_close("a slice with gaps", &inside, &want, 1e-6);
    let w = numbers(6 * 64, 3);
    let (tall, out) = (state(&[6, 64], &w), zeros(DType::F32, &[64, 2]));
    let got = computed(&out, &|g| {
        for i in 0..2 {
            let y = g.state(&tall).mul_mat(g.state(&input).slice(1, i, 1));
            g.compute_in(y.slice(0, 0, 64), g.state(&out).slice(1, i, 1));
        }
    });
    assert_close("slices", &got, &product(&w, &x, 6), 1e-6);
}

#[test]
fn norms() {
    let x = numbers(70 * 3, 3);
    let input = state(&[70, 3], &x);
    for eps in [1e-6_f32, 0.1] {
        let twin = |centred: bool| -> Vec<f64> {
            let row = |row: &[f32]| {
                let mean = exact(row).iter().sum::<f64>() / 70.0 * f64::from(u8::from(centred));
                let square = exact(row).iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 70.0;
                let scale = (square + f64::from(eps)).sqrt();
                exact(row).into_iter().map(move |x| (x - mean) / scale).collect::<Vec<_>>()
            };
            x.chunks(70).flat_map(row).collect()
        };
        let got = compute(&[70, 3], |g| g.state(&input).norm(eps));
        assert_close("norm", &got, &twin(true), 1e-6);
        let got = compute(&[70, 3], |g| g.state(&input).rms_norm(eps));
        assert_close("rms_norm", &got, &twin(false), 1e-6);
    }
}

#[test]
fn activations() {
    let x: Vec<f32> = (-60..=60).map(|i| i as f32 / 10.0).collect();
    let up = numbers(x.len(), 4);
    let (gate, by) = (state(&[x.len()], &x), state(&[x.len()], &up));
    let gelu = |x: f64| 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2));
    let want: Vec<_> = exact(&x).into_iter().map(gelu).collect();
    let signs = state(&[4], &[-1.5, 0.0, 2.5, f32::NAN]);
    let relu = compute(&[4], |g| g.state(&signs).relu());
    assert_eq!(relu[..3], [0.0, 0.0, 2.5]);
    assert!(relu[3].is_nan(), "what is not a number stays so");
    assert_close("gelu_erf", &compute(&[x.len()], |g| g.state(&gate).gelu_erf()), &want, 1e-6);
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let want: Vec<_> = exact(&x).iter().zip(exact(&up)).map(|(x, up)| silu(*x) * up).collect();
    let got = compute(&[x.len()], |g| g.state(&gate).swiglu(g.state(&by)));
    assert_close("swiglu", &got, &want, 1e-6);
}

type Op<'a> = &'a dyn for<'g> Fn(&'g Builder) -> Tensor<'g>;

/// What is not finite stays so in its row, through every operation between two products.
#[test]
fn what_is_not_finite_stays_so_in_its_row() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = numbers(64 * 3, 6);
        x[64 + 17] = bad; // row 1
        let (input, other) = (state(&[64, 3], &x), state(&[64, 3], &numbers(64 * 3, 7)));
        let positions = zeros(DType::I32, &[3]);
        positions.write(&[5_i32, 6, 7]);
        let ops: [(&str, Op<'_>); 7] = [
            ("add", &|g| g.state(&other) + g.state(&input)),
            ("mul", &|g| g.state(&other) * g.state(&input)),
            ("norm", &|g| g.state(&input).norm(1e-6)),
            ("rms_norm", &|g| g.state(&input).rms_norm(1e-6)),
            ("swiglu, gate", &|g| g.state(&input).swiglu(g.state(&other))),
            ("swiglu, up", &|g| g.state(&other).swiglu(g.state(&input))),
            ("rope", &|g| {
                let x = g.state(&input).reshape(&[64, 1, 3]);
                x.rope(g.state(&positions), 1e4).reshape(&[64, 3])
            }),
        ];
        for (op, build) in ops {
            let got = compute(&[64, 3], build);
            let stays = |row: &[f32]| row.iter().any(|x| !x.is_finite());
            let rows: Vec<bool> = got.chunks(64).map(stays).collect();
            assert_eq!(rows, [false, true, false], "{op} of {bad}");
        }
    }
}

#[test]
fn rope_turns_neighbouring_channels() {
    let ([d, n_head, n], base) = ([8, 3, 4], 10_000.0_f32);
    let x = numbers(d * n_head * n, 5);
    let (input, positions) = (state(&[d, n_head, n], &x), zeros(DType::I32, &[n]));
    let at = [0_i32, 1, 7, 600];
    positions.write(&at);
    let got = compute(&[d, n_head, n], |g| g.state(&input).rope(g.state(&positions), base));
    let turned = |i: usize| {
        let (channel, row) = (i % d, i / (d * n_head));
        let angle =
            f64::from(at[row]) * f64::from(base).powf(-((channel / 2 * 2) as f64) / d as f64);
        let (even, odd) = (f64::from(x[i / 2 * 2]), f64::from(x[i / 2 * 2 + 1]));
        match channel % 2 {
            0 => even * angle.cos() - odd * angle.sin(),
            _ => even * angle.sin() + odd * angle.cos(),
        }
    };
    assert_close("rope", &got, &(0..x.len()).map(turned).collect::<Vec<_>>(), 1e-4);
}

/// Two heads of queries and one of keys, which are turned where they are, and values, which are not.
#[test]
fn rope_first_turns_the_first_channels_alone() {
    let ([d, n_head, n], base) = ([8, 4, 5], 10_000.0);
    let (k, turned) = (n_head * d, 3 * d);
    let (w, _) = weight(DType::F32, &[d, k], &numbers(d * k, 1));
    let (x, positions) = (state(&[d, n], &numbers(d * n, 2)), zeros(DType::I32, &[n]));
    positions.write(&[0_i32, 1, 7, 600, 2]);
    let in_place = compute(&[k, n], |g| {
        let rows = g.weight(&w).mul_mat(g.state(&x));
        rows.rope_first(turned, d, g.state(&positions), base)
    });
    let apart = compute(&[k, n], |g| {
        let rows = g.weight(&w).mul_mat(g.state(&x));
        let first = rows.slice(0, 0, turned).heads(d).rope(g.state(&positions), base);
        first.heads_as_rows().concat(rows.slice(0, turned, k - turned), 0)
    });
    assert_eq!(in_place, apart);
}

#[test]
fn slices_that_follow_each_other_are_one() {
    let (k, n) = (12, 3);
    let (x, other) = (state(&[k, n], &numbers(k * n, 1)), state(&[k, n], &numbers(k * n, 2)));
    let got = compute(&[7, n], |g| {
        let x = g.state(&x);
        let [a, b, c] = [(2, 3), (5, 1), (6, 3)].map(|(start, k)| x.slice(0, start, k));
        assert!(Tensor::side_by_side(&[a, c]).is_none(), "there is a gap between them");
        assert!(Tensor::side_by_side(&[b, a]).is_none(), "the order is another");
        assert!(Tensor::side_by_side(&[a, g.state(&other).slice(0, 5, 1)]).is_none());
        assert!(Tensor::side_by_side(&[a, b.slice(1, 0, 2)]).is_none(), "rows are missing");
        Tensor::side_by_side(&[a, b, c]).unwrap().contiguous()
    });
    let x = numbers(k * n, 1);
    assert_eq!(got, x.chunks(k).flat_map(|row| row[2..9].to_vec()).collect::<Vec<_>>());
}

/// Sizes of an attention: channels, queries, keys, heads of each.
#[derive(Clone, Copy, Debug)]
struct Attention {
    d: usize,
    n: usize,
    n_kv: usize,
    n_head: usize,
    n_head_kv: usize,
}

impl Attention {
    /// `q [d, n, n_head]`, `k` and `v [d, n_kv, n_head_kv]` to `[d, n_head, n]`.
    fn twin(
        &self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        seen: &dyn Fn(usize, usize) -> bool,
    ) -> Vec<f64> {
        let Self { d, n, n_kv, n_head, n_head_kv } = *self;
        let mut out = vec![0.0; d * n_head * n];
        for (head, row) in (0..n_head).flat_map(|head| (0..n).map(move |row| (head, row))) {
            let kv = head / (n_head / n_head_kv) * n_kv;
            let query = &q[(head * n + row) * d..][..d];
            let score = |at: usize| {
                if seen(row, at) {
                    (product(query, &k[(kv + at) * d..][..d], d)[0] / (d as f64).sqrt()).exp()
                } else {
                    0.0
                }
            };
            let total: f64 = (0..n_kv).map(score).sum();
            for (at, i) in (0..n_kv).flat_map(|at| (0..d).map(move |i| (at, i))) {
                out[(row * n_head + head) * d + i] +=
                    score(at) / total * f64::from(v[(kv + at) * d + i]);
            }
        }
        out
    }

    fn run(&self, dtype: DType, mask: Option<&State>, [q, k, v]: [&[f32]; 3]) -> Vec<f32> {
        let Self { d, n, n_kv, n_head, n_head_kv } = *self;
        let q = state(&[d, n, n_head], q);
        let [k, v] = [k, v].map(|x| {
            let (from, to) = (state(&[d, n_kv, n_head_kv], x), zeros(dtype, &[d, n_kv, n_head_kv]));
            let mut copy = Graph::build(backend(), 4, |g| g.store(g.state(&from), &to)).unwrap();
            copy.compute().unwrap();
            to
        });
        compute(&[d, n_head, n], |g: &Builder| {
            let mask = mask.map(|mask| g.state(mask));
            let scale = (d as f32).sqrt().recip();
            g.state(&q).flash_attention(g.state(&k), g.state(&v), mask, scale)
        })
    }
}

/// Whether a row sees a key.
type Seen = dyn Fn(usize, usize) -> bool;

#[test]
fn attention_with_and_without_mask_and_with_grouped_heads() {
    let sizes = |d, n, n_kv, n_head, n_head_kv| Attention { d, n, n_kv, n_head, n_head_kv };
    for sizes in [
        sizes(8, 5, 5, 2, 2),
        sizes(16, 70, 70, 4, 2), // more queries than a tile
        sizes(72, 45, 261, 4, 1),
        sizes(128, 65, 90, 4, 2),
        sizes(64, 1, 600, 4, 1), // one token over a long cache: split between threads
        sizes(3, 66, 40, 3, 3),  // no whole vector
        sizes(2, 1, 3, 2, 1),
        sizes(1, 2, 2, 1, 1),
    ] {
        let Attention { d, n, n_kv, n_head, n_head_kv } = sizes;
        let q: Vec<f32> = numbers(d * n * n_head, 6).iter().map(|x| 3.0 * x).collect();
        let [k, v] = [7, 8].map(|seed| numbers(d * n_kv * n_head_kv, seed));
        // Row i sees the keys up to its own place, counted from the end, and always the first.
        let causal = move |row: usize, at: usize| at == 0 || at + n <= row + n_kv;
        // Of those, some rows see each third one, as rows of a tree see some of those before them.
        let tree = move |row: usize, at: usize| {
            causal(row, at) && (row.is_multiple_of(4) || at == 0 || (row + at).is_multiple_of(3))
        };
        let mask_of = |seen: &Seen| {
            let mask = zeros(DType::F16, &[n_kv, n]);
            let places = (0..n).flat_map(|row| (0..n_kv).map(move |at| (row, at)));
            let hidden = places.map(|(row, at)| if seen(row, at) { 0 } else { 0xFC00 });
            mask.write(&hidden.collect::<Vec<u16>>());
            mask
        };
        for (dtype, limit) in [(DType::F32, 1e-5), (DType::F16, 5e-3)] {
            let got = sizes.run(dtype, None, [&q, &k, &v]);
            let want = sizes.twin(&q, &k, &v, &|_, _| true);
            assert_close(&format!("{sizes:?} {dtype} all"), &got, &want, limit);
            let masks: [(_, &Seen); 2] = [("causal", &causal), ("tree", &tree)];
            for (name, seen) in masks {
                let got = sizes.run(dtype, Some(&mask_of(seen)), [&q, &k, &v]);
                let want = sizes.twin(&q, &k, &v, seen);
                assert_close(&format!("{sizes:?} {dtype} {name}"), &got, &want, limit);
            }
        }
    }
}

#[test]
fn patches_are_cut_row_by_row_and_ordered_x_y_channel() {
    let ([w, h, channels], side) = ([6, 4, 3], 2);
    let x = numbers(w * h * channels, 9);
    let (planes, kernel) =
        (state(&[w, h, channels], &x), zeros(DType::F32, &[side, side, channels, 5]));
    let got = compute(&[12, 6], |g| g.state(&planes).patches(g.state(&kernel)));
    let mut want = Vec::new();
    for (top, left) in [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)] {
        for channel in 0..channels {
            for (y, x_) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                want.push(x[left + x_ + w * (top + y + h * channel)]);
            }
        }
    }
    assert_eq!(got, want);
}

#[test]
fn rows_are_read_and_written_by_number() {
    let (data, rows) = (numbers(4 * 5, 1), numbers(4 * 2, 2));
    let ids = common::ids(DType::I32, 3, 5);
    ids.write(&[4_i32, 0, 4]);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let (table, rounded) = weight(dtype, &[4, 5], &data);
        let got = compute(&[4, 3], |g| g.weight(&table).get_rows(g.state(&ids)));
        assert_eq!(got, [&rounded[16..], &rounded[..4], &rounded[16..]].concat(), "{dtype}");
    }
    let [small, large] = [DType::I32, DType::I64].map(|dtype| common::ids(dtype, 2, 5));
    small.write(&[3_i32, 1]);
    large.write(&[3_i64, 1]);
    for at in [small, large] {
        let (cache, new) = (state(&[4, 5], &data), state(&[4, 2], &rows));
        let got = compute(&[4, 5], |g| {
            g.state(&cache).set_rows(g.state(&new), g.state(&at));
            g.state(&cache).contiguous()
        });
        let want = [&data[..4], &rows[4..], &data[8..12], &rows[..4], &data[16..]].concat();
        assert_eq!((got, cache.read::<f32>()), (want.clone(), want));
    }
}

#[test]
fn a_half_precision_state_rounds_what_is_stored_in_it() {
    let (from, to) = (state(&[4], &[1.0, 0.1, -2.5, 1e-8]), zeros(DType::F16, &[4]));
    Graph::build(backend(), 4, |g| g.store(g.state(&from), &to)).unwrap().compute().unwrap();
    assert_eq!(to.read::<u16>(), [0x3C00, 0x2E66, 0xC100, 0x0000]);
}

/// Where the numbers `0..24` of `[4, 3, 2]` end up.
fn moved(out: &[usize], build: impl for<'g> Fn(Tensor<'g>) -> Tensor<'g>) -> Vec<usize> {
    let count: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let input = state(&[4, 3, 2], &count);
    compute(out, |g| build(g.state(&input))).iter().map(|x| *x as usize).collect()
}

#[test]
fn elements_are_moved_where_they_belong() {
    let at = |x: usize, y: usize, z: usize| x + 4 * y + 12 * z;
    let all = |out: [usize; 3], f: &dyn Fn(usize, usize, usize) -> usize| -> Vec<usize> {
        let ([a, b, c], n) = (out, out.iter().product());
        (0..n).map(|i: usize| f(i % a, i / a % b, i / (a * b) % c)).collect()
    };
    let got = moved(&[12, 2], |x| x.reshape(&[12, 2]));
    assert_eq!(got, (0..24).collect::<Vec<_>>());
    // Dimension 0 goes to place 1, 1 to 2, 2 to 0.
    let got = moved(&[2, 4, 3], |x| x.permute([1, 2, 0, 3]).contiguous());
    assert_eq!(got, all([2, 4, 3], &|i, j, k| at(j, k, i)));
    let got = moved(&[4, 2, 2], |x| x.slice(1, 1, 2));
    assert_eq!(got, all([4, 2, 2], &|i, j, k| at(i, j + 1, k)));
    let got = moved(&[2, 3, 1], |x| x.slice(2, 1, 1).slice(0, 2, 2));
    assert_eq!(got, all([2, 3, 1], &|i, j, _| at(i + 2, j, 1)));
    let got = moved(&[4, 3, 2], |x| x.slice(2, 1, 1).concat(x.slice(2, 0, 1), 2));
    assert_eq!(got, all([4, 3, 2], &|i, j, k| at(i, j, 1 - k)));
    let got = moved(&[8, 3, 2], |x| x.concat(x, 0));
    assert_eq!(got, all([8, 3, 2], &|i, j, k| at(i % 4, j, k)));
}
