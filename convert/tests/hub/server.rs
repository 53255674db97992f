//! A look-alike of the Hugging Face Hub with one repository: its listing, its redirects (small files
//! to itself, large ones to another host), ranges, and whatever goes wrong.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::json;

/// The commit that every revision is at.
pub const COMMIT: &str = "31f090d05236101ebfc381b61c674dd4746d4ce0";

pub type Files = BTreeMap<String, Vec<u8>>;

/// What a client asked for.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
}

impl Request {
    /// The file whose content is asked for.
    pub fn body_of(&self) -> Option<&str> {
        self.path.strip_prefix("/cdn/").or(self.path.strip_prefix("/api/resolve-cache/"))
    }
}

/// How a request ends.
pub enum End {
    Well,
    /// With a status, before anything else.
    Status(u16),
    /// With the connection cut after so many bytes of the body.
    Cut(usize),
    /// Not at all, for some seconds.
    Silence,
}

/// The server, for as long as the test runs.
pub struct Hub {
    pub url: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Hub {
    /// Serves `files` as `robots/openvla-example`, at the revisions `main` and `refs/pr/1`.
    pub fn serve(files: Files, end: impl FnMut(&Request) -> End + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, end, files) = (seen.clone(), Arc::new(Mutex::new(end)), Arc::new(files));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, end, files) = (log.clone(), end.clone(), files.clone());
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let request = read(&stream);
                    let end = (end.lock().unwrap())(&request);
                    log.lock().unwrap().push(request.clone());
                    let answer = answer(&request, &files, port);
                    // a client that is gone does not matter.
                    let _ = send(&mut stream, answer, end);
                });
            }
        });
        Self { url: format!("http://127.0.0.1:{port}"), seen }
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// The files whose contents were asked for since the last call, sorted.
    pub fn bodies(&self) -> Vec<String> {
        let requests = self.requests();
        let mut files: Vec<_> =
            requests.iter().filter_map(|r| Some(r.body_of()?.to_owned())).collect();
        files.sort();
        files
    }
}

fn read(stream: &TcpStream) -> Request {
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    let first = lines.next().unwrap();
    let path = first.strip_prefix("GET ").unwrap().split(' ').next().unwrap().to_owned();
    let headers = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        })
        .collect();
    Request { path, headers }
}

struct Answer {
    status: u16,
    headers: Vec<String>,
    body: Vec<u8>,
}

fn answer(request: &Request, files: &Files, port: u16) -> Answer {
    let plain = |status, header: &str| Answer {
        status,
        headers: vec![header.to_owned()],
        body: Vec::new(),
    };
    let path = request.path.as_str();
    if let Some(file) = request.body_of() {
        return content(&files[file], request.headers.get("range"));
    }
    let resolve = format!("/robots/openvla-example/resolve/{COMMIT}/");
    if let Some(file) = path.strip_prefix(&resolve).filter(|file| files.contains_key(*file)) {
        return if file.ends_with(".safetensors") {
            plain(302, &format!("Location: http://localhost:{port}/cdn/{file}"))
        } else {
            plain(307, &format!("Location: /api/resolve-cache/{file}"))
        };
    }
    let Some(revision) = path.strip_prefix("/api/models/robots/openvla-example/revision/") else {
        return plain(404, "X-Error-Message: Repository not found");
    };
    if !["main?blobs=true", "refs%2Fpr%2F1?blobs=true"].contains(&revision) {
        return plain(404, "X-Error-Message: Invalid rev id");
    }
    let body = listing(files).to_string().into_bytes();
    Answer { status: 200, headers: vec![], body }
}

fn listing(files: &Files) -> serde_json::Value {
    let sibling = |(name, bytes): (&String, &Vec<u8>)| {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let (hash, size) = (hasher.finish(), bytes.len());
        let mut sibling =
            json!({"rfilename": name, "size": size, "blobId": format!("{hash:040x}")});
        if name.ends_with(".safetensors") {
            let sha256 = format!("{hash:064x}");
            sibling["lfs"] = json!({"sha256": sha256, "size": size, "pointerSize": 134});
        }
        sibling
    };
    json!({"sha": COMMIT, "siblings": files.iter().map(sibling).collect::<Vec<_>>()})
}

fn content(bytes: &[u8], range: Option<&String>) -> Answer {
    let Some(range) = range else {
        return Answer { status: 200, headers: vec![], body: bytes.to_owned() };
    };
    let start = range.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap();
    let (start, n): (usize, _) = (start.parse().unwrap(), bytes.len());
    assert!(start < n, "nothing is left to ask for");
    let range = format!("Content-Range: bytes {start}-{}/{n}", n - 1);
    Answer { status: 206, headers: vec![range], body: bytes[start..].to_owned() }
}

fn send(stream: &mut TcpStream, answer: Answer, end: End) -> std::io::Result<()> {
    let Answer { status, headers, body } = match end {
        End::Status(status) => Answer { status, headers: vec![], body: vec![] },
        _ => answer,
    };
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let n = body.len();
    let head =
        format!("HTTP/1.1 {status} -\r\nContent-Length: {n}\r\nConnection: close\r\n{headers}\r\n");
    match end {
        End::Silence => {
            stream.write_all(head.as_bytes())?;
            // Until the client has had enough.
            stream.read(&mut [0]).map(|_| ())
        }
        End::Cut(most) => {
            stream.write_all(head.as_bytes())?;
            stream.write_all(&body[..most.min(n)])
        }
        End::Well | End::Status(_) => {
            stream.write_all(head.as_bytes())?;
            stream.write_all(&body)
        }
    }
}
