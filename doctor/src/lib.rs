//! Finds why a robot moves wrongly.
//!
//! | file | what it is |
//! |---|---|
//! | [`episode`], [`table`] | what was recorded: pictures, actions, states, in a folder |
//! | [`picture`] | what may have happened to pictures: undone, and measured |
//! | [`action`] | actions as numbers in -1..1, in each of the ways that they may have been meant |
//! | [`hypothesis`] | what may be wrong, each as a change that undoes it |
//! | [`judge`], [`judgments`] | what a model says to claims about what was asked and done, and a file that keeps it |
//! | [`examine`] | an episode under every hypothesis |
//! | [`verdict`] | what the evidence says |
//! | [`machine`], [`mod@file`], [`input`] | the rest that can be wrong: each a short report |
//! | [`report`], [`html`] | all of it for people |
//!
//! The model itself is asked: how likely are the demonstrated actions under the input as it is, and under each hypothesis
//! about what is wrong with it? All hypotheses about a picture's actions and words share its features and its prompt:
//! see [`openvla::OpenVla::score`].

pub mod action;
pub mod episode;
pub mod examine;
pub mod file;
pub mod html;
pub mod hypothesis;
pub mod input;
pub mod judge;
pub mod judgments;
pub mod machine;
pub mod picture;
pub mod report;
pub mod table;
pub mod verdict;
