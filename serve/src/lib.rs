//! Serves an OpenVLA model to robots: three protocols, one queue that knows about time, one model.
//!
//! ```text
//! connection ─ routes ─┬─ act ────┐                        ┌──────── worker ────────┐
//!   server             ├─ plain ──┼─ Observation ─ engine ─┤ model ─ safety ─ Answer ├─ back
//!                      └─ openpi ─┘      + Meta     queue  └────────────────────────┘
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | `options` | the command line |
//! | `server` | listener, connections and their limits, the end |
//! | `routes` | counting and logging of every request, and its protocol |
//! | `app` | what all requests share: token, limits, bodies, pictures |
//! | `auth` | who may ask |
//! | `act`, `compat` | the reference's protocol, and its errors |
//! | `openpi` | openpi's websocket |
//! | `plain` | a picture file in, a JSON object out |
//! | `json` | JSON as Python writes it |
//! | `message`, `field` | the fields of a message, and what is wrong with them |
//! | `numpy` | numpy's arrays in JSON and msgpack |
//! | `observation` | what all protocols decode to and encode from |
//! | `engine` | where a request waits for its answer |
//! | `queue`, `recent` | who is next, what is too late, what is forgotten; pure |
//! | `turns` | whose body is decoded next |
//! | `worker` | the thread that owns the model |
//! | `policy` | what a model is to the worker |
//! | `safety` | what a motion must be before it leaves |
//! | `error` | what is answered in place of a motion |
//! | `metrics` | numbers for whoever runs it |
//! | `openapi.json` | all of it for programs and people, served at `/openapi.json` |
//!
//! # What is deliberately absent
//!
//! - No protocol knows the model; each makes one `Observation` and reads one `Answer`. `plain` shares with `act`
//!   how a JSON object is read.
//! - Nothing is batched: a robot's step is worth most alone, and as soon as can be.
//! - No TLS: a proxy in front of it has that.

pub mod act;
pub mod app;
pub mod auth;
pub mod compat;
pub mod engine;
pub mod error;
pub mod field;
pub mod json;
pub mod message;
pub mod metrics;
pub mod numpy;
pub mod observation;
pub mod openpi;
pub mod options;
pub mod plain;
pub mod policy;
pub mod queue;
pub mod recent;
pub mod routes;
pub mod safety;
pub mod server;
pub mod turns;
pub mod worker;
