//! A Postgres of one's own for a demonstration or a test: found, made, started and removed.
//!
//! It never touches a cluster that is there already: data, sockets and log live in one folder, and
//! the server listens on a free port of 127.0.0.1 only. Nobody else's processes are stopped.
//!
//! The server must not outlive us, however we end. A server in our own process group would be
//! stopped by the Ctrl-C that is meant for us, before the pipeline has drained; so it has a group
//! of its own, and a few lines of shell beside it hold the other end of a pipe: they pass signals
//! on that we write into it, and stop the server when the pipe closes, which it does even when we
//! are killed.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The oldest major version with everything that Sluicebox asks of a server.
const MAJOR_MIN: u32 = 14;

/// How long a new server may take to answer. A cold disk takes a few seconds; recovery after an
/// immediate stop under load, tens.
const START_MAX: Duration = Duration::from_secs(60);

/// How long a fast shutdown may take before it becomes an immediate one. A walsender keeps a fast
/// shutdown waiting until its client has confirmed everything.
const FAST_MAX: Duration = Duration::from_secs(10);

/// How long an immediate shutdown may take before the server is killed. Postgres itself kills its
/// backends five seconds into one.
const IMMEDIATE_MAX: Duration = Duration::from_secs(8);

/// Socket paths end at 107 bytes on Linux and 103 on macOS; `/.s.PGSQL.65535` takes 15 of them.
const SOCKET_DIR_BYTES_MAX: usize = 85;

/// Reads the names of signals from standard input, sends them to the process that is the first
/// argument, and stops it at once when the input ends.
const KEEPER: &str =
    r#"while read -r signal; do kill -s "$signal" "$1"; done; kill -s QUIT "$1" 2>/dev/null"#;

/// What to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder to make it in, as `postgres/`; a temporary one of its own where there is none.
    /// The caller removes its folder after the server has stopped.
    pub dir: Option<PathBuf>,
    /// Off, a crash of the machine (not of the server) loses data, and everything is faster.
    pub fsync: bool,
    /// Further lines for `postgresql.conf`, as name and value; the value is quoted here.
    pub settings: Vec<(String, String)>,
    /// More variables for the server's environment.
    pub env: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Self {
        Self { dir: None, fsync: true, settings: Vec::new(), env: Vec::new() }
    }
}

/// How to stop a server; the words are those of `pg_ctl stop -m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// Clients are cut off, transactions rolled back, a checkpoint written.
    Fast,
    /// As in a crash: the next start recovers from the log.
    Immediate,
}

/// A server that runs until it is stopped or dropped.
#[derive(Debug)]
pub struct Postgres {
    binaries: Binaries,
    account: Option<Account>,
    /// Holds `data/`, `socket/` and `server.log`.
    home: PathBuf,
    /// As in [`Options`].
    env: Vec<(String, String)>,
    port: u16,
    server: Option<Server>,
    /// Removed with `self`, after the server has been stopped.
    _own_dir: Option<tempfile::TempDir>,
}

#[derive(Debug)]
struct Server {
    child: Child,
    keeper: Child,
    /// Nothing only while the server is being stopped for good.
    signals: Option<ChildStdin>,
}

/// The server's programs of one installation.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Binaries {
    dir: PathBuf,
    major: u32,
}

/// The user that the server runs as, because Postgres refuses root.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Account {
    name: String,
    uid: u32,
    gid: u32,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "found no Postgres {MAJOR_MIN} or later that runs here ({tried}). Install one \
         (Debian and Ubuntu: `apt-get install postgresql`; Fedora: `dnf install postgresql-server`; \
         macOS: `brew install postgresql`), or set PG_BIN to the folder that holds its `initdb`"
    )]
    NotFound { tried: String },
    #[error(
        "Postgres refuses to run as root, and /etc/passwd names no other user to run it as; \
         create one: `useradd --system postgres`"
    )]
    NoAccount,
    #[error(
        "the user {account} cannot enter {}: set TMPDIR to a folder that every user can reach, \
         such as /tmp", dir.display()
    )]
    Unreachable { account: String, dir: PathBuf },
    #[error("{program} failed ({status}) and said:\n{output}")]
    Program { program: String, status: ExitStatus, output: String },
    #[error("could not start {program}")]
    Spawn { program: String, source: io::Error },
    #[error("could not prepare {}", path.display())]
    Prepare { path: PathBuf, source: io::Error },
    #[error("the server ended while it was starting ({status}); its log ends:\n{log}")]
    Ended { status: ExitStatus, log: String },
    #[error("the server did not answer within {seconds} s ({why}); its log ends:\n{log}")]
    Silent { seconds: u64, why: String, log: String },
    #[error("could not signal the server")]
    Signal { source: io::Error },
}

impl Postgres {
    /// Makes a cluster with logical replication on, and starts it. The superuser is `postgres`, in
    /// the database `postgres`, trusted without a password.
    ///
    /// # Errors
    ///
    /// When no Postgres is found, or it does not start; the text ends with what it said itself.
    pub async fn start(options: Options) -> Result<Self, Error> {
        let own_dir = match &options.dir {
            Some(_) => None,
            None => Some(
                tempfile::Builder::new()
                    .prefix("sluicebox-postgres-")
                    .tempdir()
                    .map_err(|source| Error::Prepare { path: std::env::temp_dir(), source })?,
            ),
        };
        let parent = match (&options.dir, &own_dir) {
            (Some(dir), _) => dir.clone(),
            (None, Some(own)) => own.path().to_path_buf(),
            (None, None) => std::env::temp_dir(),
        };
        let home = parent.join("postgres");
        let account = prepare_home(&parent, &home).await?;
        let mut failures = Vec::new();
        for binaries in find_binaries(account.as_ref(), &home, &mut failures).await {
            match init_cluster(&binaries, account.as_ref(), &home, options.fsync).await {
                Ok(()) => {
                    write_settings(&home, &options)?;
                    let env = options.env;
                    let mut postgres = Self {
                        binaries,
                        account,
                        home,
                        env,
                        port: 0,
                        server: None,
                        _own_dir: own_dir,
                    };
                    postgres.launch().await?;
                    return Ok(postgres);
                }
                Err(error) => failures.push(error.to_string()),
            }
        }
        Err(Error::NotFound { tried: describe_failures(&failures) })
    }

    /// The address of the database `postgres` for its superuser. It holds no secret.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_of("postgres", "postgres")
    }

    /// The address of a database for a user, both taken as they are.
    #[must_use]
    pub fn url_of(&self, user: &str, database: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/{database}?sslmode=disable", self.port)
    }

    /// The port on 127.0.0.1. It stays the same when the server is stopped and launched again.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The server's major version.
    #[must_use]
    pub fn major(&self) -> u32 {
        self.binaries.major
    }

    /// Where the programs of this server are, `pg_recvlogical` among them on most machines.
    #[must_use]
    pub fn bin_dir(&self) -> &Path {
        &self.binaries.dir
    }

    /// The user that the server runs as, where that is not us.
    #[must_use]
    pub fn account(&self) -> Option<&str> {
        self.account.as_ref().map(|account| account.name.as_str())
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.home.join("data")
    }

    /// What the server has written about itself.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.home.join("server.log")
    }

    /// Starts the server again after [`Self::stop`]; nothing happens where it runs.
    ///
    /// # Errors
    ///
    /// When it ends at once or does not answer.
    pub async fn launch(&mut self) -> Result<(), Error> {
        /// Another process can take the free port between our look and the server's.
        const ATTEMPTS: usize = 5;
        if self.server.is_some() {
            return Ok(());
        }
        let chosen = self.port;
        for attempt in 1.. {
            if chosen == 0 {
                self.port = free_port().map_err(|source| Error::Prepare {
                    path: PathBuf::from("a port of 127.0.0.1"),
                    source,
                })?;
            }
            self.server = Some(self.spawn()?);
            match self.wait_until_ready().await {
                Ok(()) => break,
                Err(error) => {
                    let taken = matches!(&error, Error::Ended { log, .. }
                        if log.contains("could not bind") || log.contains("could not create any TCP"));
                    self.drop_server();
                    if !taken || chosen != 0 || attempt >= ATTEMPTS {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Stops the server and waits for its end: a fast shutdown that takes too long becomes an
    /// immediate one, and that a kill. [`Self::launch`] starts it again.
    ///
    /// # Errors
    ///
    /// When the server cannot be signalled; it is killed when `self` is dropped.
    pub async fn stop(&mut self, shutdown: Shutdown) -> Result<(), Error> {
        let Some(server) = &mut self.server else { return Ok(()) };
        let steps: &[(&str, Duration)] = match shutdown {
            Shutdown::Fast => &[("INT", FAST_MAX), ("QUIT", IMMEDIATE_MAX)],
            Shutdown::Immediate => &[("QUIT", IMMEDIATE_MAX)],
        };
        'stop: for (signal, patience) in steps {
            server.signal(signal).map_err(|source| Error::Signal { source })?;
            let deadline = Instant::now() + *patience;
            while Instant::now() < deadline {
                if server.has_ended() {
                    break 'stop;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        self.drop_server();
        Ok(())
    }

    /// Ends whatever is left of the server, without an await: also from `drop`.
    fn drop_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.end();
        }
    }

    fn spawn(&self) -> Result<Server, Error> {
        let program = self.binaries.dir.join("postgres");
        let prepare = |path: PathBuf| move |source| Error::Prepare { path, source };
        let log_path = self.log_path();
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .map_err(prepare(log_path.clone()))?;
        let log_too = log.try_clone().map_err(prepare(log_path))?;
        let mut command = command(&program, self.account.as_ref(), &self.home);
        command.arg("-D").arg(self.data_dir()).arg("-p").arg(self.port.to_string());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(log).stderr(log_too);
        let mut child = command
            .spawn()
            .map_err(|source| Error::Spawn { program: program.display().to_string(), source })?;
        match self.spawn_keeper(child.id()) {
            Ok((keeper, signals)) => Ok(Server { child, keeper, signals }),
            Err(source) => {
                kill(&mut child);
                Err(Error::Spawn { program: "sh".to_owned(), source })
            }
        }
    }

    fn spawn_keeper(&self, server: u32) -> io::Result<(Child, Option<ChildStdin>)> {
        let mut command = command(Path::new("sh"), self.account.as_ref(), &self.home);
        command.arg("-c").arg(KEEPER).arg("sh").arg(server.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut keeper = command.spawn()?;
        let signals = keeper.stdin.take();
        Ok((keeper, signals))
    }

    async fn wait_until_ready(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + START_MAX;
        let log_path = self.log_path();
        let url = self.url();
        loop {
            if let Some(server) = &mut self.server
                && let Ok(Some(status)) = server.child.try_wait()
            {
                return Err(Error::Ended { status, log: log_tail(&log_path) });
            }
            let why = match tokio_postgres::connect(&url, tokio_postgres::NoTls).await {
                Ok((client, connection)) => {
                    let connection = tokio::spawn(connection);
                    let answer = client.batch_execute("SELECT").await;
                    drop(client);
                    // The connection ends with its client; waiting leaves no backend behind.
                    drop(connection.await);
                    match answer {
                        Ok(()) => return Ok(()),
                        Err(error) => error.to_string(),
                    }
                }
                Err(error) => error.to_string(),
            };
            if Instant::now() >= deadline {
                let seconds = START_MAX.as_secs();
                return Err(Error::Silent { seconds, why, log: log_tail(&log_path) });
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.drop_server();
    }
}

impl Server {
    /// Sends `INT` (fast shutdown) or `QUIT` (immediate) by way of the keeper.
    fn signal(&mut self, name: &str) -> io::Result<()> {
        match &mut self.signals {
            Some(signals) => writeln!(signals, "{name}"),
            None => Ok(()),
        }
    }

    fn has_ended(&mut self) -> bool {
        // An error means that there is no such child any more.
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Stops the server at once and reaps both children.
    fn end(&mut self) {
        if !self.has_ended() {
            // The end of the pipe is the order to stop the server.
            drop(self.signals.take());
            let deadline = Instant::now() + IMMEDIATE_MAX;
            while !self.has_ended() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        // The keeper goes before the pipe closes where the server has ended by itself, so that it
        // does not signal a process that has since been given the same number.
        kill(&mut self.keeper);
        kill(&mut self.child);
    }
}

/// Kills and reaps a child; nothing to do is no failure.
fn kill(child: &mut Child) {
    if !matches!(child.try_wait(), Ok(Some(_))) && child.kill().is_ok() {
        // Reaping fails only where somebody else has reaped it.
        drop(child.wait());
    }
}

/// A program of the cluster: as its user, in its folder and process group, deaf to our `PG…`
/// variables, speaking English so that its log can be read by us.
fn command(program: &Path, account: Option<&Account>, home: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("PG")) {
            command.env_remove(name);
        }
    }
    command.env("LC_ALL", "C").env("TZ", "UTC").current_dir(home).process_group(0);
    if let Some(account) = account {
        // The standard library also drops root's supplementary groups when it changes the user.
        command.uid(account.uid).gid(account.gid);
        command.env("HOME", home).env("USER", &account.name).env("LOGNAME", &account.name);
    }
    command
}

/// Runs a program to its end and hands back what it wrote.
async fn run(mut command: Command) -> Result<String, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null());
    let output = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| Error::Spawn { program: program.clone(), source })?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    let text = text.trim().to_owned();
    if output.status.success() {
        return Ok(text);
    }
    Err(Error::Program { program, status: output.status, output: text })
}

/// Makes the cluster's folder and chooses who owns it: nobody else unless we are root.
async fn prepare_home(parent: &Path, home: &Path) -> Result<Option<Account>, Error> {
    let prepare = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::Prepare { path, source }
    };
    fs::create_dir(home).map_err(prepare(home))?;
    fs::set_permissions(home, Permissions::from_mode(0o700)).map_err(prepare(home))?;
    // Whoever owns what we have just made is who we are.
    let is_root = fs::metadata(home).map_err(prepare(home))?.uid() == 0;
    if !is_root {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let account = choose_account(&users).ok_or(Error::NoAccount)?;
    std::os::unix::fs::chown(home, Some(account.uid), Some(account.gid)).map_err(prepare(home))?;
    // A temporary folder is closed to others; they may now pass through it, not look around in it.
    fs::set_permissions(parent, Permissions::from_mode(0o711)).map_err(prepare(parent))?;
    let mut enter = command(Path::new("sh"), Some(&account), Path::new("/"));
    enter.arg("-c").arg(r#"cd "$1" && test -w ."#).arg("sh").arg(home);
    match run(enter).await {
        Ok(_) => Ok(Some(account)),
        Err(_) => Err(Error::Unreachable { account: account.name, dir: home.to_path_buf() }),
    }
}

/// The user for the server: `postgres`, or `nobody`, or any that is not root.
fn choose_account(passwd: &str) -> Option<Account> {
    let accounts: Vec<Account> = passwd
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some(Account { name, uid, gid })
        })
        .filter(|account| account.uid != 0)
        .collect();
    let named = |name: &str| accounts.iter().find(|account| account.name == name);
    named("postgres").or_else(|| named("nobody")).or_else(|| accounts.first()).cloned()
}

/// The installations that answer, the likeliest first; `failures` gets what the others said.
///
/// Finding a file is not enough: on some machines `initdb` on PATH is a wrapper that works for one
/// user only.
async fn find_binaries(
    account: Option<&Account>,
    home: &Path,
    failures: &mut Vec<String>,
) -> Vec<Binaries> {
    let mut found: Vec<Binaries> = Vec::new();
    for dir in candidate_dirs() {
        if !dir.join("initdb").is_file() || !dir.join("postgres").is_file() {
            if std::env::var_os("PG_BIN").is_some_and(|named| named == *dir.as_os_str()) {
                failures.push(format!("PG_BIN is {}, without `initdb`", dir.display()));
            }
            continue;
        }
        match probe(&dir, account, home).await {
            Ok(major) if major >= MAJOR_MIN => found.push(Binaries { dir, major }),
            Ok(major) => failures.push(format!("{} is version {major}", dir.display())),
            Err(error) => failures.push(error.to_string()),
        }
    }
    found
}

/// Asks both programs for their version; hands back the server's.
async fn probe(dir: &Path, account: Option<&Account>, home: &Path) -> Result<u32, Error> {
    let version = |program: &str| {
        let mut version = command(&dir.join(program), account, home);
        version.arg("--version");
        run(version)
    };
    version("initdb").await?;
    Ok(major_of(&version("postgres").await?).unwrap_or(0))
}

/// `15` from `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`; also from `18beta1`.
fn major_of(version: &str) -> Option<u32> {
    let number = version.split_once("(PostgreSQL)")?.1.trim_start();
    let digits = number.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

/// Where a server's programs may be: PG_BIN alone where it is set, then PATH, then the places of
/// the distributions.
fn candidate_dirs() -> Vec<PathBuf> {
    if let Some(dir) = std::env::var_os("PG_BIN").filter(|dir| !dir.is_empty()) {
        return vec![PathBuf::from(dir)];
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    // Debian; then the packages of postgresql.org for Fedora and its kin; then Homebrew on both
    // processors; then Postgres.app.
    for (parent, prefix) in [
        ("/usr/lib/postgresql", ""),
        ("/usr", "pgsql-"),
        ("/opt/homebrew/opt", "postgresql"),
        ("/usr/local/opt", "postgresql"),
        ("/home/linuxbrew/.linuxbrew/opt", "postgresql"),
        ("/Applications/Postgres.app/Contents/Versions", ""),
    ] {
        dirs.extend(newest_first(Path::new(parent), prefix));
    }
    let mut seen = std::collections::HashSet::new();
    dirs.retain(|dir| seen.insert(dir.clone()));
    dirs
}

/// `bin` folders below the entries of `parent` with that prefix, by version.
fn newest_first(parent: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    let mut versions: Vec<(u32, PathBuf)> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let rest = name.strip_prefix(prefix)?;
            let digits = rest.trim_start_matches(|c: char| !c.is_ascii_digit());
            let digits = digits.split(|c: char| !c.is_ascii_digit()).next()?;
            // Homebrew's plain `postgresql` has no number in its name.
            Some((digits.parse().unwrap_or(0), entry.path().join("bin")))
        })
        .filter(|(_, dir)| dir.is_dir())
        .collect();
    versions.sort_by(|a, b| b.cmp(a));
    versions.into_iter().map(|(_, dir)| dir).collect()
}

fn describe_failures(failures: &[String]) -> String {
    if failures.is_empty() {
        return "looked on PATH and in the usual places".to_owned();
    }
    failures.join("; ")
}

/// Runs `initdb`, in Unicode where the machine has that locale.
async fn init_cluster(
    binaries: &Binaries,
    account: Option<&Account>,
    home: &Path,
    fsync: bool,
) -> Result<(), Error> {
    let data = home.join("data");
    let mut last = None;
    for locale in ["C.UTF-8", "C"] {
        // What an earlier attempt has left behind would be refused.
        match fs::remove_dir_all(&data) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(Error::Prepare { path: data, source });
            }
            Ok(()) | Err(_) => {}
        }
        let mut initdb = command(&binaries.dir.join("initdb"), account, home);
        initdb.arg("-D").arg(&data).args(["-U", "postgres", "-A", "trust", "-E", "UTF8"]);
        initdb.arg(format!("--locale={locale}")).arg("--no-instructions");
        if !fsync {
            initdb.arg("--no-sync");
        }
        match run(initdb).await {
            Ok(_) => return Ok(()),
            Err(error) => last = Some(error),
        }
    }
    Err(last.expect("there are two locales to try"))
}

/// Appends our settings; the last one of a name counts.
fn write_settings(home: &Path, options: &Options) -> Result<(), Error> {
    let socket = home.join("socket");
    let prepare = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::Prepare { path, source }
    };
    fs::create_dir(&socket).map_err(prepare(&socket))?;
    let owner = fs::metadata(home).map_err(prepare(home))?;
    std::os::unix::fs::chown(&socket, Some(owner.uid()), Some(owner.gid()))
        .map_err(prepare(&socket))?;
    let socket = match socket.to_str() {
        Some(text) if text.len() <= SOCKET_DIR_BYTES_MAX => text.to_owned(),
        // Without a socket at all the server still has its port.
        Some(_) | None => String::new(),
    };
    let mut settings: Vec<(&str, &str)> = vec![
        ("listen_addresses", "127.0.0.1"),
        ("unix_socket_directories", &socket),
        ("wal_level", "logical"),
        ("max_wal_senders", "10"),
        ("max_replication_slots", "10"),
        ("max_prepared_transactions", "10"),
        ("log_line_prefix", "%m [%p] "),
        ("logging_collector", "off"),
    ];
    if !options.fsync {
        settings.extend([("fsync", "off"), ("full_page_writes", "off")]);
    }
    settings.extend(options.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let mut text = String::from("\n# Set by Sluicebox for a throwaway cluster.\n");
    for (name, value) in settings {
        text.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
    }
    let path = home.join("data/postgresql.conf");
    let append = || File::options().append(true).open(&path)?.write_all(text.as_bytes());
    append().map_err(prepare(&path))
}

/// A port that was free a moment ago.
fn free_port() -> io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// The last lines of a log, at most 4 KiB.
pub(crate) fn log_tail(path: &Path) -> String {
    const BYTES_MAX: u64 = 4096;
    const LINES_MAX: usize = 20;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(BYTES_MAX);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(LINES_MAX)..].join("\n")
        }
        Err(error) => format!("({} could not be read: {error})", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_server_says() {
        fn check(text: &str, expected: Option<u32>) {
            assert_eq!(major_of(text), expected, "{text}");
        }
        check("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", Some(15));
        check("postgres (PostgreSQL) 18beta1", Some(18));
        check("postgres (PostgreSQL) 9.6.24", Some(9));
        check("postgres (PostgreSQL) devel", None);
        check("something else", None);
        check("", None);
    }

    #[test]
    fn the_account_is_postgres_then_nobody_then_any_but_root() {
        fn check(passwd: &str, expected: Option<(&str, u32, u32)>) {
            let account = choose_account(passwd);
            let account = account.as_ref().map(|a| (a.name.as_str(), a.uid, a.gid));
            assert_eq!(account, expected, "{passwd}");
        }
        let root = "root:x:0:0:root:/root:/bin/bash\n";
        let nobody = "nobody:x:65534:65533::/nonexistent:/bin/false\n";
        check("", None);
        check(root, None);
        check("toor:x:0:0::/:/bin/sh\nbroken line\n:::\n", None);
        check(&format!("{root}games:x:5:60::/:/bin/sh\n"), Some(("games", 5, 60)));
        check(&format!("{root}games:x:5:60::/:\n{nobody}"), Some(("nobody", 65534, 65533)));
        check(&format!("{nobody}postgres:x:101:104:,,,:/:\n"), Some(("postgres", 101, 104)));
    }

    #[test]
    fn the_newest_version_comes_first() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["pgsql-9.6", "pgsql-15", "pgsql-9", "other-20", "pgsql-16"] {
            fs::create_dir_all(parent.path().join(name).join("bin")).unwrap();
        }
        fs::create_dir_all(parent.path().join("pgsql-17")).unwrap();
        let found = newest_first(parent.path(), "pgsql-");
        let expected: Vec<PathBuf> = ["pgsql-16", "pgsql-15", "pgsql-9.6", "pgsql-9"]
            .map(|name| parent.path().join(name).join("bin"))
            .into();
        assert_eq!(found, expected);
        assert_eq!(newest_first(&parent.path().join("missing"), ""), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_log_is_cut_to_its_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let text: String = (0..5000).map(|line| format!("line {line}\n")).collect();
        fs::write(&path, text).unwrap();
        let tail = log_tail(&path);
        assert_eq!(tail.lines().count(), 20);
        assert!(tail.ends_with("line 4999"), "{tail}");
        assert!(log_tail(&dir.path().join("none")).contains("could not be read"));
    }
}
