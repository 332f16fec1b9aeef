//! How many bytes of changes may be between the source and their settlement.
//!
//! The source takes from the budget before it reads, the driver gives back as changes settle. That
//! is what keeps memory bounded whatever a row's size: a stalled sink leaves the budget spent, and
//! the source then stops reading (and goes on telling Postgres that it is alive). It counts bytes,
//! not changes, because one change may be a hundred bytes or a hundred mebibytes.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// A number of bytes that many may take from and give back to.
#[derive(Debug)]
pub struct ByteBudget {
    bytes_max: usize,
    out: AtomicUsize,
    /// How many wait, so that giving back costs one load while nobody does.
    waiting: AtomicUsize,
    freed: Notify,
}

impl ByteBudget {
    /// A budget of `bytes_max`, all of it there.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            out: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
        }
    }

    /// What may be out at once, in bytes.
    #[must_use]
    pub fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// What is out now, in bytes. More than [`Self::bytes_max`] while one change that is larger
    /// than the whole budget passes.
    #[must_use]
    pub fn bytes_out(&self) -> usize {
        self.out.load(Ordering::SeqCst)
    }

    /// Waits until the bytes fit or nothing else is out, so that one change of any size passes
    /// alone. Dropping the future takes nothing.
    pub async fn acquire(&self, bytes: usize) {
        if self.try_acquire(bytes) {
            return;
        }
        let _waiting = Waiting::enter(&self.waiting);
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            // Enabled before looking, so that what is given back in between is not missed.
            freed.as_mut().enable();
            if self.try_acquire(bytes) {
                return;
            }
            freed.await;
        }
    }

    /// Takes the bytes if [`Self::acquire`] would not wait.
    #[must_use]
    pub fn try_acquire(&self, bytes: usize) -> bool {
        self.out
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |out| {
                let sum = out.saturating_add(bytes);
                (out == 0 || sum <= self.bytes_max).then_some(sum)
            })
            .is_ok()
    }

    /// Takes the bytes though they may not fit: for memory that is already in use.
    pub fn force(&self, bytes: usize) {
        self.out.fetch_add(bytes, Ordering::SeqCst);
    }

    /// Gives back what was taken.
    pub fn release(&self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let before = self.out.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |out| {
            Some(out.saturating_sub(bytes))
        });
        debug_assert!(before.is_ok_and(|out| out >= bytes), "more given back than was taken");
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.freed.notify_waiters();
        }
    }
}

/// Counts one that waits, also when its future is dropped.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn fits_or_passes_alone() {
        // (already out, asked for, granted)
        for (out, bytes, granted) in
            [(0, 10, true), (0, 11, true), (0, 1000, true), (1, 9, true), (1, 10, false)]
        {
            let budget = ByteBudget::new(10);
            budget.force(out);
            assert_eq!(budget.try_acquire(bytes), granted, "{out} + {bytes}");
            assert_eq!(budget.bytes_out(), if granted { out + bytes } else { out });
        }
    }

    #[tokio::test]
    async fn waits_for_what_is_given_back() {
        let budget = Arc::new(ByteBudget::new(10));
        budget.acquire(8).await;
        let waiting = tokio::spawn({
            let budget = Arc::clone(&budget);
            async move { budget.acquire(20).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        budget.release(5);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished(), "20 bytes pass only alone");
        budget.release(3);
        waiting.await.unwrap();
        assert_eq!(budget.bytes_out(), 20);
    }

    #[tokio::test]
    async fn a_dropped_wait_takes_nothing() {
        let budget = ByteBudget::new(10);
        budget.acquire(10).await;
        let timeout = tokio::time::timeout(Duration::from_millis(10), budget.acquire(1)).await;
        assert!(timeout.is_err());
        budget.release(10);
        assert_eq!(budget.bytes_out(), 0);
        assert_eq!(budget.waiting.load(Ordering::SeqCst), 0);
    }
}
