//! A throwaway Postgres: one cluster for the whole test process with a database per test, and
//! clusters of their own for tests that restart the server or change its settings.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use sluicebox::throwaway::{Options, Postgres, Shutdown};
use tempfile::TempDir;
use tokio::sync::{Mutex, OnceCell};
use tokio_postgres::{Client, NoTls};

/// The superuser that tests are. The cluster's own superuser needs no password.
pub const USER: &str = "tester";

/// Its password. Tests look for it in everything that Sluicebox prints.
pub const PASSWORD: &str = "pg-s3cret-p4ss";

/// Enough slots for every test at once, and defaults of the session that would spoil each value
/// that Sluicebox does not pin.
const SETTINGS: &[(&str, &str)] = &[
    ("max_wal_senders", "200"),
    ("max_replication_slots", "200"),
    ("max_connections", "200"),
    ("timezone", "Europe/Helsinki"),
    ("datestyle", "SQL, DMY"),
    ("intervalstyle", "sql_standard"),
    ("bytea_output", "escape"),
    ("extra_float_digits", "-5"),
];

/// A running server. It is gone when this is dropped, and also when the test process ends, however
/// it ends.
#[derive(Debug)]
pub struct Cluster {
    postgres: Mutex<Postgres>,
    port: u16,
    bin: PathBuf,
    /// Declared last, so that the folder goes after the server.
    _dir: TempDir,
}

impl Cluster {
    /// The cluster that tests share. It lives as long as the test process.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<Cluster> = OnceCell::const_new();
        let start = async || {
            let cluster = Self::start(&[]).await;
            // Nobody drops a static: a shell removes the folder once this process and the server
            // are gone.
            let script = r#"read -r _; while [ -e "$1" ]; do sleep 0.2; done; rm -rf "$2""#;
            let mut command = Command::new("sh");
            command.arg("-c").arg(script).arg("sh");
            command.arg(cluster.postgres.lock().await.data_dir().join("postmaster.pid"));
            command.arg(cluster._dir.path()).current_dir("/");
            command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
            std::mem::forget(command.spawn().expect("`sh` is everywhere"));
            cluster
        };
        SHARED.get_or_init(start).await
    }

    /// A cluster of one's own, with settings that override the usual ones.
    pub async fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_in(settings, &[]).await
    }

    /// The same with more variables in its environment.
    pub async fn start_in(settings: &[(&str, &str)], env: &[(&str, &str)]) -> Self {
        let dir = tempfile::Builder::new().prefix("sluicebox-it-pg-").tempdir().unwrap();
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        // The tests kill processes; only a machine that dies loses what the kernel has.
        let options = Options {
            dir: Some(dir.path().to_owned()),
            fsync: false,
            settings: SETTINGS.iter().chain(settings).map(own).collect(),
            env: env.iter().map(own).collect(),
        };
        let postgres = Postgres::start(options).await.unwrap_or_else(|error| panic!("{error}"));

        // Whoever is not the cluster's own superuser has to give a password.
        let rules = "host all postgres 127.0.0.1/32 trust\n\
                     host replication postgres 127.0.0.1/32 trust\n\
                     host all all 127.0.0.1/32 scram-sha-256\n\
                     host replication all 127.0.0.1/32 scram-sha-256\n";
        fs::write(postgres.data_dir().join("pg_hba.conf"), rules).unwrap();
        let sql = format!("create role {USER} superuser login replication password '{PASSWORD}'");
        let admin = connect(&postgres.url()).await;
        admin.batch_execute(&sql).await.unwrap();
        admin.batch_execute("select pg_reload_conf()").await.unwrap();

        // Some machines link the server's programs into the path, and not all of its clients.
        let server = fs::canonicalize(postgres.bin_dir().join("postgres")).unwrap();
        let bin = server.parent().expect("a program is in a folder").to_owned();
        let port = postgres.port();
        Self { postgres: Mutex::new(postgres), port, bin, _dir: dir }
    }

    /// Starts a stopped server again.
    pub async fn up(&self) {
        let mut postgres = self.postgres.lock().await;
        postgres.launch().await.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Stops the server: `Fast` as an operator does, `Immediate` as a crash does.
    pub async fn down(&self, shutdown: Shutdown) {
        let mut postgres = self.postgres.lock().await;
        postgres.stop(shutdown).await.unwrap_or_else(|error| panic!("{error}"));
    }

    /// The server's processes, the one that has started all others first.
    pub async fn pids(&self) -> Vec<u32> {
        let path = self.postgres.lock().await.data_dir().join("postmaster.pid");
        let text = fs::read_to_string(path).unwrap_or_default();
        let first: Vec<u32> = text.lines().take(1).filter_map(|line| line.parse().ok()).collect();
        let Some(server) = first.first() else { return Vec::new() };
        let path = format!("/proc/{server}/task/{server}/children");
        let children = fs::read_to_string(path).unwrap_or_default();
        first
            .iter()
            .copied()
            .chain(children.split(' ').filter_map(|pid| pid.parse().ok()))
            .collect()
    }

    /// Those of the server's processes that send changes.
    pub async fn walsenders(&self) -> Vec<u32> {
        let is_one = |pid: &u32| {
            let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&title).contains("walsender")
        };
        self.pids().await.into_iter().filter(is_one).collect()
    }

    /// The server's data, for whoever puts an older copy in its place.
    pub async fn data_dir(&self) -> PathBuf {
        self.postgres.lock().await.data_dir()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where `pg_recvlogical` and its like are.
    pub fn bin(&self) -> &std::path::Path {
        &self.bin
    }

    /// The URL of a database on this server, for a superuser.
    pub fn url(&self, database: &str) -> String {
        self.url_as(USER, PASSWORD, database)
    }

    pub fn url_as(&self, user: &str, password: &str, database: &str) -> String {
        format!("postgres://{user}:{password}@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    /// A new, empty database.
    pub async fn database(&self, test: &str) -> Database<'_> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{test}_{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let admin = connect(&self.url("postgres")).await;
        admin.batch_execute(&format!("create database {name}")).await.unwrap();
        Database { cluster: self, name }
    }
}

/// A database on a throwaway cluster, and a connection to it.
#[derive(Debug)]
pub struct Database<'a> {
    pub cluster: &'a Cluster,
    pub name: String,
}

impl Database<'_> {
    pub fn url(&self) -> String {
        self.cluster.url(&self.name)
    }

    pub async fn connect(&self) -> Client {
        connect(&self.url()).await
    }

    /// Runs statements, all of which must succeed.
    pub async fn run(&self, sql: &str) {
        let client = self.connect().await;
        if let Err(error) = client.batch_execute(sql).await {
            panic!("{error}: {:?}\nin: {}", error.as_db_error(), &sql[..sql.len().min(500)]);
        }
    }

    /// The rows of one query as text, NULL as nothing.
    pub async fn rows(&self, sql: &str) -> Vec<Vec<Option<String>>> {
        let client = self.connect().await;
        let messages = client.simple_query(sql).await.unwrap();
        let mut rows = Vec::new();
        for message in messages {
            if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
                rows.push((0..row.len()).map(|i| row.get(i).map(str::to_owned)).collect());
            }
        }
        rows
    }

    /// The first column of the first row, as text.
    pub async fn value(&self, sql: &str) -> Option<String> {
        self.rows(sql).await.into_iter().next()?.into_iter().next()?
    }
}

/// Connects, with as many attempts as a server that is just starting needs.
pub async fn connect(url: &str) -> Client {
    super::until("a connection to Postgres", async || {
        try_connect(url).await.map_err(|error| error.to_string())
    })
    .await
}

pub async fn try_connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}
