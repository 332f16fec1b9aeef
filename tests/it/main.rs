//! Sluicebox as a user runs it: the real program as a child process, against a real Postgres and
//! the real s2-lite, judged by its commands, its HTTP answers and what the stream holds.
//!
//! Nothing here reaches into the library's insides. No test measures time: time-outs only bound
//! how long a failing test hangs. Random workloads print their seed; `SLUICEBOX_SEED=N` repeats
//! one.

#![allow(clippy::unwrap_used, reason = "a test that meets the unexpected is meant to fail")]

mod bad_input;
mod cli;
mod console;
mod dead_letters;
mod first_start;
mod folder;
mod groups;
mod hostile_folder;
mod languages;
mod leaving;
mod metrics;
mod one_step;
mod parts;
mod provocations;
mod restart;
mod rights;
mod rollback;
mod routes;
mod routes_recovery;
mod sink_faults;
mod spill;
mod story;
mod stream_loss;
mod stuck;
mod support;
mod takeover;
mod tools;
mod torture;
mod transforms;
mod values;
mod verify;
