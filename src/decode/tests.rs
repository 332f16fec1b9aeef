use proptest::prelude::*;

use super::*;
use crate::change::{Column, Grouping};
use crate::pg_type::Kind;

/// Puts a message together as `src/backend/replication/logical/proto.c` of Postgres does.
#[derive(Clone, Default)]
struct Message(Vec<u8>);

impl Message {
    fn new(tag: u8) -> Self {
        Self(vec![tag])
    }

    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    fn name(mut self, value: &str) -> Self {
        self.0.extend(value.as_bytes());
        self.u8(0)
    }

    /// `None` is NULL, `u` unchanged, anything else text.
    fn row(mut self, kind: u8, cells: &[Option<&str>]) -> Self {
        self = self.u8(kind).u16(u16::try_from(cells.len()).unwrap());
        for cell in cells {
            self = match cell {
                None => self.u8(b'n'),
                Some("u") => self.u8(b'u'),
                Some(text) => {
                    let mut message = self.u8(b't').u32(u32::try_from(text.len()).unwrap());
                    message.0.extend(text.as_bytes());
                    message
                }
            };
        }
        self
    }

    fn bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.0)
    }
}

const OID: u32 = 16_400;
const COMMIT_LSN: u64 = 0x16_B374_D848;

fn begin() -> Message {
    Message::new(b'B').u64(COMMIT_LSN).u64(1_000_000).u32(77)
}

fn commit() -> Message {
    Message::new(b'C').u8(0).u64(COMMIT_LSN).u64(COMMIT_LSN + 0x30).u64(1_000_000)
}

fn relation() -> Message {
    Message::new(b'R')
        .u32(OID)
        .name("public")
        .name("documents")
        .u8(b'd')
        .u16(2)
        .u8(1)
        .name("id")
        .u32(23)
        .u32(u32::MAX)
        .u8(0)
        .name("body")
        .u32(25)
        .u32(u32::MAX)
}

fn table(oid: u32) -> Arc<Table> {
    let column = |name: &str, identity| Column {
        name: name.to_owned(),
        type_name: "text".to_owned(),
        kind: Kind::Text,
        identity,
        primary_key: identity,
    };
    let columns = vec![column("id", true), column("body", false)];
    Arc::new(Table {
        oid,
        schema: "public".to_owned(),
        name: "documents".to_owned(),
        columns,
        grouping: Grouping::Key,
    })
}

fn insert(cells: &[Option<&str>]) -> Message {
    Message::new(b'I').u32(OID).row(b'N', cells)
}

fn update() -> Message {
    Message::new(b'U').u32(OID)
}

fn delete() -> Message {
    Message::new(b'D').u32(OID)
}

/// A decoder that knows the table and is inside a transaction.
fn inside() -> Decoder {
    let mut decoder = Decoder::new();
    decoder.define(table(OID));
    decoder.decode(begin().bytes()).unwrap();
    decoder
}

fn change(message: &Message) -> Change {
    match inside().decode(message.bytes()) {
        Ok(Decoded::Change(change)) => change,
        other => panic!("not a change: {other:?}"),
    }
}

/// A row as words: NULL, unchanged, absent, or the text.
fn row(tuple: Option<&Tuple>) -> Vec<String> {
    let Some(tuple) = tuple else { return Vec::new() };
    let word = |(index, cell): (usize, &Cell)| match cell {
        Cell::Null => "NULL".to_owned(),
        Cell::Unchanged => "unchanged".to_owned(),
        Cell::Absent => "absent".to_owned(),
        Cell::Text { .. } => String::from_utf8(tuple.text(index).unwrap().to_vec()).unwrap(),
    };
    tuple.cells.iter().enumerate().map(word).collect()
}

fn check(message: &Message, action: Action, new: &[&str], old: &[&str]) {
    let change = change(message);
    assert_eq!(change.action, action);
    assert_eq!(row(change.new.as_ref()), new);
    assert_eq!(row(change.old.as_ref()), old);
}

#[test]
fn transactions_carry_positions_and_times() {
    let mut decoder = Decoder::new();
    assert_eq!(
        decoder.decode(begin().bytes()),
        Ok(Decoded::Begin {
            commit_lsn: Lsn(COMMIT_LSN),
            commit_timestamp_us: 946_684_801_000_000,
            xid: 77
        })
    );
    assert_eq!(
        decoder.decode(commit().bytes()),
        Ok(Decoded::Commit { lsn: Lsn(COMMIT_LSN), end_lsn: Lsn(COMMIT_LSN + 0x30) })
    );
}

#[test]
fn relations_are_described_as_sent() {
    let column = |name: &str, type_oid, identity| RelationColumn {
        name: name.to_owned(),
        type_oid,
        type_modifier: -1,
        identity,
    };
    let expected = Relation {
        oid: OID,
        schema: "public".to_owned(),
        name: "documents".to_owned(),
        replica_identity: b'd',
        columns: vec![column("id", 23, true), column("body", 25, false)],
    };
    let decoded = Decoder::new().decode(relation().bytes());
    assert_eq!(decoded, Ok(Decoded::Relation(expected)));

    let system = Message::new(b'R').u32(1).name("").name("t").u8(b'f').u16(0);
    let Ok(Decoded::Relation(system)) = Decoder::new().decode(system.bytes()) else { panic!() };
    assert_eq!(system.schema, "pg_catalog");
}

#[test]
fn a_new_description_makes_the_old_one_void() {
    let mut decoder = inside();
    let message = insert(&[Some("1"), None]).bytes();
    decoder.decode(message.clone()).unwrap();
    decoder.decode(relation().bytes()).unwrap();
    let undefined = Error::UndefinedTable { message: "Insert", oid: OID };
    assert_eq!(decoder.decode(message), Err(undefined));
}

#[test]
fn rows_are_what_was_sent() {
    use Action::{Delete, Insert, Update};
    check(&insert(&[Some("1"), Some("text")]), Insert, &["1", "text"], &[]);
    check(&insert(&[Some(""), None]), Insert, &["", "NULL"], &[]);
    check(&update().row(b'N', &[Some("1"), Some("u")]), Update, &["1", "unchanged"], &[]);
    check(&delete().row(b'K', &[Some("1"), None]), Delete, &[], &["1", "absent"]);
    check(&delete().row(b'O', &[Some("1"), None]), Delete, &[], &["1", "NULL"]);
    check(
        &update().row(b'K', &[Some("1"), None]).row(b'N', &[Some("2"), Some("u")]),
        Update,
        &["2", "unchanged"],
        &["1", "absent"],
    );
    check(
        &update().row(b'O', &[Some("1"), Some("long")]).row(b'N', &[Some("1"), Some("u")]),
        Update,
        &["1", "long"],
        &["1", "long"],
    );
    // A key that is itself a TOAST value: Postgres then sends the old key.
    check(
        &update().row(b'K', &[Some("key"), None]).row(b'N', &[Some("u"), Some("b")]),
        Update,
        &["key", "b"],
        &["key", "absent"],
    );
}

#[test]
fn indexes_count_what_the_transaction_did() {
    let mut decoder = inside();
    decoder.define(table(OID + 1));
    let row = insert(&[Some("1"), None]).bytes();
    let logical =
        |flags| Message::new(b'M').u8(flags).u64(1).name("prefix").u32(2).u8(1).u8(2).bytes();
    let index = |decoded| match decoded {
        Ok(Decoded::Change(change)) => change.position.index,
        other => panic!("not a change: {other:?}"),
    };
    assert_eq!(index(decoder.decode(row.clone())), 0);
    assert_eq!(decoder.decode(logical(1)), Ok(Decoded::Other));
    assert_eq!(index(decoder.decode(row.clone())), 2);
    assert_eq!(decoder.decode(logical(0)), Ok(Decoded::Other));
    let truncate = Message::new(b'T').u32(2).u8(3).u32(OID).u32(OID + 1).bytes();
    let Ok(Decoded::Truncate(changes)) = decoder.decode(truncate) else { panic!() };
    let found: Vec<_> = changes
        .iter()
        .map(|change| (change.table.oid, change.position.index, change.action, change.row()))
        .collect();
    assert_eq!(found, [(OID, 3, Action::Truncate, None), (OID + 1, 4, Action::Truncate, None)]);
    assert_eq!(index(decoder.decode(row.clone())), 5);
    decoder.decode(commit().bytes()).unwrap();
    decoder.decode(begin().bytes()).unwrap();
    assert_eq!(index(decoder.decode(row)), 0);
}

#[test]
fn messages_out_of_place_are_refused() {
    let row = insert(&[Some("1"), None]);
    let mut outside = Decoder::new();
    outside.define(table(OID));
    let mut check = |message: &Message, name| {
        let error = Err(Error::OutsideTransaction { message: name });
        assert_eq!(outside.decode(message.bytes()), error);
    };
    check(&row, "Insert");
    check(&commit(), "Commit");
    check(&Message::new(b'T').u32(1).u8(0).u32(OID), "Truncate");
    check(&Message::new(b'M').u8(1).u64(1).name("").u32(0), "Message");
    let nested = Error::NestedTransaction { open: Lsn(COMMIT_LSN), begun: Lsn(COMMIT_LSN) };
    assert_eq!(inside().decode(begin().bytes()), Err(nested));
    let other = Message::new(b'C').u8(0).u64(5).u64(6).u64(0).bytes();
    let mismatch = Error::CommitMismatch { begun: Lsn(COMMIT_LSN), committed: Lsn(5) };
    assert_eq!(inside().decode(other), Err(mismatch));
}

#[test]
fn what_is_not_version_1_in_text_is_refused() {
    let table = "public.documents".to_owned();
    let check = |message: Message, error| {
        assert_eq!(inside().decode(message.bytes()), Err(error));
    };
    check(Message::default(), Error::Empty);
    check(Message::new(b'S').u32(1), Error::UnknownMessage { tag: b'S' });
    let binary = Message::new(b'I').u32(OID).u8(b'N').u16(2).u8(b'b').u32(1).u8(1).u8(b'n');
    check(binary, Error::BinaryCell { table: table.clone() });
    let unknown = Message::new(b'I').u32(OID).u8(b'N').u16(2).u8(b'x').u8(b'n');
    check(unknown, Error::CellFormat { table: table.clone(), format: b'x' });
    check(insert(&[None]), Error::ColumnCount { table, expected: 2, found: 1 });
    let kind = Error::RowKind { message: "Insert", kind: b'K' };
    check(Message::new(b'I').u32(OID).row(b'K', &[None, None]), kind);
    check(insert(&[None, None]).u8(0), Error::Trailing { message: "Insert", bytes: 1 });
    let undefined = Error::UndefinedTable { message: "Delete", oid: 9 };
    check(Message::new(b'D').u32(9).row(b'K', &[None, None]), undefined);
    let mut names = Message::new(b'Y').u32(1);
    names.0.extend(b"\xff\0\0");
    check(names, Error::NotUtf8 { message: "Type" });
}

fn samples() -> Vec<Message> {
    vec![
        begin(),
        commit(),
        relation(),
        insert(&[Some("1"), Some("text")]),
        update().row(b'N', &[Some("1"), Some("u")]),
        update().row(b'K', &[Some("1"), None]).row(b'N', &[Some("2"), Some("x")]),
        update().row(b'O', &[Some("1"), Some("long")]).row(b'N', &[Some("1"), Some("u")]),
        delete().row(b'O', &[Some("1"), Some("y")]),
        Message::new(b'T').u32(1).u8(0).u32(OID),
        Message::new(b'M').u8(1).u64(1).name("prefix").u32(2).u8(1).u8(2),
        Message::new(b'Y').u32(1).name("public").name("mood"),
        Message::new(b'O').u64(1).name("origin"),
    ]
}

/// A decoder in the state in which the message may arrive.
fn ready_for(message: &Message) -> Decoder {
    if message.0.first() != Some(&b'B') {
        return inside();
    }
    let mut decoder = Decoder::new();
    decoder.define(table(OID));
    decoder
}

#[test]
fn a_cut_message_is_an_error_wherever_it_is_cut() {
    for message in samples() {
        let whole = message.bytes();
        assert!(ready_for(&message).decode(whole.clone()).is_ok());
        for end in 0..whole.len() {
            let cut = ready_for(&message).decode(whole.slice(..end));
            assert!(cut.is_err(), "{whole:?} cut at {end}: {cut:?}");
        }
    }
}

/// Whatever was decoded, its cells lie within its bytes.
fn cells_are_inside(decoded: &Decoded) -> bool {
    let Decoded::Change(change) = decoded else { return true };
    change.new.iter().chain(&change.old).all(|tuple| {
        tuple.cells.iter().enumerate().all(|(index, cell)| match cell {
            Cell::Text { .. } => tuple.text(index).is_some(),
            Cell::Null | Cell::Unchanged | Cell::Absent => true,
        })
    })
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(
        tag in prop::sample::select(b"BCRIUDTMYOSx".as_slice()),
        oid in prop_oneof![Just(OID), any::<u32>()],
        rest in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        for message in [Message::new(tag), Message::new(tag).u32(oid), Message::default()] {
            let mut bytes = message.0.clone();
            bytes.extend(&rest);
            if let Ok(decoded) = ready_for(&message).decode(Bytes::from(bytes)) {
                prop_assert!(cells_are_inside(&decoded));
            }
        }
    }

    #[test]
    fn damaged_messages_never_panic(
        sample in 0..12_usize,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let message = samples().swap_remove(sample);
        let mut bytes = message.0.clone();
        for (at, byte) in &damage {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        if let Ok(decoded) = ready_for(&message).decode(Bytes::from(bytes)) {
            prop_assert!(cells_are_inside(&decoded));
        }
    }
}
