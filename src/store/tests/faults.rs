//! Power loss at every write, a full disk, a failing one.

use std::collections::BTreeMap;

use super::vfs::{Disk, Op, after_power_loss, connect};
use super::*;

/// What a file has to hold, kept beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model {
    messages: BTreeMap<u64, (String, Change)>,
    checkpoint: Option<Checkpoint>,
    spilled: BTreeMap<u64, Vec<Change>>,
    streams: BTreeMap<String, (u64, u64)>,
}

impl Model {
    fn apply(&mut self, writes: &[Write]) {
        for write in writes {
            match write {
                Write::Insert { id, change, state, .. } => {
                    self.messages.insert(*id, (format!("{state:?}"), (**change).clone()));
                }
                Write::Failed { id, state, .. } => {
                    if let Some(message) = self.messages.get_mut(id) {
                        message.0 = format!("{state:?}");
                    }
                }
                Write::Remove { id } | Write::DeadLetter { id } | Write::Acknowledge { id } => {
                    self.messages.remove(id);
                }
                Write::Checkpoint(checkpoint) => self.checkpoint = Some(*checkpoint),
                Write::Spill { id, changes } => {
                    self.spilled.insert(*id, changes.clone());
                }
                Write::Unspill { through } => self.spilled.retain(|id, _| id > through),
                Write::Stream { name, seq: Some(seq), reached } => {
                    self.streams.insert(name.to_string(), (*seq, *reached));
                }
                Write::Stream { name, seq: None, .. } => _ = self.streams.remove(&**name),
                Write::Begin { .. }
                | Write::Parts { .. }
                | Write::PartsSent { .. }
                | Write::LetterFile(_)
                | Write::Chain { .. }
                | Write::Promise(_)
                | Write::InForce { .. }
                | Write::SourceIdentity { .. }
                | Write::Publication(_)
                | Write::SlotMade { .. } => {}
            }
        }
    }

    async fn of(store: &Store, loaded: &Loaded) -> Result<Self, Error> {
        let row = |row: &StreamRow| (row.name.clone(), (row.seq, row.reached));
        let streams = loaded.streams.iter().map(row).collect();
        let mut model = Self { checkpoint: loaded.checkpoint, streams, ..Self::default() };
        for chunk in &loaded.spilled {
            let read = store.read_spill(chunk.id - 1).await?.unwrap();
            assert_eq!(*chunk, Chunk::of(chunk.id, &read.1));
            model.spilled.insert(read.0, read.1);
        }
        for known in &loaded.messages {
            for message in store.read(vec![known.id], usize::MAX).await? {
                let state = format!("{:?}", known.state);
                model.messages.insert(message.id, (state, message.change));
            }
        }
        Ok(model)
    }
}

/// Transactions such as a pipeline makes: messages come, fail again, leave, and the checkpoint moves.
struct Work {
    random: Random,
    model: Model,
    next_id: u64,
    large_one_in: u64,
}

impl Work {
    fn new(seed: u64, large_one_in: u64) -> Self {
        Self { random: Random(seed), model: Model::default(), next_id: 1, large_one_in }
    }

    fn next(&mut self) -> Vec<Write> {
        let mut writes = Vec::new();
        for _ in 0..=self.random.below(3) {
            let known: Vec<u64> = self.model.messages.keys().copied().collect();
            let any = |random: &mut Random| {
                let index = usize::try_from(random.below(known.len() as u64)).unwrap();
                known[index]
            };
            match self.random.below(8) {
                6 => {
                    let id = self.next_id;
                    self.next_id += 1;
                    let changes = (0..self.random.below(20) + 1)
                        .map(|index| {
                            let body = vec![b'a'; usize::try_from(self.random.below(900)).unwrap()];
                            insert_of(index, at(id * 10, index), &body)
                        })
                        .collect();
                    writes.push(Write::Spill { id, changes });
                }
                7 => {
                    let first = self.model.spilled.keys().next().copied().unwrap_or(0);
                    writes.push(Write::Unspill { through: first + self.random.below(10) });
                }
                0 if !known.is_empty() => {
                    writes.push(Write::Remove { id: any(&mut self.random) });
                }
                1 if !known.is_empty() => {
                    writes.push(Write::Acknowledge { id: any(&mut self.random) });
                }
                2 if !known.is_empty() => writes.push(Write::Failed {
                    id: any(&mut self.random),
                    state: StoredState::Retrying,
                    attempts: Attempts { all: self.next_id, own: self.next_id / 2 },
                    next_attempt: None,
                    failure: failure(),
                }),
                _ => {
                    let id = self.next_id;
                    self.next_id += 1;
                    let bytes =
                        if self.random.below(self.large_one_in) == 0 { 300_000 } else { 90 };
                    let body: Vec<u8> =
                        (0..bytes).map(|_| self.random.below(256).to_le_bytes()[0]).collect();
                    let change = insert_of(id, at(id * 10, 0), &body);
                    writes.push(inserted(id, change, StoredState::Parked, Some(failure())));
                }
            }
            // A message is touched once in a transaction.
            self.model.apply(&writes);
        }
        let seq = self.next_id;
        let position = at(seq, 0);
        let (confirm, reached) = (Lsn(seq), seq + 3);
        writes.push(Write::Checkpoint(Checkpoint { position, seq: Some(seq), reached, confirm }));
        self.model.apply(&writes);
        writes
    }
}

fn open(dir: &Path) -> Result<(Store, Loaded), Error> {
    Store::open_by(dir, false, connect)
}

/// Memory where there is such a folder: thousands of files are made.
fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// After a power loss at any write, whatever the disk had taken of what was not synced, the store opens
/// and holds each transaction that was answered, whole, and at most the one that was under way.
#[test]
fn what_was_answered_survives_a_power_loss_at_any_write() {
    let runtime = runtime();
    let seed = Random::seed();
    let dir = fast_dir();
    let disk = Disk::under(dir.path());
    let mut work = Work::new(seed, 12);
    let mut models = vec![Model::default()];
    // Each start and each clean end writes the log back into the file.
    for transactions in [40, 1, 5, 40, 3] {
        let (store, _) = open(dir.path()).unwrap();
        for _ in 0..transactions {
            let writes = work.next();
            models.push(work.model.clone());
            runtime.block_on(store.write(writes.into())).unwrap();
            disk.answered(models.len() - 1);
        }
        drop(store);
        until_closed(dir.path());
    }
    let ops = disk.ops();
    let mut random = Random(seed ^ 1);
    let (mut answered, mut crashes, mut under_way) = (0, 0, 0);
    for end in 0..=ops.len() {
        if let Some(Op::Answered(transactions)) = end.checked_sub(1).map(|last| &ops[last]) {
            answered = *transactions;
        }
        // Every sync and what is around it, and a part of the many writes in between.
        let near_sync = ops[end.saturating_sub(2)..(end + 2).min(ops.len())]
            .iter()
            .any(|op| !matches!(op, Op::Write { .. }));
        if !near_sync && random.below(12) > 0 {
            continue;
        }
        let crashed = fast_dir();
        for (name, bytes) in after_power_loss(&ops[..end], &mut random) {
            std::fs::write(crashed.path().join(name), bytes).unwrap();
        }
        let what = format!("seed {seed}: a power loss after {end} of {} operations", ops.len());
        let (store, loaded) = Store::open(crashed.path()).unwrap_or_else(|e| panic!("{what}: {e}"));
        let found = runtime.block_on(Model::of(&store, &loaded));
        let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
        if models.get(answered + 1) == Some(&found) {
            under_way += 1;
        } else {
            assert!(found == models[answered], "{what}: {answered} transactions were answered");
        }
        crashes += 1;
        drop(store);
        until_closed(crashed.path());
    }
    assert!(crashes > 500 && under_way > 0, "{crashes} crashes, {under_way} kept one more");
}

#[test]
fn a_full_disk_loses_nothing_and_is_left_behind_once_there_is_room() {
    let runtime = runtime();
    let seed = Random::seed();
    let dir = fast_dir();
    let disk = Disk::under(dir.path());
    let (store, _) = open(dir.path()).unwrap();
    let mut work = Work::new(seed, 2);
    let mut full = 0;
    for round in 0..40_u64 {
        let before = work.model.clone();
        let writes: Arc<[Write]> = work.next().into();
        disk.set(|faults| faults.full_at = Some(60_000 * (round % 12)));
        let written = runtime.block_on(store.write(Arc::clone(&writes)));
        if let Err(error) = written {
            full += 1;
            assert!(matches!(error, Error::Full) && error.heals(), "{error}");
            assert!(error.to_string().contains("make room"), "{error}");
            // What is there can be read meanwhile.
            if let Some(id) = before.messages.keys().next() {
                let read = runtime.block_on(store.read(vec![*id], usize::MAX)).unwrap();
                assert_eq!(read[0].change, before.messages[id].1);
            }
            disk.set(|faults| faults.full_at = None);
            runtime.block_on(store.write(writes)).unwrap();
        }
    }
    assert!(full > 5, "full {full} times");
    // The last of the writes may have found room below the bound that was drawn for it.
    disk.set(|faults| faults.full_at = None);
    drop(store);
    until_closed(dir.path());
    let (store, loaded) = open(dir.path()).unwrap();
    assert_eq!(runtime.block_on(Model::of(&store, &loaded)).unwrap(), work.model);
}

/// How often one write meets a failing disk before the disk lets it through.
const FAILURES_IN_A_ROW: u32 = 20;

/// A write that failed is tried again as it was, and that is enough.
#[test]
fn a_failing_disk_is_outlasted() {
    let runtime = runtime();
    let seed = Random::seed();
    let dir = fast_dir();
    let disk = Disk::under(dir.path());
    let (store, _) = open(dir.path()).unwrap();
    let mut work = Work::new(seed, 8);
    let mut failed = 0;
    for number in 0..80 {
        let writes: Arc<[Write]> = work.next().into();
        disk.set(|faults| faults.fails = Some((20, Random(seed ^ (2 + number)))));
        let mut attempts = 0;
        while let Err(error) = runtime.block_on(store.write(Arc::clone(&writes))) {
            assert!(error.heals(), "seed {seed}: {error:?}");
            failed += 1;
            attempts += 1;
            // A large write is hundreds of operations, of which one in twenty fails: by chance alone
            // it might never come through.
            if attempts == FAILURES_IN_A_ROW {
                disk.set(|faults| faults.fails = None);
            }
        }
    }
    assert!(failed > 10, "failed {failed} times");
    disk.set(|faults| faults.fails = None);
    drop(store);
    until_closed(dir.path());
    let (store, loaded) = open(dir.path()).unwrap();
    assert_eq!(runtime.block_on(Model::of(&store, &loaded)).unwrap(), work.model, "seed {seed}");
}
