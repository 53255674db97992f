//! Clients that do not behave: each plays tricks in turn, by chance, for as long as it goes. Where a trick is a request that
//! the server takes, it is answered as any other.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use fastrand::Rng;

use crate::soak::forms::{Form, Line, Said, Says, vla_eval};
use crate::soak::robots::{BUSY, unix};
use crate::soak::scene::Scene;
use crate::soak::target::{Moment, Target};
use crate::soak::wire::{Http, Socket, get, post};

/// A client of a name that nobody else has.
type Trick = fn(&Target, &str, &mut Rng) -> Result<(), Lost>;

/// A connection that broke, and whether the server's end explains it.
struct Lost(io::Error, bool);

const TRICKS: [(&str, Trick); 14] = [
    ("half a request", half_a_request),
    ("a slow writer", slow_writer),
    ("a slow reader", slow_reader),
    ("gone before the answer", gone_before_the_answer),
    ("bad requests", bad_requests),
    ("a clock that jumps", clock_that_jumps),
    ("a program that starts again", program_that_starts_again),
    ("a deadline of milliseconds", tight_deadline),
    ("a newer observation", newer_observation),
    ("half a frame", half_a_frame),
    ("bad frames", bad_frames),
    ("gone in an episode", gone_in_an_episode),
    ("an episode that ends early", episode_that_ends_early),
    ("a page that is closed", page_that_is_closed),
];

const HTTP: [Form; 3] = [Form::Json, Form::Multipart, Form::Act];
/// Protocols in which a robot has a name.
const NAMED: [Form; 4] = [Form::Json, Form::Multipart, Form::Act, Form::Openpi];
const WEBSOCKETS: [Form; 2] = [Form::Openpi, Form::VlaEval];

/// Plays until the end.
pub fn play(target: &Target, name: &str, rng: &mut Rng) {
    let mut n = 0;
    while !target.is_over() {
        let (what, trick) = TRICKS[rng.usize(..TRICKS.len())];
        n += 1;
        match trick(target, &format!("{name}-{n}"), rng) {
            Ok(()) => target.count(what, "played"),
            Err(Lost(error, is_explained)) => target.lost(what, &error, is_explained),
        }
        target.sleep(Duration::from_millis(rng.u64(500..4000)));
    }
}

fn one_of(forms: &[Form], rng: &mut Rng) -> Form {
    forms[rng.usize(..forms.len())]
}

fn scene<'a>(target: &'a Target, rng: &mut Rng) -> &'a Scene {
    &target.scenes[rng.usize(..target.scenes.len())]
}

/// Opens a connection, which works unless the server is going.
fn open(target: &Target, form: Form) -> Result<Line, Lost> {
    let before = target.now();
    form.open(target).map_err(|error| Lost(error, target.explains(before)))
}

/// Asks, and wants a motion or one of these codes.
fn ask(
    target: &Target,
    line: &mut Line,
    scene: &Scene,
    says: Says,
    codes: &[&str],
) -> Result<Said, Lost> {
    let before = target.now();
    line.send(target, scene, says).map_err(|error| Lost(error, target.explains(before)))?;
    receive(target, line, scene, before, codes)
}

fn receive(
    target: &Target,
    line: &mut Line,
    scene: &Scene,
    before: Moment,
    codes: &[&str],
) -> Result<Said, Lost> {
    let begun = Instant::now();
    let said = line.receive().map_err(|error| Lost(error, target.explains(before)))?;
    let who = line.form().name();
    let outcome = said.outcome.as_str();
    if outcome == "ok" {
        target.check(who, scene, &said, begun.elapsed());
    }
    let goes = outcome == "not_ready" && target.explains(before);
    if !goes && outcome != "ok" && !BUSY.contains(&outcome) && !codes.contains(&outcome) {
        target.broke("a sound request is served", format!("{who} is told `{outcome}`"));
    }
    Ok(said)
}

fn half_a_request(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let bytes = one_of(&HTTP, rng).bytes(target, scene(target, rng), Says::robot(name, 1));
    let Ok(mut http) = Http::connect(target) else { return Ok(()) };
    let _ = http.send(&bytes[..rng.usize(1..bytes.len())]); // what comes of it is the server's to bear
    target.sleep(Duration::from_millis(rng.u64(..1000)));
    Ok(())
}

fn slow_writer(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let (form, scene, before) = (one_of(&HTTP, rng), scene(target, rng), target.now());
    let bytes = form.bytes(target, scene, Says::robot(name, 1));
    let Line::Http(_, mut http) = open(target, form)? else { return Ok(()) };
    for part in bytes.chunks(bytes.len() / 8 + 1) {
        http.send(part).map_err(|error| Lost(error, target.explains(before)))?;
        std::thread::sleep(Duration::from_millis(100));
    }
    receive(target, &mut Line::Http(form, http), scene, before, &[]).map(drop)
}

fn slow_reader(target: &Target, _: &str, _: &mut Rng) -> Result<(), Lost> {
    let Ok(mut http) = Http::connect(target) else { return Ok(()) };
    let _ = http.stream.set_nonblocking(true);
    let _ = http.stream.write(&get(target, "/openapi.json").repeat(200)); // as much as there is room for
    target.sleep(Duration::from_secs(3));
    Ok(())
}

fn gone_before_the_answer(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let bytes = one_of(&HTTP, rng).bytes(target, scene(target, rng), Says::robot(name, 1));
    let Ok(mut http) = Http::connect(target) else { return Ok(()) };
    let _ = http.send(&bytes); // the server may be going
    Ok(())
}

/// Each is answered by an error that is the client's.
fn bad_requests(target: &Target, _: &str, rng: &mut Rng) -> Result<(), Lost> {
    let json = |body: &str| post(target, "/v1/act", "application/json", "", body.as_bytes());
    let header = |line: &str| post(target, "/v1/act", "application/json", line, b"{}");
    let noise: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(300).collect();
    let large = format!("POST /act HTTP/1.1\r\nHost: x\r\n{}", target.authorization());
    let bad = [
        json("{\"image\":"),
        json("{\"image\": \"AAAA\", \"instruction\": \"x\"}"),
        json("{\"image\": 3, \"instruction\": \"x\"}"),
        json("[]"),
        header("X-Seq: -1\r\n"),
        header("X-Deadline-Ms: 0\r\n"),
        header("X-Timestamp: 1700000000000\r\n"),
        header("X-Client-Id: \r\n"),
        post(target, "/act", "application/json", "", &noise),
        post(target, "/v1/act", "text/plain", "", &noise),
        post(target, "/v1/act", "multipart/form-data; boundary=x", "", &noise),
        post(target, "/nowhere", "text/plain", "", b""),
        get(target, "/v1/act"),
        format!("{large}Content-Length: 99999999999\r\n\r\n").into_bytes(),
    ];
    let Line::Http(_, mut http) = open(target, Form::Json)? else { return Ok(()) };
    let before = target.now();
    let answer = http.send(&bad[rng.usize(..bad.len())]).and_then(|()| http.answer());
    let answer = answer.map_err(|error| Lost(error, target.explains(before)))?;
    let is_told = (400..500).contains(&answer.status) && answer.json()["message"].is_string();
    let goes = answer.status == 503 && target.explains(before);
    if !is_told && !goes {
        let how = format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body));
        target.broke("a bad request is told what is wrong", how);
    }
    Ok(())
}

/// What is older than what came is refused, until the program starts again.
fn clock_that_jumps(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let (form, scene, now) = (one_of(&NAMED, rng), scene(target, rng), unix());
    let mut line = open(target, form)?;
    let at =
        |timestamp: f64| Says { client: Some(name), timestamp: Some(timestamp), ..Says::default() };
    let ahead = ask(target, &mut line, scene, at(now + 86_400.0), &[])?;
    let back = ask(target, &mut line, scene, at(now), &["out_of_order"])?;
    refuses(target, &ahead, &back, form);
    ask(target, &mut line, scene, Says { epoch: Some(now as u64), ..at(now) }, &[]).map(drop)
}

/// A late motion never moves a robot: if `first` was answered, `then` must be refused for coming after it.
fn refuses(target: &Target, first: &Said, then: &Said, form: Form) {
    if first.outcome == "ok" && then.outcome == "ok" {
        target.broke("what is older than what came is refused", format!("not by {}", form.name()));
    }
}

fn program_that_starts_again(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let (form, scene, now) = (one_of(&NAMED, rng), scene(target, rng), unix());
    let by_epoch = rng.bool();
    let run = |run: u8, seq: u64| {
        let epoch = by_epoch.then(|| now as u64 + u64::from(run));
        let timestamp = (!by_epoch).then(|| now + f64::from(run) + seq as f64 / 100.0);
        Says { epoch, timestamp, ..Says::robot(name, seq) }
    };
    let mut first = open(target, form)?;
    ask(target, &mut first, scene, run(0, 5), &[])?;
    let mut second = open(target, form)?;
    let anew = ask(target, &mut second, scene, run(1, 1), &[])?;
    let late = ask(target, &mut first, scene, run(0, 6), &["out_of_order"])?;
    refuses(target, &anew, &late, form);
    Ok(())
}

fn tight_deadline(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let deadline_ms = rng.u64(1..60);
    let (mut line, scene) = (open(target, one_of(&NAMED, rng))?, scene(target, rng));
    let said = ask(target, &mut line, scene, Says { deadline_ms, ..Says::robot(name, 1) }, &[])?;
    if said.outcome == "ok" && said.ms.is_some_and(|ms| ms > deadline_ms as f64) {
        let how = format!("after {:?} ms of {deadline_ms}", said.ms);
        target.broke("a motion comes before its deadline", how);
    }
    Ok(())
}

/// Over two connections, so that either may come first.
fn newer_observation(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let form = one_of(&NAMED, rng);
    let (mut older, mut newer) = (open(target, form)?, open(target, form)?);
    let (scenes, before) = ([scene(target, rng), scene(target, rng)], target.now());
    older
        .send(target, scenes[0], Says::robot(name, 1))
        .and_then(|()| newer.send(target, scenes[1], Says::robot(name, 2)))
        .map_err(|error| Lost(error, target.explains(before)))?;
    receive(target, &mut older, scenes[0], before, &["superseded", "out_of_order"])?;
    receive(target, &mut newer, scenes[1], before, &[]).map(drop)
}

fn socket(line: Line) -> Option<Socket> {
    match line {
        Line::Openpi(socket) | Line::VlaEval(socket) => Some(socket),
        Line::Http(..) => None,
    }
}

fn half_a_frame(target: &Target, _: &str, rng: &mut Rng) -> Result<(), Lost> {
    let socket = socket(open(target, one_of(&WEBSOCKETS, rng))?);
    let some: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(100).collect();
    socket.map(|socket| socket.break_off(5000, &some)); // the server may be going
    Ok(())
}

/// An error answers each, and the next sound one is served.
fn bad_frames(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let (form, scene, before) = (one_of(&WEBSOCKETS, rng), scene(target, rng), target.now());
    let mut line = open(target, form)?;
    let mut bad = form.bytes(target, scene, Says::robot(name, 1));
    match rng.u8(..3) {
        0 => bad.truncate(rng.usize(..bad.len())),
        1 => bad = std::iter::repeat_with(|| rng.u8(..)).take(50).collect(),
        _ => bad = vla_eval("greeting", Says::default(), [0_u8; 3]),
    }
    let said = match &mut line {
        Line::Openpi(socket) | Line::VlaEval(socket) => socket.send(bad),
        Line::Http(..) => Ok(()),
    };
    let said = said.and_then(|()| line.receive());
    let said = said.map_err(|error| Lost(error, target.explains(before)))?;
    if said.outcome == "ok" {
        target.broke("a bad frame is told what is wrong", format!("not by {}", form.name()));
    }
    ask(target, &mut line, scene, Says::robot(name, 2), &[]).map(drop)
}

fn gone_in_an_episode(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let mut line = open(target, one_of(&WEBSOCKETS, rng))?;
    let _ = line.send(target, scene(target, rng), Says::robot(name, 1)); // the server may be going
    Ok(())
}

/// What was asked in the episode has one answer, and the next episode its own.
fn episode_that_ends_early(target: &Target, name: &str, rng: &mut Rng) -> Result<(), Lost> {
    let (scenes, before) = ([scene(target, rng), scene(target, rng)], target.now());
    let mut line = open(target, Form::VlaEval)?;
    let end = vla_eval("episode_end", Says::robot(name, 2), BTreeMap::<&str, u8>::new());
    let sent = line.send(target, scenes[0], Says::robot(name, 1)).and_then(|()| match &mut line {
        Line::VlaEval(socket) => socket.send(end),
        _ => Ok(()),
    });
    sent.map_err(|error| Lost(error, target.explains(before)))?;
    let first = receive(target, &mut line, scenes[0], before, &["superseded"])?;
    let then = ask(target, &mut line, scenes[1], Says::robot(name, 3), &[])?;
    if (first.seq, then.seq) != (Some(1), Some(3)) {
        let how = format!("seq {:?} and {:?}, not 1 and 3", first.seq, then.seq);
        target.broke("motions are those of what was asked, in order", how);
    }
    Ok(())
}

fn page_that_is_closed(target: &Target, _: &str, rng: &mut Rng) -> Result<(), Lost> {
    let Ok(mut http) = Http::connect(target) else { return Ok(()) };
    let _ = http.send(&get(target, "/page/events")); // the server may be going
    if rng.bool() {
        let _ = http.stream.read(&mut [0; 1000]);
    }
    target.sleep(Duration::from_secs(2)); // reads nothing
    Ok(())
}
