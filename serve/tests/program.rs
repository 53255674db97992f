//! The program as a user meets it: what it says, how it ends, what it survives.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).env_remove("OPENVLA_MODEL").stdin(Stdio::null());
    for variable in ["all_proxy", "https_proxy", "http_proxy", "no_proxy"] {
        command.env_remove(variable).env_remove(variable.to_uppercase());
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(program: &str, args: &[&str]) -> (Output, String) {
    let output = command(program, args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, said)
}

const SERVE: &str = env!("CARGO_BIN_EXE_openvla-serve");

fn table() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../example/table.png").display().to_string()
}

/// A server as its own process.
struct Server {
    child: Child,
    url: String,
    /// Where somebody reads it.
    log: Option<BufReader<std::process::ChildStderr>>,
    /// What was read of it.
    said: String,
}

impl Server {
    fn start(args: &[&str]) -> Self {
        Self::start_by(&[SERVE], args)
    }

    /// By a program that becomes what its last arguments say.
    fn start_by(by: &[&str], args: &[&str]) -> Self {
        let fixed = ["--port", "0", "--log-json", "--threads", "1"];
        let mut child = command(by[0], &[&by[1..], &fixed, args].concat()).spawn().unwrap();
        let log = child.stderr.take().map(BufReader::new);
        let mut server = Self { child, url: String::new(), log, said: String::new() };
        server.reads("ready");
        server
    }

    /// Reads its log up to a message that starts like this.
    fn reads(&mut self, message: &str) {
        loop {
            let mut line = String::new();
            let log = self.log.as_mut().unwrap();
            assert!(log.read_line(&mut line).unwrap() > 0, "it ended before it said {message:?}");
            let event: Value =
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
            if let Some(address) = event["address"].as_str() {
                self.url = format!("http://{address}");
            }
            self.said.push_str(&line);
            if event["message"].as_str().is_some_and(|said| said.starts_with(message)) {
                return;
            }
        }
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    fn terminate(&self) {
        self.signal("-TERM");
    }

    fn ended(mut self) -> (bool, String) {
        let mut rest = String::new();
        self.log.take().unwrap().read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().success(), rest)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

fn body() -> String {
    let file = std::fs::read(table()).unwrap();
    json!({ "image": STANDARD.encode(file), "instruction": "put eggplant into pot" }).to_string()
}

#[test]
fn what_cannot_work_is_said_at_once() {
    let (output, said) = run(SERVE, &["--host", "0.0.0.0"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: ") && said.contains("--token-file"), "{said}");
    let (output, said) = run(SERVE, &["--port", "0", "-m", "/nowhere/model.gguf"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: ") && said.contains("/nowhere/model.gguf"), "{said}");
    let (output, said) = run(SERVE, &["--port", "0", "--unnorm-key", "tabletops"]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("hint: did you mean `tabletop`?"), "{said}");
    let (output, said) = run(SERVE, &["--max-delta", "much"]);
    assert_eq!(output.status.code(), Some(2), "usage: {said}");
}

/// A stack of so many bytes fits in no address space, so no thread can be started.
#[test]
fn without_threads_it_ends_at_once() {
    let mut server = command(SERVE, &["--port", "0"]);
    let output = server.env("RUST_MIN_STACK", (1_u64 << 60).to_string()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("no more may be started here") && said.contains("ulimit -u"), "{said}");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port().to_string();
    let (output, said) = run(SERVE, &["--host", "localhost", "--port", &port]);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("cannot listen on 127.0.0.1:{port}")), "{said}");
    assert!(said.contains("--port names another"), "{said}");
}

/// As when it is started again before the one before has ended.
#[test]
fn a_port_that_is_about_to_be_free_is_waited_for() {
    let before = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = before.local_addr().unwrap().port().to_string();
    let mut child = command(SERVE, &["--port", &port, "--threads", "1"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    drop(before);
    let said = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(said.into_iter().any(|line| line.contains("listening")));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// What was asked is answered, or was never accepted: a client is told one of the two.
#[test]
fn nothing_accepted_is_lost_when_it_is_asked_to_stop() {
    let server = Server::start(&["--queue", "128"]);
    let (url, body) = (format!("{}/v1/act", server.url), body());
    let (answered, lost) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                loop {
                    // A connection for each request, as `requests.post` has it.
                    let agent: ureq::Agent = ureq::Agent::config_builder()
                        .http_status_as_error(false)
                        .timeout_global(Some(Duration::from_secs(60)))
                        .build()
                        .into();
                    let request = agent.post(&url).content_type("application/json");
                    match request.send(&body) {
                        Ok(response) if response.status() == 200 => {
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(other) => panic!("{other:?}"),
                        Err(ureq::Error::Io(why))
                            if why.kind() == std::io::ErrorKind::ConnectionRefused =>
                        {
                            return;
                        }
                        Err(ureq::Error::ConnectionFailed) => return,
                        Err(why) => {
                            eprintln!("{why:?}");
                            lost.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        while answered.load(Ordering::Relaxed) < 128 {
            std::thread::sleep(Duration::from_millis(10));
        }
        server.terminate();
    });
    let (success, log) = server.ended();
    assert!(success && log.contains("draining"), "{log}");
    assert_eq!(lost.load(Ordering::Relaxed), 0, "of {}", answered.load(Ordering::Relaxed));
}

/// As where the log collector at the other end of a pipe has crashed.
#[test]
fn without_anybody_who_reads_its_log_it_serves_and_drains() {
    let mut child = command(SERVE, &["--port", "0", "--threads", "1", "--log", "debug"]);
    let mut child = child.spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("listening") {
        line.clear();
        assert!(log.read_line(&mut line).unwrap() > 0, "it ended before it listened");
    }
    let address = line.split("address=").nth(1).unwrap().trim().to_owned();
    drop(log);
    let (url, said) = (format!("http://{address}"), String::new());
    let mut server = Server { child, url, log: None, said };
    let begun = Instant::now();
    while !ureq::get(format!("{}/readyz", server.url)).call().is_ok_and(|a| a.status() == 200) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it never was ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    let url = format!("{}/v1/act", server.url);
    let asks = || ureq::post(&url).content_type("application/json").send(body()).unwrap().status();
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..8).map(|_| scope.spawn(asks)).collect();
        assert!(asked.into_iter().all(|asked| asked.join().unwrap() == 200));
    });
    server.terminate();
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

/// SIGHUP reads the tokens of clients again, and ends a server that has none, as it ends most programs.
#[test]
fn at_sighup_the_tokens_of_clients_are_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("clients");
    let (arm, leg) = ("the-token-of-the-arm", "the-token-of-the-leg");
    std::fs::write(&path, format!("arm act {arm}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut server = Server::start(&["--client-tokens", path.to_str().unwrap()]);
    assert!(server.said.contains("can be read by every user: chmod 600"), "{}", server.said);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    server.said.clear();
    let status = |server: &Server, token: &str| {
        let agent = ureq::Agent::config_builder().http_status_as_error(false).build();
        let request = ureq::Agent::from(agent).get(format!("{}/v1/model", server.url));
        let answer = request.header("authorization", format!("Bearer {token}")).call();
        answer.unwrap().status().as_u16()
    };
    assert_eq!([status(&server, arm), status(&server, leg)], [200, 401]);
    std::fs::write(&path, format!("leg act {leg}\narm {arm}\n")).unwrap();
    server.signal("-HUP");
    server.reads("SIGHUP: the tokens stay as they were");
    assert!(server.said.contains("line 2: 2 words were found"), "{}", server.said);
    assert_eq!([status(&server, arm), status(&server, leg)], [200, 401]);
    std::fs::write(&path, format!("leg act {leg}\n")).unwrap();
    server.signal("-HUP");
    server.reads("SIGHUP: the tokens were read again");
    assert_eq!([status(&server, arm), status(&server, leg)], [401, 200]);
    assert!(
        !server.said.contains("chmod") && !server.said.contains("the-token"),
        "{}",
        server.said
    );
    server.terminate();
    assert!(server.ended().0);
}

/// As a copy over the file, a full disk or a network drive does it while robots move.
#[test]
fn a_served_model_does_not_hang_on_its_file() {
    let dir = tempfile::tempdir().unwrap();
    for example in ["tabletop.gguf", "example.gguf"] {
        let path = dir.path().join(example);
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../example").join(example);
        std::fs::copy(from, &path).unwrap();
        let server = Server::start(&["-m", path.to_str().unwrap()]);
        let act = || {
            let request = ureq::post(format!("{}/v1/act", server.url));
            let mut answer = request.content_type("application/json").send(body()).unwrap();
            let answer: Value = serde_json::from_reader(answer.body_mut().as_reader()).unwrap();
            answer["tokens"].clone()
        };
        let before = act();
        assert!(before.is_array(), "{before}");
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        std::io::copy(&mut std::io::repeat(0).take(file.metadata().unwrap().len()), &mut &file)
            .unwrap();
        assert_eq!(act(), before, "{example}: overwritten with zeros");
        file.set_len(100).unwrap();
        assert_eq!(act(), before, "{example}: cut off");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(act(), before, "{example}: gone");
        server.terminate();
        assert!(server.ended().0);
    }
}

/// A control group of its own, of either version.
struct Group {
    folder: PathBuf,
    limit: &'static str,
    taken: &'static str,
}

impl Group {
    fn new() -> Self {
        let name = format!("openvla-test-{}", std::process::id());
        let second = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
        let group = if second.is_ok_and(|all| all.contains("memory")) {
            let folder = Path::new("/sys/fs/cgroup").join(name);
            Self { folder, limit: "memory.max", taken: "memory.current" }
        } else {
            let folder = Path::new("/sys/fs/cgroup/memory").join(name);
            Self { folder, limit: "memory.limit_in_bytes", taken: "memory.usage_in_bytes" }
        };
        std::fs::create_dir(&group.folder).unwrap();
        group
    }

    /// Bytes that are taken, without pages of files, which it could give back.
    fn taken(&self) -> usize {
        let read = |file: &str| std::fs::read_to_string(self.folder.join(file)).unwrap();
        let stat = read("memory.stat");
        let files = stat.lines().filter_map(|line| line.split_once("active_file "));
        let files = files.filter(|(before, _)| ["", "in"].contains(before));
        let files: usize = files.map(|(_, bytes)| bytes.parse::<usize>().unwrap()).sum();
        read(self.taken).trim().parse::<usize>().unwrap() - files
    }

    fn allow(&self, bytes: usize) {
        std::fs::write(self.folder.join(self.limit), bytes.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.folder); // once it is empty
    }
}

/// The second model would not fit into what a container may take, though the machine has room.
#[test]
#[ignore = "needs root, and a system that lets it make a control group"]
fn a_reload_for_which_a_control_group_has_no_room_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model.gguf");
    let tabletop = Path::new(env!("CARGO_MANIFEST_DIR")).join("../example/tabletop.gguf");
    std::fs::copy(tabletop, &model).unwrap();
    let group = Group::new();
    let enter = "echo $$ > \"$0/cgroup.procs\"; exec \"$@\"";
    let by = ["sh", "-c", enter, group.folder.to_str().unwrap(), SERVE];
    let server = Server::start_by(&by, &["-m", model.to_str().unwrap()]);
    let post = |path: &str, body: &str| {
        let config = ureq::Agent::config_builder().http_status_as_error(false).build();
        let agent = ureq::Agent::new_with_config(config);
        let request = agent.post(format!("{}{path}", server.url)).content_type("application/json");
        let mut answer = request.send(body).unwrap();
        let text = answer.body_mut().read_to_string().unwrap();
        (answer.status().as_u16(), serde_json::from_str::<Value>(&text).unwrap())
    };
    let before = post("/v1/act", &body());
    assert_eq!(before.0, 200, "{before:?}");

    group.allow(group.taken() + (800 << 10));
    let (status, refused) = post("/v1/reload", "");
    assert_eq!(status, 422, "{refused}");
    let message = refused["message"].as_str().unwrap();
    assert!(
        message.contains("the model stays: both models must be in memory at once"),
        "{message}"
    );
    assert_eq!(post("/v1/act", &body()).1["action"], before.1["action"]);

    group.allow(group.taken() + (64 << 20));
    let (status, reloaded) = post("/v1/reload", "");
    assert_eq!(status, 200, "{reloaded}");
    assert_eq!(post("/v1/act", &body()).1["action"], before.1["action"]);
    drop(server);
}
