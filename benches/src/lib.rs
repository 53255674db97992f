//! What one control step of a model file costs on this machine, and what it could cost.
//!
//! | file | what it does |
//! |---|---|
//! | [`workload`] | a model, the pictures and the instruction that every measurement uses |
//! | [`subject`] | a policy of either kind, as stages |
//! | [`work`] | the bytes and operations of each stage, computed |
//! | [`machine`] | what this machine is, and what it reaches at best |
//! | [`measure`] | the measurement |
//! | [`robots`] | what several robots cost that are served together |
//! | [`cores`] | how a step scales with cores |
//! | [`jitter`] | how evenly steps take their time |
//! | [`compare`] | what a device computes, held against the CPU |
//! | [`results`] | what it gives: one versioned object, to write and to read |
//! | [`report`] | that as tables |
//! | [`plot`] | that as a picture |
//! | [`project`] | what cards that were not measured might reach |
//! | [`types`] | one checkpoint at every type, on the simulated table |

pub mod compare;
pub mod cores;
pub mod jitter;
pub mod machine;
pub mod measure;
pub mod plot;
pub mod project;
pub mod report;
pub mod results;
pub mod robots;
pub mod subject;
pub mod types;
pub mod work;
pub mod workload;
