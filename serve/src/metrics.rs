//! Metrics in Prometheus' format.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::observation::{Draft, Times};
use crate::policy::ModelInfo;
use crate::tokens::Caller;

/// The labels of requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Request {
    /// The protocol: `act`, `openpi`, `plain`, `vla_eval`, `page`, or `other`.
    pub form: &'static str,
    /// `ok`, or the error's code.
    pub outcome: &'static str,
}

/// The labels of requests by who asked: the names in the file of clients, of which there are only so many.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    token: String,
    outcome: &'static str,
}

/// The label of a stage.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stage {
    stage: &'static str,
}

/// The labels of the model that is served.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Served {
    model: String,
    fingerprint: String,
}

/// The label of what came of a reload.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reloaded {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Device {
    device: String,
}

#[derive(Debug, Clone)]
struct Seconds;

impl MetricConstructor<Histogram> for Seconds {
    fn new_metric(&self) -> Histogram {
        Histogram::new(exponential_buckets(0.000_25, 2.0, 19)) // to 65 s
    }
}

/// All metrics.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Answered requests and websocket messages.
    pub requests: Family<Request, Counter>,
    asked: Family<Asked, Counter>,
    stages: Family<Stage, Histogram, Seconds>,
    batches: Histogram,
    /// Observations in the queue.
    pub waiting: Gauge,
    /// Observations that a newer one replaced.
    pub superseded: Counter,
    /// Observations that were dropped because they were late, or their client left.
    pub dropped: Counter,
    drafted: Counter,
    accepted: Counter,
    /// Clients whose last motion is remembered.
    pub sessions: Gauge,
    /// Open connections.
    pub connections: Gauge,
    /// Connections that were closed because too many were open.
    pub refused: Counter,
    /// Times that the model was opened again after a failure.
    pub restarts: Counter,
    /// 1 if requests are accepted.
    pub ready: Gauge,
    /// 1 while the emergency stop is set.
    pub stopped: Gauge,
    /// Lines of the audit log that were lost.
    pub audit_dropped: Counter,
    memory: Gauge,
    devices: Family<Device, Gauge>,
    served: Family<Served, Gauge>,
    reloads: Family<Reloaded, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("openvla");
        let requests = Family::default();
        registry.register(
            "requests",
            "Requests and messages answered, by outcome",
            requests.clone(),
        );
        let asked = Family::default();
        let help = "The same by the name of the client's token, where it has one";
        registry.register("token_requests", help, asked.clone());
        let stages = Family::new_with_constructor(Seconds);
        let help = "Time by stage; queue is all before the model, step all within it";
        registry.register_with_unit("stage", help, Unit::Seconds, stages.clone());
        let batches = Histogram::new([1.0, 2.0, 3.0, 4.0, 6.0, 8.0]);
        registry.register("batch_size", "Robots that a step served together", batches.clone());
        let mut gauge = |name: &str, help: &str| {
            let gauge = Gauge::<i64>::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let waiting = gauge("queue_depth", "Observations that wait for the model");
        let sessions = gauge("sessions", "Clients whose last motions are remembered");
        let connections = gauge("connections", "Open connections");
        let ready = gauge("ready", "1 if requests are taken");
        let stopped = gauge("stopped", "1 while the emergency stop is set");
        let memory = gauge("resident_memory_bytes", "Memory of the process");
        let devices = Family::<Device, Gauge>::default();
        registry.register("device_memory_bytes", "What the model takes by device", devices.clone());
        let served = Family::<Served, Gauge>::default();
        registry.register("model", "1 for the model that is served", served.clone());
        let reloads = Family::<Reloaded, Counter>::default();
        registry.register("reloads", "Times that another model was to be served", reloads.clone());
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::<u64, AtomicU64>::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let superseded = counter("superseded", "Observations replaced by a newer one");
        let dropped = counter("dropped", "Observations dropped: too late, or their client left");
        let drafted = counter("draft_tokens", "Tokens that could be drafted");
        let accepted = counter("draft_accepted", "Tokens that were drafted and right");
        let refused = counter("connections_refused", "Connections closed for being too many");
        let restarts = counter("restarts", "Times the model was opened again after a failure");
        let audit_dropped = counter("audit_dropped", "Lines of the audit log that were lost");
        Self {
            registry,
            requests,
            asked,
            stages,
            batches,
            waiting,
            superseded,
            dropped,
            drafted,
            accepted,
            sessions,
            connections,
            refused,
            restarts,
            ready,
            stopped,
            audit_dropped,
            memory,
            devices,
            served,
            reloads,
        }
    }
}

impl Metrics {
    /// Counts an answered request.
    pub fn answered(&self, form: &'static str, outcome: &'static str, caller: &Caller) {
        self.requests.get_or_create(&Request { form, outcome }).inc();
        if let Some(token) = caller.name() {
            self.asked.get_or_create(&Asked { token: token.to_owned(), outcome }).inc();
        }
    }

    /// Counts a step.
    pub fn step(&self, times: &Times, draft: &Draft) {
        for (stage, ms) in [
            ("queue", times.queue),
            ("preprocess", times.preprocess),
            ("vision", times.vision),
            ("projector", times.projector),
            ("prefill", times.prefill),
            ("decode", times.decode),
            ("step", times.step),
        ] {
            self.stages.get_or_create(&Stage { stage }).observe(ms / 1e3);
        }
        self.drafted.inc_by(draft.accepted.len() as u64);
        self.accepted.inc_by(draft.accepted.iter().filter(|hit| **hit).count() as u64);
    }

    /// Counts a step for so many robots.
    pub fn batch(&self, n: usize) {
        self.batches.observe(n as f64);
    }

    /// Sets what is served, and its memory on each device.
    pub fn model(&self, model: &ModelInfo) {
        let (name, fingerprint) = (model.name.clone(), model.fingerprint.clone());
        self.served.clear();
        self.served.get_or_create(&Served { model: name, fingerprint }).set(1);
        self.devices(&model.memory);
    }

    /// Counts a reload.
    pub fn reloaded(&self, outcome: &'static str) {
        self.reloads.get_or_create(&Reloaded { outcome }).inc();
    }

    fn devices(&self, memory: &[(String, usize)]) {
        for (device, bytes) in memory {
            let label = Device { device: device.clone() };
            self.devices.get_or_create(&label).set(i64::try_from(*bytes).unwrap_or(i64::MAX));
        }
    }

    /// All metrics as text.
    pub fn text(&self) -> String {
        if let Some(bytes) = resident() {
            self.memory.set(bytes);
        }
        let mut out = String::new();
        text::encode(&mut out, &self.registry).expect("writing to a string cannot fail");
        out
    }
}

/// The resident memory of the process in bytes, where the system tells.
pub fn resident() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: i64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_in_the_text() {
        let metrics = Metrics::default();
        let caller = Caller::default();
        metrics.answered("act", "ok", &caller);
        metrics.answered("act", "ok", &caller);
        metrics.answered("plain", "queue_full", &caller);
        let timing = openvla::Timing::default();
        let times = Times::new(std::time::Duration::from_millis(3), &timing);
        metrics.step(&times, &Draft { passes: 5, accepted: vec![true, true, false] });
        metrics.devices(&[("CPU".into(), 42)]);
        metrics.batch(1);
        metrics.batch(5);
        let text = metrics.text();
        for line in [
            r#"openvla_requests_total{form="act",outcome="ok"} 2"#,
            r#"openvla_requests_total{form="plain",outcome="queue_full"} 1"#,
            r#"openvla_stage_seconds_bucket{le="0.004",stage="queue"} 1"#,
            r#"openvla_stage_seconds_count{stage="step"} 1"#,
            r#"openvla_device_memory_bytes{device="CPU"} 42"#,
            r#"openvla_batch_size_bucket{le="1.0"} 1"#,
            "openvla_batch_size_sum 6.0",
            "openvla_draft_tokens_total 3",
            "openvla_draft_accepted_total 2",
            "openvla_queue_depth 0",
            "openvla_dropped_total 0",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        assert!(metrics.memory.get() > 1 << 20, "this process takes more than a megabyte");
    }
}
