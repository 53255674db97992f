//! Another model in the place of the one that is served: wholly or not at all, and no robot waits for it.

mod common;
#[path = "common/sockets.rs"]
mod sockets;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use anyhow::{Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use common::{Answer, Gate, Server, Stub, options};
use openvla::image::{RgbImage, imageops};
use openvla::{Gguf, checksum};
use openvla_serve::models::{Files, Models};
use openvla_serve::numpy::{Json, Ndarray};
use serde_json::{Value, json};
use sockets::{Form, Robot};

const TASK: &str = "put eggplant into pot";

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../example").join(name)
}

fn reload(server: &Server, model: Option<&str>) -> Answer {
    let body = model.map(|model| json!({ "model": model }).to_string()).unwrap_or_default();
    server.post("/v1/reload", &[("x-client-id", "operator")], body.as_bytes())
}

/// A file of the same model, which acts otherwise: each fifth channel before the head is changed, and the checksum is right.
fn altered(path: &Path, change: fn(&mut [u8])) -> Vec<u8> {
    let file = Gguf::open(path).unwrap();
    let range = file.tensor("output_norm.weight").unwrap().range.clone();
    let mut bytes = file.bytes().to_vec();
    let before = format!("{:016x}", checksum(&bytes[range.clone()]));
    bytes[range.clone()].chunks_mut(4).step_by(5).for_each(change);
    let after = format!("{:016x}", checksum(&bytes[range]));
    let at = bytes.windows(16).position(|window| window == before.as_bytes()).unwrap();
    bytes[at..at + 16].copy_from_slice(after.as_bytes());
    bytes
}

/// A folder with `a.gguf` and `b.gguf`.
fn models() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(example("tabletop.gguf"), dir.path().join("a.gguf")).unwrap();
    std::fs::write(dir.path().join("b.gguf"), altered(&example("tabletop.gguf"), |x| x.fill(0)))
        .unwrap();
    dir
}

fn serve(dir: &Path, more: &[&str]) -> Server {
    let (model, folder) = (dir.join("a.gguf"), dir.to_str().unwrap());
    let fixed = ["-m", model.to_str().unwrap(), "--models", folder, "--threads", "1"];
    let args = [&fixed, more].concat();
    let server = Server::with(&args, Gate::default(), channel().1, Files(options(&args).model));
    server.wait_for("/readyz", 200);
    server
}

fn fingerprint(server: &Server) -> String {
    server.get("/v1/model", &[]).json()["fingerprint"].as_str().unwrap().to_owned()
}

/// Pictures that differ.
fn scenes() -> Vec<RgbImage> {
    let table = openvla::image::open(example("tabletop.png")).unwrap().to_rgb8();
    let shade = |share: u32| {
        RgbImage::from_fn(84, 84, |x, y| {
            let mut pixel = *table.get_pixel(x * table.width() / 84, y * table.height() / 84);
            pixel.0 = pixel.0.map(|v| (u32::from(v) * share / 8).min(255) as u8);
            pixel
        })
    };
    (3..13).map(shade).flat_map(|image| [imageops::flip_horizontal(&image), image]).collect()
}

/// What a file's model does on each scene.
fn motions(path: &Path, scenes: &[RgbImage]) -> Vec<Vec<f64>> {
    let args = ["-m", path.to_str().unwrap(), "--threads", "1"];
    let openvla::Policy::OpenVla(mut policy) = options(&args).model.open().unwrap() else {
        unreachable!("it is an OpenVLA")
    };
    scenes.iter().map(|scene| policy.act(scene, TASK, None).unwrap().action).collect()
}

#[test]
fn under_load_each_answer_is_wholly_one_models() {
    let dir = models();
    let all = scenes();
    let [a, b] = ["a.gguf", "b.gguf"].map(|name| motions(&dir.path().join(name), &all));
    let differ = all.into_iter().zip(a.into_iter().zip(b)).filter(|(_, (a, b))| a != b);
    let (scenes, (a, b)): (Vec<_>, (Vec<_>, Vec<_>)) = differ.unzip();
    assert!(scenes.len() >= 3, "the models differ on {} scenes", scenes.len());
    let server = serve(dir.path(), &[]);
    let of_a = fingerprint(&server);
    let over = AtomicBool::new(false);
    let arrays = |scene: &RgbImage| {
        let shape = vec![84, 84, 3];
        Ndarray { dtype: "|u1".into(), shape, data: scene.as_raw().clone().into() }
    };
    // Vla-eval has single precision.
    let whose = |motion: &[f64], scene: usize| {
        let near = |of: &[f64]| of.iter().zip(motion).all(|(x, y)| (x - y).abs() < 1e-7);
        let (is_a, is_b) = (near(&a[scene]), near(&b[scene]));
        assert!(is_a != is_b, "{motion:?} is neither {:?} nor {:?}", a[scene], b[scene]);
        is_a
    };
    let url = |path: &str| server.url(path);
    let (act, plain) = (url("/act"), url("/v1/act"));
    let seen = std::thread::scope(|scope| {
        let (over, scenes, whose, of_a) = (&over, &scenes, &whose, &of_a);
        let mut robots = Vec::new();
        for (path, is_plain) in [(&act, false), (&plain, true), (&plain, true)] {
            robots.push(scope.spawn(move || {
                let mut seen = [0, 0];
                for i in (0..scenes.len()).cycle().take_while(|_| !over.load(Ordering::Relaxed)) {
                    let mut file = std::io::Cursor::new(Vec::new());
                    let image = if is_plain {
                        scenes[i].write_to(&mut file, openvla::image::ImageFormat::Png).unwrap();
                        json!(STANDARD.encode(file.into_inner()))
                    } else {
                        json!(Json(arrays(&scenes[i])))
                    };
                    let body = json!({ "image": image, "instruction": TASK }).to_string();
                    let answer = ureq::post(path.as_str())
                        .content_type("application/json")
                        .send(body)
                        .unwrap();
                    let mut body = answer.into_body();
                    let answer: Value = serde_json::from_reader(body.as_reader()).unwrap();
                    let is_a = if is_plain {
                        let motion: Vec<f64> =
                            serde_json::from_value(answer["action"].clone()).unwrap();
                        let is_a = whose(&motion, i);
                        assert_eq!(answer["fingerprint"] == **of_a, is_a, "it says whose it is");
                        is_a
                    } else {
                        let bytes = STANDARD.decode(answer["__numpy__"].as_str().unwrap()).unwrap();
                        let number = |x: &[u8]| f64::from_le_bytes(x.try_into().unwrap());
                        whose(&bytes.chunks(8).map(number).collect::<Vec<_>>(), i)
                    };
                    seen[usize::from(is_a)] += 1;
                }
                seen
            }));
        }
        for form in [Form::OpenPi, Form::VlaEval] {
            let mut robot = Robot::connect(&server, form, None).unwrap();
            robots.push(scope.spawn(move || {
                let mut seen = [0, 0];
                for i in (0..scenes.len()).cycle().take_while(|_| !over.load(Ordering::Relaxed)) {
                    let motion = robot.step_of(Some(scenes[i].as_raw()), TASK, None).unwrap();
                    seen[usize::from(whose(&motion, i))] += 1;
                }
                seen
            }));
        }
        for name in ["b.gguf", "a.gguf", "b.gguf", "b.gguf", "a.gguf", "b.gguf"] {
            let before = fingerprint(&server);
            let got = reload(&server, Some(name));
            assert_eq!(got.status, 200, "{got:?}");
            assert_eq!(got.json()["before"], *before);
            let now = fingerprint(&server);
            assert_eq!((&got.json()["fingerprint"], &now == of_a), (&json!(now), name == "a.gguf"));
            let served =
                format!("openvla_model{{model=\"{}\"", got.json()["model"].as_str().unwrap());
            let metrics = server.get("/metrics", &[]);
            let lines: Vec<&str> =
                metrics.text().lines().filter(|line| line.starts_with("openvla_model{")).collect();
            assert!(lines.len() == 1 && lines[0].starts_with(&served), "{lines:?}");
            assert!(lines[0].contains(&now), "{lines:?}");
            let asked = server.step(TASK, &[]);
            assert_eq!(asked.json()["fingerprint"], *now, "what comes after it is the new one's");
        }
        over.store(true, Ordering::Relaxed);
        robots.into_iter().map(|robot| robot.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(seen.iter().all(|seen| seen.iter().all(|n| *n > 0)), "each robot met both: {seen:?}");
    assert_eq!(server.metric("openvla_reloads_total{outcome=\"ok\"}"), 6.0);
    assert_eq!(server.metric("openvla_restarts_total"), 0.0);
}

#[test]
fn what_cannot_be_served_leaves_everything_as_it_was() {
    let dir = models();
    let at = |name: &str| dir.path().join(name);
    let log = at("audit.jsonl");
    let server = serve(dir.path(), &["--audit-log", log.to_str().unwrap()]);
    let sound = std::fs::read(at("a.gguf")).unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(at(name), bytes).unwrap();
    let mut damaged = sound.clone();
    let last = damaged.len() - 100;
    damaged[last] ^= 1;
    write("damaged.gguf", &damaged);
    write("cut.gguf", &sound[..sound.len() / 2]);
    write("text.gguf", b"not a model");
    write("empty.gguf", b"");
    std::fs::create_dir(at("folder.gguf")).unwrap();
    let wrong = altered(&at("a.gguf"), |x| x.copy_from_slice(&1e3_f32.to_le_bytes()));
    write("wrong.gguf", &wrong);
    std::fs::copy(example("tabletop-oft.gguf"), at("oft.gguf")).unwrap();
    std::fs::copy(example("example.gguf"), at("other.gguf")).unwrap();
    let before = (fingerprint(&server), server.step(TASK, &[]).json()["action"].clone());
    let refused = [
        ("damaged.gguf", "is damaged, in "),
        ("cut.gguf", "cut.gguf"),
        ("text.gguf", "text.gguf"),
        ("empty.gguf", "empty.gguf"),
        ("folder.gguf", "folder.gguf"),
        ("none.gguf", "none.gguf"),
        ("wrong.gguf", "does not act as its checkpoint does"),
        ("oft.gguf", "is of an OpenVLA-OFT model, and an OpenVLA is served"),
        ("other.gguf", "knows the data sets example_tabletop, and a model of tabletop is served"),
    ];
    for (name, why) in refused {
        let got = reload(&server, Some(name));
        let error = got.assert_error(422, "reload_failed");
        let message = error["message"].as_str().unwrap();
        assert!(message.starts_with("the model stays: ") && message.contains(why), "{message}");
        let now = (fingerprint(&server), server.step(TASK, &[]).json()["action"].clone());
        assert_eq!(now, before, "after {name}");
    }
    for elsewhere in ["../a.gguf", "/etc/passwd", "."] {
        reload(&server, Some(elsewhere)).assert_error(400, "bad_request");
    }
    server.get("/v1/reload", &[]).assert_error(405, "method_not_allowed");
    let n = refused.len() as f64;
    assert_eq!(server.metric("openvla_reloads_total{outcome=\"reload_failed\"}"), n);
    assert_eq!(server.metric("openvla_restarts_total"), 0.0);
    assert_eq!(reload(&server, Some("b.gguf")).status, 200);
    let asked = server.step(TASK, &[]).json();
    drop(server);
    let text = std::fs::read_to_string(&log).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |outcome: &str| lines.iter().filter(|line| line["outcome"] == outcome).count();
    assert_eq!((of("reload_failed"), of("reload")), (refused.len(), 1));
    let [.., reloaded, moved] = lines.as_slice() else { unreachable!("there are more") };
    assert_eq!((&reloaded["client"], &reloaded["outcome"]), (&json!("operator"), &json!("reload")));
    for line in [reloaded, moved] {
        assert_eq!(line["model"], at("b.gguf").to_str().unwrap());
        assert_eq!(line["fingerprint"], asked["fingerprint"]);
    }
}

/// A file that is served and that its owner replaced, as `mv new.gguf model.gguf` does.
#[test]
fn without_a_name_the_served_file_is_read_again() {
    let dir = models();
    let at = |name: &str| dir.path().join(name);
    let server = serve(dir.path(), &[]);
    let first = fingerprint(&server);
    assert_eq!(reload(&server, None).json()["fingerprint"], *first);
    std::fs::rename(at("b.gguf"), at("a.gguf")).unwrap();
    let second = reload(&server, None).json()["fingerprint"].as_str().unwrap().to_owned();
    assert!(second != first && fingerprint(&server) == second);
    let alone = Server::example(&["--threads", "1"]);
    reload(&alone, Some("a.gguf")).assert_error(400, "bad_request");
    assert_eq!(reload(&alone, None).status, 200, "the built-in example, again");
}

#[test]
fn other_machines_may_not_ask_for_it_without_a_token() {
    let server = Server::start(&["--host", "0.0.0.0", "--insecure"]);
    let error = reload(&server, None).assert_error(403, "missing_scope");
    assert!(error["hint"].as_str().unwrap().contains("`admin`"), "{error}");
}

#[test]
fn what_is_not_signed_takes_no_place() {
    // The key of minisign's own documentation.
    let key = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
    let path = example("tabletop.gguf");
    let served = Files(options(&["-m", path.to_str().unwrap()]).model).open(None).unwrap();
    let info = openvla_serve::policy::Policy::info(&served);
    let files = Files(options(&["--require-signature", key]).model);
    let Err(error) = files.open_beside(Some(&path), &info) else { panic!("it is not signed") };
    assert!(format!("{error:#}").contains("has no signature"), "{error:#}");
}

/// Stubs, by the names of their files.
struct Stubs {
    stub: Stub,
    opened: Arc<Mutex<Vec<String>>>,
    /// What the file `wait` waits for.
    gate: Gate,
}

impl Models for Stubs {
    type Policy = Stub;

    fn open(&self, file: Option<&Path>) -> Result<Stub> {
        let name = file.map_or("first".into(), |f| f.file_name().unwrap().display().to_string());
        self.opened.lock().unwrap().push(name.clone());
        match name.as_str() {
            "wait" => self.gate.pass(),
            "panic" => panic!("as it was told"),
            "none" => bail!("there is no such file"),
            _ => {}
        }
        let mut stub = self.stub.clone();
        (stub.fails, stub.fingerprint) = (name == "sick", name);
        Ok(stub)
    }
}

fn stubs(args: &[&str]) -> (Server, Arc<Mutex<Vec<String>>>, Gate) {
    let (gate, (send, saw), opened) = (Gate::default(), channel(), Arc::default());
    let stub = Stub::new(gate.clone(), send);
    let models = Stubs { stub, opened: Arc::clone(&opened), gate: Gate::default() };
    let opens = models.gate.clone();
    let args = [&["--models", "/models"], args].concat();
    let server = Server::with(&args, gate, saw, models);
    server.wait_for("/readyz", 200);
    (server, opened, opens)
}

#[test]
fn robots_are_served_meanwhile_and_one_reload_goes_on_at_a_time() {
    let (server, opened, opens) = stubs(&[]);
    let url = server.url("/v1/reload");
    let first = std::thread::spawn(move || {
        let body = json!({ "model": "wait" }).to_string();
        let mut answer = ureq::post(url).send(body).unwrap();
        serde_json::from_reader::<_, Value>(answer.body_mut().as_reader()).unwrap()
    });
    while opened.lock().unwrap().last().unwrap() != "wait" {
        std::thread::yield_now();
    }
    for _ in 0..5 {
        assert_eq!(server.step("x", &[]).json()["fingerprint"], "first");
        let busy = reload(&server, Some("other"));
        busy.assert_error(409, "reload_running");
        assert!(busy.headers.contains_key("retry-after"));
    }
    // A step that has begun is the old one's, also if it ends later.
    let begun = server.step_beside("wait", &[]);
    assert_eq!(server.saw.iter().find(|seen| seen.instruction == "wait").unwrap().wrists.len(), 0);
    let after = server.step_beside("x", &[("x-client-id", "other")]);
    server.wait_for_metric("openvla_queue_depth", 1.0);
    opens.open(1);
    server.gate.open(1);
    assert_eq!(begun.join().unwrap().json()["fingerprint"], "first");
    assert_eq!(after.join().unwrap().status, 200);
    let done = first.join().unwrap();
    assert_eq!((&done["fingerprint"], &done["before"]), (&json!("wait"), &json!("first")));
    assert_eq!(server.step("x", &[]).json()["fingerprint"], "wait");
    assert_eq!(reload(&server, Some("other")).status, 200, "the next may come");
}

#[test]
fn whatever_fails_on_the_way_the_model_stays_and_goes_on_by_its_file() {
    let (server, opened, _) = stubs(&[]);
    for (name, why) in
        [("panic", "as it was told"), ("none", "there is no such file"), ("sick", "panicked")]
    {
        let error = reload(&server, Some(name)).assert_error(422, "reload_failed");
        assert!(error["message"].as_str().unwrap().contains(why), "{error}");
        assert_eq!(server.step("x", &[]).json()["fingerprint"], "first");
    }
    server.step("panic", &[]).assert_error(500, "model_failed");
    server.wait_for("/readyz", 200);
    assert_eq!(opened.lock().unwrap().last().unwrap(), "first");
    assert_eq!(reload(&server, Some("second")).status, 200);
    server.step("panic", &[]).assert_error(500, "model_failed");
    server.wait_for("/readyz", 200);
    assert_eq!(opened.lock().unwrap().last().unwrap(), "second", "what was served is opened again");
    assert_eq!(reload(&server, None).json()["fingerprint"], "second");
}

#[test]
fn limits_of_motions_hold_from_one_model_to_the_next() {
    let (server, ..) = stubs(&["--max-delta", "0.01"]);
    let step = |instruction: &str| {
        let answer = server.step(instruction, &[("x-client-id", "arm")]).json();
        (answer["action"][0].as_f64().unwrap(), answer["fingerprint"].as_str().unwrap().to_owned())
    };
    assert_eq!(step("move 0"), (0.0, "first".into()));
    assert_eq!(reload(&server, Some("second")).status, 200);
    assert_eq!(step("move 1"), (0.01, "second".into()));
}

#[test]
fn a_server_that_ends_does_not_wait_for_it() {
    let (mut server, opened, opens) = stubs(&[]);
    let url = server.url("/v1/reload");
    let asked = std::thread::spawn(move || {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build();
        let body = json!({ "model": "wait" }).to_string();
        ureq::Agent::from(agent).post(url).send(body).unwrap().status().as_u16()
    });
    while opened.lock().unwrap().last().unwrap() != "wait" {
        std::thread::yield_now();
    }
    server.stop();
    assert_eq!(asked.join().unwrap(), 503);
    server.ended().unwrap();
    opens.open(1);
}
