//! Files that torch wrote, by what the reference computes with them: heads and state projectors.

use std::path::PathBuf;

use safetensors::SafeTensors;

use super::*;

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/golden/oft").join(name)
}

/// The tensors of a file, computed with as bf16 as the reference does.
struct Weights(Tensors);

impl Weights {
    fn open(name: &str) -> Self {
        let mut tensors = Tensors::default();
        tensors.add_torch(&golden(name), "").unwrap();
        Self(tensors)
    }

    fn get(&self, name: &str) -> Vec<f64> {
        let matrix = self.0.matrix(name).unwrap();
        let mut numbers = vec![0.0; matrix.row * matrix.n_row];
        matrix.read(0, &mut numbers);
        numbers.into_iter().map(|x| f64::from(bf16::from_f32(x).to_f32())).collect()
    }

    fn linear(&self, layer: &str, x: &[f64]) -> Vec<f64> {
        let weight = self.get(&format!("{layer}.weight"));
        let dot = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
        let products = weight.chunks_exact(x.len()).map(dot);
        products.zip(self.get(&format!("{layer}.bias"))).map(|(y, bias)| y + bias).collect()
    }

    fn norm(&self, layer: &str, x: &[f64]) -> Vec<f64> {
        let n = x.len() as f64;
        let mean = x.iter().sum::<f64>() / n;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
        let scaled = x.iter().map(|x| (x - mean) / (variance + 1e-5).sqrt());
        let scaled = scaled.zip(self.get(&format!("{layer}.weight"))).map(|(x, weight)| x * weight);
        scaled.zip(self.get(&format!("{layer}.bias"))).map(|(x, bias)| x + bias).collect()
    }

    /// What a head makes of a time step's rows.
    fn head(&self, prefix: &str, rows: &[f64]) -> Vec<f64> {
        let at = |layer: &str| format!("{prefix}{layer}");
        let normed = self.norm(&at("layer_norm1"), rows);
        self.blocks(prefix, relu(self.linear(&at("fc1"), &normed)))
    }

    /// From the first linear layer on.
    fn blocks(&self, prefix: &str, mut x: Vec<f64>) -> Vec<f64> {
        for block in ["0", "1"] {
            let at = |layer: &str| format!("{prefix}mlp_resnet_blocks.{block}.ffn.{layer}");
            let branch = relu(self.linear(&at("1"), &self.norm(&at("0"), &x)));
            x = x.iter().zip(branch).map(|(x, y)| x + y).collect();
        }
        let normed = self.norm(&format!("{prefix}layer_norm2"), &x);
        self.linear(&format!("{prefix}fc2"), &normed)
    }
}

fn relu(x: Vec<f64>) -> Vec<f64> {
    x.into_iter().map(|x| x.max(0.0)).collect()
}

/// The error function by its series, which is exact enough as far as a normed network reaches.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..120 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

fn gelu(x: Vec<f64>) -> Vec<f64> {
    x.into_iter().map(|x| x / 2.0 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))).collect()
}

/// A tensor of a case.
fn of_case(case: &str, name: &str) -> Vec<f64> {
    let bytes = std::fs::read(golden(&format!("cases/{case}.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    match tensor.dtype() {
        Dtype::F64 => tensor.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
        _ => {
            let floats = tensor.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
            floats.map(f64::from).collect()
        }
    }
}

fn assert_close(got: &[f64], want: &[f64], most: f64) {
    assert_eq!(got.len(), want.len());
    let error = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(error < most, "off by {error}");
}

#[test]
#[ignore = "needs ../shared/golden"]
fn heads_make_the_references_motions_of_its_rows() {
    let head = Weights::open("A/action_head--150000_checkpoint.pt");
    let rows = of_case("a01_env", "action_hidden");
    let got: Vec<_> = rows.chunks(7 * 256).flat_map(|step| head.head("model.", step)).collect();
    assert_close(&got, &of_case("a01_env", "normalized_actions"), 2e-4);

    let head = Weights::open("B/action_head--100000_checkpoint.pt");
    let inner = of_case("b01_aloha", "head.fc1_relu");
    let got: Vec<_> = inner.chunks(256).flat_map(|x| head.blocks("model.", x.to_vec())).collect();
    assert_close(&got, &of_case("b01_aloha", "normalized_actions"), 2e-4);

    // The rows of the last of ten steps, and the noise that it predicts.
    let head = Weights::open("F/action_head--150000_checkpoint.pt");
    let rows = of_case("f01_diffusion", "action_hidden");
    let predict = |step| head.head("noise_predictor.mlp_resnet.", step);
    let got: Vec<_> = rows.chunks(7 * 256).flat_map(predict).collect();
    let want = of_case("f01_diffusion", "ddim_noise_pred");
    assert_close(&got, &want[want.len() - got.len()..], 2e-4);
}

#[test]
#[ignore = "needs ../shared/golden"]
fn state_projectors_make_the_references_rows() {
    for (file, case) in
        [("A/proprio_projector--150000", "a01_env"), ("B/proprio_projector--100000", "b01_aloha")]
    {
        let projector = Weights::open(&format!("{file}_checkpoint.pt"));
        let state = of_case(case, "proprio_normalized");
        let got = projector.linear("fc2", &gelu(projector.linear("fc1", &state)));
        assert_close(&got, &of_case(case, "proprio_token"), 2e-6);
    }
    let noisy = Weights::open("F/noisy_action_projector--150000_checkpoint.pt");
    assert_eq!(noisy.0.entries()["fc1.weight"].shape, [256, 1]);
}

/// The whole vision backbone: towers with unmerged LoRA in bf16, FiLM in f32.
#[test]
#[ignore = "needs ../shared/golden"]
fn a_vision_backbone_keeps_its_two_types() {
    let path = golden("D/vision_backbone--100000_checkpoint.pt");
    let tensors = torch::read(std::fs::File::open(path).unwrap()).unwrap();
    assert_eq!(tensors.len(), 263);
    for (name, tensor) in &tensors {
        let film = name.contains(".scale.") || name.contains(".shift.");
        assert_eq!(tensor.dtype, if film { Dtype::F32 } else { Dtype::BF16 }, "{name}");
    }
    let shape = |name: &str| &tensors[&format!("vision_backbone.featurizer.{name}")].shape[..];
    assert_eq!(shape("blocks.0.scale.weight"), [64, 256]);
    assert_eq!(shape("patch_embed.proj.lora_A.default.weight"), [20, 3, 14, 14]);
}
