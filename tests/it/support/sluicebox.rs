//! Sluicebox itself: a folder with a configuration, `run` as a child process, and its commands.
//!
//! Whatever it prints is looked through when a test ends: for secrets, for values of rows, for
//! panics. So every test is a test of that, too.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{ExitStatus, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::{ROW_MARK, free_port, postgres, until};

/// The access token that tests use unless they say otherwise.
pub const TOKEN: &str = "s2-t0ken-s3cret";

/// What goes into `sluicebox.toml`. Text is written as it is, so that a test can be wrong on
/// purpose.
#[derive(Debug, Clone)]
pub struct Settings {
    pub url: String,
    pub slot: String,
    pub publication: String,
    pub tables: Vec<String>,
    /// The credentials' line under `[sink]`.
    pub token: String,
    pub endpoint: String,
    pub basin: String,
    pub stream: String,
    pub transforms: String,
    pub state: String,
    /// More text under `[sink]`, then whole sections.
    pub sink: String,
    pub sections: String,
}

/// A folder with a configuration, and everything that `run` printed there.
#[derive(Debug)]
pub struct Home {
    dir: TempDir,
    pub settings: Settings,
    console: u16,
    /// One client, so that asking often costs the process no new connections.
    http: reqwest::Client,
    secrets: Vec<String>,
}

impl Home {
    pub fn new(settings: Settings) -> Self {
        let dir = tempfile::Builder::new().prefix("sluicebox-it-").tempdir().unwrap();
        fs::create_dir(dir.path().join("transforms")).unwrap();
        let secrets = vec![TOKEN.to_owned(), postgres::PASSWORD.to_owned()];
        let home =
            Self { dir, settings, console: free_port(), http: reqwest::Client::new(), secrets };
        home.write_config();
        home
    }

    /// One more text that must never be printed.
    pub fn secret(&mut self, secret: &str) {
        self.secrets.push(secret.to_owned());
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes `sluicebox.toml` from the settings as they are now.
    pub fn write_config(&self) {
        let Settings { url, slot, publication, token, endpoint, basin, stream, .. } =
            &self.settings;
        let Settings { transforms, state, sink, sections, tables, .. } = &self.settings;
        let console = self.console;
        let text = format!(
            "[source]\nurl = \"{url}\"\nslot = \"{slot}\"\npublication = \"{publication}\"\n\
             tables = {tables:?}\n\n\
             [sink]\nbasin = \"{basin}\"\nstream = \"{stream}\"\n{token}\n\
             endpoint = \"{endpoint}\"\n{sink}\n\n\
             [transforms]\ndir = \"{transforms}\"\n\n[state]\ndir = \"{state}\"\n\n\
             [console]\nlisten = \"127.0.0.1:{console}\"\n\n{sections}\n"
        );
        fs::write(self.path("sluicebox.toml"), text).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut process = Command::new(env!("CARGO_BIN_EXE_sluicebox"));
        process.args(args).arg("-c").arg(self.path("sluicebox.toml"));
        process
            .current_dir("/")
            .env_remove("SLUICEBOX_LOG")
            .env("XDG_CACHE_HOME", super::CACHE)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        process
    }

    /// Starts `run`. Its stderr is appended to a file of this folder.
    pub fn start(&self) -> Running<'_> {
        self.start_with(&[])
    }

    pub fn start_with(&self, args: &[&str]) -> Running<'_> {
        self.spawn(self.command(&[&["run"], args].concat()))
    }

    /// Starts `run` by another program, which turns into it: as `env` does.
    pub fn start_by(&self, program: &str, args: &[&str]) -> Running<'_> {
        let own = self.command(&["run"]);
        let own = own.as_std();
        let mut command = Command::new(program);
        command.args(args).arg(own.get_program()).args(own.get_args()).current_dir("/");
        command.env_remove("SLUICEBOX_LOG").stdin(Stdio::null()).kill_on_drop(true);
        self.spawn(command)
    }

    fn spawn(&self, mut command: Command) -> Running<'_> {
        let mut log = fs::OpenOptions::new();
        let mut log = log.create(true).append(true).open(self.path("log")).unwrap();
        writeln!(log, "---- run").unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        Running { home: self, child: command.spawn().unwrap() }
    }

    /// Everything that `run` printed in this folder so far.
    pub fn log(&self) -> String {
        fs::read(self.path("log"))
            .map_or_else(|_| String::new(), |bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Runs a command to its end.
    pub async fn cli(&self, args: &[&str]) -> Output {
        let output = self.command(args).output().await.unwrap();
        let printed = String::from_utf8_lossy(&output.stderr);
        self.look_through(&format!("`sluicebox {}`", args.join(" ")), &printed);
        output
    }

    /// Runs a command that must succeed, and returns its stdout.
    pub async fn ok(&self, args: &[&str]) -> String {
        let output = self.cli(args).await;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "`sluicebox {}` ended with {}:\n{stdout}\n{}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        stdout
    }

    /// Runs a command with `--json`, which must succeed, and returns what it printed.
    pub async fn json(&self, args: &[&str]) -> Value {
        let stdout = self.ok(&[args, &["--json"]].concat()).await;
        serde_json::from_str(&stdout).unwrap_or_else(|error| {
            panic!("`sluicebox {}` did not print JSON: {error}\n{stdout}", args.join(" "))
        })
    }

    /// What `messages list` shows, of one state or of all.
    pub async fn messages(&self, state: Option<&str>) -> Vec<Value> {
        let mut args = vec!["messages", "list"];
        args.extend(state.iter().flat_map(|state| ["--state", state]));
        let list = self.json(&args).await;
        list["messages"].as_array().expect("`messages` is a list").clone()
    }

    /// Waits until exactly this many messages are in a state, and returns them.
    pub async fn until_messages(&self, state: &str, count: usize) -> Vec<Value> {
        until(&format!("{count} messages {state}"), async || {
            let output = self.cli(&["messages", "list", "--state", state, "--json"]).await;
            let list: Value = serde_json::from_slice(&output.stdout)
                .map_err(|error| format!("{error}: {}", String::from_utf8_lossy(&output.stderr)))?;
            let messages = list["messages"].as_array().cloned().unwrap_or_default();
            if messages.len() == count { Ok(messages) } else { Err(format!("{messages:#?}")) }
        })
        .await
    }

    /// Waits until nothing failed or waits any more, for as long as there is less and less of it.
    pub async fn until_no_messages(&self) {
        let mut least = u64::MAX;
        while least > 0 {
            least = until(&format!("fewer messages than {least}"), async || {
                let output = self.cli(&["messages", "list", "--json"]).await;
                let list: Value = serde_json::from_slice(&output.stdout).map_err(|error| {
                    format!("{error}: {}", String::from_utf8_lossy(&output.stderr))
                })?;
                let total = list["total"].as_u64().filter(|total| *total < least);
                total.ok_or_else(|| format!("{list:#}"))
            })
            .await;
        }
    }

    /// Waits until all that was spilled is delivered or stored, for as long as there is less and less of it.
    pub async fn until_nothing_is_spilled(&self) {
        let mut least = u64::MAX;
        while least > 0 {
            least = until(&format!("fewer spilled changes than {least}"), async || {
                let spilled = self.spilled().await?;
                if spilled < least { Ok(spilled) } else { Err(format!("{spilled} are spilled")) }
            })
            .await;
        }
    }

    /// The entry of a file in `transforms list`, once the answer is there and `good` likes it.
    pub async fn until_transform(&self, file: &str, state: &str) -> Value {
        until(&format!("{file} to be {state}"), async || {
            let list = self.json(&["transforms", "list"]).await;
            let all = list["transforms"].as_array().expect("`transforms` is a list");
            let entry = all.iter().find(|entry| entry["file"] == file && entry["state"] == state);
            entry.cloned().ok_or_else(|| format!("{list:#}"))
        })
        .await
    }

    /// The transforms folder.
    pub fn transforms(&self) -> PathBuf {
        self.path(&self.settings.transforms)
    }

    /// Puts a file into the transforms folder in one step, as the documentation advises.
    pub fn drop_in(&self, name: &str, bytes: &[u8]) {
        let temporary = self.transforms().join(format!("{name}.tmp"));
        fs::write(&temporary, bytes).unwrap();
        fs::rename(temporary, self.transforms().join(name)).unwrap();
    }

    /// Writes the settings of a module in one step.
    pub fn drop_in_settings(&self, module: &str, text: &str) {
        self.drop_in(&module.replace(".wasm", ".toml"), text.as_bytes());
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.console)
    }

    /// The body of `/readyz`, whatever its status.
    pub async fn readyz(&self) -> Result<Value, String> {
        let answer = self.http.get(self.url("/readyz")).send().await;
        let answer = answer.map_err(|error| error.to_string())?;
        let status = answer.status();
        let body: Value = answer.json().await.map_err(|error| error.to_string())?;
        if body["ready"] != (status == 200) {
            return Err(format!("/readyz answers {status} with {body}"));
        }
        Ok(body)
    }

    /// How many changes are spilled now.
    pub async fn spilled(&self) -> Result<u64, String> {
        let status = self.status().await?;
        status["spilled_changes"].as_u64().ok_or_else(|| status.to_string())
    }

    /// Freezes the process and starts this one on its state folder, until that has become its own: the
    /// console answers earlier. Where the first one stands in the middle of a write to the store, nobody
    /// gets in, which is said; then it goes on for a moment. Nothing where that is always so.
    pub async fn try_take_over_from(&self, first: &Running<'_>) -> Option<Running<'_>> {
        for _ in 0..20 {
            first.signal("STOP");
            let before = self.log().len();
            let mut running = self.start_with(&["--take-over"]);
            let began = until("the second process to begin or to end", async || {
                if running.has_ended() {
                    return Ok(false);
                }
                let log = self.log()[before..].to_owned();
                if log.contains("sluicebox runs") { Ok(true) } else { Err(log) }
            })
            .await;
            if began {
                return Some(running);
            }
            let log = self.log()[before..].to_owned();
            assert!(log.contains("in the middle of a write"), "{log}");
            first.signal("CONT");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        None
    }

    /// The same where it has to succeed; waits until everything works.
    pub async fn take_over_from(&self, first: &Running<'_>) -> Running<'_> {
        let running = self.try_take_over_from(first).await;
        running.expect("the first process is not always in the middle of a write").ready().await
    }

    /// What the process publishes of itself.
    pub async fn status(&self) -> Result<Value, String> {
        let answer = self.http.get(self.url("/api/v1/status")).send().await;
        answer.map_err(|e| e.to_string())?.json().await.map_err(|e| e.to_string())
    }

    /// What `/metrics` says.
    pub async fn metrics(&self) -> Result<String, String> {
        let answer = self.http.get(self.url("/metrics")).send().await;
        answer.map_err(|e| e.to_string())?.text().await.map_err(|e| e.to_string())
    }

    /// Fails the test if a text shows what nobody may see.
    pub fn look_through(&self, what: &str, text: &str) {
        let row = [ROW_MARK.to_owned()];
        for secret in self.secrets.iter().chain(&row) {
            if let Some(line) = text.lines().find(|line| line.contains(secret.as_str())) {
                panic!("{what} printed {secret}:\n{line}");
            }
        }
        // Of a guest's panic nothing names a thread.
        let is_own = |line: &str| line.starts_with("thread '") && line.contains("panicked at");
        let has_note = ["RUST_BACKTRACE", "stack backtrace"].iter().any(|note| text.contains(note));
        assert!(!has_note && !text.lines().any(is_own), "{what} panicked:\n{text}");
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let log = self.log();
        if std::thread::panicking() {
            let skipped = log.len().saturating_sub(20_000);
            eprintln!("---- what `sluicebox run` printed (the end of it)");
            eprintln!("{}", String::from_utf8_lossy(&log.as_bytes()[skipped..]));
            return;
        }
        self.look_through("`sluicebox run`", &log);
    }
}

/// A running `sluicebox run`. Killed when dropped.
#[derive(Debug)]
pub struct Running<'a> {
    pub home: &'a Home,
    child: Child,
}

impl Running<'_> {
    pub fn pid(&self) -> u32 {
        self.child.id().expect("the process runs")
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Whether it has written itself into the lock of its state folder.
    pub fn has_the_state(&self) -> bool {
        let lock = self.home.path(&self.home.settings.state).join("lock");
        let lock = fs::read_to_string(lock).unwrap_or_default();
        lock.split_whitespace().next() == Some(self.pid().to_string().as_str())
    }

    /// Fails the test if the process has ended.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("`sluicebox run` ended by itself with {status}");
        }
    }

    /// Waits until `/readyz` says that everything works.
    pub async fn ready(mut self) -> Self {
        until("`sluicebox run` to be ready", async || {
            self.assert_alive();
            let body = self.home.readyz().await?;
            if body["ready"] == true { Ok(()) } else { Err(body.to_string()) }
        })
        .await;
        self
    }

    /// Waits until `/readyz` gives a reason whose code begins like this, and returns its text.
    pub async fn unready(&mut self, code: &str) -> String {
        until(&format!("/readyz to say {code}…"), async || {
            self.assert_alive();
            let body = self.home.readyz().await?;
            let reasons = body["reasons"].as_array().expect("`reasons` is a list").clone();
            let begins = |found: &str| found.starts_with(code);
            let reason = reasons.iter().find(|reason| reason["code"].as_str().is_some_and(begins));
            let text = reason.and_then(|reason| reason["text"].as_str());
            text.map(str::to_owned).ok_or_else(|| body.to_string())
        })
        .await
    }

    /// Waits until changes are spilled.
    pub async fn until_spilled(&mut self) {
        until("changes to be spilled", async || {
            self.assert_alive();
            match self.home.spilled().await? {
                0 => Err(self.home.status().await?.to_string()),
                _ => Ok(()),
            }
        })
        .await;
    }

    pub fn signal(&self, name: &str) {
        let mut kill = std::process::Command::new("kill");
        let status = kill.args([&format!("-{name}"), &self.pid().to_string()]).status().unwrap();
        assert!(status.success(), "could not send {name}");
    }

    /// Waits for the process to end by itself.
    pub async fn ended(mut self) -> ExitStatus {
        match tokio::time::timeout(super::PATIENCE, self.child.wait()).await {
            Ok(status) => status.unwrap(),
            Err(_) => panic!("`sluicebox run` did not end:\n{}", where_it_stands(self.pid())),
        }
    }

    /// SIGTERM; the process must drain and exit with 0.
    pub async fn stop(self) {
        self.signal("TERM");
        let status = self.ended().await;
        assert_eq!(status.code(), Some(0), "`sluicebox run` after SIGTERM: {status}");
    }

    /// `kill -9`.
    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

/// What the threads of a process wait for, for whoever has to find out why it does not go on.
fn where_it_stands(pid: u32) -> String {
    let read = |path: &str| fs::read_to_string(format!("/proc/{pid}/{path}")).unwrap_or_default();
    let status = read("status");
    let state = status.lines().find(|line| line.starts_with("State:")).unwrap_or("State: unknown");
    let args = ["-p", &pid.to_string(), "-batch", "-ex", "thread apply all backtrace 25"];
    let stacks = std::process::Command::new("gdb").args(args).output();
    let stacks = stacks.map_or_else(
        |_| "(there is no gdb to look at its stacks)".to_owned(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    );
    format!("{state}\n{stacks}")
}
