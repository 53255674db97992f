//! vla-eval's websocket, seen from outside.

mod common;
#[path = "common/sockets.rs"]
mod sockets;

use std::collections::BTreeMap;
use std::net::TcpStream;

use common::{ACTION, Server, png};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use sockets::Array;
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket, client};

type Socket = WebSocket<TcpStream>;

/// A frame as vla-eval's client packs it.
#[derive(Serialize)]
struct Frame<'a, P> {
    r#type: &'a str,
    payload: P,
    seq: u64,
    timestamp: f64,
}

#[derive(Serialize)]
struct Observation<'a> {
    images: Cameras,
    task_description: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    states: Option<Array>,
}

#[derive(Serialize)]
struct Cameras {
    agentview: Picture,
    #[serde(skip_serializing_if = "Option::is_none")]
    wrist: Option<Picture>,
    #[serde(skip_serializing_if = "Option::is_none")]
    third: Option<Picture>,
}

#[derive(Serialize)]
struct Picture {
    #[serde(rename = "__image__")]
    is_image: bool,
    format: &'static str,
    data: ByteBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<&'static str>,
    shape: Vec<usize>,
}

#[derive(Deserialize)]
struct Reply {
    r#type: String,
    payload: BTreeMap<String, serde_json::Value>,
    seq: u64,
    timestamp: f64,
}

#[derive(Deserialize)]
struct ActionReply {
    payload: ActionPayload,
    seq: u64,
}

#[derive(Deserialize)]
struct ActionPayload {
    actions: Array,
}

fn file(side: u32) -> Picture {
    let (data, shape) = (ByteBuf::from(png(side, side)), vec![side as usize, side as usize, 3]);
    Picture { is_image: true, format: "png", data, dtype: None, shape }
}

fn raw(side: usize) -> Picture {
    let data = ByteBuf::from(vec![7; side * side * 3]);
    let (dtype, shape) = (Some("|u1"), vec![side, side, 3]);
    Picture { is_image: true, format: "raw", data, dtype, shape }
}

fn see(picture: Picture, task_description: &str) -> Observation<'_> {
    let images = Cameras { agentview: picture, wrist: None, third: None };
    Observation { images, task_description, states: None }
}

fn send<P: Serialize>(socket: &mut Socket, r#type: &str, seq: u64, payload: P) {
    let frame = Frame { r#type, payload, seq, timestamp: 1.8e9 };
    let frame = rmp_serde::to_vec_named(&frame).unwrap();
    socket.send(Message::Binary(frame.into())).unwrap();
}

fn frame(socket: &mut Socket) -> Vec<u8> {
    loop {
        match socket.read().unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            Message::Binary(bytes) => return bytes.to_vec(),
            other => panic!("{other:?}"),
        }
    }
}

fn reply(socket: &mut Socket) -> Reply {
    let frame = frame(socket);
    rmp_serde::from_slice(&frame).unwrap()
}

fn action(socket: &mut Socket, seq: u64) -> Vec<f32> {
    let frame = frame(socket);
    let reply: ActionReply = rmp_serde::from_slice(&frame)
        .unwrap_or_else(|_| panic!("{:?}", String::from_utf8_lossy(&frame)));
    let actions = reply.payload.actions;
    assert_eq!((reply.seq, actions.dtype.as_str(), actions.is_array), (seq, "<f4", true));
    assert_eq!(actions.shape, [actions.data.len() / 4]);
    actions.data.chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect()
}

/// The error that a frame is answered by.
fn error(socket: &mut Socket, seq: u64) -> String {
    let reply = reply(socket);
    assert_eq!((reply.r#type.as_str(), reply.seq), ("error", seq));
    reply.payload["error"].as_str().unwrap().to_owned()
}

fn connect(server: &Server, query: &str) -> Socket {
    let url = format!("ws://{}/vla-eval{query}", server.address);
    client(url.into_client_request().unwrap(), server.connect()).unwrap().0
}

fn hello(socket: &mut Socket, seq: u64) -> BTreeMap<String, serde_json::Value> {
    #[derive(Serialize)]
    struct Hello {
        harness_version: &'static str,
        protocol_version: u64,
        benchmark: &'static str,
    }
    let payload = Hello { harness_version: "0.8.0", protocol_version: 1, benchmark: "LIBERO" };
    send(socket, "hello", seq, payload);
    let reply = reply(socket);
    assert_eq!((reply.r#type.as_str(), reply.seq), ("hello", seq));
    assert!(reply.timestamp > 1.7e9);
    reply.payload
}

/// An empty payload.
const NOTHING: BTreeMap<&str, u8> = BTreeMap::new();

fn motion() -> Vec<f32> {
    ACTION.iter().map(|x| *x as f32).collect()
}

#[test]
fn it_says_what_it_serves_and_answers_step_by_step() {
    let server = Server::start(&["--unnorm-key", "bridge_orig"]);
    let mut socket = connect(&server, "");
    let said = hello(&mut socket, 1);
    assert_eq!(said["protocol_version"], 1);
    assert_eq!(said["observation_params"], serde_json::json!({ "seed": 0 }));
    assert_eq!(said["action_spec"]["gripper"]["format"], "continuous_01");
    assert_eq!(said["action_spec"]["rotation"]["dims"], 3);
    let observed = said["observation_spec"].as_object().unwrap().keys();
    assert_eq!(observed.collect::<Vec<_>>(), ["image", "language"]);
    send(&mut socket, "episode_start", 2, BTreeMap::from([("task", NOTHING)]));
    for (seq, picture) in [(3, file(5)), (4, raw(6))] {
        send(&mut socket, "observation", seq, see(picture, "Wave"));
        assert_eq!(action(&mut socket, seq), motion());
        let seen = server.seen();
        assert_eq!((u64::from(seen.image.width()), seen.instruction.as_str()), (seq + 2, "Wave"));
        assert_eq!(seen.state, None);
    }
    send(&mut socket, "episode_end", 5, NOTHING);
    send(&mut socket, "observation", 6, see(file(5), "Wave"));
    assert_eq!(action(&mut socket, 6), motion());
    assert_eq!(server.metric("openvla_requests_total{form=\"vla_eval\",outcome=\"ok\"}"), 3.0);
}

#[test]
fn the_gripper_is_turned_where_the_url_says_so() {
    let server = Server::start(&[]);
    let mut socket = connect(&server, "?gripper=binary_close_positive&unnorm_key=bridge_orig");
    let said = hello(&mut socket, 1);
    let gripper = &said["action_spec"]["gripper"];
    assert_eq!(gripper["format"], "binary_close_positive");
    assert_eq!(gripper["range"], serde_json::json!([-1.0, 1.0]));
    // numpy: -np.sign(2 * np.float32(x) - 1)
    for (seq, (model, benchmark)) in
        [("1", -1.0), ("0.75", -1.0), ("0.25", 1.0), ("0", 1.0), ("0.5", 0.0)]
            .into_iter()
            .enumerate()
    {
        let task = format!("move {model}");
        send(&mut socket, "observation", seq as u64, see(raw(2), &task));
        let action = action(&mut socket, seq as u64);
        assert_eq!(action[6], benchmark, "{model}");
        assert_eq!(action[..6], [model.parse::<f32>().unwrap(); 6]);
    }
    assert_eq!(server.seen().unnorm_key.as_deref(), Some("bridge_orig"));
}

#[test]
fn an_error_is_a_frame_and_the_next_step_is_taken() {
    let server = Server::start(&[]);
    let mut socket = connect(&server, "");
    send(&mut socket, "observation", 1, see(raw(2), "nan"));
    let text = error(&mut socket, 1);
    assert!(text.starts_with("observation_failed: not_finite: "), "{text}");
    let broken = Picture { data: ByteBuf::from(*b"no file"), ..file(2) };
    send(&mut socket, "observation", 2, see(broken, "x"));
    assert!(error(&mut socket, 2).starts_with("observation_failed: bad_image: "));
    let float = Picture { dtype: Some("<f4"), ..raw(2) };
    send(&mut socket, "observation", 3, see(float, "x"));
    assert!(error(&mut socket, 3).contains("`<f4`; uint8 is wanted"));
    send(&mut socket, "observation", 4, BTreeMap::from([("images", NOTHING)]));
    assert!(error(&mut socket, 4).contains("`images` holds no picture"));
    send(&mut socket, "greeting", 5, NOTHING);
    assert!(error(&mut socket, 5).contains("no frames of type `greeting`"));
    send(&mut socket, "hello", 6, BTreeMap::from([("protocol_version", 2)]));
    assert!(error(&mut socket, 6).contains("protocol version 2; 1 is spoken here"));
    socket.send(Message::Text("hello".into())).unwrap();
    assert!(error(&mut socket, 0).contains("a text frame came"));
    send(&mut socket, "observation", 7, see(raw(2), "x"));
    assert_eq!(action(&mut socket, 7), motion());
}

/// The client would say nothing about a refused handshake but that there is no server.
#[test]
fn what_is_wrong_with_the_url_is_said_where_it_is_read() {
    let server = Server::start(&[]);
    for (query, word) in [
        ("?gripper=open", "unknown variant `open`"),
        ("?gripers=binary_close_positive", "unknown field `gripers`"),
        ("?n_actions=two", "invalid digit"),
        ("?n_actions=2", "the model computes 1"),
        ("?unnorm_key=kitchen", "unknown_unnorm_key"),
    ] {
        let mut socket = connect(&server, query);
        hello(&mut socket, 1);
        send(&mut socket, "observation", 2, see(raw(2), "x"));
        let text = error(&mut socket, 2);
        assert!(text.contains(word), "{query}: {text}");
    }
}

#[test]
fn chunks_are_given_out_one_by_one_until_the_episode_ends() {
    let server = Server::oft(&[]);
    let mut socket = connect(&server, "?n_actions=3");
    let said = hello(&mut socket, 1);
    let params = serde_json::json!({ "env_seed": 0, "quat_no_antipodal": true, "send_wrist_image": true, "send_state": true });
    assert_eq!(said["observation_params"], params);
    assert_eq!(said["observation_spec"]["state"]["dims"], 3);
    let observe = |socket: &mut Socket, seq: u64| {
        let images = Cameras { agentview: file(4), wrist: Some(raw(5)), third: Some(file(6)) };
        let data = [1.0_f32, 2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
        let states = Array {
            is_array: true,
            data: ByteBuf::from(data),
            dtype: "<f4".into(),
            shape: vec![3],
        };
        let seen = Observation { images, task_description: "wave", states: Some(states) };
        send(socket, "observation", seq, seen);
        assert_eq!(action(socket, seq), motion());
    };
    let looked = || std::iter::from_fn(|| server.saw.try_recv().ok()).count();
    (2..5).for_each(|seq| observe(&mut socket, seq));
    let seen = server.seen();
    let sides: Vec<u32> = seen.wrists.iter().map(|image| image.width()).collect();
    assert_eq!((seen.image.width(), sides), (4, vec![5, 6]));
    assert_eq!(seen.state, Some(vec![1.0, 2.0, 3.0]));
    assert_eq!(looked(), 0, "three actions of one look");
    (5..7).for_each(|seq| observe(&mut socket, seq));
    assert_eq!(looked(), 1);
    send(&mut socket, "episode_start", 7, NOTHING);
    observe(&mut socket, 8);
    assert_eq!(looked(), 1, "what was left of the chunk is of the episode before");
}

#[test]
fn who_does_not_wait_gets_the_newest_and_nothing_of_an_episode_before() {
    let server = Server::start(&[]);
    let mut socket = connect(&server, "");
    send(&mut socket, "observation", 1, see(raw(2), "wait"));
    server.seen();
    send(&mut socket, "observation", 2, see(raw(2), "old"));
    send(&mut socket, "observation", 3, see(raw(2), "wait"));
    assert!(error(&mut socket, 2).starts_with("observation_failed: superseded: "));
    server.gate.open(1);
    action(&mut socket, 1);
    server.seen();
    send(&mut socket, "observation", 4, see(raw(2), "older still"));
    send(&mut socket, "episode_start", 5, NOTHING);
    for seq in [3, 4] {
        assert!(error(&mut socket, seq).contains("its episode is over"));
    }
    send(&mut socket, "observation", 6, see(raw(2), "new"));
    server.gate.open(1);
    action(&mut socket, 6);
}

/// With limits of how motions change, the first of an episode may be anything.
#[test]
fn an_episode_begins_anew() {
    let server = Server::start(&["--max-delta", "0.1"]);
    let mut socket = connect(&server, "");
    for (seq, (x, limited)) in [(1.0, 1.0), (0.0, 0.9)].into_iter().enumerate() {
        send(&mut socket, "observation", seq as u64, see(raw(2), &format!("move {x}")));
        assert_eq!(action(&mut socket, seq as u64), [limited; 7]);
    }
    send(&mut socket, "episode_start", 3, NOTHING);
    send(&mut socket, "observation", 4, see(raw(2), "move 0"));
    assert_eq!(action(&mut socket, 4), [0.0; 7]);
}

#[test]
fn a_stop_takes_what_is_left_of_a_chunk_with_it() {
    let server = Server::oft(&[]);
    let mut socket = connect(&server, "");
    let look = || {
        let images = Cameras { agentview: raw(2), wrist: Some(raw(2)), third: Some(raw(2)) };
        let (data, dtype) = (ByteBuf::from(vec![0; 12]), "<f4".to_owned());
        let states = Some(Array { is_array: true, data, dtype, shape: vec![3] });
        Observation { images, task_description: "Wave", states }
    };
    send(&mut socket, "observation", 1, look());
    action(&mut socket, 1);
    server.seen();
    server.post("/v1/stop", &[], b"");
    send(&mut socket, "observation", 2, look());
    assert!(error(&mut socket, 2).starts_with("observation_failed: stopped: "));
    server.post("/v1/release", &[], b"");
    send(&mut socket, "observation", 3, look());
    action(&mut socket, 3);
    server.seen(); // the model has looked again
}

#[test]
fn frames_that_are_none_do_no_harm() {
    let server = Server::start(&["--max-body", "100000"]);
    let mut socket = connect(&server, "");
    let whole =
        Frame { r#type: "observation", payload: see(raw(2), "x"), seq: 1, timestamp: 1.8e9 };
    let whole = rmp_serde::to_vec_named(&whole).unwrap();
    let cut = (0..whole.len()).step_by(3).map(|n| whole[..n].to_vec());
    let nested = [b"\x81\xa1x".to_vec(), vec![0x91; 50_000]].concat();
    let huge_map = vec![0xdf, 0xff, 0xff, 0xff, 0xff];
    for bad in cut.chain([nested, huge_map, b"\x01".to_vec()]) {
        socket.send(Message::Binary(bad.into())).unwrap();
        assert!(error(&mut socket, 0).starts_with("frame_failed: bad_request: "));
    }
    // A picture that says it is larger than it may be.
    let huge = Picture { shape: vec![usize::MAX, 2, 3], ..raw(2) };
    send(&mut socket, "observation", 2, see(huge, "x"));
    assert!(error(&mut socket, 2).starts_with("observation_failed: bad_image: "));
    send(&mut socket, "observation", 3, see(raw(2), "x"));
    action(&mut socket, 3);
    socket.send(Message::Binary(vec![0; 100_001].into())).unwrap();
    assert!(matches!(socket.read(), Err(_) | Ok(Message::Close(_))), "too large");
    assert_eq!(server.step("x", &[]).status, 200);
}

#[test]
fn at_the_end_it_finishes_the_step_and_says_goodbye() {
    let mut server = Server::start(&[]);
    let mut socket = connect(&server, "");
    send(&mut socket, "observation", 1, see(raw(2), "wait"));
    server.seen();
    server.stop();
    server.gate.open(1);
    action(&mut socket, 1);
    match socket.read().unwrap() {
        Message::Close(Some(frame)) => assert_eq!(u16::from(frame.code), 1001),
        other => panic!("{other:?}"),
    }
    drop(socket);
    server.ended().unwrap();
}

#[test]
fn its_tools_ask_over_http() {
    let server = Server::start(&[]);
    let health = server.get("/health", &[]);
    assert_eq!((health.status, &health.json()["status"]), (200, &"ok".into()));
    let config = server.get("/config", &[]);
    assert_eq!(config.json(), serde_json::json!({ "applied": {}, "config": {} }));
    let set = server.get("/config?max_batch_size=8", &[]);
    assert_eq!((set.status, set.json()["errors"].as_array().unwrap().len()), (422, 1));
    server.get("/vla-eval", &[]).assert_error(426, "upgrade_required");
}

/// Its client knows an URL alone: the token is a password in it.
#[test]
fn a_token_is_a_password() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    std::fs::write(&path, "0123456789abcdef").unwrap();
    let server = Server::start(&["--token-file", path.to_str().unwrap()]);
    assert_eq!(server.get("/health", &[]).status, 200);
    server.get("/config", &[]).assert_error(401, "unauthorized");
    let connect = |password: &str| {
        let url = format!("ws://{}/vla-eval", server.address);
        let mut request = url.into_client_request().unwrap();
        let shown = base64::Engine::encode(
            &base64::engine::general_purpose::STANDARD,
            format!("robot:{password}"),
        );
        request.headers_mut().insert("authorization", format!("Basic {shown}").parse().unwrap());
        client(request, server.connect()).ok()
    };
    hello(&mut connect("0123456789abcdef").unwrap().0, 1);
    assert!(connect("0123456789abcdee").is_none());
}
