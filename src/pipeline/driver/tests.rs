//! Moments that a seed of the [simulation](crate::simulation) seldom or never draws: the driver is put
//! into them by hand, on a real store, with an S2 that does not answer.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use rand::SeedableRng as _;
use reqwest::Request;

use super::*;
use crate::change::{Action, Cell, Change, Column, Grouping, Lsn, Table, Tuple};
use crate::config::{LetterPlace, SpillAfter};
use crate::pg_type::Kind;
use crate::pipeline::heartbeat::heartbeat;
use crate::pipeline::item::{Item, Shaped};
use crate::pipeline::outbox::Parcel;
use crate::pipeline::place::{Floors, LaneId};
use crate::pipeline::sample::Sample;
use crate::pipeline::size_gate;
use crate::pipeline::workers::Job;
use crate::sink::record::Record;
use crate::sink::transport::{self, Answering, Transport};
use crate::sink::{Endpoint, Settings as SinkSettings};
use crate::source::{self, SourceStatus};
use crate::store::{Failure, Task};

/// An S2 that never answers.
#[derive(Debug)]
struct Silent;

impl Transport for Silent {
    fn execute(&self, _: transport::Lane, _: Request) -> Answering {
        Box::pin(std::future::pending())
    }
}

/// A driver, and what it would have outside.
struct Bench {
    driver: Driver,
    tasks: Arc<Mutex<Vec<Task>>>,
    database: store::Database,
    outside: (watch::Receiver<Status>, mpsc::Sender<source::Batch>, watch::Sender<SourceStatus>),
}

impl Bench {
    fn new(dead_letters: Option<DeadLetters>) -> Self {
        Self::after(Arc::default(), dead_letters)
    }

    /// On a store of an earlier process that wrote this.
    fn after(written: Arc<[Write]>, dead_letters: Option<DeadLetters>) -> Self {
        let mut database = store::Database::shared("").unwrap();
        let tasks = Arc::<Mutex<Vec<Task>>>::default();
        let queue = Arc::clone(&tasks);
        let store = Store::over(&database, move |task| queue.lock().unwrap().push(task));
        let load = |database: &mut store::Database| {
            database.load(&mut SmallRng::seed_from_u64(1)).unwrap()
        };
        let mut loaded = load(&mut database);
        if !written.is_empty() {
            // What is asked for is handed over when it is waited for.
            let mut writing = std::pin::pin!(store.write(written));
            assert!(writing.as_mut().now_or_never().is_none());
            let task = tasks.lock().unwrap().pop().unwrap();
            assert!(task.carry_out(&mut database));
            loaded = load(&mut database);
        }
        let (batches_in, batches) = mpsc::channel(8);
        let (status_in, source_status) = watch::channel(SourceStatus::default());
        let source = Source {
            batches,
            confirm: watch::channel(Lsn(0)).0,
            status: source_status,
            reconnect: watch::channel(()).0,
            task: tokio::spawn(async {}),
        };
        let (status, published) = watch::channel(Status::default());
        let settings = SinkSettings {
            endpoint: Endpoint::Url("http://s2.silent".to_owned()),
            ..SinkSettings::new("the-basin", "changes")
        };
        let parts = Parts {
            settings: Settings {
                window: Window { linger: Duration::ZERO, bytes_max: 1 << 20 },
                retry: Backoff { min: Duration::from_secs(1), max: Duration::from_secs(5) },
                dead_letters,
                bounds: Bounds {
                    spill_after: SpillAfter::Bytes(1 << 30),
                    spill_bytes_max: 0,
                    store_bytes_max: 1 << 30,
                },
                portions: Portions::default(),
                stuck_after: Duration::from_secs(60),
                guarantee: None,
                grants: Grants::default(),
                pipeline_name: "bench".to_owned(),
                database_name: "bench".to_owned(),
                hostname: "bench".to_owned(),
                unguarded: false,
            },
            store,
            loaded,
            source,
            budget: Arc::new(ByteBudget::new(1 << 20)),
            chains: watch::channel(Arc::new(Chain::empty(0))).1,
            sampler: Sampler::new(Sample::default()),
            workers: Workers::over(1, |_| true),
            letters: crate::pipeline::dead_letter::writer::Writer::start(),
            client: Client::over(Arc::new(Silent), settings).unwrap(),
            clock: Clock::starting_at(std::time::UNIX_EPOCH + Duration::from_secs(1_764_000_000)),
            rng: SmallRng::seed_from_u64(2),
            status,
            heart: heartbeat().0,
            shutdown: CancellationToken::new(),
        };
        let driver = Driver::new(parts, mpsc::unbounded_channel().0).unwrap();
        Self { driver, tasks, database, outside: (published, batches_in, status_in) }
    }

    /// Has everything written that is due.
    async fn written(&mut self) {
        self.driver.delivered = true;
        self.driver.saved_at -= IDLE_CHECKPOINT_INTERVAL;
        self.driver.write(self.driver.clock.now());
        // What is asked for is handed over when it is waited for.
        if let Some(writing) = &mut self.driver.writing {
            assert!(futures_util::poll!(&mut writing.done).is_pending());
        }
        let tasks: Vec<Task> = self.tasks.lock().unwrap().drain(..).collect();
        for task in tasks {
            assert!(task.carry_out(&mut self.database));
        }
        assert!(self.driver.writing.is_some(), "there is something to write");
        let result = done(&mut self.driver.writing).await;
        self.driver.on_written(result).unwrap();
    }

    /// What a restart would find.
    fn loaded(&mut self) -> store::Loaded {
        self.database.load(&mut SmallRng::seed_from_u64(1)).unwrap()
    }

    /// Records of a stream are gone, of which ours end here, and an operator chose to skip.
    fn skips_to(&mut self, lane: LaneId, newest: Position) {
        self.skips_behind(lane, &HashMap::from([(newest, 7)]));
    }

    /// The same, where these of ours are left.
    fn skips_behind(&mut self, lane: LaneId, landed: &HashMap<Position, u64>) {
        let choice = crate::pipeline::grants::LostRecords::Skip;
        let lost = crate::pipeline::link::Lost { choice, behind: 5 };
        self.driver.on_lost_records(lane, lost, landed);
    }

    fn routed(&mut self, name: &str) -> LaneId {
        let row = store::StreamRow { name: name.to_owned(), seq: 0, reached: 0 };
        self.driver.adopt_streams(vec![row]).unwrap();
        self.driver.lanes.id(name).unwrap()
    }

    /// A change that comes from the source.
    async fn read(&mut self, at: Position) -> Item {
        let change = insert(at);
        self.driver.budget.acquire(change.bytes()).await;
        self.driver.holds.pass(at);
        Item { origin: Origin::Source { entry: self.driver.tracker.read(at) }, change }
    }

    /// A message that has failed so often that it is to become a dead letter, just read from the store.
    async fn spent(&mut self, at: Position) -> store::Message {
        let item = self.read(at).await;
        let change = item.change.clone();
        let failure = failure("oversize");
        let id = self.driver.park(item, failure.clone(), keep::MadeBy::Current);
        self.written().await;
        self.driver.holds.request(id);
        let due = self.driver.holds.next_due(self.driver.clock.now(), self.driver.stored);
        assert_eq!(due, Some(id));
        self.driver.dead.spend(id);
        self.driver.dead.is_said(id);
        let failure = Some(serde_json::to_string(&failure).unwrap());
        store::Message { id, change, parts: None, failure }
    }
}

/// The messages that a restart would find, and how it would.
fn known(loaded: &store::Loaded) -> Vec<(Position, StoredState)> {
    loaded.messages.iter().map(|known| (known.position, known.state)).collect()
}

fn insert(position: Position) -> Change {
    let id = position.index.to_string().into_bytes();
    let end = u32::try_from(id.len()).unwrap();
    let cells = [Cell::Text { start: 0, end }].into();
    let column = Column {
        name: "id".to_owned(),
        type_name: "int8".to_owned(),
        kind: Kind::Integer,
        identity: true,
        primary_key: true,
    };
    Change {
        position,
        commit_timestamp_us: 0,
        action: Action::Insert,
        table: Arc::new(Table {
            oid: 1,
            schema: "public".to_owned(),
            name: "items".to_owned(),
            columns: vec![column],
            grouping: Grouping::Key,
        }),
        new: Some(Tuple { data: Bytes::from(id), cells }),
        old: None,
    }
}

fn failure(class: &str) -> Failure {
    let mut failure = routed::route_failure("of the test".to_owned());
    failure.error.class = class.to_owned();
    failure
}

fn at(index: u64) -> Position {
    Position { commit_lsn: Lsn(100), index }
}

fn into_a_file(dir: &std::path::Path) -> Option<DeadLetters> {
    let place = LetterPlace::File(dir.join("dead.jsonl"));
    Some(DeadLetters { max_attempts: 1, place })
}

/// Runs what writes letters, and says what came of it.
async fn letters_written(bench: &mut Bench) {
    if !bench.driver.dead.is_idle() {
        let done = dead::written(&mut bench.driver.dead).await;
        bench.driver.on_letters(done);
    }
}

#[tokio::test]
async fn what_is_skipped_of_a_routed_stream_is_on_disk_before_anything_follows() {
    let mut bench = Bench::new(None);
    bench.driver.lanes.own.acknowledged = Some(0);
    let lane = bench.routed("orders");
    bench.skips_to(lane, at(2));
    bench.written().await;
    assert!(!bench.driver.begins_elsewhere);
    // The first is for another stream, and on its way.
    bench.read(at(1)).await;
    let skipped = bench.read(at(2)).await;
    let record =
        Record { timestamp_ms: None, headers: [].into_iter().collect(), body: Bytes::new() };
    let record = size_gate::check(record).unwrap().routed_to(Some("orders".into()));
    bench.driver.forward_parcel(Parcel::new(skipped, vec![record]));
    assert!(bench.driver.begins_elsewhere, "nothing follows before it is written down");
    bench.written().await;
    assert!(!bench.driver.begins_elsewhere);
    // A restart knows it, and that it has to read the one before it.
    let loaded = bench.loaded();
    assert!(loaded.checkpoint.unwrap().position < at(1));
    assert_eq!(known(&loaded), [(at(2), StoredState::Acknowledged)]);
}

#[tokio::test]
async fn how_far_an_operator_skips_does_not_grow_with_the_log() {
    let mut bench = Bench::new(None);
    bench.driver.lanes.own.acknowledged = Some(0);
    let lane = bench.routed("orders");
    for lane in [LaneId::OWN, lane] {
        bench.skips_behind(lane, &HashMap::new());
    }
    let ends_at = |bench: &Bench, lsn| {
        let identity =
            source::Identity { system_identifier: "7".to_owned(), timeline: 1, wal_end: Lsn(lsn) };
        bench.outside.2.send_modify(|status| status.identity = Some(identity));
    };
    ends_at(&bench, 101);
    let first = bench.read(at(1)).await;
    assert!(bench.driver.skips(at(1)) && bench.driver.skips_in(lane, &first));
    // The source has connected anew, and more was committed.
    ends_at(&bench, 201);
    let newer = bench.read(Position { commit_lsn: Lsn(150), index: 0 }).await;
    assert!(!bench.driver.skips(newer.change.position), "it was committed after the choice");
    assert!(!bench.driver.skips_in(lane, &newer), "it was committed after the choice");
}

#[tokio::test]
async fn what_an_operator_skips_is_not_spilled() {
    let mut bench = Bench::new(None);
    bench.driver.lanes.own.acknowledged = Some(0);
    bench.driver.begin_to_spill(true);
    let batch = |range: std::ops::Range<u64>| source::Batch {
        bytes: range.clone().map(|index| insert(at(index)).bytes()).sum(),
        items: range.map(|index| source::Item::Change(insert(at(index)))).collect(),
    };
    bench.driver.budget.acquire(3 * insert(at(1)).bytes()).await;
    bench.driver.on_batch(batch(1..2)).unwrap();
    bench.skips_to(LaneId::OWN, at(2));
    bench.driver.on_batch(batch(2..4)).unwrap();
    bench.written().await;
    assert_eq!(bench.driver.budget.bytes_out(), 0);
    // A restart knows it, and sends what was spilled: the first before the choice, and the third is new.
    let loaded = bench.loaded();
    assert_eq!(loaded.spilled.iter().map(|chunk| chunk.changes).sum::<u64>(), 2);
    assert!(loaded.checkpoint.unwrap().position < at(1));
    assert_eq!(known(&loaded), [(at(2), StoredState::Acknowledged)]);
}

#[tokio::test]
async fn a_message_that_an_operator_skips_is_no_second_one() {
    let mut bench = Bench::new(None);
    bench.driver.lanes.own.acknowledged = Some(0);
    let item = bench.read(at(2)).await;
    bench.driver.park(item, failure("oversize"), keep::MadeBy::Current);
    bench.written().await;
    bench.driver.begin_to_spill(true);
    bench.driver.replayed.insert(at(2));
    bench.skips_to(LaneId::OWN, at(2));
    let change = insert(at(2));
    bench.driver.budget.acquire(change.bytes()).await;
    let bytes = change.bytes();
    let items = vec![source::Item::Change(change)];
    bench.driver.on_batch(source::Batch { items, bytes }).unwrap();
    bench.written().await;
    assert_eq!(bench.driver.budget.bytes_out(), 0);
    let loaded = bench.loaded();
    assert_eq!(known(&loaded), [(at(2), StoredState::Parked)]);
}

#[tokio::test]
async fn what_left_the_store_before_it_was_known_to_be_there_is_not_looked_for() {
    let mut bench = Bench::new(None);
    bench.driver.lanes.own.acknowledged = Some(0);
    let lane = bench.routed("orders");
    let item = bench.read(at(1)).await;
    bench.driver.park(item, failure("route"), keep::MadeBy::Current);
    // Its stream is read, as a whole and for what was in doubt, while it is being written down.
    for _ in 0..2 {
        bench.driver.apply_landed(lane, [(at(1), 7)].into_iter());
    }
    let mut floors = Floors::default();
    bench.driver.doubts.add_found(&mut floors);
    assert_eq!(floors.of(lane), None, "it would keep the stream's row for ever");
    bench.written().await;
    assert!(bench.driver.holds.is_empty());
}

#[tokio::test]
async fn a_spent_message_that_is_found_in_its_stream_becomes_no_dead_letter() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(into_a_file(dir.path()));
    let lane = bench.routed("orders");
    let message = bench.spent(at(1)).await;
    bench.driver.doubt_all(vec![(at(1), lane)]);
    bench.driver.end_doubts(lane, &HashMap::from([(at(1), 7)]));
    bench.driver.on_spent_read(message).unwrap();
    letters_written(&mut bench).await;
    bench.written().await;
    assert!(!dir.path().join("dead.jsonl").exists(), "it is delivered");
    assert!(bench.driver.holds.is_empty());
}

#[tokio::test]
async fn a_spent_message_that_may_be_in_a_stream_waits_until_that_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(into_a_file(dir.path()));
    let lane = bench.routed("orders");
    let message = bench.spent(at(1)).await;
    let id = message.id;
    bench.driver.doubt_all(vec![(at(1), lane)]);
    bench.driver.on_spent_read(message).unwrap();
    letters_written(&mut bench).await;
    assert!(!dir.path().join("dead.jsonl").exists(), "nobody knows whether it is delivered");
    assert!(bench.driver.holds.is_idle(id));
    // It is there.
    bench.driver.end_doubts(lane, &HashMap::from([(at(1), 7)]));
    bench.written().await;
    assert!(bench.driver.holds.is_empty());
}

/// Hands over what a chain made of a change: one record for the pipeline's own stream.
fn shaped(bench: &mut Bench, item: Item) {
    let record =
        Record { timestamp_ms: None, headers: [].into_iter().collect(), body: Bytes::new() };
    let shaped = Shaped::Records(vec![size_gate::check(record).unwrap()]);
    assert!(bench.driver.on_shaped(item, shaped, keep::MadeBy::Current).is_none());
}

#[tokio::test]
async fn a_stream_that_is_shut_before_it_was_read_is_read_before_what_it_may_have_is_sent() {
    let mut bench = Bench::new(None);
    bench.driver.lanes.own.acknowledged = Some(0);
    bench.driver.lanes.own.unread = false;
    let lane = bench.routed("orders");
    bench.driver.check_established();
    assert!(!bench.driver.established, "it may be read yet");
    let fatal = crate::sink::error::Error::Settings { text: "of the test".to_owned() };
    assert!(matches!(fatal.class(), crate::sink::error::Class::Fatal { .. }));
    bench.driver.on_sink_error(lane, &fatal).unwrap();
    assert!(bench.driver.established, "all that is not concerned goes on");

    bench.outside.2.send_modify(|status| status.taken_at = Some(Lsn(101)));
    let (first, second) = (bench.read(at(1)).await, bench.read(at(2)).await);
    let newer = Position { commit_lsn: Lsn(101), index: 7 };
    let newer = bench.read(newer).await;
    shaped(&mut bench, first);
    let dropped = bench.driver.on_shaped(second, Shaped::Dropped, keep::MadeBy::Current);
    assert!(dropped.is_none());
    shaped(&mut bench, newer);
    assert_eq!(bench.driver.lanes.own.outbox.size().0, 1, "the newer one");
    bench.written().await;
    let stored: Vec<_> = bench.driver.holds.positions().map(|(at, _)| at).collect();
    assert_eq!(stored.len(), 2, "{stored:?}");
    assert!(stored.iter().all(|at| bench.driver.is_in_doubt(*at)), "nobody gives them up now");

    // The stream can be read, and has one of them. Another is on its way through the transforms.
    let third = bench.read(Position { commit_lsn: Lsn(100), index: 3 }).await;
    let (line, next) = (crate::pipeline::link::Line::silent(&bench.driver.lanes.own.client), 9);
    let established = crate::pipeline::link::Established {
        line,
        landed: HashMap::from([(at(1), 7), (at(3), 8)]),
        begun: HashMap::new(),
        letters: HashSet::new(),
        known_to: next,
        lost: None,
    };
    bench.driver.on_established(lane, established);
    let stored: Vec<_> = bench.driver.holds.positions().map(|(at, _)| at).collect();
    assert_eq!(stored, [at(2)]);
    shaped(&mut bench, third);
    assert_eq!(bench.driver.lanes.own.outbox.size().0, 1, "what is there is not sent again");
    assert!(!bench.driver.is_in_doubt(at(2)));
}

#[tokio::test]
async fn what_is_dropped_while_its_stream_may_have_it_is_looked_for_there() {
    let mut bench = Bench::new(None);
    bench.driver.lanes.own.acknowledged = Some(0);
    bench.driver.lanes.own.unread = false;
    let lane = bench.routed("orders");
    bench.driver.lanes.get_mut(lane).unwrap().unread = false;
    // An earlier one keeps the checkpoint.
    bench.read(at(1)).await;
    let sent = bench.read(at(2)).await;
    bench.driver.doubt_all(vec![(at(2), lane)]);
    assert!(bench.driver.on_shaped(sent, Shaped::Dropped, keep::MadeBy::Current).is_none());
    assert!(bench.driver.lanes.get(lane).unwrap().wants_session(), "nothing else leads there");
    let established = crate::pipeline::link::Established {
        line: crate::pipeline::link::Line::silent(&bench.driver.lanes.own.client),
        landed: HashMap::from([(at(2), 7)]),
        begun: HashMap::new(),
        letters: HashSet::new(),
        known_to: 9,
        lost: None,
    };
    bench.driver.on_established(lane, established);
    assert!(!bench.driver.lanes.get(lane).unwrap().wants_session());
    bench.written().await;
    // A restart reads the change again, and another chain may not drop it.
    let row = store::StreamRow { name: "orders".to_owned(), seq: 7, reached: 9 };
    assert_eq!(bench.loaded().streams, [row]);
}

#[tokio::test]
async fn what_a_newer_chain_drops_waits_for_the_stream_that_may_have_it() {
    for is_there in [true, false] {
        let mut bench = Bench::new(None);
        bench.driver.lanes.own.acknowledged = Some(0);
        bench.driver.lanes.own.unread = false;
        let lane = bench.routed("orders");
        let item = bench.read(at(1)).await;
        bench.driver.doubt_all(vec![(at(1), lane)]);
        let dropped = bench.driver.on_shaped(item, Shaped::Dropped, keep::MadeBy::Current);
        assert!(dropped.is_none());
        bench.written().await;
        let stored = |bench: &Bench| -> Vec<_> {
            bench.driver.holds.positions().map(|(at, _)| at).collect()
        };
        assert_eq!(stored(&bench), [at(1)], "what follows it in its group waits");
        let established = crate::pipeline::link::Established {
            line: crate::pipeline::link::Line::silent(&bench.driver.lanes.own.client),
            landed: is_there.then_some((at(1), 7)).into_iter().collect(),
            begun: HashMap::new(),
            letters: HashSet::new(),
            known_to: 9,
            lost: None,
        };
        bench.driver.on_established(lane, established);
        let left = if is_there { vec![] } else { vec![at(1)] };
        assert_eq!(stored(&bench), left, "it is shaped again where it is not there");
        assert_eq!(bench.driver.counters.dropped, 0);
    }
}

#[tokio::test]
async fn what_was_confirmed_and_is_found_at_a_start_keeps_no_row_when_the_spill_is_through() {
    let stored = Box::new(insert(at(2)));
    let groups = crate::pipeline::group::Groups {
        table: crate::pipeline::group::GroupId([1; 16]),
        first: None,
        second: None,
    };
    let written = [
        Write::Spill { id: 1, changes: vec![insert(at(1))] },
        Write::Insert {
            id: 1,
            change: stored,
            groups,
            state: StoredState::Parked,
            attempts: store::Attempts::default(),
            next_attempt: None,
            failure: Some(failure("trap")),
        },
        // Postgres gives none of them again.
        Write::Checkpoint(store::Checkpoint {
            position: at(1).before(),
            seq: Some(0),
            reached: 0,
            confirm: Lsn(at(1).commit_lsn.0 + 1),
        }),
        Write::Stream { name: "orders".into(), seq: Some(0), reached: 0 },
    ];
    let mut bench = Bench::after(written.into(), None);
    bench.driver.lanes.own.acknowledged = Some(0);
    let lane = bench.driver.lanes.id("orders").unwrap();
    let established = crate::pipeline::link::Established {
        line: crate::pipeline::link::Line::silent(&bench.driver.lanes.own.client),
        // The last was there before the store, and is not in it.
        landed: HashMap::from([(at(1), 6), (at(2), 7), (at(3), 8)]),
        begun: HashMap::new(),
        letters: HashSet::new(),
        known_to: 9,
        lost: None,
    };
    bench.driver.on_established(lane, established);
    bench.written().await;
    assert!(bench.driver.holds.is_empty(), "the message is there");
    let row = |bench: &mut Bench| bench.loaded().streams;
    let of = |seq| [store::StreamRow { name: "orders".to_owned(), seq, reached: 9 }];
    assert_eq!(row(&mut bench), of(6), "the checkpoint is before all of them");

    bench.driver.on_spill_read(Ok(Some((1, vec![insert(at(1))])))).unwrap();
    bench.written().await;
    bench.written().await;
    assert_eq!(row(&mut bench), of(9), "the checkpoint has passed all of them");
}

#[tokio::test]
async fn a_message_becomes_a_letter_once_the_store_knows_that_it_is_spent() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(into_a_file(dir.path()));
    bench.driver.lanes.own.acknowledged = Some(0);
    let item = bench.read(at(1)).await;
    let change = item.change.clone();
    let failed = failure("oversize");
    let id = bench.driver.park(item, failed.clone(), keep::MadeBy::Current);
    // It is asked for, or was on its way, before its failure is on disk.
    bench.driver.stored = id;
    bench.driver.holds.request(id);
    assert_eq!(bench.driver.holds.next_due(bench.driver.clock.now(), id), Some(id));
    let failed = Some(serde_json::to_string(&failed).unwrap());
    let message = store::Message { id, change, parts: None, failure: failed };
    bench.driver.on_spent_read(message).unwrap();
    letters_written(&mut bench).await;
    assert!(!dir.path().join("dead.jsonl").exists(), "a restart would try it once more");
    assert_eq!(bench.driver.holds.next_due(bench.driver.clock.now(), id), None);
    bench.written().await;
    assert_eq!(bench.driver.holds.next_due(bench.driver.clock.now(), id), Some(id));
}

#[tokio::test]
async fn a_spent_message_whose_letter_failed_in_the_middle_is_not_tried_once_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(into_a_file(dir.path()));
    bench.driver.established = true;
    let message = bench.spent(at(1)).await;
    let id = message.id;
    bench.driver.on_spent_read(message).unwrap();
    bench.driver.on_letters(Err("of the test".to_owned()));
    assert!(bench.driver.holds.is_idle(id));
    bench.driver.reprieve_all();
    assert!(bench.driver.dead.is_spent(id), "its line may be in the file");
}

#[tokio::test]
async fn a_spent_message_that_is_certainly_nowhere_has_another_attempt_with_a_new_chain() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(into_a_file(dir.path()));
    bench.driver.established = true;
    let lane = bench.routed("orders");
    let (nowhere, in_doubt) = (bench.spent(at(1)).await.id, bench.spent(at(2)).await.id);
    for id in [nowhere, in_doubt] {
        bench.driver.holds.back(id, true, Due::OnRequest);
    }
    bench.driver.doubt_all(vec![(at(2), lane)]);
    bench.driver.reprieve_all();
    assert!(!bench.driver.dead.is_spent(nowhere));
    assert!(bench.driver.dead.is_spent(in_doubt), "it may be in a stream");
}

#[tokio::test]
async fn a_message_whose_letter_is_not_handed_on_has_the_attempt_that_was_wanted_meanwhile() {
    let place = LetterPlace::Stream("dead".into());
    let mut bench = Bench::new(Some(DeadLetters { max_attempts: 1, place }));
    bench.driver.established = true;
    let lane = bench.routed("dead");
    let store::Message { id, change, .. } = bench.spent(at(1)).await;
    bench.driver.reprieve_all();
    assert!(bench.driver.dead.is_spent(id), "its letter is on its way");
    bench.driver.retry_bytes += change.bytes();
    let item = Item { change, origin: Origin::Store { id } };
    bench.driver.letter_waits(&item, lane, &failure("route"));
    assert_eq!(bench.driver.retry_bytes, 0, "it is not on its way any more");
    assert!(!bench.driver.dead.is_spent(id));
    let due = bench.driver.holds.next_due(bench.driver.clock.now(), bench.driver.stored);
    assert_eq!(due, Some(id), "it is tried at once, and not when its stream is asked for again");
}

#[tokio::test]
async fn a_letter_that_could_not_be_written_is_written_later() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(into_a_file(dir.path()));
    let message = bench.spent(at(1)).await;
    let (id, bytes) = (message.id, message.change.bytes());
    bench.driver.retry_bytes += bytes;
    bench.driver.on_spent_read(message).unwrap();
    bench.driver.on_letters(Err("of the test".to_owned()));
    assert_eq!(bench.driver.retry_bytes, 0, "it is not on its way any more");
    let (now, stored) = (bench.driver.clock.now(), bench.driver.stored);
    assert_eq!(bench.driver.holds.next_due(now, stored), None, "not at once");
    let later = bench.driver.holds.next_time(stored).unwrap();
    assert_eq!(bench.driver.holds.next_due(later, stored), Some(id));
}

#[tokio::test]
async fn what_failed_before_any_part_was_in_a_stream_is_shaped_anew() {
    let parts_of = |bench: &mut Bench| {
        let loaded = bench.loaded();
        loaded.messages[0].parts.as_ref().map(|parts| parts.first)
    };
    for (below, in_doubt, kept) in [(0, false, None), (1, false, Some(1)), (0, true, Some(0))] {
        let mut bench = Bench::new(None);
        bench.driver.lanes.own.acknowledged = Some(0);
        let lane = bench.routed("orders");
        let item = bench.read(at(1)).await;
        let record =
            || Record { timestamp_ms: None, headers: [].into_iter().collect(), body: Bytes::new() };
        let records = [(); 2].map(|()| size_gate::check(record()).unwrap());
        bench.driver.store_parts(item, records.into());
        bench.written().await;
        assert_eq!(parts_of(&mut bench), Some(0));
        let (now, stored) = (bench.driver.clock.now(), bench.driver.stored);
        let id = bench.driver.holds.next_due(now, stored).unwrap();
        let origin = Origin::Store { id };
        bench.driver.on_portion(&crate::pipeline::outbox::Portion {
            origin,
            below,
            records: 1,
            metered_bytes: 8,
        });
        if in_doubt {
            bench.driver.doubt_all(vec![(at(1), lane)]);
        }
        bench.driver.failed_again(id, failure("refused"), keep::MadeBy::Current);
        bench.written().await;
        assert_eq!(parts_of(&mut bench), kept, "below {below}, in doubt: {in_doubt}");
    }
}

#[tokio::test]
async fn a_message_is_spent_once_so_many_attempts_have_failed() {
    let place = LetterPlace::Stream("dead".into());
    let mut bench = Bench::new(Some(DeadLetters { max_attempts: 3, place }));
    let item = bench.read(at(1)).await;
    let id = bench.driver.park(item, failure("trap"), keep::MadeBy::Current);
    let mut spent = vec![bench.driver.dead.is_spent(id)];
    for by in [keep::MadeBy::Current, keep::MadeBy::Older, keep::MadeBy::Current] {
        bench.driver.failed_again(id, failure("trap"), by);
        spent.push(bench.driver.dead.is_spent(id));
    }
    assert_eq!(spent, [false, false, false, true], "what an older chain made does not count");
}

#[tokio::test]
async fn a_job_of_slow_changes_is_no_standstill() {
    let mut bench = Bench::new(None);
    let workbench = crate::transform::Workbench::new(None).unwrap();
    let (workers, mut done) = Workers::start(vec![workbench.runner()]).unwrap();
    bench.driver.workers = workers;
    let items = vec![bench.read(at(1)).await, bench.read(at(2)).await];
    let envelope = Arc::new(Envelope::new(crate::message::EnvelopeSettings::default()));
    let before = bench.driver.look_at_transforms().progress;
    let job = Job { number: 0, chain: Arc::new(Chain::empty(0)), envelope, items };
    assert!(bench.driver.workers.submit(job));
    done.recv().await.unwrap();
    // The job is not taken in yet: what counts is each change.
    assert_eq!(bench.driver.look_at_transforms().progress, before + 2);
}
