//! Certificates of model files: when they are written, what they say, and what is held against them.

mod common;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Output;

use common::{assert_fails, example, openvla_convert, stderr, stdout};
use minisign::KeyPair;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// A folder with a trained example as `model.gguf`, and perhaps its certificate as `model.json`.
struct Model(TempDir);

impl Model {
    fn copy(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(example(name), dir.path().join("model.gguf")).unwrap();
        Self(dir)
    }

    fn certified(name: &str) -> Self {
        let it = Self::copy(name);
        let output = it.verify(&["--certificate", "model.json"]);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(stderr(&output), "wrote model.json\n");
        it
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn verify(&self, args: &[&str]) -> Output {
        let usual = ["verify", "model.gguf", "--device", "cpu", "-t", "1"];
        openvla_convert(&[&usual, args].concat(), self.0.path())
    }

    fn check(&self, args: &[&str]) -> Output {
        self.verify(&[&["--check-certificate", "model.json"], args].concat())
    }

    fn certificate(&self) -> Value {
        serde_json::from_slice(&fs::read(self.at("model.json")).unwrap()).unwrap()
    }

    fn write(&self, certificate: &Value) {
        fs::write(self.at("model.json"), certificate.to_string()).unwrap();
    }
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
}

#[test]
fn a_certificate_says_which_file_computed_what_and_where() {
    let it = Model::certified("tabletop.gguf");
    let said = it.certificate();
    let bytes = fs::read(it.at("model.gguf")).unwrap();
    let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let version = env!("CARGO_PKG_VERSION");
    let inspected = stdout(&openvla_convert(&["inspect", "--json", "model.gguf"], it.0.path()));
    let inspected: Value = serde_json::from_str(&inspected).unwrap();
    let model = json!({"name": inspected["general"]["name"], "file": "model.gguf",
                       "bytes": bytes.len(), "sha256": hash});
    assert_eq!(said["model"], model);
    assert_eq!([&said["converter"], &said["checker"]], [version, version]);
    assert_eq!(said["source"], inspected["general"]["source"]);
    assert_eq!(said["source"]["fingerprint"].as_str().unwrap().len(), 16);
    assert_eq!(said["source_files"], inspected["source_files"]);
    assert!(!said["source_files"].as_array().unwrap().is_empty());
    assert_eq!(said["machine"]["devices"], json!(["CPU"]));
    let kernels = openvla::Kernels::default().resolve().to_string();
    assert_eq!(
        [&said["machine"]["kernels"], &said["machine"]["n_threads"]],
        [&json!(kernels), &json!(1)]
    );
    assert!(!said["machine"]["cpu"].as_str().unwrap().is_empty());
    let date = said["date"].as_str().unwrap();
    assert!(date.len() == 20 && date.ends_with('Z'), "{date}");
    let verified: Value = serde_json::from_str(&stdout(&it.verify(&["--json"]))).unwrap();
    assert_eq!(said["n_checksum"], verified["n_checksum"]);
    let cases = said["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2);
    for (case, verified) in cases.iter().zip(verified["cases"].as_array().unwrap()) {
        for key in ["instruction", "images", "tokens", "error", "largest_difference"] {
            assert_eq!(case[key], verified[key], "{key}");
        }
        assert_eq!(case["tokens"].as_array().unwrap().len(), 7);
        assert!(case["largest_difference"].as_f64().unwrap() > 0.0, "{case}");
    }

    let keys = ["\"format\"", "\"model\"", "\"source\"", "\"machine\"", "\"date\"", "\"cases\""];
    let text = fs::read_to_string(it.at("model.json")).unwrap();
    let order: Vec<_> = keys.iter().map(|key| text.find(key).unwrap()).collect();
    assert!(order.is_sorted(), "{order:?}");
    succeeds(&it.verify(&["--certificate", "model.json"]));
    let again = fs::read_to_string(it.at("model.json")).unwrap();
    let dateless =
        |text: &str| text.lines().filter(|line| !line.contains("\"date\"")).collect::<String>();
    assert_eq!(dateless(&text), dateless(&again), "the same but for the time");
}

#[test]
fn without_passing_all_checks_there_is_no_certificate() {
    let it = Model::copy("tabletop.gguf");
    let sound = fs::read(it.at("model.gguf")).unwrap();
    let mut damaged = sound.clone();
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(it.at("model.gguf"), damaged).unwrap();
    fs::write(it.at("before.json"), "before").unwrap();
    for out in ["model.json", "before.json"] {
        let output = it.verify(&["--certificate", out]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("model.gguf is damaged"), "{}", stderr(&output));
    }
    assert!(!it.at("model.json").exists());
    assert_eq!(fs::read(it.at("before.json")).unwrap(), b"before");

    let random = ["random", "--size", "tiny", "--q8", "-o", "model.gguf"];
    succeeds(&openvla_convert(&random, it.0.path()));
    let words = ["model.gguf has no reference cases", "--no-proof"];
    assert_fails(&it.verify(&["--certificate", "model.json"]), &words);
    assert!(!it.at("model.json").exists());

    fs::write(it.at("model.gguf"), sound).unwrap();
    let output = it.verify(&["--certificate", "none/model.json"]);
    assert!(stderr(&output).contains("cannot write none/model.json"), "{}", stderr(&output));
    let source = example("openvla-example").display().to_string();
    let output = it.verify(&["--certificate", "model.json", "--source", &source]);
    assert!(stderr(&output).contains("was not made of these files"), "{}", stderr(&output));
    assert!(!it.at("model.json").exists(), "a wrong source is a check that fails");
    let both = it.verify(&["--certificate", "a.json", "--check-certificate", "b.json"]);
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn a_machine_with_other_kernels_agrees_with_a_certificate() {
    for name in ["tabletop.gguf", "tabletop-oft.gguf", "example.gguf"] {
        let it = Model::certified(name);
        for kernels in openvla::Kernels::available() {
            let output = it.check(&["--kernels", kernels.name()]);
            assert!(output.status.success(), "{name}, {kernels}: {}", stdout(&output));
            assert!(
                stdout(&output).ends_with("all as in the certificate\n"),
                "{}",
                stdout(&output)
            );
        }
    }
}

#[test]
fn what_a_certificate_says_otherwise_is_named() {
    let it = Model::certified("tabletop.gguf");
    let sound = it.certificate();
    let refused = |change: &dyn Fn(&mut Value), words: &str| {
        let mut changed = sound.clone();
        change(&mut changed);
        assert_ne!(changed, sound);
        it.write(&changed);
        let output = it.check(&[]);
        assert_eq!(output.status.code(), Some(1), "{words}");
        let line = format!("not as in the certificate: {words}");
        assert!(stdout(&output).contains(&line), "{line:?} is missing in:\n{}", stdout(&output));
        assert!(stderr(&output).contains("in 1 places"), "{}", stderr(&output));
        let json: Value = serde_json::from_str(&stdout(&it.check(&["--json"]))).unwrap();
        let named = json["certificate_differences"][0].as_str().unwrap();
        assert!(named.starts_with(words), "{named}");
    };
    let token = sound["cases"][1]["tokens"][2].as_u64().unwrap();
    let instruction = &sound["cases"][1]["instruction"];
    refused(
        &|it| it["cases"][1]["tokens"][2] = json!(token - 1),
        &format!("{instruction}: token 3 is {token}, in the certificate {}", token - 1),
    );
    refused(&|it| it["cases"][1]["tokens"] = json!([]), &format!("{instruction}: 7 tokens"));
    refused(&|it| it["cases"][0]["error"] = json!(-1.0), "\"put eggplant into pot\": off by ");
    refused(
        &|it| it["cases"][0]["instruction"] = json!("stop"),
        "\"put eggplant into pot\": the certificate has another case",
    );
    refused(&|it| it["cases"] = json!([]), "the model's number of reference cases: ");
    refused(&|it| it["source"]["fingerprint"] = json!("0"), "the model's source: ");
    refused(&|it| it["source_files"][0]["name"] = json!("x"), "the model's source files: ");
    refused(&|it| it["model"]["name"] = json!("OpenVLA 7B v1.0"), "the model's name: ");
    refused(&|it| it["converter"] = json!(null), "the model's converter: ");
}

/// A head that computes numbers has no tokens.
#[test]
fn actions_of_an_oft_are_held_by_their_error() {
    let it = Model::certified("tabletop-oft.gguf");
    let mut certificate = it.certificate();
    let case = &mut certificate["cases"][0];
    assert!(case.get("tokens").is_none() && case["images"].as_array().unwrap().len() == 2);
    let [error, largest] = ["error", "largest_difference"].map(|key| case[key].as_f64().unwrap());
    assert!(error > 0.0 && (1e-9..1.0).contains(&largest), "{case}");
    case["error"] = json!(error - 0.06);
    it.write(&certificate);
    let output = it.check(&[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("other kernels explain 5e-2 more"), "{}", stdout(&output));
    certificate["cases"][0]["error"] = json!(error - 0.04);
    it.write(&certificate);
    succeeds(&it.check(&[]));
}

/// Nothing is said of a model that is not the one, nor is it opened.
#[test]
fn a_certificate_of_another_file_is_refused() {
    let it = Model::certified("tabletop.gguf");
    let mut bytes = fs::read(it.at("model.gguf")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    for other in [&bytes[..], b"not a model", b""] {
        fs::write(it.at("model.gguf"), other).unwrap();
        let words = ["model.json is a certificate of another file", "SHA-256"];
        assert_fails(&it.check(&[]), &words);
    }
    fs::remove_file(it.at("model.gguf")).unwrap();
    assert_fails(&it.check(&[]), &["cannot read model.gguf"]);
}

#[test]
fn a_certificate_that_was_not_signed_is_refused() {
    let it = Model::certified("tabletop.gguf");
    let keys = KeyPair::generate_unencrypted_keypair().unwrap();
    let key = keys.pk.to_base64();
    assert_fails(&it.check(&["--key", &key]), &["model.json has no signature"]);
    let file = File::open(it.at("model.json")).unwrap();
    let signature = minisign::sign(None, &keys.sk, file, Some("of the lab"), None).unwrap();
    fs::write(it.at("model.json.minisig"), signature.into_string()).unwrap();
    let output = it.check(&["--key", &key]);
    succeeds(&output);
    assert_eq!(stderr(&output), "signed: of the lab\n");
    let other = KeyPair::generate_unencrypted_keypair().unwrap().pk.to_base64();
    assert_fails(&it.check(&["--key", &other]), &["of another key than the one that is trusted"]);
    let mut certificate = it.certificate();
    certificate["date"] = json!("2000-01-01T00:00:00Z");
    it.write(&certificate);
    assert_fails(&it.check(&["--key", &key]), &["was changed after it was signed"]);
    succeeds(&it.check(&[])); // what else it says is right
}

#[test]
fn files_that_are_not_certificates_are_errors_in_words() {
    let it = Model::certified("tabletop.gguf");
    let sound = it.certificate();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut changed = sound.clone();
        change(&mut changed);
        changed.to_string().into_bytes()
    };
    let without = |key: &str| changed(&|it| drop(it.as_object_mut().unwrap().remove(key)));
    let is_not = "model.json is not a certificate of `openvla-convert verify`";
    for (bytes, words) in [
        (b"".to_vec(), &[is_not, "EOF"][..]),
        (b"GGUF".to_vec(), &[is_not]),
        (vec![0xff; 100], &[is_not]),
        (b"[]".to_vec(), &[is_not]),
        (b"{}".to_vec(), &[is_not]),
        (vec![b'['; 1 << 19], &[is_not, "recursion"]),
        (vec![b' '; (1 << 20) + 1], &["model.json has more than 1048576 bytes"]),
        (changed(&|it| it["format"] = json!("other")), &[is_not]),
        (changed(&|it| it["version"] = json!("1")), &[is_not]),
        (changed(&|it| it["version"] = json!(2)), &["of version 2", "reads version 1"]),
        (without("model"), &["model.json is incomplete or damaged", "model"]),
        (without("cases"), &["model.json is incomplete or damaged", "cases"]),
        (changed(&|it| it["cases"][1]["error"] = json!("small")), &["cases[1].error"]),
        (changed(&|it| it["cases"][0]["tokens"][3] = json!(-1)), &["cases[0].tokens[3]"]),
    ] {
        fs::write(it.at("model.json"), bytes).unwrap();
        assert_fails(&it.check(&[]), words);
    }
    fs::remove_file(it.at("model.json")).unwrap();
    assert_fails(&it.check(&[]), &["model.json", "No such file"]);
    fs::create_dir(it.at("model.json")).unwrap();
    assert_fails(&it.check(&[]), &["model.json is a folder"]);
}
