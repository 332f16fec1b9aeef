//! The real s2-lite inside this process: for `demo`, `s2`, `endpoint = "embedded"` and tests.
//!
//! It differs from `s2 lite` in three ways. It sets TCP_NODELAY, without which clients over HTTP/2
//! wait 44 ms for many an answer. It does not sleep at the start for an earlier instance to notice
//! that it was replaced; a lock on the directory keeps two from being there at all. And it listens
//! where it is told to, with any port that is free if that is 0.

use std::{
    fs::{File, TryLockError},
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::serve::ListenerExt as _;
use bytesize::ByteSize;
use s2_lite::{
    backend::{Backend, bgtasks},
    handlers,
};
use slatedb::object_store::{ObjectStore, local::LocalFileSystem, memory::InMemory};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

/// How long appends are gathered before they are made durable: what s2-lite itself takes for memory
/// and local disks. SlateDB's own default is twenty times as long.
const FLUSH_INTERVAL: Duration = Duration::from_millis(5);
/// The most metered bytes of appends under way, over all streams: s2-lite's own default.
const APPENDS_IN_FLIGHT: ByteSize = ByteSize::mib(128);
/// How long open connections may take to finish at the end. A reader that waits for new records
/// would otherwise hold the end up for a minute.
const SHUTDOWN_TIME_OUT: Duration = Duration::from_secs(2);
const LOCK_FILE: &str = "lock";

/// Where the server listens and what it keeps records in.
#[derive(Clone, Debug)]
pub struct EmbeddedSettings {
    /// Port 0 takes a free one.
    pub listen: SocketAddr,
    pub storage: Storage,
}

/// What keeps the records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Gone at the end, and never smaller meanwhile: not for long runs.
    Memory,
    /// A directory of its own, created where missing; synced before anything is acknowledged.
    Dir(PathBuf),
}

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error("could not use {} for the embedded S2 server", dir.display())]
    Dir {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "another embedded S2 server is using {}: stop it, or choose another directory",
        dir.display()
    )]
    Locked { dir: PathBuf },
    #[error("could not listen on {listen} for the embedded S2 server; choose another address")]
    Listen {
        listen: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("could not open the embedded S2 server's database: {reason}")]
    Open { reason: String },
    #[error("could not close the embedded S2 server's database: {reason}")]
    Close { reason: String },
}

/// A running server. [`Self::shutdown`] ends it in order; dropping it only cuts it off, after which
/// a directory holds everything that was acknowledged.
pub struct Embedded {
    address: SocketAddr,
    backend: Backend,
    stop: CancellationToken,
    serving: JoinHandle<()>,
    /// Held as long as the directory is used.
    lock: Option<File>,
}

impl std::fmt::Debug for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Embedded").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Embedded {
    /// Starts the server. When this returns it answers, `/health` included.
    ///
    /// # Errors
    ///
    /// When the directory or the address cannot be used.
    pub async fn start(settings: EmbeddedSettings) -> Result<Self, EmbeddedError> {
        let EmbeddedSettings { listen, storage } = settings;
        let listener = TcpListener::bind(listen)
            .await
            .map_err(|source| EmbeddedError::Listen { listen, source })?;
        let address =
            listener.local_addr().map_err(|source| EmbeddedError::Listen { listen, source })?;
        let (store, lock) = match storage {
            Storage::Memory => (Arc::new(InMemory::new()) as Arc<dyn ObjectStore>, None),
            Storage::Dir(dir) => {
                let lock = lock(&dir)?;
                let store = LocalFileSystem::new_with_prefix(&dir)
                    .map_err(|error| EmbeddedError::Open { reason: error.to_string() })?
                    .with_fsync(true);
                (Arc::new(store) as Arc<dyn ObjectStore>, Some(lock))
            }
        };
        let open_failed = |reason: String| EmbeddedError::Open { reason };
        let defaults =
            slatedb::Settings { flush_interval: Some(FLUSH_INTERVAL), ..Default::default() };
        let database = slatedb::Settings::from_env_with_default("SL8_", defaults)
            .map_err(|error| open_failed(error.to_string()))?;
        let database = slatedb::Db::builder("", store)
            .with_settings(database)
            .build()
            .await
            .map_err(|error| open_failed(error.to_string()))?;
        let backend = Backend::new(database, APPENDS_IN_FLIGHT);
        bgtasks::spawn(&backend);

        let router = handlers::router().with_state(backend.clone());
        let listener = listener.tap_io(|stream| {
            // A connection that is gone already fails here, and then by itself.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "could not set TCP_NODELAY");
            }
        });
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let serving = tokio::spawn(async move {
            // It returns when it was asked to stop, and never fails.
            if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stopped).await
            {
                tracing::error!(%error, "the embedded S2 server stopped serving");
            }
        });
        Ok(Self { address, backend, stop, serving, lock })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What to set as `endpoint`. A server that listens everywhere is reached on this machine.
    #[must_use]
    pub fn url(&self) -> String {
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(match address {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        format!("http://{address}")
    }

    /// Lets connections finish, then closes the database and gives the directory free.
    ///
    /// # Errors
    ///
    /// When the database cannot be closed; what was acknowledged is durable all the same.
    pub async fn shutdown(mut self) -> Result<(), EmbeddedError> {
        self.stop.cancel();
        if tokio::time::timeout(SHUTDOWN_TIME_OUT, &mut self.serving).await.is_err() {
            self.serving.abort();
        }
        let closed = self.backend.close().await;
        drop(self.lock.take());
        closed.map_err(|error| EmbeddedError::Close { reason: error.to_string() })
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.stop.cancel();
        self.serving.abort();
    }
}

/// Creates the directory where missing and takes it for this process. The lock goes with the
/// process, however it ends.
fn lock(dir: &Path) -> Result<File, EmbeddedError> {
    let failed = |source| EmbeddedError::Dir { dir: dir.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(failed)?;
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join(LOCK_FILE))
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(EmbeddedError::Locked { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}
