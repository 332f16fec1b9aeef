//! `sluicebox demo`: the whole story on this machine, with nothing prepared and nothing left over.
//!
//! ```text
//! throwaway Postgres ── the pipeline, as `run` runs it ──▶ embedded S2, on disk
//!        ▲                        ▲                              │
//!    clients write        strip-columns is dropped in       read back, folded, compared
//! ```
//!
//! It is a user of Sluicebox: it writes a configuration file, starts the pipeline from it, and
//! looks at it through the handle that the console has. It never reaches into the path, and the
//! verification in [`verify`] judges by what Postgres and S2 say.

mod narrator;
mod verify;
mod workload;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use base64::Engine as _;
use bytes::Bytes;
use tokio_postgres::NoTls;
use tokio_util::sync::CancellationToken;

use self::narrator::{Narrator, thousands};
use self::workload::{LARGE_COLUMNS, Ledger, SCHEMA, TABLE, Workload, lock};
use crate::app::{self, Running};
use crate::config::Config;
use crate::pipeline::control::{Control, Filter, MessageList, MessageView, PageQuery, Status};
use crate::pipeline::grants::Grants;
use crate::sink::embedded::{Embedded, EmbeddedSettings, Storage};
use crate::sink::{self, Client, ReadRecord};
use crate::throwaway::{self, Postgres, Shutdown};
use crate::transform::ready_made;
use crate::verify::shorten;

/// Fewer rows leave nothing to tell of.
pub const ROWS_MIN: u64 = 100;

/// Names of the demonstration's own S2.
const BASIN: &str = "sluicebox-demo";
const STREAM: &str = "documents";

/// The replication slot, as configurations have it by default.
const SLOT: &str = "sluicebox";

/// How long nothing at all may move before the demonstration gives up. Compiling a module in a
/// build without optimisation, on a busy machine, takes some seconds.
const STALL_MAX: Duration = Duration::from_secs(60);

/// How long the pipeline may take to drain at the end.
const FINISH_MAX: Duration = Duration::from_secs(30);

/// What to show.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Rows to insert, at least [`ROWS_MIN`]; updates and deletes come on top.
    pub rows: u64,
    /// Another seed draws other rows, and the same one the same.
    pub seed: u64,
    /// End after the verification, instead of staying up until Ctrl-C.
    pub exit: bool,
    /// Leave the folder with database, stream, store and logs where it is.
    pub keep: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { rows: 20_000, seed: 1, exit: false, keep: false }
    }
}

/// Everything that has to be stopped, in whatever state the story ended.
struct Stage {
    dir: PathBuf,
    postgres: Option<Postgres>,
    s2: Option<Embedded>,
    running: Option<Running>,
    shutdown: CancellationToken,
}

/// Tells the story. Success means that everything that it claims was verified; an interruption
/// before that is none.
///
/// # Errors
///
/// When something could not even be tried: no Postgres, no room, a pipeline that stopped.
pub async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let narrator = Narrator::new();
    let dir = tempfile::Builder::new()
        .prefix("sluicebox-demo-")
        .tempdir()
        .context("could not create a temporary folder (TMPDIR chooses where)")?;
    let mut stage = Stage {
        dir: dir.path().to_path_buf(),
        postgres: None,
        s2: None,
        running: None,
        shutdown: CancellationToken::new(),
    };
    write_log_to(&stage.log_path())?;
    let mut interruption = Interruption::listen()?;
    // On the heap: the story holds much between its steps.
    let told = tokio::select! {
        told = Box::pin(story(&mut stage, options, &narrator)) => told.map(Some),
        () = interruption.wait() => Ok(None),
    };
    let verified = told.as_ref().ok().copied().flatten();
    if verified == Some(true) && !options.exit {
        stage.invite(&narrator);
        tokio::select! {
            () = interruption.wait() => {}
            () = stage.pipeline_stopped() => {}
        }
    }
    let interrupted = if matches!(told, Ok(None)) { "Interrupted. " } else { "" };
    narrator.line(format_args!("\n{interrupted}Stopping the pipeline, S2 and Postgres."));
    let closed = stage.close().await;
    let failed = told.is_err() || closed.is_err() || verified == Some(false);
    if options.keep {
        narrator.line(format_args!("Everything is kept in {}.", dir.keep().display()));
    } else {
        if failed && let Some(logs) = stage.keep_logs() {
            narrator.line(format_args!(
                "The logs are kept in {}; `--keep` keeps database, stream and store, too.",
                logs.display()
            ));
        }
        dir.close().context("could not remove the temporary folder")?;
    }
    // Where both went wrong, the pipeline's own end is the cause.
    match (told, closed) {
        (Err(story), Err(end)) => Err(end.context(format!("{story:#}"))),
        (Err(error), Ok(())) | (Ok(_), Err(error)) => Err(error),
        (Ok(_), Ok(())) if verified == Some(true) => Ok(ExitCode::SUCCESS),
        (Ok(_), Ok(())) => Ok(ExitCode::FAILURE),
    }
}

/// From an empty folder to the verdict: whether everything that was claimed held.
async fn story(stage: &mut Stage, options: Options, narrator: &Narrator) -> anyhow::Result<bool> {
    let rows = options.rows.max(ROWS_MIN);
    narrator.line("Postgres rows become S2 records, through WebAssembly, on this machine.");
    narrator.line(format_args!("Everything is in {} meanwhile.", stage.dir.display()));

    narrator.step("A throwaway Postgres with logical replication");
    let begun = Instant::now();
    // Nobody pulls the plug during a demonstration, and its data is thrown away anyway.
    let postgres = throwaway::Options {
        dir: Some(stage.dir.clone()),
        fsync: false,
        settings: vec![("max_wal_size".to_owned(), "2GB".to_owned())],
        ..throwaway::Options::default()
    };
    let postgres = stage.postgres.insert(Postgres::start(postgres).await?);
    let url = postgres.url();
    let account = postgres.account().map(|name| format!(", as the user {name}"));
    narrator.say(format_args!(
        "version {}{}, ready after {:.1} s: {url}",
        postgres.major(),
        account.unwrap_or_default(),
        begun.elapsed().as_secs_f64()
    ));
    let database = connect(&url).await?;
    database.batch_execute(SCHEMA).await.context("could not create the table")?;
    narrator.say(format_args!("with an empty table {TABLE} of 23 columns"));

    narrator.step("An embedded S2 server, storing on disk");
    let s2 = stage.s2.insert(start_s2(&stage.dir).await?);
    let s2_url = s2.url();
    narrator.say(format_args!("{s2_url}, basin {BASIN}, stream {STREAM}"));

    narrator.step("The pipeline, with no transforms yet");
    let config_path = stage.config_path();
    write_config(&stage.dir, &config_path, &url, &s2_url)?;
    narrator.say(format_args!("configured by {}", config_path.display()));
    let config = Config::load(&config_path)?;
    let transforms_dir = config.transforms.dir.clone();
    let source = app::source_settings(&config, app::dsn(&config)?);
    let running = Box::pin(app::start(config, Grants::default(), stage.shutdown.clone())).await?;
    let running = stage.running.insert(running);
    narrator.say(format_args!("its console, for a browser: http://{}/", running.console));
    let control = running.control.clone();
    let mut workload = Workload::connect(&url, rows, options.seed).await?;
    let shared_ledger = workload.shared_ledger();
    let mut watch = Watch { control, database, ledger: &shared_ledger, narrator };
    watch.until_ready().await?;
    narrator.say(format_args!("slot {SLOT} created; delivery: {}", watch.status().guarantee));

    narrator.step(format_args!(
        "Three clients write: {} rows of about 1 KiB, updates, deletes, and now and then a row \
         with 3 MB of text or 1.2 MB of JSON",
        thousands(rows)
    ));
    let begun = Instant::now();
    watch.during(workload.write(rows * 7 / 10)).await?;
    watch.until_confirmed().await?;
    let (changes, large_rows) = {
        let ledger = workload.ledger();
        (ledger.changes, ledger.large_rows)
    };
    let status = watch.status();
    narrator.say(format_args!(
        "{} changes committed; {} of them are records in S2, {:.1} s after the first",
        thousands(changes),
        thousands(status.records),
        begun.elapsed().as_secs_f64()
    ));

    narrator.step("What S2 cannot take is parked, and holds nothing back but its own row");
    let parked = watch.list("parked", 1000).await?;
    let waiting = watch.list("waiting", 1).await?.total;
    let parked_as_expected = tell_parked(narrator, &parked, waiting, large_rows);
    if let Some(first) = parked.messages.first() {
        let id = first.id.parse().context("a message's id is no number")?;
        narrator.say(format_args!("the hint for it: {}", watch.control.show(id).await?.hint));
    }

    narrator.step("The operator drops strip-columns.wasm into the folder; the clients write on");
    let module = install_strip_columns(&transforms_dir)?;
    narrator.say(format_args!(
        "{}, with settings beside it: {} go where a record would be too large",
        module.display(),
        LARGE_COLUMNS.join(" and ")
    ));
    let client = Client::new(sink::Settings {
        endpoint: sink::Endpoint::Url(s2_url),
        ..sink::Settings::new(BASIN, STREAM)
    })?;
    let mut delivered = client.follow(client.tail().await?.next_seq);
    let begun = Instant::now();
    let former_chain = watch.status().chain;
    watch.during(workload.write(rows * 9 / 10)).await?;
    watch.until_delivered().await?;
    let status = watch.status();
    if status.chain == former_chain {
        bail!("the parked messages are gone, and no transform went live");
    }
    narrator.say(format_args!(
        "no restart: chain {} is live, and all parked messages are delivered after {:.1} s",
        status.chain,
        begun.elapsed().as_secs_f64()
    ));
    if let Some(first) = parked.messages.first() {
        tell_delivered(narrator, &mut delivered, first).await?;
    }

    narrator.step("From now on such rows pass without stopping");
    watch.during(workload.write(rows)).await?;
    watch.until_delivered().await?;
    narrator.say(format_args!("{} changes committed in all", thousands(workload.ledger().changes)));

    narrator.step("The end of the stream, as S2 has it");
    tell_tail(narrator, &client).await?;

    narrator.step("Is it all there? The whole stream, folded into a table, against the source");
    // Taken out, because nothing may hold a lock while it waits.
    let ledger = std::mem::take(&mut *workload.ledger());
    let verdict = Box::pin(verify::verify(narrator, source, client, &ledger)).await?;
    narrator.say(&verdict);
    let verified = verdict.holds() && parked_as_expected;
    narrator.line(if verified {
        "\nVerified: every change is in the stream exactly once, in order, within S2's limit."
    } else {
        "\nNOT verified: see above."
    });
    Ok(verified)
}

/// Says what is parked and why; answers whether it is what has to be.
fn tell_parked(narrator: &Narrator, parked: &MessageList, waiting: u64, large_rows: u64) -> bool {
    narrator.say(format_args!(
        "{} messages parked, {waiting} waiting behind them, everything else delivered; three of \
         them:",
        parked.total
    ));
    for message in parked.messages.iter().take(3) {
        let reason = message.error.as_ref().map_or("no reason", |error| error.text.as_str());
        narrator.say(format_args!(
            "  message {}: {} of {} {}\n    {reason}",
            message.id, message.action, message.table, message.key
        ));
    }
    if parked.total != large_rows {
        narrator.say(format_args!(
            "NO  {large_rows} rows were too large, so that as many messages had to be parked"
        ));
    }
    parked.total == large_rows
}

/// Looks for the record of a message that was parked, and says what has become of it.
async fn tell_delivered(
    narrator: &Narrator,
    reader: &mut sink::Reader,
    message: &MessageView,
) -> anyhow::Result<()> {
    let key = format!("{}:{}", message.commit_lsn, message.commit_idx);
    let key = Bytes::from(base64::engine::general_purpose::STANDARD.encode(key));
    // It was delivered, so that it is in what is read; a stream without it would be followed for
    // ever, and the verification would say so better than we can.
    let search = async {
        while let Some(records) = reader.next().await? {
            let is_wanted = |record: &&ReadRecord| record.header("sb-key") == Some(&key);
            if let Some(record) = records.iter().find(is_wanted) {
                return anyhow::Ok(Some(record.clone()));
            }
        }
        Ok(None)
    };
    let Ok(found) = tokio::time::timeout(FINISH_MAX, search).await else { return Ok(()) };
    let Some(record) = found? else { return Ok(()) };
    let body: serde_json::Value = serde_json::from_slice(&record.body)?;
    narrator.say(format_args!(
        "message {}, which was the {} of {}, is record {}: {} bytes, stripped_columns {}",
        message.id,
        message.action,
        message.key,
        record.seq,
        thousands(record.body.len() as u64),
        body["metadata"]["stripped_columns"]
    ));
    Ok(())
}

/// The last records, shortened.
async fn tell_tail(narrator: &Narrator, client: &Client) -> anyhow::Result<()> {
    const RECORDS: u64 = 5;
    const CHARACTERS: usize = 110;
    let tail = client.tail().await?.next_seq;
    let mut reader = client.read_range(tail.saturating_sub(RECORDS), tail);
    while let Some(records) = reader.next().await? {
        for record in records {
            let header = |name| {
                record.header(name).map(|value| String::from_utf8_lossy(value)).unwrap_or_default()
            };
            narrator.say(format_args!(
                "{:>7}  {} {}  chain {}\n         {}",
                record.seq,
                header("sb-action"),
                header("sb-table"),
                header("sb-chain"),
                shorten(&String::from_utf8_lossy(&record.body), CHARACTERS)
            ));
        }
    }
    Ok(())
}

/// The ready-made module with settings for the large columns: they go where the message would be
/// too large otherwise.
fn install_strip_columns(dir: &Path) -> anyhow::Result<PathBuf> {
    let columns: Vec<String> = LARGE_COLUMNS.iter().map(|column| format!("\"{column}\"")).collect();
    let settings = format!("[config]\ncolumns = [{}]\nonly_oversize = true\n", columns.join(", "));
    Ok(ready_made::install(dir, "strip-columns", &settings, None)?)
}

async fn connect(url: &str) -> anyhow::Result<tokio_postgres::Client> {
    let (client, driver) =
        tokio_postgres::connect(url, NoTls).await.context("could not connect to Postgres")?;
    // A connection that is lost shows in the next statement.
    tokio::spawn(driver);
    Ok(client)
}

async fn start_s2(dir: &Path) -> anyhow::Result<Embedded> {
    let settings = EmbeddedSettings {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        storage: Storage::Dir(dir.join("s2")),
    };
    Ok(Embedded::start(settings).await?)
}

fn write_config(dir: &Path, path: &Path, database: &str, s2: &str) -> anyhow::Result<()> {
    // The console's port has to be known to other commands, which read it from the file.
    let console = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .context("found no free port on 127.0.0.1")?;
    let text = format!(
        r#"# Written by `sluicebox demo`.
[source]
url = "{database}"
tables = ["{TABLE}"]

[sink]
basin = "{BASIN}"
stream = "{STREAM}"
endpoint = "{s2}"
create = true

[transforms]
dir = "transforms"

[state]
dir = "state"

[console]
listen = "{console}"
"#
    );
    std::fs::create_dir_all(dir.join("transforms"))
        .and_then(|()| std::fs::write(path, text))
        .with_context(|| format!("could not write {}", path.display()))
}

/// The pipeline's log goes to a file of its own, so that the story stays readable.
fn write_log_to(path: &Path) -> anyhow::Result<()> {
    use tracing_subscriber::EnvFilter;
    let file = std::fs::File::create(path)
        .with_context(|| format!("could not create {}", path.display()))?;
    // As `run` logs: libraries have little to say at `info` that an operator has a use for.
    let filter = EnvFilter::try_from_env("SLUICEBOX_LOG")
        .unwrap_or_else(|_| EnvFilter::new("warn,sluicebox=info"));
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_env_filter(filter)
        .with_writer(Mutex::new(file))
        .try_init()
        .map_err(|error| anyhow::anyhow!("could not set up the log: {error}"))
}

impl Stage {
    fn config_path(&self) -> PathBuf {
        self.dir.join("sluicebox.toml")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("sluicebox.log")
    }

    /// Says how to look around while everything is up.
    fn invite(&self, narrator: &Narrator) {
        let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("sluicebox"));
        // As one would type it, where that is possible.
        let program = std::env::current_dir()
            .ok()
            .and_then(|here| program.strip_prefix(here).ok().map(Path::to_path_buf))
            .unwrap_or(program);
        let (program, config) = (program.display(), self.config_path());
        let config = config.display();
        narrator.line(
            "\nEverything stays up until Ctrl-C. From another terminal, or in the console:\n",
        );
        if let Some(running) = &self.running {
            narrator.say(format_args!("http://{}/", running.console));
        }
        for command in ["messages list", "transforms list", "tail", "check"] {
            narrator.say(format_args!("{program} {command} -c {config}"));
        }
        if let Some(postgres) = &self.postgres {
            narrator.say(format_args!("psql '{}'", postgres.url()));
            // A column that is not stripped, so that there is something to see and to mend.
            narrator.say(format_args!(
                "psql '{}' -c \"UPDATE {TABLE} SET title = repeat('x', 2000000) \
                 WHERE id = (SELECT min(id) FROM {TABLE})\"   # parks one more",
                postgres.url()
            ));
        }
        if let Some(s2) = &self.s2 {
            let url = s2.url();
            narrator.say(format_args!(
                "curl -H 's2-basin: {BASIN}' '{url}/v1/streams/{STREAM}/records?tail_offset=1'"
            ));
        }
        narrator.say(format_args!("tail -f {}", self.log_path().display()));
    }

    async fn pipeline_stopped(&self) {
        let Some(running) = &self.running else { return };
        let mut control = running.control.clone();
        while control.status_changed().await.is_ok() {}
    }

    /// Stops everything, whatever there is, in the order of the path.
    async fn close(&mut self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        let finished = match self.running.take() {
            Some(running) => match tokio::time::timeout(FINISH_MAX, running.finish()).await {
                Ok(finished) => finished.context("the pipeline ended with an error"),
                Err(_) => Err(anyhow::anyhow!(
                    "the pipeline did not stop within {} s",
                    FINISH_MAX.as_secs()
                )),
            },
            None => Ok(()),
        };
        let s2 = match self.s2.take() {
            Some(s2) => s2.shutdown().await.map_err(anyhow::Error::from),
            None => Ok(()),
        };
        let postgres = match &mut self.postgres {
            Some(postgres) => postgres.stop(Shutdown::Fast).await.map_err(anyhow::Error::from),
            None => Ok(()),
        };
        finished.and(s2).and(postgres)
    }

    /// Copies the logs out of the folder that is about to go; nothing where nothing was logged yet.
    fn keep_logs(&self) -> Option<PathBuf> {
        let postgres = self.postgres.as_ref()?.log_path();
        let kept = PathBuf::from(format!("{}-logs", self.dir.display()));
        std::fs::create_dir(&kept).ok()?;
        std::fs::copy(self.log_path(), kept.join("sluicebox.log")).ok()?;
        std::fs::copy(postgres, kept.join("postgres.log")).ok()?;
        Some(kept)
    }
}

/// How the pipeline is getting on, as Postgres and the pipeline's own handle tell it.
struct Watch<'a> {
    control: Control,
    database: tokio_postgres::Client,
    ledger: &'a Mutex<Ledger>,
    narrator: &'a Narrator,
}

/// What has to change for things to be moving.
#[derive(PartialEq, Eq)]
struct Progress {
    changes: u64,
    records: u64,
    stored: u64,
    confirmed: Option<String>,
    chain: String,
}

impl Watch<'_> {
    fn status(&self) -> Status {
        self.control.status()
    }

    async fn list(&self, state: &str, limit: usize) -> anyhow::Result<MessageList> {
        let filter = Filter { state: Some(state.to_owned()), ..Filter::default() };
        Ok(self.control.list(PageQuery { filter, after: None, limit }).await?)
    }

    /// Shows how far things are, and fails when the pipeline has stopped.
    async fn tick(&mut self) -> anyhow::Result<()> {
        const INTERVAL: Duration = Duration::from_millis(100);
        // The time-out is the usual case: nothing new was published.
        if let Ok(changed) = tokio::time::timeout(INTERVAL, self.control.status_changed()).await {
            changed?;
            tokio::time::sleep(INTERVAL).await;
        }
        let status = self.status();
        let written = lock(self.ledger).changes;
        let mut text = format!(
            "{} changes written, {} records in S2, {} parked, {} waiting",
            thousands(written),
            thousands(status.records),
            status.parked + status.retrying,
            status.waiting
        );
        if let Some(reason) = status.reasons.first() {
            text.push_str("; ");
            text.push_str(&reason.text);
        }
        self.narrator.progress(text);
        Ok(())
    }

    /// Shows progress while something else is done.
    async fn during(
        &mut self,
        work: impl Future<Output = Result<(), tokio_postgres::Error>>,
    ) -> anyhow::Result<()> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done.context("a client could not write its rows"),
                ticked = self.tick() => ticked?,
            }
        }
    }

    /// The slot exists and the path is open: from here on no change is missed.
    async fn until_ready(&mut self) -> anyhow::Result<()> {
        self.until("the pipeline to be ready", async |watch| {
            let slot = "SELECT 1 FROM pg_replication_slots
                        WHERE slot_name = $1 AND confirmed_flush_lsn IS NOT NULL";
            let slot = watch.database.query_opt(slot, &[&SLOT]).await?;
            Ok(slot.is_some() && watch.status().ready)
        })
        .await
    }

    /// Postgres was told that it may forget everything written so far: it is in S2 or the store.
    async fn until_confirmed(&mut self) -> anyhow::Result<()> {
        let row = self.database.query_one("SELECT pg_current_wal_flush_lsn()::text", &[]).await?;
        let written: String = row.try_get(0)?;
        self.until("everything to be delivered or parked", async |watch| {
            let confirmed = "SELECT confirmed_flush_lsn >= $1::text::pg_lsn
                             FROM pg_replication_slots WHERE slot_name = $2";
            let row = watch.database.query_one(confirmed, &[&written, &SLOT]).await?;
            Ok(row.try_get(0)?)
        })
        .await
    }

    /// As [`Self::until_confirmed`], and the store is empty: it is all in S2.
    async fn until_delivered(&mut self) -> anyhow::Result<()> {
        self.until_confirmed().await?;
        self.until("the parked messages to be delivered", async |watch| {
            let query = PageQuery { limit: 1, ..PageQuery::default() };
            Ok(watch.control.list(query).await?.total == 0)
        })
        .await
    }

    /// Waits, as long as something moves.
    async fn until(
        &mut self,
        what: &str,
        mut holds: impl AsyncFnMut(&Self) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let mut moved = (Instant::now(), self.progress());
        while !holds(self).await? {
            self.tick().await?;
            let progress = self.progress();
            if progress != moved.1 {
                moved = (Instant::now(), progress);
            } else if moved.0.elapsed() > STALL_MAX {
                let status = self.status();
                let reasons: Vec<&str> =
                    status.reasons.iter().map(|reason| reason.text.as_str()).collect();
                bail!(
                    "waited for {what}, and nothing has moved for {} s: {} parked, {} retrying, \
                     {} waiting, confirmed {}; {}",
                    STALL_MAX.as_secs(),
                    status.parked,
                    status.retrying,
                    status.waiting,
                    status.confirmed.as_deref().unwrap_or("nothing"),
                    if reasons.is_empty() { "no reason given".into() } else { reasons.join("; ") }
                );
            }
        }
        Ok(())
    }

    fn progress(&self) -> Progress {
        let status = self.status();
        Progress {
            changes: status.changes,
            records: status.records,
            stored: status.parked + status.retrying + status.waiting,
            confirmed: status.confirmed,
            chain: status.chain,
        }
    }
}

/// Ctrl-C, `kill`, and a terminal that was closed.
struct Interruption {
    signals: [tokio::signal::unix::Signal; 3],
}

impl Interruption {
    fn listen() -> anyhow::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let listen = || -> std::io::Result<_> {
            Ok([
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            ])
        };
        Ok(Self { signals: listen().context("could not listen for Ctrl-C")? })
    }

    async fn wait(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.signals;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
