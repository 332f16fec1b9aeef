//! The WIT contract as Rust: generated from `wit/`, nothing written by hand.

use wasmtime::component::{HasSelf, Linker};

use super::state::GuestState;

mod generated {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "transform",
        // A host function may trap: a deadline can pass while it works.
        imports: { default: trappable },
        with: { "sluicebox:transform/types.change": crate::transform::state::ChangeHandle },
    });
}

pub(crate) use generated::sluicebox::transform::{logging, types};
pub(crate) use generated::{Transform, TransformPre};

/// The version of the interface in `wit/`, as import and export names carry it.
pub(crate) const VERSION: &str = "1.0.0";

/// Defines the interface's functions.
pub(crate) fn add_to_linker(linker: &mut Linker<GuestState>) -> wasmtime::Result<()> {
    Transform::add_to_linker::<_, HasSelf<_>>(linker, |state| state)
}
