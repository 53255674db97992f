//! openpi's websocket, seen from outside.

mod common;

use std::net::TcpStream;

use common::{ACTION, Server};
use openvla_serve::field::Field;
use openvla_serve::numpy::{Msgpack, Ndarray};
use serde::{Deserialize, Serialize};
use tungstenite::client::IntoClientRequest;
use tungstenite::{Message, WebSocket, client};

type Socket = WebSocket<TcpStream>;

/// A frame as openpi's client packs it for LIBERO.
#[derive(Serialize, Clone)]
struct Frame<'a> {
    #[serde(rename = "observation/image")]
    image: Picture,
    #[serde(rename = "observation/wrist_image")]
    wrist: Picture,
    #[serde(rename = "observation/state")]
    state: [f64; 8],
    prompt: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
}

#[derive(Clone)]
struct Picture(Vec<usize>);

impl Serialize for Picture {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let data: Vec<u8> = (0..self.0.iter().product::<usize>()).map(|i| i as u8).collect();
        let shape = self.0.clone();
        Msgpack(Ndarray { dtype: "|u1".into(), shape, data: data.into() }).serialize(to)
    }
}

#[derive(Deserialize)]
struct Reply<'a> {
    #[serde(borrow)]
    actions: Field<'a>,
    seq: Option<u64>,
    warning: Option<String>,
    server_timing: Timing,
}

#[derive(Deserialize)]
struct Timing {
    infer_ms: f64,
    queue_ms: f64,
    prev_total_ms: Option<f64>,
}

fn frame(prompt: &str, seq: Option<u64>) -> Vec<u8> {
    let (image, wrist) = (Picture(vec![2, 3, 3]), Picture(vec![3, 6, 5]));
    rmp_serde::to_vec_named(&Frame { image, wrist, state: [0.5; 8], prompt, seq }).unwrap()
}

fn connect(server: &Server) -> (Socket, serde_json::Value) {
    let request = format!("ws://{}", server.address).into_client_request().unwrap();
    let (mut socket, _) = client(request, server.connect()).unwrap();
    let metadata = binary(&mut socket);
    (socket, rmp_serde::from_slice(&metadata).unwrap())
}

/// The next message that is none of the protocol's own.
fn read(socket: &mut Socket) -> Message {
    loop {
        match socket.read().unwrap() {
            Message::Ping(_) | Message::Pong(_) => {}
            message => return message,
        }
    }
}

fn binary(socket: &mut Socket) -> Vec<u8> {
    match read(socket) {
        Message::Binary(bytes) => bytes.to_vec(),
        other => panic!("{other:?}"),
    }
}

fn error(socket: &mut Socket) -> String {
    match read(socket) {
        Message::Text(text) => {
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            json["code"].as_str().unwrap().to_owned()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn it_says_what_it_serves_and_answers_step_by_step() {
    let server = Server::start(&["--unnorm-key", "bridge_orig"]);
    let (mut socket, metadata) = connect(&server);
    assert_eq!(metadata["model"], "a stub");
    assert_eq!(metadata["unnorm_key"], "bridge_orig");
    assert_eq!(metadata["unnorm_keys"].as_array().unwrap().len(), 2);
    for i in 0..3_u64 {
        socket.send(Message::Binary(frame("be unsure", Some(i)).into())).unwrap();
        let bytes = binary(&mut socket);
        let reply: Reply<'_> = rmp_serde::from_slice(&bytes).unwrap();
        assert_eq!(reply.actions.array("actions").unwrap(), Ndarray::of_f64(&ACTION, vec![1, 7]));
        assert_eq!((reply.seq, reply.warning.is_some()), (Some(i), true));
        assert!(reply.server_timing.infer_ms >= 0.0 && reply.server_timing.queue_ms > 0.0);
        assert_eq!(reply.server_timing.prev_total_ms.is_some(), i > 0);
        assert_eq!(server.seen().image.dimensions(), (3, 2), "not the wrist's");
    }
    assert_eq!(server.metric("openvla_requests_total{form=\"openpi\",outcome=\"ok\"}"), 3.0);
}

#[test]
fn an_error_is_text_and_the_next_step_is_taken() {
    let server = Server::start(&[]);
    let (mut socket, _) = connect(&server);
    socket.send(Message::Text("hello".into())).unwrap();
    assert_eq!(error(&mut socket), "bad_request");
    let float = Ndarray::of_f64(&[0.5; 3], vec![1, 1, 3]);
    let image = [("image", Msgpack(float))];
    let no_prompt = rmp_serde::to_vec_named(&std::collections::BTreeMap::from(image)).unwrap();
    socket.send(Message::Binary(no_prompt.into())).unwrap();
    assert_eq!(error(&mut socket), "bad_request");
    socket.send(Message::Binary(frame("nan", None).into())).unwrap();
    assert_eq!(error(&mut socket), "not_finite");
    socket.send(Message::Binary(frame("x", None).into())).unwrap();
    binary(&mut socket);
}

#[test]
fn with_compat_errors_it_ends_as_the_references_does() {
    let server = Server::start(&["--compat-errors"]);
    let (mut socket, _) = connect(&server);
    socket.send(Message::Binary(b"\xc1".to_vec().into())).unwrap();
    assert_eq!(error(&mut socket), "bad_request");
    match read(&mut socket) {
        Message::Close(Some(frame)) => assert_eq!(u16::from(frame.code), 1011),
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_does_not_wait_gets_the_newest() {
    let server = Server::start(&[]);
    let (mut socket, _) = connect(&server);
    socket.send(Message::Binary(frame("wait", Some(1)).into())).unwrap();
    server.seen();
    socket.send(Message::Binary(frame("old", Some(2)).into())).unwrap();
    server.wait_for_metric("openvla_queue_depth", 1.0);
    socket.send(Message::Binary(frame("new", Some(3)).into())).unwrap();
    assert_eq!(error(&mut socket), "superseded");
    server.gate.open(1);
    for seq in [1, 3] {
        let bytes = binary(&mut socket);
        let reply: Reply<'_> = rmp_serde::from_slice(&bytes).unwrap();
        assert_eq!(reply.seq, Some(seq));
    }
    socket.send(Message::Binary(frame("again", Some(3)).into())).unwrap();
    assert_eq!(error(&mut socket), "out_of_order");
}

/// The count may start again, and what the program before sent is refused.
#[test]
fn a_program_that_starts_again_says_so_by_its_epoch() {
    #[derive(Serialize)]
    struct Robot {
        image: Picture,
        prompt: &'static str,
        client_id: &'static str,
        epoch: u64,
        seq: u64,
    }
    let server = Server::start(&[]);
    let (mut before, mut after) = (connect(&server).0, connect(&server).0);
    let send = |socket: &mut Socket, epoch: u64, seq: u64| {
        let (image, prompt, client_id) = (Picture(vec![2, 3, 3]), "wave", "arm");
        let frame = rmp_serde::to_vec_named(&Robot { image, prompt, client_id, epoch, seq });
        socket.send(Message::Binary(frame.unwrap().into())).unwrap();
    };
    for (epoch, seq) in [(1, 7), (2, 7)] {
        send(&mut after, epoch, seq);
        binary(&mut after);
    }
    send(&mut before, 1, 8);
    assert_eq!(error(&mut before), "out_of_order");
}

#[test]
fn while_it_is_stopped_every_frame_is_told_so() {
    let server = Server::start(&[]);
    let (mut socket, _) = connect(&server);
    socket.send(Message::Binary(frame("wait", Some(1)).into())).unwrap();
    server.seen();
    server.post("/v1/stop", &[], b"");
    assert_eq!(error(&mut socket), "stopped");
    socket.send(Message::Binary(frame("x", Some(2)).into())).unwrap();
    assert_eq!(error(&mut socket), "stopped");
    server.gate.open(1);
    server.post("/v1/release", &[], b"");
    socket.send(Message::Binary(frame("x", Some(3)).into())).unwrap();
    assert_eq!(rmp_serde::from_slice::<Reply<'_>>(&binary(&mut socket)).unwrap().seq, Some(3));
}

#[test]
fn frames_that_are_no_observation_do_no_harm() {
    let server = Server::start(&["--max-body", "100000"]);
    let (mut socket, _) = connect(&server);
    let whole = frame("x", None);
    let cut = (0..whole.len()).step_by(3).map(|n| whole[..n].to_vec());
    let nested = [b"\x81\xa1x".to_vec(), vec![0x91; 50_000]].concat();
    let huge_map = vec![0xdf, 0xff, 0xff, 0xff, 0xff];
    let huge_text = vec![0x81, 0xdb, 0xff, 0xff, 0xff, 0xff];
    let number_key = vec![0x81, 0x01, 0x02];
    for bad in cut.chain([nested, huge_map, huge_text, number_key]) {
        socket.send(Message::Binary(bad.into())).unwrap();
        assert_eq!(error(&mut socket), "bad_request");
    }
    socket.send(Message::Binary(whole.into())).unwrap();
    binary(&mut socket);
    socket.send(Message::Binary(vec![0; 100_001].into())).unwrap();
    assert!(matches!(socket.read(), Err(_) | Ok(Message::Close(_))), "too large");
    assert_eq!(server.step("x", &[]).status, 200);
}

#[test]
fn at_the_end_it_finishes_the_step_and_says_goodbye() {
    let mut server = Server::start(&[]);
    let (mut busy, _) = connect(&server);
    let (mut idle, _) = connect(&server);
    server.wait_for_metric("openvla_connections", 3.0); // and the one that asks for it
    busy.send(Message::Binary(frame("wait", None).into())).unwrap();
    server.seen();
    server.stop();
    match read(&mut idle) {
        Message::Close(Some(frame)) => assert_eq!(u16::from(frame.code), 1001),
        other => panic!("{other:?}"),
    }
    server.gate.open(1);
    binary(&mut busy);
    assert!(matches!(read(&mut busy), Message::Close(Some(_))));
    drop((busy, idle));
    server.ended().unwrap();
}

/// As Python's websocket-client has it unless told otherwise.
#[test]
fn a_client_may_name_the_server_as_its_origin() {
    let server = Server::start(&[]);
    let url = format!("ws://{}", server.address);
    let connect = |origin: String| {
        let mut request = url.clone().into_client_request().unwrap();
        request.headers_mut().insert("origin", origin.parse().unwrap());
        client(request, server.connect()).ok()
    };
    let (mut socket, _) = connect(format!("http://{}", server.address)).unwrap();
    binary(&mut socket);
    assert!(connect("http://example.org".into()).is_none());
}

/// As LeRobot's data sets hold their pictures.
#[test]
fn a_picture_of_floats_is_taken() {
    #[derive(Serialize)]
    struct Frame {
        image: Msgpack<'static>,
        prompt: &'static str,
    }
    let server = Server::start(&[]);
    let (mut socket, _) = connect(&server);
    let mut send = |numbers: &[f64]| {
        let image = Msgpack(Ndarray::of_f64(numbers, vec![3, 1, 5]));
        let frame = rmp_serde::to_vec_named(&Frame { image, prompt: "wave" }).unwrap();
        socket.send(Message::Binary(frame.into())).unwrap();
        read(&mut socket)
    };
    let fractions: Vec<f64> = (0..15).map(|i| f64::from(i) / 15.0).collect();
    assert!(matches!(send(&fractions), Message::Binary(_)));
    let image = server.seen().image;
    assert_eq!((image.dimensions(), image.get_pixel(4, 0).0), ((5, 1), [68, 153, 238]));
    let Message::Text(error) = send(&[255.0; 15]) else { panic!("it is not a picture") };
    assert!(error.contains("it holds 255"), "{error}");
}

/// As ALOHA's robots send theirs, with a prompt and a count of numpy's own types.
#[test]
fn an_observation_of_numpys_types_and_one_camera_is_taken() {
    #[derive(Serialize)]
    struct Images {
        cam_high: Picture,
    }
    #[derive(Serialize)]
    struct Scalar {
        #[serde(rename = "__npgeneric__")]
        is_scalar: bool,
        data: u64,
        dtype: &'static str,
    }
    #[derive(Serialize)]
    struct Aloha {
        images: Images,
        prompt: Msgpack<'static>,
        seq: Scalar,
    }
    let server = Server::start(&[]);
    let (mut socket, _) = connect(&server);
    let text: Vec<u8> = "wave".chars().flat_map(|c| (c as u32).to_le_bytes()).collect();
    let prompt = Msgpack(Ndarray { dtype: "<U4".into(), shape: vec![], data: text.into() });
    let images = Images { cam_high: Picture(vec![3, 6, 5]) };
    let seq = Scalar { is_scalar: true, data: 9, dtype: "<i8" };
    let frame = rmp_serde::to_vec_named(&Aloha { images, prompt, seq }).unwrap();
    socket.send(Message::Binary(frame.into())).unwrap();
    let bytes = binary(&mut socket);
    assert_eq!(rmp_serde::from_slice::<Reply<'_>>(&bytes).unwrap().seq, Some(9));
    let seen = server.seen();
    assert_eq!((seen.image.dimensions(), seen.instruction.as_str()), ((5, 6), "wave"));
}

#[test]
fn it_is_also_where_vllm_has_it() {
    let server = Server::start(&[]);
    let url = format!("ws://{}/v1/realtime/robot/openpi", server.address);
    let mut socket = client(url.into_client_request().unwrap(), server.connect()).unwrap().0;
    binary(&mut socket);
    socket.send(Message::Binary(frame("x", Some(1)).into())).unwrap();
    assert_eq!(rmp_serde::from_slice::<Reply<'_>>(&binary(&mut socket)).unwrap().seq, Some(1));
}

#[test]
fn plain_http_is_told_where_to_go() {
    let server = Server::start(&["--no-page"]);
    let got = server.get("/", &[]);
    got.assert_error(426, "upgrade_required");
    assert_eq!(got.headers["upgrade"], "websocket");
}

/// As openpi's LIBERO client, to a model that reads all of it.
#[test]
fn a_model_of_chunks_reads_wrists_and_state() {
    #[derive(Serialize)]
    struct Whole {
        #[serde(rename = "observation/image")]
        image: Picture,
        #[serde(rename = "observation/wrist_image")]
        wrist: Picture,
        images: Cameras,
        #[serde(rename = "observation/state")]
        state: Msgpack<'static>,
        prompt: &'static str,
        n_actions: u64,
    }
    #[derive(Serialize)]
    struct Cameras {
        cam_wrist: Picture,
    }
    let server = Server::oft(&[]);
    let (mut socket, metadata) = connect(&server);
    assert_eq!(metadata["action_horizon"], 4);
    assert_eq!(metadata["cameras"][1], "left_wrist_image");
    let described = server.get("/v1/model", &[]);
    assert_eq!(described.json(), metadata, "others ask for it");
    assert_eq!(metadata["state_length"], 3);
    let whole = Whole {
        image: Picture(vec![2, 3, 3]),
        wrist: Picture(vec![2, 5, 3]),
        images: Cameras { cam_wrist: Picture(vec![2, 6, 3]) },
        state: Msgpack(Ndarray::of_f64(&[1.0, 2.0, 3.0], vec![3])),
        prompt: "wave",
        n_actions: 2,
    };
    socket.send(Message::Binary(rmp_serde::to_vec_named(&whole).unwrap().into())).unwrap();
    let bytes = binary(&mut socket);
    let reply: Reply<'_> = rmp_serde::from_slice(&bytes).unwrap();
    let want = Ndarray::of_f64(&[ACTION, ACTION].concat(), vec![2, 7]);
    assert_eq!(reply.actions.array("actions").unwrap(), want);
    let seen = server.seen();
    let sides: Vec<u32> = seen.wrists.iter().map(|image| image.width()).collect();
    assert_eq!((seen.image.width(), sides), (3, vec![5, 6]));
    assert_eq!(seen.state, Some(vec![1.0, 2.0, 3.0]));
}
