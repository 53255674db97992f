//! Clients that behave: robots at a fixed rate, one for each protocol in turn, and somebody who watches the page.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::time::{Duration, Instant, SystemTime};

use crate::soak::forms::{Form, Line, Says};
use crate::soak::scene::Scene;
use crate::soak::target::{Moment, Target};
use crate::soak::wire::{Http, get};

/// What a robot may be told beside a motion, by a server whose other clients keep it busy.
pub const BUSY: [&str; 2] = ["queue_full", "deadline_exceeded"];

/// An observation that is on its way.
struct Asked<'a> {
    seq: u64,
    scene: &'a Scene,
    at: Instant,
    /// What was known of the server's end when it had been sent whole.
    sent: Moment,
}

/// Asks `hz` times a second for as long as it goes, over a connection that it keeps, as a robot whose name it has.
pub fn robot(target: &Target, name: &str, form: Form, hz: f64, rng: &mut fastrand::Rng) {
    // A count that goes on over connections, as a camera's does.
    let mut seq = 0;
    while !target.is_over() {
        let before = target.now();
        let ended = form.open(target).map_or_else(
            |error| Err((error, target.explains(before))),
            |line| drive(target, name, line, before, hz, &mut seq, rng),
        );
        if let Err((error, is_explained)) = ended {
            target.lost(form.name(), &error, is_explained);
            target.sleep(Duration::from_millis(200));
        }
    }
}

/// One connection, from `opened` on; an error comes with whether the server's end explains it.
fn drive(
    target: &Target,
    name: &str,
    mut line: Line,
    opened: Moment,
    hz: f64,
    seq: &mut u64,
    rng: &mut fastrand::Rng,
) -> Result<(), (io::Error, bool)> {
    let form = line.form();
    let is_http = matches!(line, Line::Http(..));
    while !target.is_over() {
        let next = Instant::now() + Duration::from_secs_f64(1.0 / hz);
        // Now and then openpi's client does not wait for the answer.
        let n = if form == Form::Openpi && rng.u8(..4) == 0 { 2 } else { 1 };
        let mut asked = VecDeque::new();
        for _ in 0..n {
            *seq += 1;
            let (scene, at) = (&target.scenes[rng.usize(..target.scenes.len())], Instant::now());
            let says = Says { timestamp: Some(unix()), ..Says::robot(name, *seq) };
            let sent = line.send(target, scene, says);
            sent.map_err(|error| (error, target.explains(opened)))?;
            asked.push_back(Asked { seq: *seq, scene, at, sent: target.now() });
        }
        let count = asked.len();
        for _ in 0..count {
            let sent = asked.back().map_or(opened, |asked| asked.sent);
            receive(target, &mut line, &mut asked).map_err(|error| {
                // A websocket says that it goes, and what it had not read by then was not accepted.
                let may =
                    if is_http { target.may_lose(opened, sent) } else { target.explains(opened) };
                (error, may)
            })?;
        }
        if line.has_more() {
            target.broke("a request has one answer", format!("{}: more than one", form.name()));
        }
        target.sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// Reads an answer, and holds it against what was asked.
fn receive(target: &Target, line: &mut Line, asked: &mut VecDeque<Asked>) -> io::Result<()> {
    let form = line.form();
    let said = line.receive()?;
    target.count(form.name(), &said.outcome);
    if said.outcome == "ok" {
        // Errors of openpi's do not say whose they are. Motions do, and come in order: what is left before one of
        // them is what the errors were about.
        let whose = said.seq.map_or(Some(0), |seq| asked.iter().position(|asked| asked.seq == seq));
        match whose.and_then(|i| asked.drain(..=i).next_back()) {
            Some(asked) => target.check(form.name(), asked.scene, &said, asked.at.elapsed()),
            None => {
                let how = format!("{}: seq {:?} came", form.name(), said.seq);
                target.broke("motions are those of what was asked, in order", how);
            }
        }
        return Ok(());
    }
    // Of two frames of one connection the newer may be decoded first.
    let is_older = matches!(said.outcome.as_str(), "superseded" | "out_of_order");
    let others_wait = is_older && form == Form::Openpi;
    let goes =
        said.outcome == "not_ready" && asked.back().is_none_or(|asked| target.explains(asked.sent));
    if !others_wait && !goes && !BUSY.contains(&said.outcome.as_str()) {
        let how = format!("{} is told `{}`", form.name(), said.outcome);
        target.broke("a good robot is served", how);
    }
    Ok(())
}

/// Reads the page's events for as long as it goes. The server sends some at least once a second.
pub fn watcher(target: &Target) {
    while !target.is_over() {
        let before = target.now();
        let watched = watch(target);
        if let Err(error) = watched {
            target.lost("page", &error, target.explains(before));
            target.sleep(Duration::from_millis(200));
        }
    }
}

fn watch(target: &Target) -> io::Result<()> {
    let mut page = Http::connect(target)?;
    page.send(&get(target, "/page/events"))?;
    page.stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut bytes = [0; 1 << 16];
    while !target.is_over() {
        let n = page.stream.read(&mut bytes)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let events = bytes[..n].windows(7).filter(|part| part == b"event: ").count();
        (0..events).for_each(|_| target.count("page", "event"));
    }
    Ok(())
}

/// Seconds since 1970.
pub fn unix() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}
