//! The path of a change, from the source to the confirmation.

pub mod budget;
pub mod control;
pub mod size_gate;
