//! What the store keeps, through releases, damage, full disks and power loss.

mod damage;
mod faults;
mod vfs;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;

use super::look::Look;
use super::*;
use crate::change::{Action, Cell, Column, Grouping, Table, Tuple};
use crate::pg_type::Kind;
use crate::sink::record::{Header, Record};

/// `public.documents (id int8 primary key, body text)`.
fn table() -> Arc<Table> {
    let column = |name: &str, key: bool| Column {
        name: name.to_owned(),
        type_name: if key { "int8" } else { "text" }.to_owned(),
        kind: if key { Kind::Integer } else { Kind::Text },
        identity: key,
        primary_key: key,
    };
    Arc::new(Table {
        oid: 16_384,
        schema: "public".to_owned(),
        name: "documents".to_owned(),
        columns: vec![column("id", true), column("body", false)],
        grouping: Grouping::Key,
    })
}

fn row(id: u64, body: Option<&[u8]>) -> Tuple {
    let mut data = id.to_string().into_bytes();
    let end = |data: &[u8]| u32::try_from(data.len()).unwrap();
    let key = Cell::Text { start: 0, end: end(&data) };
    let body = match body {
        None => Cell::Unchanged,
        Some(body) => {
            let start = end(&data);
            data.extend_from_slice(body);
            Cell::Text { start, end: end(&data) }
        }
    };
    Tuple { data: Bytes::from(data), cells: [key, body].into() }
}

fn at(commit_lsn: u64, index: u64) -> Position {
    Position { commit_lsn: Lsn(commit_lsn), index }
}

fn change(position: Position, action: Action, new: Option<Tuple>, old: Option<Tuple>) -> Change {
    Change {
        position,
        commit_timestamp_us: 1_764_000_000_000_000,
        action,
        table: table(),
        new,
        old,
    }
}

fn insert_of(id: u64, position: Position, body: &[u8]) -> Change {
    change(position, Action::Insert, Some(row(id, Some(body))), None)
}

fn failure() -> Failure {
    let error = ErrorView {
        class: "oversize".to_owned(),
        status: None,
        text: "too large".to_owned(),
        body: None,
        transform: None,
    };
    let columns = vec![ColumnBytes { name: "body".to_owned(), bytes: 2_000_000 }];
    Failure { error, bytes: Some(2_000_100), columns, trace: Vec::new() }
}

fn inserted(id: u64, change: Change, state: StoredState, failure: Option<Failure>) -> Write {
    let next_attempt = (state == StoredState::Retrying)
        .then(|| UNIX_EPOCH + Duration::from_millis(1_764_000_123_456));
    Write::Insert {
        id,
        groups: Groups::of(&change),
        change: Box::new(change),
        state,
        attempts: Attempts { all: u64::from(failure.is_some()), own: 0 },
        next_attempt,
        failure,
    }
}

/// The writes of the fixture `version-1.db`: one message in each state.
fn sample() -> Vec<Write> {
    vec![
        Write::Promise(Guarantee::NumbersOnly),
        Write::SourceIdentity { system_identifier: "7321".to_owned() },
        Write::Chain { generation: 3, digest: "0b990b8ef8361330".to_owned() },
        inserted(1, insert_of(1, at(100, 0), &[b'x'; 3000]), StoredState::Parked, Some(failure())),
        inserted(
            2,
            change(at(100, 1), Action::Update, Some(row(1, None)), Some(row(1, Some(b"before")))),
            StoredState::Waiting,
            None,
        ),
        inserted(3, insert_of(2, at(200, 0), b"two"), StoredState::Retrying, Some(failure())),
        inserted(4, insert_of(3, at(300, 0), b"three"), StoredState::Parked, Some(failure())),
        Write::Checkpoint(Checkpoint {
            position: at(250, 7),
            seq: Some(42),
            reached: 50,
            confirm: Lsn(260),
        }),
        Write::Acknowledge { id: 4 },
    ]
}

/// What a file holds, as far as anybody can ask: everything that a start is told, and each change.
async fn contents(store: &Store, loaded: &Loaded) -> Result<String, Error> {
    let mut text = format!("{loaded:?}");
    let ids: Vec<u64> = loaded.messages.iter().map(|known| known.id).collect();
    for id in ids {
        for Message { id, change, parts, .. } in store.read(vec![id], usize::MAX).await? {
            text.push_str(&format!("\n{id} {change:?} {parts:?}"));
        }
    }
    Ok(text)
}

/// Opens a folder and reads all of it, as far as it can be read.
fn look(dir: &Path) -> Result<String, Error> {
    let read = || {
        let (store, loaded) = Store::open(dir)?;
        runtime().block_on(contents(&store, &loaded))
    };
    // A thread of its own, because a test's may run other futures.
    std::thread::scope(|scope| scope.spawn(read).join().unwrap())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

/// A change as it can be compared: where its values lie does not matter.
fn values(change: &Change) -> String {
    let row = |row: &Option<Tuple>| {
        let row = row.as_ref()?;
        let cell = |(column, cell): (usize, &Cell)| match cell {
            Cell::Text { .. } => String::from_utf8_lossy(row.text(column).unwrap()).into_owned(),
            Cell::Null | Cell::Unchanged | Cell::Absent => format!("{cell:?}"),
        };
        Some(row.cells.iter().enumerate().map(cell).collect::<Vec<_>>())
    };
    let Change { position, action, table, commit_timestamp_us, new, old } = change;
    let (new, old) = (row(new), row(old));
    format!("{position} {action} {commit_timestamp_us} {table:?} {new:?} {old:?}")
}

/// Does something with a store, and waits until its file is closed.
async fn with_store<T>(dir: &Path, work: impl AsyncFnOnce(Store, Loaded) -> T) -> T {
    let (store, loaded) = Store::open(dir).unwrap();
    let done = work(store, loaded).await;
    until_closed(dir);
    done
}

/// The thread has the folder locked until it has closed the file.
fn until_closed(dir: &Path) {
    let lock = File::create(dir.join("lock")).unwrap();
    lock.lock().unwrap();
}

/// Numbers that look random and repeat from their seed (splitmix64).
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    /// `SLUICEBOX_SEED`, or the clock. Printed, so that a failure repeats.
    fn seed() -> u64 {
        let seed = match std::env::var("SLUICEBOX_SEED") {
            Ok(text) => text.parse().expect("SLUICEBOX_SEED is a number"),
            Err(_) => u64::from(UNIX_EPOCH.elapsed().unwrap().subsec_nanos()),
        };
        eprintln!("seed: SLUICEBOX_SEED={seed}");
        seed
    }

    /// From 0 to `end`, exclusive.
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % end
    }
}

#[tokio::test]
async fn spilled_changes_come_back_as_they_went_in_across_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let large: Vec<u8> = (0..3_500_000_u32).map(|byte| byte.to_le_bytes()[0]).collect();
    let both = change(at(20, 1), Action::Update, Some(row(2, None)), Some(row(2, Some(b"old"))));
    let truncate = change(at(20, 2), Action::Truncate, None, None);
    let chunks = [
        vec![insert_of(1, at(10, 0), b"one"), insert_of(2, at(20, 0), &large), both, truncate],
        vec![insert_of(3, at(30, 0), b"three")],
    ];
    let spill =
        |id: u64| Write::Spill { id, changes: chunks[usize::try_from(id - 1).unwrap()].clone() };
    with_store(dir.path(), async |store, _| {
        store.write(vec![spill(1), spill(2)].into()).await.unwrap();
    })
    .await;
    let (store, loaded) = Store::open(dir.path()).unwrap();
    assert_eq!(loaded.spilled, [Chunk::of(1, &chunks[0]), Chunk::of(2, &chunks[1])]);
    for (after, id) in [(0, 1), (1, 2)] {
        let (found, changes) = store.read_spill(after).await.unwrap().unwrap();
        assert_eq!(found, id);
        let wanted = &chunks[usize::try_from(id - 1).unwrap()];
        assert_eq!(
            changes.iter().map(values).collect::<Vec<_>>(),
            wanted.iter().map(values).collect::<Vec<_>>()
        );
        assert!(Arc::ptr_eq(&changes[0].table, &changes[changes.len() - 1].table));
    }
    assert_eq!(store.read_spill(2).await.unwrap(), None);
    store.write(vec![Write::Unspill { through: 1 }].into()).await.unwrap();
    assert_eq!(store.read_spill(0).await.unwrap().unwrap().0, 2);
}

/// It stood still between the lock and its first transaction, and wakes up when another is the owner.
#[test]
fn a_process_that_was_taken_over_from_before_it_began_does_not_begin() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Database::open(dir.path(), false, Connection::open).unwrap();
    assert!(matches!(
        Database::open(dir.path(), false, Connection::open),
        Err(Error::Locked { pid: Some(pid), .. }) if pid == std::process::id()
    ));
    let mut second = Database::open(dir.path(), true, Connection::open).unwrap();
    second.load(&mut rand::rng()).unwrap();
    assert!(matches!(first.load(&mut rand::rng()), Err(Error::TakenOver)));
    second.write(&[Write::Chain { generation: 1, digest: String::new() }]).unwrap();
}

/// Nothing is written, and nothing is asked for.
#[test]
fn a_process_that_was_taken_over_from_learns_it_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let (first, _) = Store::open(dir.path()).unwrap();
    let (second, _) = Store::open_from(dir.path(), true).unwrap();
    while !first.is_taken_over() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(!second.is_taken_over());
}

#[test]
fn what_was_given_up_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Look::open(dir.path()).unwrap().is_none());
    let mut database = Database::open(dir.path(), false, Connection::open).unwrap();
    database.load(&mut rand::rng()).unwrap();
    for id in 1..=3 {
        let change = insert_of(id, at(100 * id, 0), b"x");
        let parked = inserted(id, change, StoredState::Parked, Some(failure()));
        database.write(&[parked]).unwrap();
    }
    // The second time it is gone already; the checkpoint takes the tombstone.
    let give_up = |id| Write::Acknowledge { id };
    database.write(&[give_up(2), give_up(3)]).unwrap();
    let checkpoint = Checkpoint { position: at(1000, 0), ..Checkpoint::default() };
    database.write(&[give_up(2), Write::Checkpoint(checkpoint)]).unwrap();
    let look = Look::open(dir.path()).unwrap().unwrap();
    let all = look.given_up().unwrap();
    assert_eq!(all.count, 2);
    let found: Vec<_> =
        all.newest.iter().map(|one| (&*one.table, one.key["id"].as_u64())).collect();
    assert_eq!(found, [("public.documents", Some(2)), ("public.documents", Some(3))]);
}

/// Before its stream was ever opened, a checkpoint has no number to read it from; from then on none takes it
/// away, whichever of two transactions came first.
#[test]
fn a_checkpoint_without_a_number_leaves_what_is_there() {
    let mut database = Database::shared("without_a_number").unwrap();
    let loaded = |database: &mut Database| {
        database.load(&mut rand::rng()).unwrap().checkpoint.map(
            |Checkpoint { position, seq, reached, confirm }| {
                assert_eq!(reached, seq.unwrap_or_default());
                (position.index, seq, confirm.0)
            },
        )
    };
    let write = |index, seq: Option<u64>, confirm| {
        let (position, reached) = (at(1, index), seq.unwrap_or_default());
        Write::Checkpoint(Checkpoint { position, seq, reached, confirm: Lsn(confirm) })
    };
    assert_eq!(loaded(&mut database), None);
    for (writes, expected) in [
        (vec![write(1, None, 10)], (1, None, 10)),
        (vec![Write::Begin { seq: 0 }], (1, Some(0), 10)),
        (vec![write(2, None, 20)], (2, Some(0), 20)),
        (vec![Write::Begin { seq: 7 }], (2, Some(7), 20)),
        (vec![write(3, Some(9), 30), write(4, None, 40)], (4, Some(9), 40)),
    ] {
        database.write(&writes).unwrap();
        assert_eq!(loaded(&mut database), Some(expected), "{writes:?}");
    }
    // Its checksum, too.
    schema::prepare(&mut database.connection).unwrap();
    let mut fresh = Database::shared("begins_at_once").unwrap();
    fresh.load(&mut rand::rng()).unwrap();
    fresh.write(&[Write::Begin { seq: 3 }]).unwrap();
    assert_eq!(loaded(&mut fresh), Some((0, Some(3), 0)));
}

#[test]
fn another_process_sees_what_is_held_and_where_it_was_routed_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut database = Database::open(dir.path(), false, Connection::open).unwrap();
    database.load(&mut rand::rng()).unwrap();
    let (new, old) = (row(7, Some(b"x")), row(6, Some(b"y")));
    let moved = change(at(700, 1), Action::Update, Some(new), Some(old));
    let truncate = change(at(800, 0), Action::Truncate, None, None);
    let parked = |id, change| inserted(id, change, StoredState::Parked, Some(failure()));
    let stream = |name: &str, seq| Write::Stream { name: name.into(), seq, reached: 9 };
    let spilled = vec![insert_of(8, at(900, 0), b"z"), insert_of(9, at(900, 1), b"z")];
    database
        .write(&[
            parked(1, insert_of(1, at(100, 0), b"x")),
            parked(2, moved),
            parked(3, truncate),
            parked(4, insert_of(4, at(400, 0), b"x")),
            Write::Acknowledge { id: 4 },
            stream("cdc/a", Some(5)),
            Write::Spill { id: 1, changes: spilled },
        ])
        .unwrap();
    // Nothing of it is to be read when all of it is settled.
    database.draw_token(Some("cdc/b"), 1).unwrap();
    database.write(&[stream("cdc/b", Some(1)), stream("cdc/b", None)]).unwrap();
    let look = Look::open(dir.path()).unwrap().unwrap();
    let mut held = Vec::new();
    look.undelivered(|message| {
        let keys: Vec<_> = message.keys.iter().map(|key| key["id"].as_i64()).collect();
        held.push((message.position, keys));
    })
    .unwrap();
    let expected =
        [(at(100, 0), vec![Some(1)]), (at(700, 1), vec![Some(7), Some(6)]), (at(800, 0), vec![])];
    assert_eq!(held, expected);
    assert_eq!(look.streams().unwrap(), ["cdc/a", "cdc/b"].map(str::to_owned).into());
    assert_eq!(look.pipeline_id().unwrap().map(|id| id.len()), Some(16));
    let mut positions = Vec::new();
    look.spilled(|change| positions.push(change.position)).unwrap();
    assert_eq!(positions, [at(900, 0), at(900, 1)]);
}

#[test]
fn parts_come_back_as_they_went_in_as_far_as_they_were_not_sent() {
    let dir = tempfile::tempdir().unwrap();
    let record = |number: u8| {
        let header =
            |name: &'static str, value: Vec<u8>| Header { name: name.into(), value: value.into() };
        Record {
            timestamp_ms: (number > 0).then_some(u64::from(number)),
            headers: [header("sb-part", vec![b'0' + number]), header("odd", vec![0, 255, number])]
                .into_iter()
                .collect(),
            body: vec![number; 300_000 * usize::from(number)].into(),
        }
    };
    let records: Vec<Record> = (0..5).map(record).collect();
    let parts = |stream: Option<&str>| Parts {
        stream: stream.map(Arc::from),
        first: 0,
        records: records.clone(),
    };
    let left = |first: usize, stream: Option<&str>| {
        Some(Parts { first: first as u64, records: records[first..].to_vec(), ..parts(stream) })
    };
    let write = |writes: Vec<Write>| {
        let mut database = Database::open(dir.path(), false, Connection::open).unwrap();
        let loaded = database.load(&mut rand::rng()).unwrap();
        database.write(&writes).unwrap();
        let read = database.read(&[1, 2], usize::MAX).unwrap();
        let known: Vec<_> = loaded.messages.into_iter().map(|known| known.parts).collect();
        (known, read.into_iter().map(|message| message.parts).collect::<Vec<_>>())
    };
    let message =
        |id: u64| inserted(id, insert_of(id, at(id, 0), b"x"), StoredState::Waiting, None);
    let (known, read) = write(vec![
        message(1),
        message(2),
        Write::Parts { id: 1, parts: Some(parts(None)) },
        Write::Parts { id: 2, parts: Some(parts(Some("else/where"))) },
    ]);
    assert_eq!((known, read), (vec![], vec![left(0, None), left(0, Some("else/where"))]));
    let (known, read) =
        write(vec![Write::PartsSent { id: 1, below: 3 }, Write::Parts { id: 2, parts: None }]);
    let of =
        |first, stream: Option<&str>| Some(KnownParts { stream: stream.map(Arc::from), first });
    assert_eq!(known, [of(0, None), of(0, Some("else/where"))]);
    assert_eq!(read, [left(3, None), None]);
    let (known, read) = write(vec![Write::Acknowledge { id: 1 }, Write::Remove { id: 2 }]);
    assert_eq!((known, read), (vec![of(3, None), None], vec![]));
    assert_eq!(write(vec![]).0, [None], "the mark has none");
}

#[test]
fn dead_letters_are_counted_and_the_newest_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let mut database = Database::open(dir.path(), false, Connection::open).unwrap();
    assert_eq!(database.load(&mut rand::rng()).unwrap().dead_letters, 0);
    for id in 1..=5 {
        let change = insert_of(id, at(id, 0), b"x");
        database
            .write(&[
                inserted(id, change, StoredState::Retrying, Some(failure())),
                Write::DeadLetter { id },
                Write::LetterFile(LetterFile { path: "dead".to_owned(), end: id * 10 }),
                // It counts once.
                Write::DeadLetter { id },
            ])
            .unwrap();
    }
    // Each leaves a mark until the checkpoint has passed it.
    let passed = Checkpoint { position: at(3, 0), ..Checkpoint::default() };
    database.write(&[Write::Checkpoint(passed)]).unwrap();
    let loaded = database.load(&mut rand::rng()).unwrap();
    let marks: Vec<_> = loaded.messages.iter().map(|known| (known.id, known.state)).collect();
    assert_eq!(marks, [4, 5].map(|id| (id, StoredState::Acknowledged)));
    assert_eq!(loaded.dead_letters, 5);
    assert_eq!(loaded.letter_file, Some(LetterFile { path: "dead".to_owned(), end: 50 }));
    let list = |after: Option<u64>, table: Option<&str>| {
        let filter = control::Filter {
            state: Some("dead".to_owned()),
            table: table.map(str::to_owned),
            ..control::Filter::default()
        };
        let query = PageQuery { filter, after, limit: 2 };
        let list = view::list(&database.connection, &query, &HashSet::new()).unwrap();
        let ids: Vec<String> = list.messages.iter().map(|message| message.id.clone()).collect();
        (ids.join(" "), list.next, list.total)
    };
    assert_eq!(list(None, None), ("1 2".to_owned(), Some("2".to_owned()), 5));
    assert_eq!(list(Some(4), Some("documents")), ("5".to_owned(), None, 5));
    assert_eq!(list(None, Some("public.other")), (String::new(), None, 0));
    let look = Look::open(dir.path()).unwrap().unwrap();
    assert_eq!(look.dead_letters().unwrap().len(), 5);
}

#[test]
fn a_message_that_was_there_is_told_from_one_that_never_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut database = Database::open(dir.path(), false, Connection::open).unwrap();
    database.load(&mut rand::rng()).unwrap();
    let answers = |database: &Database, id: u64| {
        let shown = view::show(&database.connection, id, &HashSet::new()).unwrap_err();
        let filter = control::Filter { id: Some(id), ..control::Filter::default() };
        let selected = view::select(&database.connection, &filter).unwrap_err();
        assert_eq!(shown.to_string(), selected.to_string());
        shown.to_string()
    };
    assert_eq!(answers(&database, 1), "this store has never had a message 1, nor any other");
    let insert = |id| {
        let change = insert_of(id, at(id, 0), b"x");
        inserted(id, change, StoredState::Retrying, Some(failure()))
    };
    database.write(&[insert(1), Write::Remove { id: 1 }]).unwrap();
    assert!(answers(&database, 2).ends_with("message 2: the only one was number 1"));
    let more = [insert(2), insert(3), Write::Remove { id: 3 }, Write::Acknowledge { id: 2 }];
    database.write(&more).unwrap();
    for id in 1..=3 {
        let text = answers(&database, id);
        assert!(text.starts_with(&format!("there is no message {id} in the store")), "{text}");
    }
    for id in [0, 4, u64::MAX] {
        let expected =
            format!("this store has never had a message {id}: their numbers were 1 to 3");
        assert_eq!(answers(&database, id), expected);
    }
}

#[test]
fn a_new_chain_makes_what_is_parked_due_in_its_own_transaction() {
    let mut database = Database::shared("due_by_chain").unwrap();
    database.load(&mut rand::rng()).unwrap();
    let parked =
        |id| inserted(id, insert_of(id, at(id, 0), b"x"), StoredState::Parked, Some(failure()));
    let waiting = inserted(3, insert_of(3, at(3, 0), b"x"), StoredState::Waiting, None);
    database.write(&[parked(1), parked(2), waiting]).unwrap();
    database.write(&[Write::Chain { generation: 2, digest: "new".to_owned() }]).unwrap();
    let loaded = database.load(&mut rand::rng()).unwrap();
    let states: Vec<_> = loaded.messages.iter().map(|known| known.state).collect();
    assert_eq!(states, [StoredState::Retrying, StoredState::Retrying, StoredState::Waiting]);
    let now = SystemTime::now();
    let is_due = |known: &Known| known.next_attempt.is_some_and(|at| at <= now);
    assert!(loaded.messages[..2].iter().all(is_due), "{:?}", loaded.messages);
    // Their checksums, too.
    schema::prepare(&mut database.connection).unwrap();
}

#[test]
fn the_token_in_force_is_never_forgotten() {
    let mut database = Database::shared("token_in_force").unwrap();
    database.load(&mut rand::rng()).unwrap();
    for stream in [None, Some("cdc/a")] {
        let before = database.draw_token(stream, 1).unwrap();
        let Tokens { next: token, known, .. } = database.draw_token(stream, 1).unwrap();
        assert_eq!(known, [before.next, token.clone()], "either may be in force");
        let name = stream.map(Arc::from);
        database.write(&[Write::InForce { stream: name, token: token.clone() }]).unwrap();
        let mut drawn = Vec::new();
        // As many starts that die before S2 has answered.
        for _ in 0..TOKENS_MAX + 7 {
            let tokens = database.draw_token(stream, 1).unwrap();
            assert_eq!(tokens.known[0], token);
            drawn.push(tokens.next);
            let newest = drawn.len().min(TOKENS_MAX - 1);
            assert_eq!(tokens.known[1..], drawn[drawn.len() - newest..]);
        }
    }
}

#[test]
fn how_far_a_stream_has_reached_outlasts_what_is_unsettled_in_it() {
    let mut database = Database::shared("reached").unwrap();
    database.load(&mut rand::rng()).unwrap();
    let name = "cdc/a";
    let reached = |database: &mut Database| database.draw_token(Some(name), 1).unwrap().reached;
    assert_eq!(reached(&mut database), 0);
    for (seq, number) in [(Some(0), 1), (Some(5), 9), (None, 12), (Some(12), 12), (None, 3)] {
        database.write(&[Write::Stream { name: name.into(), seq, reached: number }]).unwrap();
        assert_eq!(reached(&mut database), number);
        let row = seq.map(|seq| StreamRow { name: name.to_owned(), seq, reached: number });
        let loaded = database.load(&mut rand::rng()).unwrap();
        assert_eq!(loaded.streams, row.into_iter().collect::<Vec<_>>());
    }
    // Its checksum, too.
    schema::prepare(&mut database.connection).unwrap();
    assert_eq!(database.draw_token(None, 1).unwrap().reached, 0, "of another stream");
}

#[tokio::test]
async fn what_is_read_from_is_remembered_as_it_was_last() {
    let dir = tempfile::tempdir().unwrap();
    let id = |name: &str, oid| PublicationId { name: name.to_owned(), oid };
    with_store(dir.path(), async |store, loaded| {
        assert_eq!((loaded.source_identity, loaded.publication), (None, None));
        for (system, oid) in [("7321", 16_400), ("7322", 4_000_000_000)] {
            let system_identifier = system.to_owned();
            let writes = vec![
                Write::SourceIdentity { system_identifier },
                Write::Publication(id("a name", oid)),
            ];
            store.write(writes.into()).await.unwrap();
        }
    })
    .await;
    with_store(dir.path(), async |_, loaded| {
        assert_eq!(loaded.source_identity.as_deref(), Some("7322"));
        assert_eq!(loaded.publication, Some(id("a name", 4_000_000_000)));
    })
    .await;
}
