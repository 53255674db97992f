//! Requests with headers that make sense, in any order and at any time: each leaves the queue once, none is served late,
//! and of a client that counts its runs, none is served that is older than one before it.
#![no_main]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use openvla_serve::meta::Meta;
use openvla_serve::observation::Headers;
use openvla_serve::queue::{Dropped, Limits, Queue, Refused};

const WAITING: usize = 4;
const MAX_AGE: Duration = Duration::from_secs(100);

/// Whether the client always says which run it is.
fn counts_runs(client: &str) -> bool {
    client < "2"
}

/// The next request of a client that counts its runs may follow this one.
fn check_order(last: &Meta, next: &Meta) {
    assert!(last.epoch <= next.epoch);
    if last.epoch == next.epoch {
        assert!(last.seq.is_none() || next.seq.is_none() || last.seq < next.seq);
        let times = last.timestamp.zip(next.timestamp);
        assert!(times.is_none_or(|(last, next)| last <= next));
    }
}

// Of each request: whose, connection, epoch, seq, timestamp, deadline, the time since the one before, what is done next.
fuzz_target!(|input: &[u8]| {
    let memory = Duration::from_secs(1 << 20);
    let mut queue = Queue::new(Limits { waiting: WAITING, max_age: Some(MAX_AGE), memory });
    let (mut now, mut unix) = (Instant::now(), 0.0);
    let mut waiting: BTreeMap<usize, Meta> = BTreeMap::new();
    let mut last: BTreeMap<String, Meta> = BTreeMap::new();
    let some = |byte: u8| (byte > 0).then_some(byte);
    for (id, request) in input.chunks_exact(8).enumerate() {
        let [whose, connection, epoch, seq, timestamp, deadline, wait, then] =
            *request.first_chunk().expect("eight");
        now += Duration::from_millis(wait.into());
        unix += f64::from(wait) / 1e3;
        let name = (whose % 5).to_string();
        let is_named = whose % 5 < 4;
        let headers = Headers {
            client_id: is_named.then(|| name.clone()),
            epoch: if counts_runs(&name) { Some(epoch.into()) } else { some(epoch).map(u64::from) },
            seq: some(seq).map(u64::from),
            timestamp: some(timestamp).map(f64::from),
            deadline_ms: some(deadline).map(u64::from),
        };
        let meta = headers.meta(now, connection.into(), Duration::from_secs(1));
        let meta = meta.expect("headers that make sense");
        let in_time = waiting.values().filter(|meta| meta.deadline > now).count();
        let client = meta.client.clone();
        let (mut ticket, mut left) = (None, Vec::new());
        match queue.push(meta.clone(), id, now, unix) {
            Ok((its, evicted)) => {
                if counts_runs(&name) {
                    let before = last.insert(name, meta.clone());
                    before.iter().for_each(|before| check_order(before, &meta));
                }
                waiting.insert(id, meta);
                ticket = Some(its);
                left.extend(evicted);
            }
            Err(Refused::Full) => assert!(in_time >= WAITING),
            Err(Refused::Stale(_)) => assert!(timestamp > 0),
            Err(Refused::OutOfOrder(_)) => {}
        }
        if then & 1 == 1 {
            let takes = |n: usize| Duration::from_millis(u64::from(then >> 4) * n as u64);
            let most = 1 + usize::from(then >> 1 & 3);
            let (served, late) = queue.pop(now, most, takes);
            assert!(served.len() <= most);
            for (meta, id) in served {
                assert!(meta.deadline > now);
                waiting.remove(&id).expect("it waited");
            }
            left.extend(late);
        } else if then & 2 == 2
            && let Some(id) = ticket.and_then(|ticket| queue.cancel(ticket))
        {
            waiting.remove(&id).expect("it waited");
        }
        for (id, why) in left {
            let gone = waiting.remove(&id).expect("it waited");
            match why {
                Dropped::Late => assert!(gone.deadline <= now),
                Dropped::Superseded => assert_eq!(gone.client, client),
            }
        }
        assert_eq!(queue.len(), waiting.len());
    }
});
