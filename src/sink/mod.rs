//! S2: everything that speaks to it.

pub mod record;
