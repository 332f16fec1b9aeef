//! The path of a change, from the source to the confirmation.

pub mod ack;
pub mod control;
pub mod group;
pub mod holds;
pub mod size_gate;
