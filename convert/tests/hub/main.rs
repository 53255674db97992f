//! `openvla-convert` with a repository instead of a folder, against a look-alike of the Hub.

#[path = "../common/mod.rs"]
mod common;
mod server;

use std::path::PathBuf;
use std::process::{Command, Output};

use common::{assert_fails, example, stderr};
use openvla_convert::Conversion;
use openvla_convert::plan::Encoding;
use safetensors::{Dtype, tensor::TensorView};
use server::{COMMIT, End, Files, Hub, Request};
use tempfile::TempDir;

const ID: &str = "robots/openvla-example";
const FILE: &str = "OpenVLA-424K-example-v1.0-Q8_0.gguf";
const WEIGHTS: &str = "model.safetensors";

/// The example checkpoint's files, and one that converting does not read.
fn files() -> Files {
    std::fs::read_dir(example("openvla-example"))
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// A user's folders, and the Hub as they know it.
struct User {
    dir: TempDir,
    endpoint: String,
}

impl User {
    fn of(hub: &Hub) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), endpoint: hub.url.clone() }
    }

    fn home(&self) -> PathBuf {
        self.dir.path().join("huggingface")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_openvla-convert"));
        command.args(args).current_dir(self.dir.path()).env_clear();
        command.env("HF_HOME", self.home()).env("HF_ENDPOINT", &self.endpoint);
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Where the cache has a file.
    fn cached(&self, file: &str) -> PathBuf {
        let repository = self.home().join("hub/models--robots--openvla-example");
        repository.join("snapshots").join(COMMIT).join(file)
    }

    /// What was converted, from wherever, is what the folder gives.
    fn assert_converted(&self, output: &Output) {
        self.assert_is(output, FILE, "openvla-example");
    }

    /// The file is what that example becomes.
    fn assert_is(&self, output: &Output, file: &str, checkpoint: &str) {
        assert!(output.status.success(), "{}", stderr(output));
        assert_eq!(output.stdout, b"");
        let got = std::fs::read(self.dir.path().join(file)).unwrap();
        let other = tempfile::tempdir().unwrap();
        let wanted = other.path().join("wanted.gguf");
        let encoding = "Q8_0".parse::<Encoding>().unwrap();
        let conversion = Conversion::new(&example(checkpoint), &encoding.into()).unwrap();
        conversion.write(&wanted, &indicatif::ProgressBar::hidden()).unwrap();
        let wanted = std::fs::read(wanted).unwrap();
        let data = usize::try_from(conversion.data_bytes()).unwrap();
        assert!(got[got.len() - data..] == wanted[wanted.len() - data..], "the tensors' data");
    }

    /// Exit code 1, words that help, and nothing written but perhaps the cache.
    fn assert_fails(&self, output: &Output, words: &[&str]) {
        assert_fails(output, words);
        let left = std::fs::read_dir(self.dir.path()).unwrap().map(|f| f.unwrap().file_name());
        let left: Vec<_> = left.filter(|name| name != "huggingface").collect();
        assert_eq!(left, [""; 0], "nothing is left behind");
    }
}

fn well(_: &Request) -> End {
    End::Well
}

#[test]
fn a_repository_converts_as_its_folder_does_and_is_fetched_once() {
    let hub = Hub::serve(files(), well);
    let user = User::of(&hub);
    let output = user.run(&[ID, "--q8", "--no-proof"]);
    user.assert_converted(&output);
    assert!(stderr(&output).contains(COMMIT), "says which commit: {}", stderr(&output));
    assert!(!stderr(&output).contains('\r'), "no progress bar where nobody watches");
    let read = files().into_keys().filter(|name| name != "generation_config.json");
    assert_eq!(hub.bodies(), read.collect::<Vec<_>>(), "each file that is read, once");
    let link = std::fs::read_link(user.cached(WEIGHTS)).unwrap();
    assert!(link.starts_with("../../blobs"), "{}", link.display());
    assert!(user.cached(WEIGHTS).exists(), "the cache is where HF_HOME says");

    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
    assert_eq!(hub.bodies(), [""; 0], "all was in the cache");
    user.assert_converted(&user.run(&["robots/openvla-example@refs/pr/1", "--q8", "--no-proof"]));
    assert_eq!(hub.bodies(), [""; 0], "another revision with the same commit");
    std::fs::write(user.dir.path().join("robots"), "").unwrap();
    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
}

#[test]
fn offline_the_cache_is_enough() {
    let hub = Hub::serve(files(), well);
    let user = User::of(&hub);
    let offline = |id: &str| {
        user.command(&[id, "--q8", "--no-proof"]).env("HF_HUB_OFFLINE", "1").output().unwrap()
    };
    user.assert_fails(&offline(ID), &["HF_HUB_OFFLINE", "main"]);
    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
    hub.requests();
    user.assert_converted(&offline(ID));
    user.assert_converted(&offline(&format!("{ID}@{COMMIT}")));
    assert_eq!(hub.requests().len(), 0);
}

/// The cache is found by each of the variables that Hugging Face's own programs read.
#[test]
fn the_cache_is_where_the_environment_says() {
    let hub = Hub::serve(files(), well);
    let user = User::of(&hub);
    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
    hub.requests();
    let (home, cache) = (user.home(), user.home().join("hub"));
    for (name, value) in [
        ("HF_HUB_CACHE", cache.clone()),
        ("HUGGINGFACE_HUB_CACHE", cache),
        ("HF_HOME", "~/huggingface".into()),
        ("HF_HOME", home),
        ("XDG_CACHE_HOME", user.dir.path().into()),
    ] {
        let mut command = user.command(&[ID, "--dry-run", "--no-proof"]);
        command.env_remove("HF_HOME").env("HOME", user.dir.path()).env(name, value);
        let output = command.env("TRANSFORMERS_OFFLINE", "1").output().unwrap();
        assert!(output.status.success(), "{name}: {}", stderr(&output));
    }
    assert_eq!(hub.requests().len(), 0);
}

#[test]
fn a_dropped_connection_goes_on_where_it_stopped() {
    let mut dropped = false;
    let hub = Hub::serve(files(), move |request| {
        let drop = request.body_of() == Some(WEIGHTS) && !dropped;
        dropped |= drop;
        if drop { End::Cut(300_000) } else { End::Well }
    });
    let user = User::of(&hub);
    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
    let requests = hub.requests();
    let ranges: Vec<_> = requests
        .iter()
        .filter(|request| request.body_of() == Some(WEIGHTS))
        .map(|request| request.headers.get("range").map(String::as_str))
        .collect();
    assert_eq!(ranges, [None, Some("bytes=300000-")]);
}

#[test]
fn a_connection_that_keeps_dropping_is_named_and_the_next_run_goes_on() {
    let mut n = 0;
    let hub = Hub::serve(files(), move |request| {
        n += usize::from(request.body_of() == Some(WEIGHTS));
        match (request.body_of(), n) {
            (Some(WEIGHTS), 1) => End::Cut(300_000),
            (Some(WEIGHTS), 2..=4) => End::Status(503),
            _ => End::Well,
        }
    });
    let user = User::of(&hub);
    user.assert_fails(&user.run(&[ID, "--q8", "--no-proof"]), &[WEIGHTS, "run this again", "503"]);
    let parts = std::fs::read_dir(user.cached("../../blobs")).unwrap().map(|f| f.unwrap().path());
    let parts: Vec<_> = parts.filter(|path| path.extension().is_some()).collect();
    let [part] = &parts[..] else { panic!("{parts:?}") };
    let other = std::fs::File::open(part).unwrap();
    other.lock().unwrap();
    user.assert_fails(&user.run(&[ID, "--q8", "--no-proof"]), &[WEIGHTS, "another program"]);
    drop(other);
    hub.requests();
    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
    let requests = hub.requests();
    let again = requests.iter().find(|request| request.body_of() == Some(WEIGHTS)).unwrap();
    assert_eq!(again.headers["range"], "bytes=300000-");
    assert_eq!(requests.iter().filter(|r| r.body_of().is_some()).count(), 1, "no other file");
}

#[test]
fn a_silent_connection_is_given_up() {
    let hub = Hub::serve(files(), |request| match request.body_of() {
        Some(WEIGHTS) => End::Silence,
        _ => End::Well,
    });
    let user = User::of(&hub);
    let output = user.command(&[ID]).env("HF_HUB_DOWNLOAD_TIMEOUT", "1").output().unwrap();
    user.assert_fails(&output, &[WEIGHTS, "timeout", "run this again"]);
}

#[test]
fn damaged_files_in_the_cache_are_fetched_anew() {
    let hub = Hub::serve(files(), well);
    let user = User::of(&hub);
    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
    hub.requests();
    let weights = user.cached(WEIGHTS);
    let blob = weights.canonicalize().unwrap();
    for damage in [
        &|| std::fs::write(&blob, b"cut off").unwrap() as (),
        &|| std::fs::remove_file(&blob).unwrap(),
        &|| {
            // What is there is longer than it can be.
            let bytes = std::fs::read(&blob).unwrap();
            std::fs::write(blob.with_extension("part"), [&bytes[..], b"more"].concat()).unwrap();
            std::fs::remove_file(&blob).unwrap();
        },
    ] as [&dyn Fn(); 3]
    {
        damage();
        user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
        assert_eq!(hub.bodies(), [WEIGHTS]);
    }
    std::fs::remove_file(&weights).unwrap();
    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
    assert_eq!(hub.bodies(), [""; 0], "its content was there");
}

#[test]
fn what_the_hub_refuses_is_named_with_what_to_try() {
    for (status, words) in [
        (401, ["private, gated or not there", "HF_TOKEN"]),
        (403, ["ask for access", "HF_TOKEN"]),
        (429, ["wait", "HF_TOKEN"]),
    ] {
        let hub = Hub::serve(files(), move |_| End::Status(status));
        let user = User::of(&hub);
        user.assert_fails(&user.run(&[ID]), &[&words[..], &[ID]].concat());
        assert_eq!(hub.requests().len(), 1, "asked once");
    }
    let hub = Hub::serve(files(), well);
    let user = User::of(&hub);
    user.assert_fails(&user.run(&["robots/other"]), &["404", "Repository not found", "names"]);
    user.assert_fails(&user.run(&[&format!("{ID}@v9")]), &["404", "Invalid rev id", "revision"]);
    for id in ["openvla", "a/b/c", "../up", "robots/..", "robots/x@", "robots/a b", "a--b/c"] {
        user.assert_fails(&user.run(&[id]), &[id, "neither a folder", "user/repo@revision"]);
    }
}

#[test]
fn without_a_network_it_says_so() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}/", listener.local_addr().unwrap());
    drop(listener);
    let user = User { dir: tempfile::tempdir().unwrap(), endpoint };
    user.assert_fails(&user.run(&[ID]), &["no answer from http://127.0.0.1", "HF_HUB_OFFLINE"]);
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    const TOKEN: &str = "hf_secret";
    let hub = Hub::serve(files(), |request| {
        let known = request.headers.get("authorization").is_some_and(|b| b == "Bearer hf_secret");
        if known || request.path.starts_with("/cdn/") { End::Well } else { End::Status(401) }
    });
    let user = User::of(&hub);
    let output =
        user.command(&[ID, "--q8", "--no-proof"]).env("HF_TOKEN", "hf_wrong").output().unwrap();
    user.assert_fails(&output, &["401"]);
    assert!(!stderr(&output).contains("hf_wrong"), "{}", stderr(&output));
    hub.requests();
    let output = user.command(&[ID, "--q8", "--no-proof"]).env("HF_TOKEN", TOKEN).output().unwrap();
    user.assert_converted(&output);
    assert!(!stderr(&output).contains(TOKEN), "{}", stderr(&output));
    let requests = hub.requests();
    let mut elsewhere = requests.iter().filter(|request| request.path.starts_with("/cdn/"));
    assert!(elsewhere.all(|request| !request.headers.contains_key("authorization")));
    assert!(requests.iter().any(|request| request.path.starts_with("/cdn/")));

    let hub = Hub::serve(files(), well);
    let user = User::of(&hub);
    std::fs::create_dir(user.home()).unwrap();
    std::fs::write(user.home().join("token"), "hf_file\n").unwrap();
    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
    assert_eq!(hub.requests()[0].headers["authorization"], "Bearer hf_file");
}

/// The example's OpenVLA-OFT run as it is before its adapter, which changes nothing, is merged; and the folder of the
/// model that it was trained from.
fn unmerged_run(user: &User) -> (Files, PathBuf) {
    let base = user.dir.path().join("huggingface/base");
    std::fs::create_dir_all(&base).unwrap();
    let mut run = Files::new();
    for entry in std::fs::read_dir(example("openvla-tabletop-oft")).unwrap() {
        let entry = entry.unwrap();
        let (name, bytes) =
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap());
        if !name.ends_with(".pt") {
            std::fs::write(base.join(&name), &bytes).unwrap();
        }
        if name != WEIGHTS && name != "config.json" {
            run.insert(name, bytes);
        }
    }
    let zeros = [0; 2 * 96 * 2];
    let half = |shape: [usize; 2]| TensorView::new(Dtype::BF16, shape.to_vec(), &zeros).unwrap();
    let module = "base_model.model.language_model.model.layers.0.self_attn.q_proj";
    let halves = [("A", [2, 96]), ("B", [96, 2])]
        .map(|(name, shape)| (format!("{module}.lora_{name}.weight"), half(shape)));
    run.insert(RUN_ADAPTER[1].into(), safetensors::serialize(halves, None).unwrap());
    let config = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}"#;
    run.insert(RUN_ADAPTER[0].into(), config.into());
    (run, base)
}

const RUN_ADAPTER: [&str; 2] =
    ["lora_adapter/adapter_config.json", "lora_adapter/adapter_model.safetensors"];

#[test]
fn a_run_that_was_not_merged_is_fetched_with_its_adapter() {
    let mut user = User { dir: tempfile::tempdir().unwrap(), endpoint: String::new() };
    let (run, base) = unmerged_run(&user);
    let hub = Hub::serve(run.clone(), well);
    user.endpoint = hub.url.clone();
    user.assert_fails(&user.run(&[ID]), &["its adapter was not merged", "--base"]);
    hub.requests();
    let base = base.to_str().unwrap();
    let convert = |offline: &str| {
        let args = [ID, "--base", base, "--q8", "--no-proof", "-o", "run.gguf"];
        user.command(&args).env("HF_HUB_OFFLINE", offline).output().unwrap()
    };
    user.assert_is(&convert("0"), "run.gguf", "openvla-tabletop-oft");
    let bodies = hub.bodies();
    assert!(RUN_ADAPTER.iter().all(|file| bodies.contains(&(*file).to_owned())), "{bodies:?}");
    user.assert_is(&convert("1"), "run.gguf", "openvla-tabletop-oft");
    assert_eq!(hub.requests().len(), 0);

    let hub = Hub::serve(files(), well);
    let user = User::of(&hub);
    user.assert_fails(&user.run(&[ID, "--base", base]), &["not an OpenVLA-OFT run", "--lora"]);
}

#[test]
fn what_cannot_be_converted_is_refused_before_its_weights_are_fetched() {
    let without = |name: &str| {
        let mut files = files();
        files.remove(name).unwrap();
        files
    };
    let with = |name: &str, text: String| {
        let mut files = files();
        files.insert(name.to_owned(), text.into_bytes());
        files
    };
    let config = String::from_utf8(files()["config.json"].clone()).unwrap();
    let other = config.replace(r#""model_type": "openvla""#, r#""model_type": "other""#);
    assert_ne!(config, other);
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors"}}"#;
    let escape = r#"{"weight_map": {"a": "../../config"}}"#;
    let indexed = |index: &str| {
        let mut files = with("model.safetensors.index.json", index.into());
        files.remove(WEIGHTS).unwrap();
        files
    };
    const DIFFUSION: &str = "noisy_action_projector--1_checkpoint.pt";
    let mut pickled = without(WEIGHTS);
    pickled.insert("pytorch_model.bin".into(), vec![0; 8]);
    for (files, words) in [
        (with(DIFFUSION, String::new()), ["diffusion", DIFFUSION]),
        (without(WEIGHTS), [WEIGHTS, "model.safetensors.index.json"]),
        (pickled, ["pytorch_model.bin", "safe_serialization=True"]),
        (without("preprocessor_config.json"), ["preprocessor_config.json", ID]),
        (with("config.json", other), ["`other` model", "`openvla` is needed"]),
        (indexed(index), ["00001-of-00002", "its index does"]),
        (indexed(escape), ["../../config", "plain"]),
    ] {
        let hub = Hub::serve(files, well);
        let user = User::of(&hub);
        user.assert_fails(&user.run(&[ID]), &words);
        assert!(!hub.bodies().contains(&WEIGHTS.to_owned()), "{words:?}");
    }
}

#[test]
fn shards_are_those_that_the_index_names() {
    let mut files = files();
    let weights = files.remove(WEIGHTS).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&weights).unwrap();
    let shard = "model-00001-of-00001.safetensors";
    let map: serde_json::Map<_, _> =
        tensors.names().into_iter().map(|name| (name.to_owned(), shard.into())).collect();
    let index = serde_json::json!({ "weight_map": map }).to_string();
    files.insert("model.safetensors.index.json".into(), index.into_bytes());
    files.insert(shard.into(), weights);
    files.insert("training.safetensors".into(), vec![0; 8]);
    let hub = Hub::serve(files, well);
    let user = User::of(&hub);
    user.assert_converted(&user.run(&[ID, "--q8", "--no-proof"]));
    let bodies = hub.bodies();
    assert!(bodies.contains(&shard.to_owned()), "{bodies:?}");
    assert!(!bodies.contains(&"training.safetensors".to_owned()), "{bodies:?}");
}

/// Of an adapter, only its three files are fetched; one of zeros changes nothing.
#[test]
fn an_adapter_may_be_a_repository_too() {
    let zeros = vec![0; 4 * 64 * size_of::<f32>()];
    let half = |name: &str, shape: [usize; 2]| {
        let name = format!(
            "base_model.model.language_model.model.layers.0.self_attn.q_proj.{name}.weight"
        );
        (name, TensorView::new(Dtype::F32, shape.to_vec(), &zeros).unwrap())
    };
    let tensors = [half("lora_A", [4, 64]), half("lora_B", [64, 4])];
    let adapter = safetensors::serialize(tensors, None).unwrap();
    let config = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8}"#;
    let files = Files::from([
        ("adapter_config.json".into(), config.into()),
        ("adapter_model.safetensors".into(), adapter),
        ("README.md".into(), vec![0; 8]),
    ]);
    let hub = Hub::serve(files, well);
    let user = User::of(&hub);
    let folder = common::checkpoint();
    user.assert_converted(&user.run(&[&folder, "--lora", ID, "--q8", "--no-proof"]));
    assert_eq!(hub.bodies(), ["adapter_config.json", "adapter_model.safetensors"]);
}

#[test]
fn the_example_is_built_in() {
    let user = User { dir: tempfile::tempdir().unwrap(), endpoint: String::new() };
    let output = user.run(&["--example", "--q8", "--no-proof"]);
    user.assert_is(&output, "OpenVLA-1M-tabletop-v1.0-Q8_0.gguf", "openvla-tabletop");
    assert_eq!(user.run(&["--example", ID]).status.code(), Some(2), "one of them");
    assert_eq!(user.run(&["--q8", "--no-proof"]).status.code(), Some(2), "none of them");
}
