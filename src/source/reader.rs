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

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rand::RngExt;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::catalog::Catalog;
use super::error::{Error, SKIP_LOST_CHANGES, Trouble, chain};
use super::frame::Streamed;
use super::preflight::{self, Health, Prepared};
use super::seen::Seen;
use super::sql::{Ended, Session, Sql};
use super::transport::{Identity, Replication};
use super::{APPLICATION_NAME, Batch, Item, Resume, Settings, SourceStatus, State, quote_literal};
use crate::change::{Change, Lsn};
use crate::decode::{Decoded, Decoder, Relation};
use crate::pipeline::budget::ByteBudget;

/// Batches between the source and its consumer. One waits while one is worked on; more would only
/// make batches smaller.
pub(super) const BATCHES_MAX: usize = 1;

/// A batch is not filled further beyond this: large enough that what a hand-over costs (about a
/// microsecond, and often a wake-up) vanishes, small enough to spread over workers.
const BATCH_ITEMS_MAX: usize = 256;
const BATCH_BYTES_MAX: usize = 256 * 1024;

/// How often clocks are looked at: whether to send a status update, whether the server is silent,
/// whether to stop.
const TICK: Duration = Duration::from_millis(100);

/// How long an answer on the replication connection may take before it streams. Postgres gives it at
/// once, and later only where it has much to look through.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A status update goes out at least this often, and with each tick where more was confirmed.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// The server's default `wal_sender_timeout`, taken where it has none: how long it may be silent.
const SILENCE_DEFAULT: Duration = Duration::from_secs(60);

/// Postgres before 15 is silent while it decodes a large transaction of tables that are not
/// published. Patience doubles with each loss by silence, this many times.
const PATIENCE_DOUBLINGS_MAX: u32 = 4;

/// The first delay after a loss, and the longest.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// How often the slot and the publication are looked at while streaming.
const HEALTH_INTERVAL: Duration = Duration::from_secs(10);

/// How long a stream lives on after Postgres announced its shutdown: enough to confirm what is
/// just settling, short against the minute after which administrators lose patience.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(1);

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
    /// What the slot may have been confirmed to at most; none before the first look at it.
    mark: Option<Lsn>,
    system_identifier: Option<String>,
    /// The publication that streaming began with.
    publication: Option<u32>,
    /// The code that was last logged.
    logged: Option<&'static str>,
    silent_losses: u32,
    /// The server's process for the last connection that was given up.
    given_up: Option<i32>,
    /// See [`Resume::take_over`].
    take_over: bool,
    /// See [`Resume::lost_changes`].
    lost_changes: bool,
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
            mark: resume.cursor,
            system_identifier: resume.system_identifier,
            publication: None,
            logged: None,
            silent_losses: 0,
            given_up: None,
            take_over: resume.take_over,
            lost_changes: resume.lost_changes,
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
            status.slot = health.slot;
        });
        let cursor = self.mark.filter(|_| !self.lost_changes);
        let prepared = preflight::prepare(&session, &self.settings, cursor).await?;
        self.publish.send_modify(|status| status.made_slot |= prepared.made_slot);
        self.check_mark(prepared.confirmed)?;
        self.check_publication(Some(prepared.publication))?;
        let dsn = &self.settings.dsn;
        let mut connection = Replication::connect(dsn, &session.endpoint).await?;
        let identity = answered(connection.identify()).await?;
        self.check_identity(&identity)?;
        let (slot, publication) = (&self.settings.slot, &self.settings.publication);
        let started = answered(connection.start(slot, publication)).await;
        if let Err(error) = started {
            return Err(self.explain_start(&session, error).await);
        }
        let taken_at = preflight::wal_end(&session).await?;
        (self.take_over, self.lost_changes) = (false, false);
        self.mark = self.mark.max(Some(prepared.confirmed));
        self.publication = Some(prepared.publication);
        self.system_identifier = Some(identity.system_identifier.clone());
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
        self.publish.send_modify(|status| {
            status.state = State::Streaming;
            status.wal_end = status.wal_end.max(identity.wal_end);
            status.confirmed = status.confirmed.max(prepared.confirmed);
            status.connections += 1;
            status.warnings = warnings;
            status.identity = Some(identity);
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

    /// The slot must not have been confirmed by anybody else.
    fn check_mark(&self, confirmed: Lsn) -> Result<(), Error> {
        let Some(mark) = self.mark.filter(|&mark| confirmed > mark) else { return Ok(()) };
        if self.lost_changes {
            tracing::warn!(from = %mark, to = %confirmed, "what was changed in between is given up");
            return Ok(());
        }
        Err(Error::Unmet {
            code: "source_slot_advanced",
            text: format!(
                "slot `{}` was confirmed up to {confirmed}, but this pipeline has read only up to \
                 {mark}: changes in between may be lost to it. Something else has read from the \
                 slot, it was made anew, or the state folder is an older copy",
                self.settings.slot
            ),
            mend: Some(format!(
                "put the state folder back that belongs to it; or {SKIP_LOST_CHANGES}"
            )),
            fatal: true,
        })
    }

    /// It must be the same cluster, and not an older copy of it.
    fn check_identity(&self, identity: &Identity) -> Result<(), Error> {
        let unmet = |text| {
            Err(Error::Unmet { code: "source_other_cluster", text, mend: None, fatal: true })
        };
        let found = &identity.system_identifier;
        if let Some(known) = self.system_identifier.as_ref().filter(|known| *known != found) {
            return unmet(format!(
                "this is another Postgres cluster (system identifier {found}) than the one that \
                 the pipeline has read ({known})"
            ));
        }
        match self.mark.filter(|&mark| identity.wal_end < mark) {
            Some(mark) => unmet(format!(
                "the WAL of this Postgres ends at {}, but the pipeline has read up to {mark}: it \
                 was restored from an older copy",
                identity.wal_end
            )),
            None => Ok(()),
        }
    }

    /// A publication that was dropped and made anew has not published in between; Postgres 18 says
    /// nothing about it.
    fn check_publication(&self, found: Option<u32>) -> Result<(), Error> {
        let name = &self.settings.publication;
        let text = match (self.publication, found) {
            (None, _) => return Ok(()),
            (Some(known), Some(found)) if known == found => return Ok(()),
            (Some(_), Some(_)) => format!("publication `{name}` was dropped and made anew"),
            (Some(_), None) => format!("publication `{name}` was dropped"),
        };
        Err(Error::Unmet {
            code: "source_publication",
            text: format!(
                "{text}: changes since then may not be in the stream, and the slot may not be able to \
                 pass them"
            ),
            mend: Some(format!(
                "SELECT pg_drop_replication_slot({}); then {SKIP_LOST_CHANGES}",
                quote_literal(&self.settings.slot)
            )),
            fatal: true,
        })
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
        Error::Unmet {
            code: "source_slot_active",
            text: format!(
                "slot `{}` is in use by `{}` from {} (pid {pid}); Sluicebox goes on when that ends",
                self.settings.slot,
                name.unwrap_or_default(),
                from.unwrap_or_default(),
            ),
            mend: Some(format!("SELECT pg_terminate_backend({pid})")),
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
            self.mark.unwrap_or_default(),
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
        self.mark = self.mark.max(Some(link.pulse.confirmed));
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

    fn on_health(&self, health: Health) -> Result<(), Error> {
        let Health { publication, unpublished, .. } = health;
        self.check_publication(publication)?;
        let warning = (!unpublished.is_empty()).then(|| {
            let names: Vec<_> = unpublished.iter().map(ToString::to_string).collect();
            format!(
                "publication `{}` does not hold {} any more: their changes are not read",
                self.settings.publication,
                names.join(", ")
            )
        });
        self.publish.send_modify(|status| {
            if let Some(warning) = warning.filter(|warning| !status.warnings.contains(warning)) {
                tracing::warn!("{warning}");
                status.warnings.push(warning);
            }
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

fn with_mend(finding: &preflight::Finding) -> String {
    match &finding.mend {
        Some(mend) => format!("{finding}; mend it with: {mend}"),
        None => finding.to_string(),
    }
}

/// What is being read from one connection.
#[derive(Debug, Default)]
struct Decoding {
    decoder: Decoder,
    in_transaction: bool,
    /// Tables of the publication that nobody asked for; almost always empty.
    unwanted: HashSet<u32>,
    /// Where the last transaction was committed, for errors.
    after: Lsn,
}

impl Decoding {
    /// Takes one message. Returns a relation that has to be defined before the next.
    fn take(&mut self, message: Bytes, intake: &mut Intake) -> Result<Option<Relation>, Error> {
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

    fn change(&self, change: Change, intake: &mut Intake) {
        let unwanted = !self.unwanted.is_empty() && self.unwanted.contains(&change.table.oid);
        intake.change(change, unwanted);
    }

    fn define(&mut self, described: super::catalog::Described) {
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
struct Intake {
    seen: Seen,
    batch: Batch,
    budget: Arc<ByteBudget>,
    /// What of the budget belongs to the batch already.
    held: usize,
    /// `held` is for a large frame that is being read.
    reserved: bool,
    /// Nothing after shutdown.
    out: Option<mpsc::Sender<Batch>>,
    changes: u64,
    /// Rises with everything new that was read.
    progress: u64,
}

/// Lets a busy stream gather for a moment before it is read again.
///
/// A walsender sends each change by itself. Read as they come, a busy stream costs a system call and
/// a wake-up of two threads for each; a millisecond apart, one for a hundred. A stream that is not
/// busy is never waited for.
#[derive(Debug)]
struct Pace {
    since: Instant,
    bytes: usize,
    until: Option<Instant>,
}

/// What makes a stream busy: so many bytes within [`BUSY_TIME`].
const BUSY_BYTES: usize = 32 * 1024;
const BUSY_TIME: Duration = Duration::from_millis(2);

/// A read of fewer bytes has most likely emptied the socket.
const EMPTIED_BYTES: usize = 64 * 1024;

/// How long a busy stream gathers. The socket's buffer holds what comes meanwhile.
const GATHER: Duration = Duration::from_millis(1);

impl Pace {
    fn new() -> Self {
        Self { since: Instant::now(), bytes: 0, until: None }
    }

    fn read(&mut self, bytes: usize) {
        let now = Instant::now();
        if now.duration_since(self.since) > BUSY_TIME {
            self.since = now;
            self.bytes = 0;
        }
        self.bytes += bytes;
        let gathers = self.bytes >= BUSY_BYTES && bytes < EMPTIED_BYTES;
        self.until = gathers.then(|| now + GATHER);
    }

    /// Cancel-safe.
    async fn wait(&self) {
        if let Some(until) = self.until {
            tokio::time::sleep_until(until).await;
        }
    }
}

/// The consumer has gone.
#[derive(Debug)]
struct Gone;

impl Intake {
    fn new(seen: Seen, budget: Arc<ByteBudget>, out: mpsc::Sender<Batch>) -> Self {
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

    fn change(&mut self, change: Change, unwanted: bool) {
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

    fn commit(&mut self, end_lsn: Lsn) {
        if self.seen.end(end_lsn) {
            self.progress += 1;
            self.batch.items.push(Item::Commit { end_lsn });
        }
    }

    fn idle(&mut self, wal_end: Lsn) {
        if !self.seen.end(wal_end) {
            return;
        }
        match self.batch.items.last_mut() {
            // Only the last of several is of any use.
            Some(Item::Idle { wal_end: last }) => *last = wal_end,
            _ => self.batch.items.push(Item::Idle { wal_end }),
        }
    }

    fn pending(&self) -> bool {
        !self.batch.items.is_empty()
    }

    fn is_full(&self) -> bool {
        self.batch.items.len() >= BATCH_ITEMS_MAX || self.batch.bytes >= BATCH_BYTES_MAX
    }

    /// Takes room for a frame before it is read. The batch was handed over before.
    async fn reserve(&mut self, bytes: usize) {
        self.give_back();
        self.budget.acquire(bytes).await;
        self.held = bytes;
        self.reserved = true;
    }

    /// The frame that room was reserved for does not come on this connection.
    fn forget_reservation(&mut self) {
        if self.reserved {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        self.reserved = false;
        if self.held > 0 {
            self.budget.release(std::mem::take(&mut self.held));
        }
    }

    /// Hands the batch over, with exactly its bytes taken from the budget. Dropping the future
    /// loses nothing: what was taken stays with the batch.
    async fn hand_over(&mut self) -> Result<(), Gone> {
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
    fn close(&mut self) {
        self.out = None;
        self.give_back();
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// A connection and its clocks.
#[derive(Debug)]
struct Link {
    connection: Replication,
    pulse: Pulse,
    /// Postgres shuts down and waits for us.
    going_down: CancellationToken,
    /// Our owner has had enough of this connection.
    reconnects: watch::Receiver<()>,
    /// See [`SourceStatus::moved`].
    moved: u64,
}

impl Link {
    /// Waits for something else while Postgres goes on hearing from us.
    async fn alive<T>(&mut self, wait: impl Future<Output = T>) -> Result<T, Error> {
        tokio::pin!(wait);
        loop {
            tokio::select! {
                biased;
                done = &mut wait => {
                    // Nothing was read meanwhile; that is not the server's silence.
                    self.pulse.heard();
                    return Ok(done);
                }
                _now = self.pulse.tick.tick() => self.on_tick().await?,
            }
        }
    }

    /// Sends a status update if one is due.
    async fn on_tick(&mut self) -> Result<(), Error> {
        if self.going_down.is_cancelled() {
            return Err(Error::ShuttingDown);
        }
        if self.reconnects.has_changed().unwrap_or(false) {
            return Err(Error::Stuck);
        }
        let risen = self.pulse.take_confirmed();
        if risen || self.pulse.sent_at.elapsed() >= self.pulse.status_interval {
            let request_reply = self.pulse.heard_at.elapsed() > self.pulse.silence_max / 2;
            self.status(request_reply).await?;
        }
        Ok(())
    }

    async fn status(&mut self, request_reply: bool) -> Result<(), Error> {
        self.pulse.take_confirmed();
        self.pulse.sent_at = Instant::now();
        self.connection.send_status(self.pulse.confirmed, request_reply).await
    }
}

/// When to say what to the server.
#[derive(Debug)]
struct Pulse {
    tick: Interval,
    status_interval: Duration,
    silence_max: Duration,
    source: watch::Receiver<Lsn>,
    confirmed: Lsn,
    wal_end: Lsn,
    sent_at: Instant,
    heard_at: Instant,
    /// The `sent_at` of the last published status.
    published: Instant,
}

impl Pulse {
    fn new(
        source: watch::Receiver<Lsn>,
        floor: Lsn,
        sender_timeout: Option<Duration>,
        silence_max: Duration,
    ) -> Self {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let now = Instant::now();
        // Well within what the server allows, where that is short.
        let status_interval =
            sender_timeout.map_or(STATUS_INTERVAL, |timeout| STATUS_INTERVAL.min(timeout / 4));
        let confirmed = floor.max(*source.borrow());
        Self {
            tick,
            status_interval,
            silence_max,
            source,
            confirmed,
            wal_end: Lsn::default(),
            sent_at: now,
            heard_at: now,
            published: now,
        }
    }

    /// Looks at what the owner has confirmed; whether that is more than before.
    fn take_confirmed(&mut self) -> bool {
        let confirmed = *self.source.borrow();
        let risen = confirmed > self.confirmed;
        self.confirmed = self.confirmed.max(confirmed);
        risen
    }

    fn heard(&mut self) {
        self.heard_at = Instant::now();
    }

    fn check_silence(&self) -> Result<(), Error> {
        let silence = self.heard_at.elapsed();
        if silence > self.silence_max { Err(Error::Silent { silence }) } else { Ok(()) }
    }
}

/// Who hears what is found out beside the stream.
struct Told {
    /// Whoever reads the stream, once it has time.
    news: watch::Sender<Option<Health>>,
    /// Everybody, also while nothing is read because nothing is taken: how much piles up is what
    /// decides about spilling.
    publish: watch::Sender<SourceStatus>,
}

/// Looks at the slot and the publication every few seconds, and listens for a shutdown, until it
/// is aborted.
async fn watch_over(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::{Column, Grouping, Position, Table};
    use crate::pg_type::Kind;
    use crate::source::catalog::Described;

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

    #[test]
    fn what_is_confirmed_only_rises() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _guard = runtime.enter();
        let (confirm, confirmed) = watch::channel(Lsn(5));
        let mut pulse = Pulse::new(confirmed, Lsn(7), None, SILENCE_DEFAULT);
        assert_eq!(pulse.confirmed, Lsn(7), "never below the slot");
        for (told, risen, expected) in [(6, false, 7), (9, true, 9), (9, false, 9), (8, false, 9)] {
            confirm.send_replace(Lsn(told));
            assert_eq!((pulse.take_confirmed(), pulse.confirmed), (risen, Lsn(expected)));
        }
    }
}
