//! The answer that a job beside the watch owes it. The watch waits for one of each job and does nothing
//! about its files until then, so that a job which fails in any way, by a panic too, must answer.

use std::sync::mpsc;

use super::Wake;

/// Sends what the job found out, or what else is to be told as it is dropped.
pub(super) struct Answer {
    wake: mpsc::Sender<Wake>,
    otherwise: Option<Wake>,
}

impl Answer {
    /// `otherwise` is told where the job ends without an answer.
    pub(super) fn or(wake: &mpsc::Sender<Wake>, otherwise: Wake) -> Self {
        Self { wake: wake.clone(), otherwise: Some(otherwise) }
    }

    pub(super) fn send(mut self, wake: Wake) {
        self.otherwise = Some(wake);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(wake) = self.otherwise.take() {
            // A failed send: the watch has ended.
            self.wake.send(wake).ok();
        }
    }
}
