//! What the fuzzer of `fuzz/` feeds bytes to, and what tests replay its corpora with: one body for
//! both.
//!
//! Each takes any bytes and must not panic, hang, or give out something that breaks a rule.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use crate::change::{Action, Lsn};
use crate::decode::{Decoded, Decoder};
use crate::transform::Workbench;

pub use crate::transform::fuzz_answers as answers;

/// Modules in real life have up to 64 MiB; what a fuzzer finds, it finds in a few.
const MODULE_BYTES_MAX: usize = 64 * 1024;

/// Any bytes as a module: they are examined and, where they are one, compiled; never run.
pub fn loader(bytes: &[u8]) {
    static WORKBENCH: OnceLock<Workbench> = OnceLock::new();
    if bytes.len() > MODULE_BYTES_MAX {
        return;
    }
    let workbench = WORKBENCH.get_or_init(|| Workbench::new(None).expect("wasmtime runs here"));
    let inspection = workbench.inspect(bytes);
    assert_eq!(inspection.loads, inspection.reason.is_none());
    assert_ne!(inspection.reason.as_deref(), Some(""), "a refusal has a reason");
}

/// Any bytes as messages of one replication connection, each behind its length in one byte. A
/// table is defined as its description says it.
pub fn decode(mut bytes: &[u8]) {
    let mut decoder = Decoder::new();
    // Wrong bytes end a connection; here the next message tells more.
    while let [length, rest @ ..] = bytes {
        let (message, behind) = rest.split_at(usize::from(*length).min(rest.len()));
        bytes = behind;
        match decoder.decode(Bytes::copy_from_slice(message)) {
            Ok(Decoded::Relation(relation)) => decoder.define(Arc::new(table(&relation))),
            Ok(Decoded::Change(change)) => {
                assert_ne!(change.action, Action::Truncate);
                let columns = change.table.columns.len();
                for row in [&change.new, &change.old].into_iter().flatten() {
                    assert_eq!(row.cells.len(), columns);
                    for column in 0..columns {
                        std::hint::black_box(row.text(column));
                    }
                }
            }
            Ok(Decoded::Commit { end_lsn, .. }) => assert!(end_lsn <= Lsn(u64::MAX)),
            Ok(Decoded::Begin { .. } | Decoded::Truncate(_) | Decoded::Other) | Err(_) => {}
        }
    }
}

fn table(relation: &crate::decode::Relation) -> crate::change::Table {
    let column = |column: &crate::decode::RelationColumn| crate::change::Column {
        name: column.name.clone(),
        type_name: "text".to_owned(),
        kind: crate::pg_type::Kind::Text,
        identity: column.identity,
        primary_key: column.identity,
    };
    crate::change::Table {
        oid: relation.oid,
        schema: relation.schema.clone(),
        name: relation.name.clone(),
        columns: relation.columns.iter().map(column).collect(),
        grouping: crate::change::Grouping::Key,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::transform::Workbench;

    /// Everything that is in `fuzz/corpus` of that name, which must be something.
    fn replay(name: &str, target: fn(&[u8])) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut count = 0;
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            eprintln!("{}", path.display());
            target(&std::fs::read(path).unwrap());
            count += 1;
        }
        assert!(count > 0, "{} is empty", dir.display());
    }

    #[test]
    fn the_loader_s_corpus() {
        replay("loader", super::loader);
        // From what loads, a fuzzer comes further than from what is refused at once.
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/loader");
        let workbench = Workbench::new(None).unwrap();
        for name in ["valid-component", "valid-module"] {
            let inspection = workbench.inspect(&std::fs::read(dir.join(name)).unwrap());
            assert!(inspection.loads, "{name}: {:?}", inspection.reason);
        }
    }

    #[test]
    fn the_answers_corpus() {
        replay("answers", super::answers);
    }

    #[test]
    fn the_decoder_s_corpus() {
        replay("decode", super::decode);
    }

    proptest::proptest! {
        #[test]
        fn answers_of_any_kind(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            super::answers(&bytes);
        }

        #[test]
        fn messages_of_any_kind(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            super::decode(&bytes);
        }
    }
}
