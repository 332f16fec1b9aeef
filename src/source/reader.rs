//! The task that owns the replication connection: connects, reads, hands over, confirms, and does
//! it all again after a loss.
//!
//! Whatever it waits for (room in the budget, the consumer, an answer about a type), it goes on
//! telling Postgres that it is alive, so that a stalled sink never costs the connection. What was
//! read and not handed over when a connection is lost stays in the batch: the next connection goes
//! on behind it.
//!
//! A batch is handed over as soon as nothing more is ready to be read. While the consumer is still
//! busy with the batch before, it grows instead: small batches when there is time, large ones when
//! there is not.

mod intake;
mod known;
mod link;
mod pace;
mod watch_over;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rand::RngExt;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::catalog::Catalog;
use super::error::{Error, Trouble, chain};
use super::frame::Streamed;
use super::preflight::{self, Health, Prepared};
use super::seen::Seen;
use super::sql::{Session, Sql};
use super::transport::Replication;
use super::{
    APPLICATION_NAME, Batch, PublicationId, Resume, Settings, SourceStatus, State, TableName,
    quote_identifier,
};
use crate::change::Lsn;
use crate::pipeline::budget::ByteBudget;
use intake::{Decoding, Intake};
use known::Known;
use link::{Link, Pulse};
use pace::Pace;
use watch_over::{Told, watch_over};

/// Batches between the source and its consumer. One waits while one is worked on; more would only
/// make batches smaller.
pub(super) const BATCHES_MAX: usize = 1;

/// How long an answer on the replication connection may take before it streams. Postgres gives it at
/// once, and later only where it has much to look through.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// The server's default `wal_sender_timeout`, taken where it has none: how long it may be silent.
const SILENCE_DEFAULT: Duration = Duration::from_secs(60);

/// Postgres before 15 is silent while it decodes a large transaction of tables that are not
/// published. Patience doubles with each loss by silence, this many times.
const PATIENCE_DOUBLINGS_MAX: u32 = 4;

/// The first delay after a loss, and the longest.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// The task's state across connections.
#[derive(Debug)]
pub(super) struct Reader {
    settings: Arc<Settings>,
    sql: Arc<Sql>,
    catalog: Catalog,
    intake: Intake,
    confirmed: watch::Receiver<Lsn>,
    reconnects: watch::Receiver<()>,
    publish: watch::Sender<SourceStatus>,
    shutdown: CancellationToken,
    known: Known,
    /// The code that was last logged.
    logged: Option<&'static str>,
    silent_losses: u32,
    /// The warning of tables that have left the publication, while it stands.
    unpublished: Option<String>,
    /// The server's process for the last connection that was given up.
    given_up: Option<i32>,
    /// See [`Resume::take_over`].
    take_over: bool,
}

/// The task's ends of the channels that its owner holds the others of.
#[derive(Debug)]
pub(super) struct Ends {
    pub batches: mpsc::Sender<Batch>,
    pub confirmed: watch::Receiver<Lsn>,
    pub reconnects: watch::Receiver<()>,
    pub publish: watch::Sender<SourceStatus>,
}

/// How streaming ended without an error.
enum End {
    /// We were told to stop, and everything is handed over.
    Shutdown,
    /// Nobody takes batches any more.
    Abandoned,
}

impl Reader {
    pub(super) fn new(
        settings: Settings,
        resume: Resume,
        budget: Arc<ByteBudget>,
        ends: Ends,
        shutdown: &CancellationToken,
    ) -> Self {
        let Ends { batches, confirmed, reconnects, publish } = ends;
        let sql = Arc::new(Sql::new(Arc::new(settings.dsn.clone())));
        let catalog = Catalog::new(&settings.tables, &settings.group_by);
        let seen = Seen::new(resume.skip_through, resume.cursor.unwrap_or_default());
        Self {
            settings: Arc::new(settings),
            sql,
            catalog,
            intake: Intake::new(seen, budget, batches),
            confirmed,
            reconnects,
            publish,
            // A child: that our owner has gone is nobody else's business.
            shutdown: shutdown.child_token(),
            known: Known {
                mark: resume.cursor,
                read: resume.skip_through.map_or(Lsn::default(), |position| position.commit_lsn),
                system_identifier: resume.system_identifier,
                publication: resume.publication,
                lost_changes: resume.lost_changes,
            },
            logged: None,
            silent_losses: 0,
            unpublished: None,
            given_up: None,
            take_over: resume.take_over,
        }
    }

    /// Reads until it is told to stop, or cannot go on.
    pub(super) async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            if self.shutdown.is_cancelled() {
                break;
            }
            let progress = self.intake.progress;
            let error = match Box::pin(self.connect_and_stream()).await {
                Ok(()) => break,
                Err(error) => error,
            };
            if self.intake.progress != progress {
                backoff = BACKOFF_MIN;
                self.silent_losses = 0;
            }
            if matches!(error, Error::Silent { .. }) {
                self.silent_losses = (self.silent_losses + 1).min(PATIENCE_DOUBLINGS_MAX);
            }
            self.intake.forget_reservation();
            let Trouble { code, text, fatal, .. } = error.trouble();
            if fatal {
                tracing::error!(code, "the source has stopped: {text}");
                self.publish.send_modify(|status| status.state = State::Fatal { code, text });
                return;
            }
            // One line for each reason, not for each attempt.
            if self.logged.replace(code) != Some(code) {
                tracing::warn!(code, "the source waits: {text}");
            } else {
                tracing::debug!(code, "the source still waits: {text}");
            }
            let delay = backoff.mul_f64(rand::rng().random_range(0.75..1.25));
            backoff = (backoff * 2).min(BACKOFF_MAX);
            let until = SystemTime::now() + delay;
            self.publish.send_modify(|status| status.state = State::Waiting { code, text, until });
            self.wait(delay).await;
        }
        self.publish.send_modify(|status| status.state = State::Stopped);
    }

    /// Waits before the next attempt, and hands over what the lost connection has left.
    async fn wait(&mut self, delay: Duration) {
        let sleep = tokio::time::sleep(delay);
        tokio::pin!(sleep);
        loop {
            let pending = self.intake.pending();
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return,
                handed_over = self.intake.hand_over(), if pending => if handed_over.is_err() {
                    // The owner has gone without a word.
                    self.shutdown.cancel();
                },
                () = &mut sleep => return,
            }
        }
    }

    async fn connect_and_stream(&mut self) -> Result<(), Error> {
        self.publish.send_modify(|status| {
            if !matches!(status.state, State::Waiting { .. }) {
                status.state = State::Connecting;
            }
        });
        let shutdown = self.shutdown.clone();
        let connected = tokio::select! {
            biased;
            () = shutdown.cancelled() => return Ok(()),
            connected = self.connect() => connected,
        };
        if connected.is_err() {
            // Whatever it was, the next attempt asks on a connection that is known to be good.
            self.sql.forget().await;
        }
        let (connection, session, prepared) = connected?;
        self.logged = None;
        Box::pin(self.stream(connection, session, &prepared)).await
    }

    /// Everything up to the first byte of the stream.
    async fn connect(&mut self) -> Result<(Replication, Session, Prepared), Error> {
        let session = self.sql.session().await?;
        // Also where nothing streams: what the slot keeps is seen all the same.
        let health = preflight::health(&session, &self.settings).await?;
        self.publish.send_modify(|status| {
            status.wal_end = status.wal_end.max(health.wal_end);
            status.slot.clone_from(&health.slot);
        });
        // Before anything is made there.
        if let Some(cluster) = preflight::system_identifier(&session).await {
            self.known.check_cluster(&cluster, health.wal_end)?;
        }
        self.check_publication(&health)?;
        let cursor = self.known.mark.filter(|_| !self.known.lost_changes);
        let prepared = preflight::prepare(&session, &self.settings, cursor).await?;
        self.publish.send_modify(|status| status.made_slot |= prepared.made_slot);
        self.known.check_slot(&self.settings.slot, prepared.confirmed)?;
        let dsn = &self.settings.dsn;
        let mut connection = Replication::connect(dsn, &session.endpoint).await?;
        let identity = answered(connection.identify()).await?;
        self.known.check_identity(&identity)?;
        let (slot, publication) = (&self.settings.slot, &self.settings.publication);
        let started = answered(connection.start(slot, publication)).await;
        if let Err(error) = started {
            return Err(self.explain_start(&session, error).await);
        }
        let taken_at = preflight::wal_end(&session).await?;
        self.take_over = false;
        let publication =
            PublicationId { name: self.settings.publication.clone(), oid: prepared.publication };
        self.known = Known {
            mark: self.known.mark.max(Some(prepared.confirmed)),
            read: self.known.read,
            system_identifier: Some(identity.system_identifier.clone()),
            publication: Some(publication.clone()),
            lost_changes: false,
        };
        let (standing, warnings): (Vec<_>, Vec<_>) =
            prepared.warnings.iter().partition(|finding| finding.standing);
        let warnings: Vec<_> = warnings.into_iter().map(with_mend).collect();
        // Each once, not with every connection.
        let (known, is_first) = {
            let status = self.publish.borrow();
            (status.warnings.clone(), status.connections == 0)
        };
        let standing = standing.into_iter().filter(|_| is_first).map(with_mend);
        let news = warnings.iter().filter(|warning| !known.contains(warning)).cloned();
        for warning in standing.chain(news) {
            tracing::warn!("{warning}");
        }
        self.unpublished = None;
        self.publish.send_modify(|status| {
            status.state = State::Streaming;
            status.wal_end = status.wal_end.max(identity.wal_end);
            status.confirmed = status.confirmed.max(prepared.confirmed);
            status.connections += 1;
            status.warnings = warnings;
            status.identity = Some(identity);
            status.publication = Some(publication);
            status.taken_at = Some(taken_at);
        });
        tracing::info!(
            slot = self.settings.slot,
            from = %prepared.confirmed,
            server = %session.endpoint,
            "streaming"
        );
        Ok((connection, session, prepared))
    }

    /// Says who holds the slot where that is why streaming did not start.
    async fn explain_start(&self, session: &Session, error: Error) -> Error {
        let Error::Server(server) = &error else { return error };
        if server.code != "55006" {
            return error;
        }
        let holder = session
            .first(
                "SELECT a.pid, a.application_name, coalesce(host(a.client_addr), 'this machine') \
                 FROM pg_replication_slots s JOIN pg_stat_activity a ON a.pid = s.active_pid \
                 WHERE s.slot_name = $1",
                &[&self.settings.slot],
            )
            .await;
        let Ok(Some(row)) = holder else { return error };
        let pid: i32 = row.try_get(0).unwrap_or_default();
        let name: Option<String> = row.try_get(1).unwrap_or_default();
        let from: Option<String> = row.try_get(2).unwrap_or_default();
        let is_given_up = self.given_up == Some(pid);
        if (self.take_over || is_given_up) && name.as_deref() == Some(APPLICATION_NAME) {
            let whose = if is_given_up { "our own, given up" } else { "another Sluicebox's" };
            tracing::warn!(pid, whose, "ending the connection that has the slot");
            let ended = session.first("SELECT pg_terminate_backend($1)", &[&pid]).await;
            if let Err(error) = ended {
                tracing::warn!(error = chain(&error), "it was not ended");
            }
        }
        // Whoever has read nothing yet is more often a copy of a configuration than a successor, and would
        // take what the other one has not read.
        let is_new = self.known.mark.is_none() && name.as_deref() == Some(APPLICATION_NAME);
        let mend = if is_new {
            format!(
                "another `source.slot` for this one, which has never read from it: what one Sluicebox \
                 reads from a slot, another never gets. Where it takes the other's place: SELECT \
                 pg_terminate_backend({pid})"
            )
        } else {
            format!("SELECT pg_terminate_backend({pid})")
        };
        Error::Unmet {
            code: "source_slot_active",
            text: format!(
                "slot `{}` is in use by `{}` from {} (pid {pid}); Sluicebox goes on when that ends",
                self.settings.slot,
                name.unwrap_or_default(),
                from.unwrap_or_default(),
            ),
            mend: Some(mend),
            fatal: false,
        }
    }

    async fn stream(
        &mut self,
        connection: Replication,
        session: Session,
        prepared: &Prepared,
    ) -> Result<(), Error> {
        let timeout = prepared.server.wal_sender_timeout;
        let pulse = Pulse::new(
            self.confirmed.clone(),
            self.known.mark.unwrap_or_default(),
            timeout,
            timeout.unwrap_or(SILENCE_DEFAULT) * 2_u32.pow(self.silent_losses),
        );
        let going_down = CancellationToken::new();
        let pid = connection.pid;
        let mut reconnects = self.reconnects.clone();
        let moved = self.publish.borrow().moved;
        // Whatever was asked for before there was this connection.
        reconnects.mark_unchanged();
        let mut link =
            Link { connection, pulse, going_down: going_down.clone(), reconnects, moved };
        let (news, mut health) = watch::channel(None);
        let watcher = tokio::spawn(watch_over(
            Arc::clone(&self.sql),
            Arc::clone(&self.settings),
            session,
            Told { news, publish: self.publish.clone() },
            going_down,
        ));
        let ended = self.read(&mut link, &mut health).await;
        watcher.abort();
        self.publish_numbers(&link);
        self.known.mark = self.known.mark.max(Some(link.pulse.confirmed));
        if let Err(Error::Silent { .. } | Error::Stuck) = ended {
            self.given_up = pid;
        }
        match ended? {
            End::Abandoned => {
                link.pulse.take_confirmed();
                link.connection.close(link.pulse.confirmed).await
            }
            End::Shutdown => {
                self.intake.close();
                self.linger(link).await
            }
        }
    }

    /// The hot loop.
    async fn read(
        &mut self,
        link: &mut Link,
        health: &mut watch::Receiver<Option<Health>>,
    ) -> Result<End, Error> {
        let mut stream = Decoding::default();
        let mut pace = Pace::new();
        loop {
            // Everything that has been read.
            while let Some(streamed) = link.connection.next_streamed()? {
                match streamed {
                    Streamed::Data { message, .. } => {
                        link.moved += 1;
                        if let Some(relation) = stream.take(message, &mut self.intake)? {
                            let described =
                                link.alive(self.catalog.describe(&self.sql, relation)).await??;
                            stream.define(described);
                        }
                    }
                    Streamed::Keepalive { wal_end, reply_requested } => {
                        link.moved += u64::from(wal_end > link.pulse.wal_end);
                        link.pulse.wal_end = link.pulse.wal_end.max(wal_end);
                        if !stream.in_transaction {
                            self.intake.idle(wal_end);
                        }
                        if reply_requested {
                            link.status(false).await?;
                        }
                    }
                    Streamed::Done => return Err(Error::Closed),
                    Streamed::Other => {}
                }
                if self.intake.is_full() && link.alive(self.intake.hand_over()).await?.is_err() {
                    return Ok(End::Abandoned);
                }
            }
            // A frame that is larger than what is read at once: memory first.
            if let Some(bytes) = link.connection.large_frame()?
                && !self.intake.reserved
            {
                let pending = self.intake.pending();
                if pending && link.alive(self.intake.hand_over()).await?.is_err() {
                    return Ok(End::Abandoned);
                }
                let stopped = link
                    .alive(async {
                        tokio::select! {
                            biased;
                            () = self.intake.reserve(bytes) => false,
                            () = self.shutdown.cancelled() => true,
                        }
                    })
                    .await?;
                if stopped {
                    return Ok(End::Shutdown);
                }
                link.connection.reserve_frame(bytes);
            }
            let pending = self.intake.pending() && !self.intake.reserved;
            tokio::select! {
                biased;
                // First, because a busy stream is always ready to be read.
                _now = link.pulse.tick.tick() => {
                    if self.shutdown.is_cancelled() {
                        return self.finish_reading(link).await;
                    }
                    self.on_tick(link, health).await?;
                }
                read = async {
                    pace.wait().await;
                    link.connection.read().await
                } => {
                    pace.read(read?);
                    link.pulse.heard();
                }
                handed_over = self.intake.hand_over(), if pending => if handed_over.is_err() {
                    return Ok(End::Abandoned);
                },
            }
        }
    }

    async fn on_tick(
        &mut self,
        link: &mut Link,
        health: &mut watch::Receiver<Option<Health>>,
    ) -> Result<(), Error> {
        link.on_tick().await?;
        link.pulse.check_silence()?;
        if link.pulse.published != link.pulse.sent_at {
            link.pulse.published = link.pulse.sent_at;
            self.publish_numbers(link);
        }
        if health.has_changed().unwrap_or(false) {
            let health = health.borrow_and_update().clone();
            health.map_or(Ok(()), |health| self.on_health(health))?;
        }
        Ok(())
    }

    fn publish_numbers(&self, link: &Link) {
        let pulse = &link.pulse;
        self.publish.send_modify(|status| {
            status.wal_end = status.wal_end.max(pulse.wal_end);
            status.confirmed = status.confirmed.max(pulse.confirmed);
            status.received = self.intake.seen.received();
            status.changes = self.intake.changes;
            status.moved = link.moved;
        });
    }

    fn check_publication(&self, health: &Health) -> Result<(), Error> {
        let Health { publication, unpublished, slot, .. } = health;
        self.known.check_publication(&self.settings, *publication, unpublished, slot.is_some())
    }

    fn on_health(&mut self, health: Health) -> Result<(), Error> {
        self.check_publication(&health)?;
        let publication = &self.settings.publication;
        let warning = unpublished_warning(publication, &health.unpublished);
        if warning == self.unpublished {
            return Ok(());
        }
        match &warning {
            Some(warning) => tracing::warn!("{warning}"),
            None => tracing::info!(publication, "the publication holds all tables again"),
        }
        let former = std::mem::replace(&mut self.unpublished, warning.clone());
        self.publish.send_modify(|status| {
            status.warnings.retain(|found| Some(found) != former.as_ref());
            status.warnings.extend(warning);
        });
        Ok(())
    }

    /// Hands over what was read before the stop.
    async fn finish_reading(&mut self, link: &mut Link) -> Result<End, Error> {
        if self.intake.pending() && link.alive(self.intake.hand_over()).await?.is_err() {
            return Ok(End::Abandoned);
        }
        Ok(End::Shutdown)
    }

    /// Keeps the connection while the owner drains, and ends it when the owner has.
    async fn linger(&mut self, mut link: Link) -> Result<(), Error> {
        loop {
            // The owner has dropped its end of `confirm`: nothing more will be confirmed.
            if link.pulse.source.has_changed().is_err() {
                link.pulse.take_confirmed();
                self.publish_numbers(&link);
                return link.connection.close(link.pulse.confirmed).await;
            }
            link.pulse.tick.tick().await;
            if let Err(error) = link.on_tick().await {
                // What is not confirmed now is repeated at the next start, and left out then.
                tracing::warn!("could not confirm to the end: {}", chain(&error));
                return Ok(());
            }
        }
    }
}

/// Gives a step of connecting up that is not answered.
async fn answered<T>(step: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::time::timeout(ANSWER_TIMEOUT, step)
        .await
        .unwrap_or(Err(Error::QueryTimeout { timeout: ANSWER_TIMEOUT }))
}

/// Of configured tables that the publication does not hold any more: dropped and made anew, for instance.
fn unpublished_warning(publication: &str, tables: &[TableName]) -> Option<String> {
    let list =
        |write: fn(&TableName) -> String| tables.iter().map(write).collect::<Vec<_>>().join(", ");
    (!tables.is_empty()).then(|| {
        format!(
            "publication `{publication}` does not hold {} any more: what is changed there is not read, \
             and never delivered; mend it with: ALTER PUBLICATION {} ADD TABLE {}",
            list(ToString::to_string),
            quote_identifier(publication),
            list(TableName::quoted),
        )
    })
}

fn with_mend(finding: &preflight::Finding) -> String {
    match &finding.mend {
        Some(mend) => format!("{finding}; mend it with: {mend}"),
        None => finding.to_string(),
    }
}
