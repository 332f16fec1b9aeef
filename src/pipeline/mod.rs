//! The path of a change, from the source to the confirmation.

pub mod control;
pub mod size_gate;
