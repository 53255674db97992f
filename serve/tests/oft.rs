//! OpenVLA-OFT: several cameras, the arm's state and chunks of actions, in every protocol.

mod common;
#[path = "../../tests/common/oft_runs.rs"]
mod oft_runs;
#[path = "../../convert/tests/torch/writer.rs"]
#[allow(dead_code)] // it writes files of all kinds
mod writer;

use std::sync::mpsc::channel;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Parser;
use common::{ACTION, Answer, Gate, Server, numpy_body, png};
use openvla_serve::field::Field;
use openvla_serve::models::Files;
use serde_json::{Value, json};

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

/// A picture of one pixel of this color.
fn pixel(x: u8) -> String {
    let base64 = STANDARD.encode([x; 3]);
    format!(r#"{{"__numpy__": "{base64}", "dtype": "|u1", "shape": [1, 1, 3]}}"#)
}

/// A body of openvla-oft's protocol, in the order of the fields.
fn body(fields: &[(&str, String)]) -> String {
    let fields: Vec<_> = fields.iter().map(|(name, value)| format!("{name:?}: {value}")).collect();
    format!("{{{}}}", fields.join(", "))
}

fn whole(instruction: &str) -> Vec<(&'static str, String)> {
    vec![
        ("right_wrist_image", pixel(3)),
        ("instruction", format!("{instruction:?}")),
        ("left_wrist_image", pixel(2)),
        ("state", "[0.5, -1, 2]".into()),
        ("unnorm_key", "17".into()),
        ("full_image", pixel(1)),
    ]
}

fn act(server: &Server, fields: &[(&str, String)]) -> Answer {
    server.post("/act", &JSON, body(fields).as_bytes())
}

/// The actions of an answer in openvla-oft's form.
fn actions(body: &[u8]) -> Vec<Vec<f64>> {
    let list: Vec<Field<'_>> = serde_json::from_slice(body).unwrap();
    list.into_iter().map(|action| action.numbers("action").unwrap()).collect()
}

#[test]
fn wrists_are_seen_in_the_order_of_the_request_and_a_list_of_arrays_comes_back() {
    let server = Server::oft(&["--unnorm-key", "bridge_orig"]);
    let got = act(&server, &whole("go"));
    assert_eq!(got.status, 200, "{got:?}");
    assert_eq!(actions(&got.body), vec![ACTION.to_vec(); 4]);
    assert!(got.text().starts_with(r#"[{"__numpy__":""#), "{got:?}");
    assert!(got.text().contains(r#"","dtype":"<f8","shape":[7]},{"__numpy__":""#), "{got:?}");
    let seen = server.seen();
    let colors: Vec<u8> = seen.wrists.iter().map(|image| image.as_raw()[0]).collect();
    assert_eq!((seen.image.as_raw()[0], &colors[..]), (1, &[3, 2][..]));
    assert_eq!((seen.state.as_deref(), seen.unnorm_key), (Some(&[0.5, -1.0, 2.0][..]), None));

    let double = json!({ "encoded": body(&whole("go")) }).to_string();
    let double = server.post("/act", &JSON, double.as_bytes());
    let text: String = serde_json::from_slice(&double.body).unwrap();
    let spaced = got.text().replace("\":", "\": ").replace(",\"", ", \"").replace(",{", ", {");
    assert_eq!(text, spaced, "as Python's json.dumps writes it");
}

#[test]
fn what_is_wrong_is_said_or_is_error_as_the_reference_has_it() {
    let [plain, compat] = [&[][..], &["--compat-errors"]].map(Server::oft);
    let other = |name: &str, value: &str| {
        let mut fields = whole("go");
        let found = fields.iter_mut().find(|(of, _)| *of == name);
        found.expect("a field of this name").1 = value.into();
        fields
    };
    let gray = pixel(1).replace("[1, 1, 3]", "[1, 3]");
    for (name, value, status) in [
        ("full_image", gray.as_str(), 422),
        ("left_wrist_image", "[[[1, 2, 3]]]", 400),
        ("state", "[1, NaN, 2]", 400),
        ("state", "{}", 400),
        ("instruction", "3", 400),
    ] {
        let got = act(&plain, &other(name, value));
        assert_eq!(got.status, status, "{name}: {got:?}");
        let got = act(&compat, &other(name, value));
        assert_eq!((got.status, got.text()), (200, "\"error\""), "{name}");
    }
    let got =
        plain.post("/act", &JSON, numpy_body("x").as_bytes()).assert_error(400, "bad_request");
    assert!(got["message"].as_str().unwrap().contains("there is no `full_image`"), "{got}");
    assert_eq!(compat.post("/act", &JSON, b"[1]").status, 422);
    assert_eq!(compat.get("/act", &[]).status, 405);
}

#[test]
fn json_and_forms_bring_several_pictures_and_ask_for_the_first_actions() {
    let server = Server::oft(&[]);
    let file = STANDARD.encode(png(3, 2));
    let fields = json!({
        "image": file, "left_wrist": STANDARD.encode(png(4, 4)), "a_wrist": STANDARD.encode(png(5, 5)),
        "state": [1, 2, 3], "instruction": "go", "n_actions": 2,
    });
    let got = server.post("/v1/act", &JSON, fields.to_string().as_bytes());
    let json = got.json();
    assert_eq!((got.status, &json["actions"]), (200, &json!([ACTION, ACTION])), "{json}");
    assert_eq!(json["action"], json!(ACTION));
    let seen = server.seen();
    assert_eq!((seen.wrists.len(), seen.state), (2, Some(vec![1.0, 2.0, 3.0])));

    let (front, left, right) = (png(3, 2), png(4, 4), png(5, 5));
    let parts: [(&str, &[u8]); 6] = [
        ("image", &front),
        ("right_wrist", &right),
        ("left_wrist", &left),
        ("state", b"[1, 2, 3]"),
        ("instruction", b"go"),
        ("n_actions", b"3"),
    ];
    let mut form = Vec::new();
    for (name, bytes) in parts {
        let head = format!("--cut\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n");
        form.extend([head.as_bytes(), bytes, b"\r\n"].concat());
    }
    form.extend(b"--cut--\r\n");
    let headers = [("content-type", "multipart/form-data; boundary=cut")];
    let json = server.post("/v1/act", &headers, &form).json();
    assert_eq!(json["actions"].as_array().map(Vec::len), Some(3), "{json}");
    let seen = server.seen();
    let sides: Vec<u32> = seen.wrists.iter().map(|image| image.width()).collect();
    assert_eq!((sides, seen.state), (vec![5, 4], Some(vec![1.0, 2.0, 3.0])));

    for n in [0, 5] {
        let mut fields = fields.clone();
        fields["n_actions"] = json!(n);
        let error = server.post("/v1/act", &JSON, fields.to_string().as_bytes());
        let error = error.assert_error(400, "bad_request");
        assert!(error["message"].as_str().unwrap().contains("1 to 4"), "{error}");
    }
}

#[test]
fn a_chunk_is_held_near_the_action_before_it() {
    let server = Server::oft(&["--max-delta", "0.25"]);
    let moved = |to: &str, n: usize| -> Vec<f64> {
        let fields = [&whole(&format!("move {to}"))[..], &[("n_actions", n.to_string())]].concat();
        let headers = [&JSON[..], &[("x-client-id", "arm")]].concat();
        let got = server.post("/act", &headers, body(&fields).as_bytes());
        actions(&got.body).iter().map(|action| action[0]).collect()
    };
    assert_eq!(moved("0", 4), [0.0; 4]);
    assert_eq!(moved("1", 2), [0.25, 0.5]);
    assert_eq!(moved("1", 4), [0.75, 1.0, 1.0, 1.0], "from the last action that was sent");
}

/// A random OpenVLA-OFT of two cameras and a state: the example with a state projector, saved as torch does it.
mod small {
    use std::path::Path;

    use openvla::Bounds;
    use openvla_convert::oft::RunOptions;
    use openvla_convert::plan::Encoding;
    use openvla_convert::{Conversion, Options};
    use serde_json::{Value, json};

    use super::writer::{file, state_dict, tensor};

    pub const N_STATE: usize = 3;

    pub fn write(out: &Path) {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../example/openvla-example");
        let run = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(&from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), run.path().join(entry.file_name())).unwrap();
        }
        let read = |name: &str| -> Value {
            serde_json::from_slice(&std::fs::read(from.join(name)).unwrap()).unwrap()
        };
        let mut statistics = read("dataset_statistics.json");
        for dataset in statistics.as_object_mut().unwrap().values_mut() {
            dataset["proprio"] = json!({ "q01": vec![-1.0; N_STATE], "q99": vec![1.0; N_STATE] });
        }
        std::fs::write(run.path().join("dataset_statistics.json"), statistics.to_string()).unwrap();
        let dim = read("config.json")["text_config"]["hidden_size"].as_u64().unwrap() as usize;
        let projector = run.path().join("proprio_projector--1_checkpoint.pt");
        std::fs::write(projector, state_projector(dim)).unwrap();
        let mut options: Options = "F32".parse::<Encoding>().unwrap().into();
        options.run = RunOptions {
            platform: None,
            chunk: Some(2),
            n_camera: Some(2),
            bounds: Some(Bounds::Quantiles),
        };
        let conversion = Conversion::new(run.path(), &options).unwrap();
        conversion.write(out, &indicatif::ProgressBar::hidden()).unwrap();
    }

    fn state_projector(dim: usize) -> Vec<u8> {
        let shapes = [
            ("module.fc1.weight", "0", vec![dim, N_STATE]),
            ("module.fc1.bias", "1", vec![dim]),
            ("module.fc2.weight", "2", vec![dim, dim]),
            ("module.fc2.bias", "3", vec![dim]),
        ];
        let mut storages = Vec::new();
        let mut tensors = Vec::new();
        for (name, key, shape) in shapes {
            let random = |i: usize| ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) / 8.0;
            let n = shape.iter().product();
            storages.push((key, (0..n).flat_map(|i| random(i).to_le_bytes()).collect()));
            let shape: Vec<i64> = shape.iter().map(|n| *n as i64).collect();
            tensors.push((name, tensor("Float", key, &shape)));
        }
        file(state_dict(&tensors), &storages)
    }
}

#[test]
fn a_model_says_which_pictures_and_what_state_it_misses() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    small::write(&path);
    let command = ["openvla-serve", "-m", path.to_str().unwrap(), "--threads", "1"];
    let model = openvla_serve::options::Options::parse_from(command).model;
    assert!(model.is_oft(), "so its port is that of openvla-oft's server");
    assert!(!openvla_serve::options::Options::parse_from(["openvla-serve"]).model.is_oft());
    let server = Server::with(&[], Gate::default(), channel().1, Files(model));
    server.wait_for("/readyz", 200);
    let mut fields = whole("go");
    let got = act(&server, &fields).assert_error(400, "bad_request");
    let said = "there are 3 pictures; the model has 2 cameras: full_image, wrist_image";
    assert!(got["message"].as_str().unwrap().contains(said), "{got}");
    fields.remove(0);
    let got = act(&server, &fields);
    assert_eq!((got.status, actions(&got.body).len()), (200, 2), "{got:?}");
    for (state, said) in
        [("[1]", "has 1 numbers, not 3"), ("null", "state of 3 numbers is missing")]
    {
        let wrong = fields.iter_mut().find(|(name, _)| *name == "state");
        wrong.expect("a state").1 = state.into();
        let got = act(&server, &fields).assert_error(400, "bad_request");
        assert!(got["message"].as_str().unwrap().contains(said), "{got}");
    }
    let other = server.step("go", &[]).assert_error(400, "bad_request");
    assert!(other["message"].as_str().unwrap().contains("state of 3 numbers"), "{other}");
    assert_eq!(server.metric("openvla_restarts_total"), 0.0, "a bad request is not a failure");
}

/// What the reference's server was asked and answered.
mod shared {
    use super::*;
    use crate::oft_runs::Runs;

    /// JPEG and resizing of its 8x8 pictures may differ by one in a few values.
    const TOLERANCE: f64 = 5e-3;

    #[test]
    #[ignore = "needs ../shared"]
    fn the_wire_is_the_references() {
        let runs = Runs::open();
        for name in ["A", "B"] {
            let wire = std::fs::read(runs.dir.join(format!("wire_{name}.json"))).unwrap();
            let wire: Value = serde_json::from_slice(&wire).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("model.gguf");
            runs.convert(name, "F32", &path);
            let key = wire["unnorm_key"].as_str().unwrap();
            let path = path.to_str().unwrap().to_owned();
            let args = ["--compat-errors", "--unnorm-key", key];
            let command = ["openvla-serve", "-m", &path, "--threads", "1"];
            let model = openvla_serve::options::Options::parse_from(command).model;
            let server = Server::with(&args, Gate::default(), channel().1, Files(model));
            server.wait_for("/readyz", 200);
            for exchange in wire["exchanges"].as_array().unwrap() {
                check(&server, &format!("{name} {}", exchange["name"]), exchange);
            }
        }
    }

    fn check(server: &Server, name: &str, exchange: &Value) {
        let got = match exchange["request"].as_str() {
            Some(request) => server.post("/act", &JSON, request.as_bytes()),
            None => server.get("/act", &[]),
        };
        let want = exchange["response"].as_str().unwrap();
        assert_eq!(u64::from(got.status), exchange["status"].as_u64().unwrap(), "{name}: {got:?}");
        if got.status != 200 {
            return; // FastAPI's words about JSON are those of Python's parser
        }
        if want == "\"error\"" {
            assert_eq!(got.text(), want, "{name}");
            return;
        }
        let text = |body: &str| {
            if body.starts_with('"') {
                serde_json::from_str::<String>(body).unwrap()
            } else {
                body.to_owned()
            }
        };
        let (got, want) = (text(got.text()), text(want));
        assert_eq!(form(&got), form(&want), "{name}: everything but the numbers");
        let [got, want] = [got, want].map(|body| actions(body.as_bytes()).concat());
        let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        eprintln!("{name}: {worst:.1e}");
        assert!(got.len() == want.len() && worst < TOLERANCE, "{name}: {worst}");
    }

    /// A body without the numbers of its arrays.
    fn form(body: &str) -> String {
        let parts = body.split("\"__numpy__\":");
        let after = |part: &str| match part.trim_start().strip_prefix('"') {
            Some(rest) => rest.split_once('"').unwrap().1.to_owned(),
            None => part.to_owned(),
        };
        parts.map(after).collect::<Vec<_>>().join("#")
    }
}
