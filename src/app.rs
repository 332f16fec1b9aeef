//! A whole running process put together: the store, the transforms, the source, the sink and the
//! console around one pipeline.

use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use rand::{SeedableRng as _, rngs::SmallRng};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::admin;
use crate::clock::Clock;
use crate::config::{self, Config};
use crate::message::EnvelopeSettings;
use crate::pipeline::budget::ByteBudget;
use crate::pipeline::control::{Control, Reason, Status};
use crate::pipeline::dead_letter::writer::Writer;
use crate::pipeline::driver::{self, Parts};
use crate::pipeline::grants::Grants;
use crate::pipeline::heartbeat::{self, heartbeat};
use crate::pipeline::outbox::Window;
use crate::pipeline::sample::{Sample, Sampler};
use crate::pipeline::vetting::Vetting;
use crate::pipeline::workers::Workers;
use crate::policy::{self, Backoff};
use crate::sink;
use crate::source::{self, Dsn, Resume};
use crate::store::{Loaded, Store};
use crate::transform::{Host, HostSettings};

/// Changes between the source and their settlement, in bytes as [`crate::change::Change::bytes`]
/// counts them. One change that is larger passes alone.
const BUDGET_BYTES: usize = 24 * 1024 * 1024;

/// Requests that wait for the pipeline.
const REQUESTS_MAX: usize = 64;

/// A pipeline that runs, with everything around it.
#[derive(Debug)]
pub struct Running {
    /// What the console and the commands ask.
    pub control: Control,
    /// Where the console listens.
    pub console: std::net::SocketAddr,
    pipeline: JoinHandle<Result<(), driver::Error>>,
    admin: JoinHandle<Result<(), admin::Error>>,
    /// Ends what serves the pipeline, once that has ended.
    after: CancellationToken,
    #[cfg(feature = "embedded-s2")]
    embedded: Option<sink::embedded::Embedded>,
}

impl Running {
    /// Waits until the pipeline has ended: by the shutdown token, or by itself where something cannot
    /// heal. Then ends the rest.
    ///
    /// # Errors
    ///
    /// Why it ended by itself.
    pub async fn finish(self) -> anyhow::Result<()> {
        let ended = self.pipeline.await.context("the pipeline broke off, which is a defect")?;
        self.after.cancel();
        let served = self.admin.await.context("the console broke off, which is a defect")?;
        #[cfg(feature = "embedded-s2")]
        if let Some(embedded) = self.embedded {
            embedded.shutdown().await?;
        }
        ended?;
        served?;
        Ok(())
    }
}

/// Starts a process's pipeline. Problems of the configuration and of this machine come out here;
/// Postgres and S2 are waited for behind it.
///
/// # Errors
///
/// What has to be mended before anything can run.
pub async fn start(
    config: Config,
    grants: Grants,
    shutdown: CancellationToken,
) -> anyhow::Result<Running> {
    let server = admin::Server::bind(&config.console).await?;
    let console = server.address();
    let dsn = dsn(&config)?;
    let (requests_in, requests) = mpsc::channel(REQUESTS_MAX);
    let (status_in, status) = watch::channel(Status::default());
    let (beat, heart) = heartbeat();
    let control = Control::new(requests_in, status, heart.clone());
    let after = CancellationToken::new();
    // Ends what is served already where the start fails below.
    let unserve = after.clone().drop_guard();
    let folder = Arc::new(OnceLock::<Arc<Host>>::new());
    let transforms = {
        let folder = Arc::clone(&folder);
        Arc::new(move || {
            let list = folder.get().map(|host| serde_json::to_value(host.list()));
            list.and_then(Result::ok).unwrap_or_default()
        })
    };
    // Before the store: where that has to be waited for, it is said here.
    let admin = tokio::spawn(server.serve(control.clone(), transforms, after.clone()));
    let opened = open_store(&config.state.dir, grants, &status_in, &shutdown).await?;
    let (store, loaded) = opened;
    let sample = Sample::default();
    let envelope = EnvelopeSettings {
        pipeline_id: loaded.pipeline_id.clone(),
        pipeline_name: config.source.slot.clone(),
        database_name: dsn.database().to_owned(),
        hostname: dsn.hostname(),
        ..EnvelopeSettings::default()
    };
    let host = Arc::new(Host::start(HostSettings {
        dir: config.transforms.dir.clone(),
        state_dir: config.state.dir.clone(),
        generation: loaded.generation,
        digest: loaded.chain_digest.clone(),
        no_transforms: grants.no_transforms,
        vet: Some(Arc::new(Vetting::new(store.clone(), sample.clone(), envelope))),
        compile_apart: true,
    })?);
    drop(folder.set(Arc::clone(&host)));
    let runners = (0..config.transforms.workers.max(1)).map(|_| host.runner()).collect();
    let (workers, finished) =
        Workers::start(runners).context("could not start the threads that run the transforms")?;

    #[cfg(feature = "embedded-s2")]
    let embedded = embedded(&config).await?;
    #[cfg(feature = "embedded-s2")]
    let url = embedded.as_ref().map(sink::embedded::Embedded::url);
    #[cfg(not(feature = "embedded-s2"))]
    let url = None;
    let client = sink::Client::new(sink_settings(&config.sink, url)?)?;

    let budget = Arc::new(ByteBudget::new(BUDGET_BYTES));
    let settings = driver::Settings {
        window: Window {
            linger: config.sink.linger,
            bytes_max: config.sink.in_flight_bytes_max as u64,
        },
        grants,
        retry: Backoff { min: config.delivery.retry_min, max: config.delivery.retry_max },
        dead_letters: config.delivery.dead_letters.clone(),
        bounds: driver::Bounds {
            spill_after: config.delivery.spill_after,
            spill_bytes_max: config.delivery.spill_bytes_max,
            store_bytes_max: config.state.bytes_max,
        },
        stuck_after: config.delivery.stuck_after,
        portions: driver::Portions::default(),
        guarantee: config.sink.guarantee,
        pipeline_name: config.source.slot.clone(),
        database_name: dsn.database().to_owned(),
        hostname: dsn.hostname(),
        unguarded: config.sink.mode == config::Mode::Unguarded,
    };
    let source = source::start(
        source_settings(&config, dsn),
        Resume {
            take_over: grants.take_over,
            lost_changes: grants.lost_changes,
            ..Resume::from(&loaded)
        },
        Arc::clone(&budget),
        &shutdown,
    );
    let parts = Parts {
        settings,
        store,
        loaded,
        source,
        budget,
        chains: host.chain(),
        sampler: Sampler::new(sample),
        workers,
        letters: Writer::start(),
        client,
        clock: Clock::system(),
        rng: SmallRng::from_rng(&mut rand::rng()),
        status: status_in,
        heart: beat,
        shutdown,
    };
    heart
        .watch(config.delivery.stuck_after.max(heartbeat::AFTER_MIN), || {
            std::process::exit(i32::from(heartbeat::EXIT_CODE))
        })
        .context("could not start the thread that watches the pipeline")?;
    let pipeline = tokio::spawn(driver::run(parts, finished, requests));
    drop(unserve.disarm());
    Ok(Running {
        control,
        console,
        pipeline,
        admin,
        after,
        #[cfg(feature = "embedded-s2")]
        embedded,
    })
}

/// Opens the store. A full disk, or one that fails, is waited for, with the reason in the status.
async fn open_store(
    dir: &std::path::Path,
    grants: Grants,
    status: &watch::Sender<Status>,
    shutdown: &CancellationToken,
) -> anyhow::Result<(Store, Loaded)> {
    let mut failures = 0;
    loop {
        let error = match Store::open_from(dir, grants.take_over) {
            Ok(opened) => return Ok(opened),
            Err(error) if error.heals() => error,
            Err(error) => return Err(error.into()),
        };
        failures += 1;
        let reason = Reason {
            part: "store".to_owned(),
            code: "store_failed".to_owned(),
            text: crate::error_chain::error_chain(&error),
        };
        status.send_if_modified(|status| {
            let is_news = !status.reasons.contains(&reason);
            if is_news {
                tracing::error!(error = reason.text, "the store cannot be opened; waiting");
                status.reasons = vec![reason];
            }
            is_news
        });
        let delay = policy::STORE.delay(failures, &mut rand::rng());
        tokio::select! {
            () = shutdown.cancelled() => anyhow::bail!("stopped before the store could be opened"),
            () = tokio::time::sleep(delay) => {}
        }
    }
}

/// Where Postgres is.
///
/// # Errors
///
/// When `source.url` cannot be used, which is a matter of the configuration.
pub fn dsn(config: &Config) -> anyhow::Result<Dsn> {
    config.source.url.expose().parse().map_err(|error: source::DsnError| {
        let text = format!("source.url in {} cannot be used: {error}", config.path.display());
        crate::cli::UsageError(text).into()
    })
}

/// What the source is told.
#[must_use]
pub fn source_settings(config: &Config, dsn: Dsn) -> source::Settings {
    source::Settings {
        dsn,
        slot: config.source.slot.clone(),
        publication: config.source.publication.clone(),
        tables: config.source.tables.clone(),
        group_by: config.delivery.group_by.clone(),
    }
}

/// What the sink is told. `embedded` is the address of the server in this process, where there is one.
///
/// # Errors
///
/// When the configuration asks for an embedded server that is not there, or the token is no token.
pub fn sink_settings(
    config: &config::Sink,
    embedded: Option<String>,
) -> anyhow::Result<sink::Settings> {
    let endpoint = match &config.endpoint {
        config::Endpoint::Cloud => sink::Endpoint::Cloud,
        config::Endpoint::Url(url) => sink::Endpoint::Url(url.clone()),
        config::Endpoint::Embedded => sink::Endpoint::Url(embedded.context(
            "sink.endpoint = \"embedded\" is a server inside `sluicebox run`, and there is none here: \
             start the pipeline, or name a server by its URL (a build without the feature \
             `embedded-s2` has none at all)",
        )?),
    };
    let token = match &config.access_token {
        None => None,
        Some(config::AccessToken::Value(token)) => Some(sink::Token::fixed(token.expose())?),
        Some(config::AccessToken::File(path)) => Some(sink::Token::file(path.clone())),
    };
    Ok(sink::Settings {
        endpoint,
        token,
        mode: match config.mode {
            config::Mode::Session => sink::Mode::Session,
            config::Mode::Unary => sink::Mode::Unary,
            config::Mode::Discard => sink::Mode::Discard,
            config::Mode::Unguarded => sink::Mode::Unguarded,
        },
        create: config.create,
        fencing: config.fencing,
        ..sink::Settings::new(&config.basin, &config.stream)
    })
}

/// The server inside this process, with its streams beside the store, where the configuration asks for
/// one.
#[cfg(feature = "embedded-s2")]
async fn embedded(config: &Config) -> anyhow::Result<Option<sink::embedded::Embedded>> {
    use sink::embedded::{Embedded, EmbeddedSettings, Storage};
    match &config.sink.endpoint {
        config::Endpoint::Cloud | config::Endpoint::Url(_) => Ok(None),
        config::Endpoint::Embedded => {
            let settings = EmbeddedSettings {
                listen: (std::net::Ipv4Addr::LOCALHOST, 0).into(),
                storage: Storage::Dir(config.state.dir.join("s2")),
            };
            let embedded = Embedded::start(settings).await?;
            tracing::info!(endpoint = embedded.url(), "the embedded S2 server is ready");
            Ok(Some(embedded))
        }
    }
}
