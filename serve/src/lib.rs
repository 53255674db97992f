//! Serves an OpenVLA model to robots: four protocols, one queue that knows about time, one model.
//!
//! ```text
//! connection ─ routes ─┬─ act ────┐                        ┌──────── worker ────────┐
//!   server             ├─ plain ──┼─ Observation ─ engine ─┤ model ─ safety ─ Answer ├─ back
//!                      ├─ openpi ─┤      + Meta     queue  └────────────────────────┘
//!                      └ vla_eval ┘
//! ```
//!
//! | file | what it is |
//! |---|---|
//! | `options` | the command line |
//! | `server` | the listener, limits of connections, shutdown |
//! | `routes` | the route of each request, with metrics and logs |
//! | `app` | shared state: token, limits, reading of bodies, decoding of images |
//! | `tokens`, `auth` | who may do what; what requests show of who asks |
//! | `act`, `compat` | the reference's protocol, and its errors |
//! | `openpi` | openpi's websocket |
//! | `vla_eval`, `vla_frame` | that of vla-eval, which evaluates policies on benchmarks, and what its frames hold |
//! | `websocket` | what both share |
//! | `plain` | the plain protocol: an image file in, a JSON object out |
//! | `json` | JSON as Python writes it |
//! | `message`, `field` | the fields of a message, and errors about them |
//! | `numpy` | numpy's arrays in JSON and msgpack |
//! | `observation` | observations and answers, which all protocols share |
//! | `engine` | the queue between requests and the worker |
//! | `meta` | the metadata of a request: whose it is, and what it says about time |
//! | `queue`, `order`, `recent` | the queue's rules: deadlines, which observation is older, memory of clients; no clock of their own |
//! | `pace` | how long steps take, of one robot and of several together |
//! | `turns` | fair queueing of the decoding of bodies and images |
//! | `worker` | the thread that owns the model |
//! | `description` | what is served, for clients that ask |
//! | `policy` | the interface of a model to the worker |
//! | `models` | where models come from: files, which are checked if they take the place of another |
//! | `reload`, `memory` | another model in the place of the one that is served; whether there is room for both |
//! | `safety` | checks of every motion: finite, within bounds, near the last one |
//! | `live` | the last step of each robot, and who watches |
//! | `page` | the page that people watch, and its events |
//! | `view`, `checks` | what it shows of a step; what is wrong with a picture at a glance |
//! | `rate` | how often a client may ask |
//! | `stop` | the emergency stop |
//! | `audit` | the audit log: who moved what when |
//! | `error` | errors and their codes |
//! | `metrics` | metrics for Prometheus |
//! | `openapi.json` | the description of the API, served at `/openapi.json` |
//!
//! # What is deliberately absent
//!
//! - No protocol knows the model; each makes one `Observation` and reads one `Answer`. `plain` and `act` share
//!   the reading of JSON objects.
//! - Nothing is batched: a robot's step is worth most when it comes soonest.
//! - No TLS: put a proxy in front.

pub mod act;
pub mod app;
pub mod audit;
pub mod auth;
pub mod checks;
pub mod compat;
pub mod description;
pub mod engine;
pub mod error;
pub mod field;
pub mod json;
pub mod live;
pub mod memory;
pub mod message;
pub mod meta;
pub mod metrics;
pub mod models;
pub mod numpy;
pub mod observation;
pub mod openpi;
pub mod options;
pub mod order;
pub mod pace;
pub mod page;
pub mod plain;
pub mod policy;
pub mod queue;
pub mod rate;
pub mod recent;
pub mod reload;
pub mod routes;
pub mod safety;
pub mod server;
pub mod stop;
pub mod tokens;
pub mod turns;
pub mod view;
pub mod vla_eval;
pub mod vla_frame;
pub mod websocket;
pub mod worker;
