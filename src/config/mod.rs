//! `sluicebox.toml`: settings as written, then settings that hold together.
//!
//! Everything is checked here, once, before anything is connected to; nothing here connects, and
//! nothing else reads the file. Each problem names file, line, column, key and mend, and all
//! problems are reported together. No value of a key that holds a secret is ever shown.

mod delivery;
mod document;
mod expand;
mod names;
mod secret;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use document::{Complaint, Document, Section};
use expand::Lookup;

use crate::group_by::GroupBys;
use crate::sink::Guarantee;
use crate::source::Dsn;

pub use crate::table_name::TableName;
pub use document::Problem;
pub(crate) use document::nearest;
pub use names::{InvalidListen, Listen};
pub use secret::Secret;

/// Everything that `sluicebox run` is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file that it was read from.
    pub path: PathBuf,
    pub source: Source,
    pub sink: Sink,
    pub transforms: Transforms,
    pub state: State,
    pub console: Console,
    pub delivery: Delivery,
}

/// `[source]`: which Postgres, and what of it.
#[derive(Clone, Debug)]
pub struct Source {
    /// `postgres://…`, with its password.
    pub url: Secret,
    /// At least one, none twice.
    pub tables: Vec<TableName>,
    pub slot: String,
    pub publication: String,
}

/// `[sink]`: which S2 stream, and how it is written to.
#[derive(Clone, Debug)]
pub struct Sink {
    pub basin: String,
    pub stream: String,
    /// There unless the endpoint is not S2's cloud.
    pub access_token: Option<AccessToken>,
    pub endpoint: Endpoint,
    /// Create the basin and the stream where they are missing.
    pub create: bool,
    pub mode: Mode,
    /// How long a batch that is not full waits for more.
    pub linger: Duration,
    /// Unacknowledged bytes of one append session.
    pub in_flight_bytes_max: usize,
    /// Fence with a token on every open. Without it, sequence numbers alone guard the stream.
    pub fencing: bool,
    /// The least that may be promised; by default what was promised last, and at first what the access
    /// token allows.
    pub guarantee: Option<Guarantee>,
}

/// Where S2's access token comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessToken {
    Value(Secret),
    /// Read again when S2 answers 401, so that a mended token needs no restart.
    File(PathBuf),
}

/// Which S2 server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// S2's cloud, where every basin has a host of its own.
    Cloud,
    /// One server for account and basins, such as s2-lite: `http://127.0.0.1:8080`. No slash at
    /// its end.
    Url(String),
    /// A server inside this process.
    Embedded,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cloud => f.write_str("S2's cloud"),
            Self::Url(url) => f.write_str(url),
            Self::Embedded => f.write_str("the embedded S2"),
        }
    }
}

/// How batches are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One pipelined append session over HTTP/2.
    Session,
    /// One request at a time.
    Unary,
    /// Throws every record away and confirms it to Postgres: only for measuring. Not offered by
    /// error texts, so that nobody chooses it by mistake.
    Discard,
    /// As a session, without all that makes delivery exactly once: no fencing token, no numbers, no
    /// headers that a recovery reads, no checkpoints. Only for measuring what these cost, and as
    /// little offered.
    Unguarded,
}

/// `[transforms]`: the folder and who runs what is in it.
#[derive(Clone, Debug)]
pub struct Transforms {
    pub dir: PathBuf,
    /// Threads that run transforms.
    pub workers: usize,
}

/// `[state]`: where the message store lives.
#[derive(Clone, Debug)]
pub struct State {
    pub dir: PathBuf,
    /// What the store's file may hold before nothing new is read.
    pub bytes_max: u64,
}

/// `[console]`: the HTTP address of console and API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Console {
    pub listen: Listen,
    /// Host names, beside `localhost` and the one in `listen`, under which browsers and clients
    /// may ask for it.
    pub names: Vec<String>,
}

/// `[delivery]`: what keeps its order, and how long a failed message waits before it is tried again.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub retry_min: Duration,
    pub retry_max: Duration,
    /// Of some of [`Source::tables`].
    pub group_by: GroupBys,
    /// When changes move on to disk while S2 is away.
    pub spill_after: SpillAfter,
    /// How many bytes of changes may be there. 0: none.
    pub spill_bytes_max: u64,
    /// What has work and gets nothing done for so long is stuck, and is begun anew.
    pub stuck_after: Duration,
    /// What ends the attempts of a message; nothing: they go on for ever.
    pub dead_letters: Option<DeadLetters>,
}

/// `delivery.max_attempts` and `[dead_letters]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetters {
    /// After so many attempts that failed for what a message itself is, it becomes a dead letter.
    pub max_attempts: u64,
    pub place: LetterPlace,
}

/// Where dead letters go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LetterPlace {
    /// A stream of the same basin.
    Stream(Arc<str>),
    File(PathBuf),
}

impl fmt::Display for LetterPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream(name) => write!(f, "stream `{name}`"),
            Self::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

/// When changes that S2 does not take move on to disk, so that Postgres may forget them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpillAfter {
    /// S2 is away and so many bytes of WAL are not confirmed.
    Bytes(u64),
    /// S2 has been away for so long.
    Time(Duration),
}

/// Why there is no configuration to work with. Holds no secret.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not read the configuration {} (-c FILE names another)", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}", problem_text(path, problems))]
    Invalid {
        path: PathBuf,
        /// At least one, in the order of the file.
        problems: Vec<Problem>,
    },
}

impl Config {
    /// Reads the file and the environment variables that it names.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or with all problems in it.
    pub fn load(path: &Path) -> Result<Self, Error> {
        Self::parse(&read(path)?, path, &|name| std::env::var(name))
    }

    fn parse(text: &str, path: &Path, lookup: &Lookup<'_>) -> Result<Self, Error> {
        let mut document = Document::parse(text, path, lookup)
            .map_err(|problem| Error::Invalid { path: path.to_owned(), problems: vec![problem] })?;
        let source = source(&mut document);
        let sink = sink(&mut document);
        let transforms = transforms(&mut document);
        let state = state(&mut document);
        let console = console(&mut document);
        let delivery = delivery::delivery(&mut document, source.as_ref(), sink.as_ref());
        let problems = document.finish(true);
        match (source, sink, transforms, state, console, delivery) {
            (
                Some(source),
                Some(sink),
                Some(transforms),
                Some(state),
                Some(console),
                Some(delivery),
            ) if problems.is_empty() => {
                let path = path.to_owned();
                Ok(Self { path, source, sink, transforms, state, console, delivery })
            }
            _ => Err(Error::Invalid { path: path.to_owned(), problems }),
        }
    }
}

impl Console {
    /// Reads only `[console]`: the commands that ask the running process need no database URL and
    /// no token in their environment.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or with all problems in that section.
    pub fn load(path: &Path) -> Result<Self, Error> {
        load_section(path, console)
    }
}

impl Sink {
    /// Reads only `[sink]`, for `tail`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or with all problems in that section.
    pub fn load(path: &Path) -> Result<Self, Error> {
        load_section(path, sink)
    }
}

impl Transforms {
    /// Reads only `[transforms]`, for `transforms add`.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or with all problems in that section.
    pub fn load(path: &Path) -> Result<Self, Error> {
        load_section(path, transforms)
    }
}

fn load_section<T>(
    path: &Path,
    read_section: fn(&mut Document<'_>) -> Option<T>,
) -> Result<T, Error> {
    let text = read(path)?;
    let invalid = |problems| Error::Invalid { path: path.to_owned(), problems };
    let lookup = |name: &str| std::env::var(name);
    let mut document =
        Document::parse(&text, path, &lookup).map_err(|problem| invalid(vec![problem]))?;
    let section = read_section(&mut document);
    let problems = document.finish(false);
    section.filter(|_| problems.is_empty()).ok_or_else(|| invalid(problems))
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })
}

fn problem_text(path: &Path, problems: &[Problem]) -> String {
    let path = path.display();
    match problems {
        [problem] => format!("{path}:{problem}"),
        problems => {
            let mut text = format!("{path} has {} problems", problems.len());
            for problem in problems {
                text.push_str(&format!("\n  {path}:{problem}"));
            }
            text
        }
    }
}

fn source(document: &mut Document<'_>) -> Option<Source> {
    let mut section = document.section("source");
    let url = section.required("url", "add url = \"${DATABASE_URL}\"", postgres_url);
    let tables = tables(&mut section);
    let slot = section.parsed_or("slot", "sluicebox".to_owned(), names::slot);
    let publication = section.parsed_or("publication", "sluicebox".to_owned(), names::publication);
    Some(Source { url: url?, tables: tables?, slot: slot?, publication: publication? })
}

/// Checked by whoever connects with it, whose errors repeat nothing of it.
fn postgres_url(text: &str) -> Result<Secret, Complaint> {
    let mend = "write postgres://USER:PASSWORD@HOST:PORT/DATABASE, special characters of the \
                password percent-encoded";
    match text.parse::<Dsn>() {
        Ok(_) => Ok(Secret::new(text)),
        Err(error) => Err(Complaint::new(format!("cannot be used: {error}"), mend)),
    }
}

fn tables(section: &mut Section<'_, '_>) -> Option<Vec<TableName>> {
    const KEY: &str = "tables";
    const MEND: &str = "name the tables, such as tables = [\"public.documents\"]";
    let texts = section.strings(KEY);
    if !section.has(KEY) {
        section.complain_missing(KEY, MEND);
    }
    let texts = texts?;
    if texts.is_empty() {
        section.complain_at(KEY, Complaint::new("is empty", MEND));
    }
    let mut tables = Vec::new();
    let mut good = !texts.is_empty();
    for (text, offset) in texts {
        let complaint = match text.parse::<TableName>() {
            Ok(table) if tables.contains(&table) => {
                Complaint::new(format!("`{table}` is there twice"), "name each table once")
            }
            Ok(table) => {
                tables.push(table);
                continue;
            }
            Err(error) => Complaint::new(error.to_string(), ""),
        };
        section.complain(KEY, offset, complaint);
        good = false;
    }
    good.then_some(tables)
}

fn sink(document: &mut Document<'_>) -> Option<Sink> {
    let mut section = document.section("sink");
    let basin = section.required("basin", "add basin = \"my-basin\"", names::basin);
    let stream = section.required("stream", "add stream = \"my-stream\"", names::stream);
    let endpoint = section.parsed_or("endpoint", Endpoint::Cloud, endpoint);
    let access_token = access_token(&mut section, endpoint.as_ref());
    let create = section.flag("create", false);
    let mode = section.parsed_or("mode", Mode::Session, |text| match text {
        "session" => Ok(Mode::Session),
        "unary" => Ok(Mode::Unary),
        "discard" => Ok(Mode::Discard),
        "unguarded" => Ok(Mode::Unguarded),
        _ => {
            let mend = "write \"session\" or \"unary\"";
            Err(Complaint::new(format!("`{text}` is no mode"), mend))
        }
    });
    let linger_ms = section.integer("linger_ms", 0..=1000, 5);
    let in_flight_mib = section.integer("in_flight_mib", 1..=1024, 16);
    let fencing = section.flag("fencing", true);
    let guarantee = section.parsed_or("guarantee", None, |text| {
        let mend = "write \"exactly-once\", \"numbers\" or \"at-least-once\"";
        let guarantee = Guarantee::from_word(text)
            .ok_or_else(|| Complaint::new(format!("`{text}` is no guarantee"), mend))?;
        if guarantee == Guarantee::ExactlyOnce && fencing == Some(false) {
            let mend = "leave fencing on, or write guarantee = \"numbers\"";
            return Err(Complaint::new("cannot be kept without sink.fencing", mend));
        }
        Ok(Some(guarantee))
    });
    Some(Sink {
        basin: basin?,
        stream: stream?,
        access_token: access_token?,
        endpoint: endpoint?,
        create: create?,
        mode: mode?,
        linger: Duration::from_millis(linger_ms?),
        in_flight_bytes_max: usize::try_from(in_flight_mib? * 1024 * 1024).ok()?,
        fencing: fencing?,
        guarantee: guarantee?,
    })
}

fn endpoint(text: &str) -> Result<Endpoint, Complaint> {
    let mend = "write http://HOST:PORT or https://HOST, or \"embedded\", or leave it out for S2's \
                cloud";
    if text == "embedded" {
        if cfg!(feature = "embedded-s2") {
            return Ok(Endpoint::Embedded);
        }
        let mend = "build with the feature `embedded-s2`, or name a server's URL";
        return Err(Complaint::new("this build has no embedded S2", mend));
    }
    // A URL may hold a password by mistake, so that the text is not shown.
    let Ok(url) = text.parse::<reqwest::Url>() else {
        return Err(Complaint::new("is no URL", mend));
    };
    if !matches!(url.scheme(), "http" | "https") {
        return Err(Complaint::new("does not begin with http:// or https://", mend));
    }
    if !url.username().is_empty() || url.password().is_some() {
        let mend = "give S2's token as access_token";
        return Err(Complaint::new("contains a user or a password", mend));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(Complaint::new("has a query or a fragment", mend));
    }
    // The cloud has two kinds of hosts, one for the account and one per basin, and both are known.
    let host = url.host_str().unwrap_or_default();
    let cloud = matches!(host, "a.s2.dev" | "aws.s2.dev")
        || host.ends_with(".b.s2.dev")
        || host.ends_with(".b.aws.s2.dev");
    if cloud {
        return Err(Complaint::new("is S2's cloud", "leave it out: the cloud is the default"));
    }
    Ok(Endpoint::Url(url.as_str().trim_end_matches('/').to_owned()))
}

/// Nothing after a complaint; `Some(None)` where no token is needed.
fn access_token(
    section: &mut Section<'_, '_>,
    endpoint: Option<&Endpoint>,
) -> Option<Option<AccessToken>> {
    const VALUE: &str = "access_token";
    const FILE: &str = "access_token_file";
    let value = section.parsed_or(VALUE, None, |text| {
        if text.chars().any(|c| !c.is_ascii_graphic()) {
            let mend = "write the token alone, without white space or line break";
            return Err(Complaint::new("contains characters that no token has", mend));
        }
        Ok(Some(Secret::new(text)))
    });
    let file = section.optional_path(FILE);
    let (value, file) = (value?, file?);
    let needed = matches!(endpoint, Some(Endpoint::Cloud));
    match (value, file) {
        (Some(_), Some(_)) => {
            let mend = "keep one of access_token and access_token_file";
            section.complain_at(VALUE, Complaint::new("is there beside access_token_file", mend));
            None
        }
        (None, Some(file)) => Some(Some(AccessToken::File(file))),
        (Some(token), None) if !token.expose().is_empty() => Some(Some(AccessToken::Value(token))),
        (Some(_), None) if needed => {
            let mend = "S2's cloud needs an access token";
            section.complain_at(VALUE, Complaint::new("is empty", mend));
            None
        }
        (None, None) if needed => {
            let mend = "S2's cloud needs one: add access_token = \"${S2_ACCESS_TOKEN}\"";
            section.complain_missing(VALUE, mend);
            None
        }
        (Some(_) | None, None) => Some(None),
    }
}

fn transforms(document: &mut Document<'_>) -> Option<Transforms> {
    // More than four were not faster than the one connection that feeds them.
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let mut section = document.section("transforms");
    let dir = section.path("dir", "transforms");
    let workers = section.integer("workers", 1..=64, cores.min(4));
    Some(Transforms { dir: dir?, workers: usize::try_from(workers?).ok()? })
}

fn state(document: &mut Document<'_>) -> Option<State> {
    /// Twice what is spilled at most, by default.
    const BYTES_MAX: u64 = 8 * 1024 * 1024 * 1024;
    let mut section = document.section("state");
    let dir = section.path("dir", "state");
    let bytes_max = section.parsed_or("bytes_max", BYTES_MAX, names::bytes);
    Some(State { dir: dir?, bytes_max: bytes_max? })
}

fn console(document: &mut Document<'_>) -> Option<Console> {
    const NAMES: &str = "names";
    let mut section = document.section("console");
    let default = Listen { host: "127.0.0.1".to_owned(), port: 7070 };
    let listen = section.parsed_or("listen", default, |text| {
        text.parse().map_err(|error: InvalidListen| Complaint::new(error.to_string(), ""))
    });
    let mut names = Vec::new();
    let mut good = true;
    let written = section.strings(NAMES);
    if section.has(NAMES) && written.is_none() {
        good = false;
    }
    for (name, offset) in written.into_iter().flatten() {
        if names::is_host_name(&name) {
            names.push(name.to_ascii_lowercase());
        } else {
            let mend = "write a host name without scheme and port, such as \"sluicebox.internal\"";
            section.complain(
                NAMES,
                offset,
                Complaint::new(format!("`{name}` is no host name"), mend),
            );
            good = false;
        }
    }
    Some(Console { listen: listen?, names: good.then_some(names)? })
}

#[cfg(test)]
mod tests;
