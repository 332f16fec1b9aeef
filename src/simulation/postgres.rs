//! Postgres, as far as the driver sees it: a slot that gives out committed transactions from what was
//! last confirmed, over connections that break.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::faults::Fault;
use super::process::Process;
use super::world::World;
use crate::change::Lsn;
use crate::pipeline::budget::ByteBudget;
use crate::source::seen::Seen;
use crate::source::{Batch, Identity, Item, Resume, Source, SourceStatus, State};

/// A source that reads the workload.
pub(super) fn start(
    world: &Arc<World>,
    process: &Arc<Process>,
    resume: &Resume,
    budget: Arc<ByteBudget>,
    shutdown: CancellationToken,
) -> Source {
    let (out, batches) = mpsc::channel(1);
    let (confirm, mut confirmed) = watch::channel(resume.cursor.unwrap_or_default());
    let (publish, status) = watch::channel(SourceStatus::default());
    // Connections break by themselves here.
    let (reconnect, _) = watch::channel(());
    let seen = Seen::new(resume.skip_through, resume.cursor.unwrap_or_default());
    let telling = tokio::spawn({
        let (world, process) = (Arc::clone(world), Arc::clone(process));
        async move {
            // The first status update has what was confirmed before.
            confirmed.mark_changed();
            while confirmed.changed().await.is_ok() {
                let lsn = confirmed.borrow_and_update().0;
                sleep(world.delay()).await;
                if process.is_frozen() {
                    return;
                }
                world.confirm(lsn, process.number);
                if world.chance(0.3) {
                    let mut state = world.state();
                    state.persisted = state.confirmed;
                }
            }
        }
    });
    process.owns(telling.abort_handle());
    let told = tokio::spawn({
        let (world, publish) = (Arc::clone(world), publish.clone());
        async move {
            loop {
                let wal_end = Lsn(world.workload.committed(world.elapsed_ms()).1);
                publish.send_if_modified(|status| {
                    let rises = wal_end > status.wal_end;
                    status.wal_end = status.wal_end.max(wal_end);
                    rises
                });
                sleep(Duration::from_millis(300)).await;
            }
        }
    });
    process.owns(told.abort_handle());
    let slot =
        Slot { world: Arc::clone(world), process: Arc::clone(process), seen, budget, out, publish };
    let task = tokio::spawn(async move {
        let ended = slot.out.clone();
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = ended.closed() => {}
            () = slot.run() => {}
        }
        ended.closed().await;
    });
    process.owns(task.abort_handle());
    Source { batches, confirm, status, reconnect, task }
}

struct Slot {
    world: Arc<World>,
    process: Arc<Process>,
    seen: Seen,
    budget: Arc<ByteBudget>,
    out: mpsc::Sender<Batch>,
    publish: watch::Sender<SourceStatus>,
}

impl Slot {
    async fn run(mut self) {
        loop {
            self.publish.send_modify(|status| status.state = State::Connecting);
            sleep(self.world.delay()).await;
            let wal_end = Lsn(self.world.workload.committed(self.world.elapsed_ms()).1);
            if self.process.excuses.load(Ordering::Relaxed) {
                self.world.excuse();
            }
            self.publish.send_modify(|status| {
                status.state = State::Streaming;
                // The slot is there from the first process on.
                status.made_slot |= !std::mem::replace(&mut self.world.state().has_slot, true);
                let system_identifier = "7".to_owned();
                status.identity = Some(Identity { system_identifier, timeline: 1, wal_end });
                status.taken_at = Some(wal_end);
            });
            if !self.stream().await {
                return;
            }
        }
    }

    /// One connection. Says whether to connect again.
    async fn stream(&mut self) -> bool {
        let world = Arc::clone(&self.world);
        let start = {
            let mut state = world.state();
            let persisted = state.persisted;
            drop(state);
            // A crash of Postgres forgets confirmations that it had not written down.
            let regressed = world.fault(Fault::Disconnect, 0.5);
            state = world.state();
            if regressed { persisted } else { state.confirmed }
        };
        let transactions = &world.workload.transactions;
        let first = transactions.partition_point(|transaction| transaction.commit_lsn < start);
        world.note("streaming from", start, first as u64);
        let mut batch = Batch::default();
        let size = world.draw(|rng| rand::RngExt::random_range(rng, 1..12));
        for (number, transaction) in transactions.iter().enumerate().skip(first) {
            while world.elapsed_ms() < transaction.at_ms {
                if !self.hand_over(&mut batch).await {
                    return false;
                }
                if world.fault(Fault::Disconnect, 0.1) {
                    return true;
                }
                let wait = transaction.at_ms.saturating_sub(world.elapsed_ms());
                sleep(Duration::from_millis(wait.min(200))).await;
            }
            for planned in &transaction.changes {
                let change = &world.workload.described(&planned.change, self.process.number);
                if !self.seen.change(change.position) {
                    continue;
                }
                let bytes = change.bytes();
                if !self.budget.try_acquire(bytes) {
                    if !self.hand_over(&mut batch).await {
                        return false;
                    }
                    self.budget.acquire(bytes).await;
                }
                batch.bytes += bytes;
                batch.items.push(Item::Change(change.clone()));
                if batch.items.len() >= size && !self.hand_over(&mut batch).await {
                    return false;
                }
                if world.fault(Fault::Disconnect, 0.03) {
                    return self.hand_over(&mut batch).await;
                }
            }
            if self.seen.end(Lsn(transaction.end_lsn)) {
                batch.items.push(Item::Commit { end_lsn: Lsn(transaction.end_lsn) });
            }
            let next = transactions.get(number + 1).map_or(u64::MAX, |next| next.commit_lsn);
            let idle = Lsn(next.min(transaction.end_lsn + 100));
            if world.chance(0.2) && self.seen.end(idle) {
                batch.items.push(Item::Idle { wal_end: idle });
            }
            if batch.items.len() >= size && !self.hand_over(&mut batch).await {
                return false;
            }
        }
        if !self.hand_over(&mut batch).await {
            return false;
        }
        loop {
            sleep(Duration::from_secs(1)).await;
            if world.fault(Fault::Disconnect, 0.2) {
                return true;
            }
        }
    }

    async fn hand_over(&mut self, batch: &mut Batch) -> bool {
        let received = self.seen.received();
        self.publish.send_if_modified(|status| {
            let rises = received > status.received;
            status.received = received;
            rises
        });
        if batch.items.is_empty() {
            return true;
        }
        if self.process.is_frozen() {
            // Its slot is another's by now.
            std::future::pending::<()>().await;
        }
        self.world.event("read", batch.items.len() as u64, batch.bytes as u64);
        self.out.send(std::mem::take(batch)).await.is_ok()
    }
}
