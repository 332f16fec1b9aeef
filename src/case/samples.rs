//! Messages to try a transform on where nobody gives any: one of each kind that a transform meets.

use std::sync::Arc;

use bytes::Bytes;

use super::read::{Sample, read};
use crate::change::{Cell, Change, Tuple};

/// What the oversized sample's largest column holds, in bytes: three times what S2 takes.
const OVERSIZE_BYTES: usize = 3 * 1024 * 1024;

/// Inserts, updates, a delete and a truncate of `public.documents`, a row of many types, and a row
/// that S2 does not take.
#[must_use]
pub fn built_in() -> Vec<Sample> {
    let mut samples = written();
    samples.push(Sample {
        name: "insert that is too large".to_owned(),
        change: sized(OVERSIZE_BYTES),
        case: None,
    });
    samples
}

fn written() -> Vec<Sample> {
    read(include_str!("samples.json")).expect("a file of this crate, which its tests read")
}

/// An insert into `public.documents` whose column `body` holds so many bytes of text.
#[must_use]
pub fn sized(body_bytes: usize) -> Change {
    let insert = written().swap_remove(0).change;
    let row = insert.new.as_ref().expect("an insert has a row");
    let body = insert.table.columns.iter().position(|column| column.name == "body");
    let mut data = Vec::with_capacity(body_bytes + 256);
    let mut cells = Vec::with_capacity(row.cells.len());
    for (index, cell) in row.cells.iter().enumerate() {
        let start = offset(data.len());
        match row.text(index) {
            _ if Some(index) == body => data.extend(text(body_bytes)),
            Some(text) => data.extend_from_slice(text),
            None => {
                cells.push(*cell);
                continue;
            }
        }
        cells.push(Cell::Text { start, end: offset(data.len()) });
    }
    let new = Some(Tuple { data: Bytes::from(data), cells: cells.into() });
    Change { new, table: Arc::clone(&insert.table), ..insert }
}

fn offset(length: usize) -> u32 {
    u32::try_from(length).expect("samples are far smaller than 4 GiB")
}

/// Words that repeat without being all the same, so that they compress as prose does; always the
/// same ones.
fn text(bytes: usize) -> impl Iterator<Item = u8> {
    const WORDS: [&str; 16] = [
        "stream ",
        "change ",
        "record ",
        "ledger ",
        "invoice ",
        "customer ",
        "of ",
        "the ",
        "and ",
        "delivered ",
        "in ",
        "order ",
        "exactly ",
        "once ",
        "every ",
        "time. ",
    ];
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    std::iter::repeat_with(move || {
        // Xorshift: no more than a text needs.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        WORDS[usize::try_from(state >> 60).unwrap_or(0)]
    })
    .flat_map(str::bytes)
    .take(bytes)
}
