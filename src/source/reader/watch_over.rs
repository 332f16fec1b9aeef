//! The look at the slot and the publication beside the stream.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::source::error::chain;
use crate::source::preflight::{self, Health};
use crate::source::sql::{Ended, Session, Sql};
use crate::source::{Settings, SourceStatus};

/// How often the slot and the publication are looked at while streaming.
const HEALTH_INTERVAL: Duration = Duration::from_secs(10);

/// How long a stream lives on after Postgres announced its shutdown: enough to confirm what is
/// just settling, short against the minute after which administrators lose patience.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

/// Who hears what is found out beside the stream.
pub(super) struct Told {
    /// Whoever reads the stream, once it has time.
    pub(super) news: watch::Sender<Option<Health>>,
    /// Everybody, also while nothing is read because nothing is taken: how much piles up is what
    /// decides about spilling.
    pub(super) publish: watch::Sender<SourceStatus>,
}

/// Looks at the slot and the publication every few seconds, and listens for a shutdown, until it
/// is aborted.
pub(super) async fn watch_over(
    sql: Arc<Sql>,
    settings: Arc<Settings>,
    mut session: Session,
    told: Told,
    going_down: CancellationToken,
) {
    let mut interval = tokio::time::interval(HEALTH_INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            ended = session.wait_ended() => {
                if ended == Ended::ShuttingDown {
                    tokio::time::sleep(SHUTDOWN_GRACE).await;
                    going_down.cancel();
                    return;
                }
                interval.tick().await;
            }
            _now = interval.tick() => {}
        }
        match sql.session().await {
            Ok(live) => session = live,
            // The replication connection notices by itself if Postgres has gone.
            Err(error) => {
                tracing::debug!("could not look at the slot: {}", chain(&error));
                continue;
            }
        }
        match preflight::health(&session, &settings).await {
            Ok(health) => {
                told.publish.send_modify(|status| {
                    status.wal_end = status.wal_end.max(health.wal_end);
                    status.slot.clone_from(&health.slot);
                });
                told.news.send_replace(Some(health));
            }
            Err(error) => tracing::debug!("could not look at the slot: {}", chain(&error)),
        }
    }
}
