//! From messages of the stream to a batch that takes exactly its bytes from the budget.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::change::{Change, Lsn};
use crate::decode::{Decoded, Decoder, Relation};
use crate::pipeline::budget::ByteBudget;
use crate::source::catalog::Described;
use crate::source::error::Error;
use crate::source::seen::Seen;
use crate::source::{Batch, Item};

/// A batch is not filled further beyond this: large enough that what a hand-over costs (about a
/// microsecond, and often a wake-up) vanishes, small enough to spread over workers.
const BATCH_ITEMS_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 256 * 1024;

/// What is being read from one connection.
#[derive(Debug, Default)]
pub(super) struct Decoding {
    pub(super) decoder: Decoder,
    pub(super) in_transaction: bool,
    /// Tables of the publication that nobody asked for; almost always empty.
    pub(super) unwanted: HashSet<u32>,
    /// Where the last transaction was committed, for errors.
    pub(super) after: Lsn,
}

impl Decoding {
    /// Takes one message. Returns a relation that has to be defined before the next.
    pub(super) fn take(
        &mut self,
        message: Bytes,
        intake: &mut Intake,
    ) -> Result<Option<Relation>, Error> {
        // What was reserved for this frame belongs to the batch now.
        intake.reserved = false;
        let after = self.after;
        let decoded =
            self.decoder.decode(message).map_err(|source| Error::Decode { after, source })?;
        match decoded {
            Decoded::Change(change) => self.change(change, intake),
            Decoded::Truncate(changes) => {
                for change in changes {
                    self.change(change, intake);
                }
            }
            Decoded::Begin { .. } => self.in_transaction = true,
            Decoded::Commit { end_lsn, .. } => {
                self.in_transaction = false;
                self.after = end_lsn;
                intake.commit(end_lsn);
            }
            Decoded::Relation(relation) => return Ok(Some(relation)),
            Decoded::Other => {}
        }
        if intake.batch.bytes == 0 {
            // It was a large repetition, or nothing that anybody gets.
            intake.give_back();
        }
        Ok(None)
    }

    pub(super) fn change(&self, change: Change, intake: &mut Intake) {
        let unwanted = !self.unwanted.is_empty() && self.unwanted.contains(&change.table.oid);
        intake.change(change, unwanted);
    }

    pub(super) fn define(&mut self, described: Described) {
        let oid = described.table.oid;
        if described.wanted {
            self.unwanted.remove(&oid);
        } else if self.unwanted.insert(oid) {
            let table = described.table.qualified_name();
            tracing::info!(table, "the publication holds a table that is not configured; left out");
        }
        self.decoder.define(described.table);
    }
}

/// The batch that is being filled, and the room for it.
#[derive(Debug)]
pub(super) struct Intake {
    pub(super) seen: Seen,
    pub(super) batch: Batch,
    pub(super) budget: Arc<ByteBudget>,
    /// What of the budget belongs to the batch already.
    pub(super) held: usize,
    /// `held` is for a large frame that is being read.
    pub(super) reserved: bool,
    /// Nothing after shutdown.
    pub(super) out: Option<mpsc::Sender<Batch>>,
    pub(super) changes: u64,
    /// Rises with everything new that was read.
    pub(super) progress: u64,
}

/// The consumer has gone.
#[derive(Debug)]
pub(super) struct Gone;

impl Intake {
    pub(super) fn new(seen: Seen, budget: Arc<ByteBudget>, out: mpsc::Sender<Batch>) -> Self {
        Self {
            seen,
            batch: Batch::default(),
            budget,
            held: 0,
            reserved: false,
            out: Some(out),
            changes: 0,
            progress: 0,
        }
    }

    pub(super) fn change(&mut self, change: Change, unwanted: bool) {
        if !self.seen.change(change.position) {
            return;
        }
        self.progress += 1;
        if !unwanted {
            self.batch.bytes += change.bytes();
            self.changes += 1;
            self.batch.items.push(Item::Change(change));
        }
    }

    pub(super) fn commit(&mut self, end_lsn: Lsn) {
        if self.seen.end(end_lsn) {
            self.progress += 1;
            self.batch.items.push(Item::Commit { end_lsn });
        }
    }

    pub(super) fn idle(&mut self, wal_end: Lsn) {
        if !self.seen.end(wal_end) {
            return;
        }
        match self.batch.items.last_mut() {
            // Only the last of several is of any use.
            Some(Item::Idle { wal_end: last }) => *last = wal_end,
            _ => self.batch.items.push(Item::Idle { wal_end }),
        }
    }

    pub(super) fn pending(&self) -> bool {
        !self.batch.items.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.batch.items.len() >= BATCH_ITEMS_MAX || self.batch.bytes >= BATCH_BYTES_MAX
    }

    /// Takes room for a frame before it is read. The batch was handed over before.
    pub(super) async fn reserve(&mut self, bytes: usize) {
        self.give_back();
        self.budget.acquire(bytes).await;
        self.held = bytes;
        self.reserved = true;
    }

    /// The frame that room was reserved for does not come on this connection.
    pub(super) fn forget_reservation(&mut self) {
        if self.reserved {
            self.give_back();
        }
    }

    pub(super) fn give_back(&mut self) {
        self.reserved = false;
        if self.held > 0 {
            self.budget.release(std::mem::take(&mut self.held));
        }
    }

    /// Hands the batch over, with exactly its bytes taken from the budget. Dropping the future
    /// loses nothing: what was taken stays with the batch.
    pub(super) async fn hand_over(&mut self) -> Result<(), Gone> {
        let Some(out) = &self.out else { return Err(Gone) };
        let bytes = self.batch.bytes;
        if self.held > bytes {
            self.budget.release(self.held - bytes);
            self.held = bytes;
        } else if self.held < bytes {
            let more = bytes - self.held;
            if self.held > 0 {
                // A large frame's change, which counts a little more than its frame: it is in
                // memory, and waiting for more while holding some could wait for itself.
                self.budget.force(more);
            } else {
                tokio::select! {
                    biased;
                    () = self.budget.acquire(more) => {}
                    () = out.closed() => return Err(Gone),
                }
            }
            self.held = bytes;
        }
        let permit = out.reserve().await.map_err(|_| Gone)?;
        let room = self.batch.items.len().min(BATCH_ITEMS_MAX);
        let next = Batch { items: Vec::with_capacity(room), bytes: 0 };
        permit.send(std::mem::replace(&mut self.batch, next));
        self.held = 0;
        Ok(())
    }

    /// No more batches: the consumer sees the end.
    pub(super) fn close(&mut self) {
        self.out = None;
        self.give_back();
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.give_back();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::change::{Column, Grouping, Position, Table};
    use crate::pg_type::Kind;
    use crate::source::reader::BATCHES_MAX;

    /// pgoutput messages of a table `public.t(id int4 primary key)`.
    mod message {
        use bytes::{BufMut, Bytes, BytesMut};

        pub fn begin(commit_lsn: u64) -> Bytes {
            let mut out = BytesMut::from(&b"B"[..]);
            out.put_u64(commit_lsn);
            out.put_i64(0);
            out.put_u32(1);
            out.freeze()
        }

        pub fn commit(commit_lsn: u64, end_lsn: u64) -> Bytes {
            let mut out = BytesMut::from(&b"C\0"[..]);
            out.put_u64(commit_lsn);
            out.put_u64(end_lsn);
            out.put_i64(0);
            out.freeze()
        }

        pub fn relation(oid: u32) -> Bytes {
            let mut out = BytesMut::from(&b"R"[..]);
            out.put_u32(oid);
            out.put_slice(b"public\0t\0d\0\x01\x01id\0\0\0\0\x17\xff\xff\xff\xff");
            out.freeze()
        }

        pub fn insert(oid: u32, value: &[u8]) -> Bytes {
            let mut out = BytesMut::from(&b"I"[..]);
            out.put_u32(oid);
            out.put_slice(b"N\0\x01t");
            out.put_u32(u32::try_from(value.len()).unwrap());
            out.put_slice(value);
            out.freeze()
        }
    }

    fn described(oid: u32, wanted: bool) -> Described {
        let column = Column {
            name: "id".into(),
            type_name: "int4".into(),
            kind: Kind::Integer,
            identity: true,
            primary_key: true,
        };
        let table = Table {
            oid,
            schema: "public".into(),
            name: "t".into(),
            columns: vec![column],
            grouping: Grouping::Key,
        };
        Described { table: Arc::new(table), wanted }
    }

    /// What one connection sends: transactions of two inserts each, from this one on.
    fn script(from: u64) -> Vec<Bytes> {
        let mut messages = Vec::new();
        for transaction in from..4 {
            let lsn = 100 * (transaction + 1);
            messages.push(message::begin(lsn));
            if transaction == from {
                messages.push(message::relation(1));
                messages.push(message::relation(2));
            }
            messages.push(message::insert(1, b"10"));
            messages.push(message::insert(2, b"11"));
            messages.push(message::insert(1, b"12"));
            messages.push(message::commit(lsn, lsn + 50));
        }
        messages
    }

    /// Plays a connection's messages, as far as they came.
    fn play(intake: &mut Intake, messages: &[Bytes]) {
        let mut decoding = Decoding::default();
        for message in messages {
            if let Some(relation) = decoding.take(message.clone(), intake).unwrap() {
                let wanted = relation.oid == 1;
                decoding.define(described(relation.oid, wanted));
            }
        }
    }

    fn short(items: &[Item]) -> Vec<String> {
        let word = |item: &Item| match item {
            Item::Change(change) => {
                format!("{}:{}", change.position.commit_lsn.0, change.position.index)
            }
            Item::Commit { end_lsn } => format!("commit {}", end_lsn.0),
            Item::Idle { wal_end } => format!("idle {}", wal_end.0),
        };
        items.iter().map(word).collect()
    }

    fn intake(seen: Seen) -> (Intake, mpsc::Receiver<Batch>, Arc<ByteBudget>) {
        let budget = Arc::new(ByteBudget::new(1000));
        let (out, batches) = mpsc::channel(BATCHES_MAX);
        (Intake::new(seen, Arc::clone(&budget), out), batches, budget)
    }

    #[test]
    fn connections_lost_anywhere_deliver_each_change_once_and_in_order() {
        let whole = script(0);
        let (mut once, _batches, _budget) = intake(Seen::default());
        play(&mut once, &whole);
        let expected = short(&once.batch.items);
        assert_eq!(expected[..3], ["100:0", "100:2", "commit 150"], "table 2 is not wanted");
        for lost_at in 0..=whole.len() {
            for again in 0..4 {
                // Postgres starts anew no later than at the transaction that was cut.
                let read = whole[..lost_at].iter().filter(|message| message[0] == b'C').count();
                if again > read as u64 {
                    continue;
                }
                let (mut intake, _batches, _budget) = intake(Seen::default());
                play(&mut intake, &whole[..lost_at]);
                play(&mut intake, &script(again));
                assert_eq!(short(&intake.batch.items), expected, "{lost_at}, then {again}");
            }
        }
    }

    #[test]
    fn a_resumed_source_leaves_out_what_is_settled() {
        let seen = Seen::new(Some(Position { commit_lsn: Lsn(200), index: 0 }), Lsn(150));
        let (mut intake, _batches, _budget) = intake(seen);
        play(&mut intake, &script(0));
        let found = short(&intake.batch.items);
        assert_eq!(found[..4], ["200:2", "commit 250", "300:0", "300:2"]);
    }

    #[test]
    fn idle_ends_do_not_pile_up() {
        let (mut intake, _batches, _budget) = intake(Seen::default());
        for wal_end in [5, 6, 4, 7] {
            intake.idle(Lsn(wal_end));
        }
        intake.commit(Lsn(9));
        intake.idle(Lsn(9));
        intake.idle(Lsn(10));
        assert_eq!(short(&intake.batch.items), ["idle 7", "commit 9", "idle 10"]);
    }

    #[tokio::test]
    async fn a_batch_takes_exactly_its_bytes_from_the_budget() {
        // What was reserved before, for a frame of any size.
        for reserved in [0, 1, 700, 5000] {
            let (mut intake, mut batches, budget) = intake(Seen::default());
            if reserved > 0 {
                intake.reserve(reserved).await;
                assert_eq!(budget.bytes_out(), reserved);
            }
            play(&mut intake, &script(3));
            assert!(!intake.reserved);
            intake.hand_over().await.unwrap();
            let batch = batches.recv().await.unwrap();
            assert_eq!(batch.bytes, 2 * (256 + 2));
            assert_eq!(budget.bytes_out(), batch.bytes, "reserved {reserved}");
            drop(intake);
            assert_eq!(budget.bytes_out(), batch.bytes, "only the consumer's is left");
        }
    }

    #[tokio::test]
    async fn a_large_frame_that_nobody_gets_gives_its_bytes_back() {
        let position = Position { commit_lsn: Lsn(400), index: 2 };
        let (mut intake, _batches, budget) = intake(Seen::new(Some(position), Lsn(0)));
        let mut decoding = Decoding::default();
        for message in script(3) {
            intake.reserve(5000).await;
            if let Some(relation) = decoding.take(message, &mut intake).unwrap() {
                decoding.define(described(relation.oid, true));
            }
            assert!(!intake.reserved);
        }
        assert_eq!(
            (short(&intake.batch.items), budget.bytes_out()),
            (vec!["commit 450".into()], 0)
        );
    }

    #[tokio::test]
    async fn a_reservation_ends_with_its_connection() {
        let (mut intake, _batches, budget) = intake(Seen::default());
        intake.reserve(5000).await;
        intake.forget_reservation();
        assert_eq!(budget.bytes_out(), 0);
    }

    #[tokio::test]
    async fn a_full_queue_holds_back_and_a_dropped_wait_loses_nothing() {
        let (mut intake, mut batches, budget) = intake(Seen::default());
        intake.commit(Lsn(1));
        intake.hand_over().await.unwrap();
        play(&mut intake, &script(3));
        for _attempt in 0..3 {
            let wait = tokio::time::timeout(Duration::from_millis(5), intake.hand_over());
            assert!(wait.await.is_err());
        }
        assert_eq!(budget.bytes_out(), intake.batch.bytes, "taken once");
        assert_eq!(batches.recv().await.unwrap().items.len(), 1);
        intake.hand_over().await.unwrap();
        assert_eq!(batches.recv().await.unwrap().items.len(), 3);
    }

    #[tokio::test]
    async fn a_consumer_that_goes_is_noticed_also_while_the_budget_is_spent() {
        let (mut intake, batches, budget) = intake(Seen::default());
        budget.force(1000);
        play(&mut intake, &script(3));
        let gone = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            drop(batches);
        });
        assert!(intake.hand_over().await.is_err());
        gone.await.unwrap();
    }
}
