//! `sluicebox check`: what is wrong, and what mends it.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::client::{Client, ClientError, ProcessArguments};
use super::output::{print, print_json, printable};
use super::{EXIT_NO, Global, human, stream};
use crate::config::{self, Config, Endpoint, LetterPlace, State};
use crate::finding::{Finding, Level};
use crate::pipeline::dead_letter::file;
use crate::sink::client::ReadFrom;
use crate::sink::error::Named;
use crate::transform::{Refused, Workbench, live_modules, read_modules};
use crate::{admin, app, sink, source, store};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, arguments: Arguments) -> anyhow::Result<ExitCode> {
    let config = Config::load(&global.config)?;
    let mut findings = vec![Finding::ok(
        "configuration",
        "file",
        format!("{} is well formed", global.config.display()),
    )];
    findings.extend(transforms(&config.transforms.dir, &config.state.dir));
    findings.push(state_folder(&config.state.dir));
    findings.extend(room(&config.state));
    findings.extend(console(&config).await);
    findings.extend(source(&config).await);
    findings.extend(sink(&config.sink, Named::Sink).await);
    findings.extend(dead_letters(&config).await);
    let is_well = findings.iter().all(|finding| finding.level != Level::Fail);
    if arguments.json {
        print_json(&json!({"ok": is_well, "findings": findings}))?;
    } else {
        print(&findings_text(&findings))?;
    }
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::from(EXIT_NO) })
}

/// The folder, and whether each of its modules would be taken up, as far as that shows without messages.
fn transforms(dir: &Path, state_dir: &Path) -> Vec<Finding> {
    const PART: &str = "transforms";
    let shown = dir.display();
    let failed = |text: String, mend: String| vec![Finding::fail(PART, "folder", text, mend)];
    let modules = match std::fs::read_dir(dir).and_then(|_| read_modules(dir)) {
        Ok(modules) => modules,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let text = format!("the folder {shown} does not exist");
            return failed(text, format!("mkdir -p '{shown}'"));
        }
        Err(error) => {
            let text = format!("the folder {shown} cannot be read: {error}");
            return failed(text, "set transforms.dir to a folder that can be read".to_owned());
        }
    };
    let text = format!("{shown} has {}", human::count(modules.len() as u64, "module"));
    // What cannot be read of the state is told of there.
    let live = live_modules(state_dir).ok().flatten().unwrap_or_default();
    if modules.is_empty() && !live.is_empty() {
        let files: Vec<&str> = live.iter().map(|module| module.file.as_str()).collect();
        let text = format!("{text}, and live last were {}", files.join(", "));
        return vec![Finding {
            part: PART,
            name: "folder".to_owned(),
            level: Level::Warn,
            text,
            mend: Some("where a volume is to be mounted there, mount it".to_owned()),
        }];
    }
    let mut findings = vec![Finding::ok(PART, "folder", text)];
    let workbench = match Workbench::of_user() {
        Ok(workbench) => workbench,
        Err(error) => {
            let text = crate::error_chain::error_chain(&error);
            findings.push(Finding::fail(PART, "engine", text, "use a machine that can run it"));
            return findings;
        }
    };
    for module in modules {
        let file = module.file.clone();
        findings.push(match workbench.chain(vec![module]) {
            Ok(_) => Finding::ok(PART, file, "loads and starts with its settings"),
            Err(Refused { reason, .. }) => {
                let mend = format!("put a version that works there, or take {shown}/{file} away");
                Finding::fail(PART, file, reason, mend)
            }
        });
    }
    findings
}

/// Whether the store can be written, found out by writing a file that is gone at once.
fn state_folder(dir: &Path) -> Finding {
    const PART: &str = "state";
    let shown = dir.display();
    if !dir.exists() {
        // `run` creates it; whether it may is seen by the nearest folder that exists.
        let parent = dir.ancestors().skip(1).find(|parent| parent.is_dir());
        let parent = parent.unwrap_or(Path::new("."));
        return match tempfile::tempfile_in(parent) {
            Ok(_) => Finding::ok(PART, "folder", format!("{shown} will be created")),
            Err(error) => {
                let text = format!("the folder {shown} does not exist and cannot be made: {error}");
                Finding::fail(PART, "folder", text, format!("mkdir -p '{shown}'"))
            }
        };
    }
    match tempfile::tempfile_in(dir) {
        Ok(_) => Finding::ok(PART, "folder", format!("{shown} can be written")),
        Err(error) => {
            let text = format!("the folder {shown} cannot be written: {error}");
            Finding::fail(PART, "folder", text, "set state.dir to a folder that can be written")
        }
    }
}

/// Whether the store finds as much room as the settings let it take. What it has taken already counts as room;
/// `None` where the system does not say.
fn room(state: &State) -> Option<Finding> {
    const PART: &str = "state";
    let exists = state.dir.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let disk = rustix::fs::statvfs(exists).ok()?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let taken = std::fs::metadata(state.dir.join(store::FILE)).map_or(0, |file| file.len());
    let (dir, most) = (state.dir.display(), state.bytes_max);
    if free.saturating_add(taken) < most {
        let text = format!(
            "{} are free on the disk of {dir}, and the store may take {} (state.bytes_max): while it is full, nothing \
             is read from Postgres",
            human::bytes(free),
            human::bytes(most),
        );
        let mend = "make room, set state.dir to a larger disk, or state.bytes_max to what there is";
        return Some(Finding::warn(PART, "room", text, mend));
    }
    let text =
        format!("{} free, of which the store may take {}", human::bytes(free), human::bytes(most));
    Some(Finding::ok(PART, "room", text))
}

async fn source(config: &Config) -> Vec<Finding> {
    const PART: &str = "source";
    let dsn = match app::dsn(config) {
        Ok(dsn) => dsn,
        Err(error) => {
            return vec![Finding::fail(PART, "url", format!("{error:#}"), "set source.url")];
        }
    };
    let found = source::check(&app::source_settings(config, dsn)).await;
    let convert = |finding: source::Finding| Finding {
        part: PART,
        name: finding.name,
        level: finding.level,
        text: finding.text,
        mend: finding.mend,
    };
    found.into_iter().map(convert).collect()
}

/// Whether the stream is there and what the token may do with it, found out without writing.
///
/// S2's own errors say what mends them. Whether the token may fence shows when `run` does it: there
/// is no way to ask.
async fn sink(config: &config::Sink, named: Named) -> Vec<Finding> {
    const PART: &str = "sink";
    if config.endpoint == Endpoint::Embedded {
        return vec![Finding::ok(PART, "endpoint", "S2 runs inside the process")];
    }
    let failed = |name: &str, error: anyhow::Error| Finding {
        part: PART,
        name: name.to_owned(),
        level: Level::Fail,
        text: format!("{error:#}"),
        mend: None,
    };
    let client = match named_client(config, named) {
        Ok(client) => client,
        Err(error) => return vec![failed("client", error)],
    };
    let place = client.place().clone();
    let shown = format!("stream `{}` in basin `{}`", place.stream, place.basin);
    let mut findings = Vec::new();
    match client.tail().await {
        Ok(tail) => {
            let text =
                format!("{shown} at {} has its next record at {}", place.endpoint, tail.next_seq);
            findings.push(Finding::ok(PART, "stream", text));
        }
        Err(error) if error.is_stream_missing() || error.is_basin_missing() => {
            let missing = if config.create {
                Finding::ok(PART, "stream", format!("{shown} is missing, and `run` creates it"))
            } else {
                failed("stream", error.into())
            };
            // Nothing else can be asked of a stream that is not there.
            return vec![missing];
        }
        Err(error) if error.is_forbidden() => {
            findings.push(not_allowed(PART, "check-tail", &error))
        }
        Err(error) => return vec![failed("stream", error.into())],
    }
    match client.read(ReadFrom::TailOffset(1), 1, Duration::ZERO).await {
        Ok(_) => findings.push(Finding::ok(PART, "read", "the access token may read")),
        Err(error) if error.is_forbidden() => findings.push(not_allowed(PART, "read", &error)),
        Err(error) => findings.push(failed("read", error.into())),
    }
    match client.check_append().await {
        Ok(_) => findings.push(Finding::ok(PART, "append", "the access token may append")),
        Err(error) => findings.push(failed("append", error.into())),
    }
    findings
}

fn named_client(config: &config::Sink, named: Named) -> anyhow::Result<sink::Client> {
    let client = stream::client(config.clone(), None)?;
    Ok(client.for_stream(&config.stream, named)?)
}

/// Whether dead letters could go where they are to go, found out without writing.
async fn dead_letters(config: &Config) -> Vec<Finding> {
    const PART: &str = "dead_letters";
    let place = config.delivery.dead_letters.as_ref().map(|letters| &letters.place);
    match place {
        None => Vec::new(),
        Some(LetterPlace::Stream(name)) => {
            let stream = config::Sink { stream: name.to_string(), ..config.sink.clone() };
            let of_letters = |finding: Finding| Finding { part: PART, ..finding };
            sink(&stream, Named::DeadLetters).await.into_iter().map(of_letters).collect()
        }
        Some(LetterPlace::File(path)) => {
            let shown = path.display();
            vec![match file::check(path) {
                Ok(()) => Finding::ok(PART, "file", format!("{shown} can be written")),
                Err(error) => {
                    let text = format!("{shown} cannot be written: {error}");
                    Finding::fail(PART, "file", text, "set dead_letters.file to one that can be")
                }
            }]
        }
    }
}

fn not_allowed(part: &'static str, operation: &str, error: &sink::Error) -> Finding {
    let text = format!("without `{operation}` delivery is at least once: {error}");
    Finding { part, name: operation.to_owned(), level: Level::Warn, text, mend: None }
}

/// Whether the address is free, or else held by a sluicebox that is ready.
async fn console(config: &Config) -> Vec<Finding> {
    const PART: &str = "console";
    let listen = &config.console.listen;
    match admin::Server::bind(&config.console).await {
        Ok(_) => return vec![Finding::ok(PART, "listen", format!("{listen} is free"))],
        Err(admin::Error::InUse { .. }) => {}
        Err(error) => {
            let text = format!("{:#}", anyhow::Error::from(error));
            let mend = "set console.listen to an address of this machine";
            return vec![Finding::fail(PART, "listen", text, mend)];
        }
    }
    match running_status(config).await {
        Ok(status) if status.ready => {
            vec![Finding::ok(PART, "listen", format!("a sluicebox runs at {listen} and is ready"))]
        }
        Ok(status) => {
            let running = format!("a sluicebox runs at {listen} and is not ready");
            let mend = "its reasons follow; it goes on by itself when they are mended";
            let mut findings = vec![Finding::warn(PART, "listen", running, mend)];
            findings.extend(status.reasons.into_iter().map(|reason| Finding {
                part: PART,
                name: reason.code,
                level: Level::Warn,
                text: reason.text,
                mend: None,
            }));
            findings
        }
        Err(error) => {
            let text = format!("{listen} is in use: {error:#}");
            let mend = "end what listens there, or set console.listen to another address";
            vec![Finding::fail(PART, "listen", text, mend)]
        }
    }
}

async fn running_status(config: &Config) -> anyhow::Result<crate::pipeline::control::Status> {
    let console = Some(config.console.listen.clone());
    let client = Client::new(&ProcessArguments { console }, &config.path)?;
    let answer: Result<_, ClientError> = client.get(&["status"], &[]).await;
    Ok(client.read(answer?)?)
}

fn findings_text(findings: &[Finding]) -> String {
    let name = |finding: &Finding| format!("{}.{}", finding.part, finding.name);
    let width = findings.iter().map(|finding| name(finding).chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let (level, found) = (finding.level.as_str(), printable(&finding.text));
        text.push_str(&format!("{level:<4}  {:<width$}  {found}\n", name(finding)));
        for line in finding.mend.iter().flat_map(|mend| mend.lines()) {
            text.push_str("        ");
            text.push_str(&printable(line));
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_line_up_with_their_mend_below() {
        let findings = [
            Finding::ok("source", "connect", "Postgres 17.2"),
            Finding::fail(
                "source",
                "wal_level",
                "wal_level is replica",
                "ALTER SYSTEM SET wal_level = logical;\nthen restart Postgres",
            ),
        ];
        let expected = "\
ok    source.connect    Postgres 17.2
fail  source.wal_level  wal_level is replica
        ALTER SYSTEM SET wal_level = logical;
        then restart Postgres
";
        assert_eq!(findings_text(&findings), expected);
    }

    #[test]
    fn folders() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("a/b");
        let state = dir.path();
        assert_eq!(transforms(&missing, state)[0].level, Level::Fail);
        assert_eq!(state_folder(&missing).level, Level::Ok);
        assert!(!missing.exists());
        std::fs::write(dir.path().join("10-x.wasm"), "").unwrap();
        std::fs::write(dir.path().join("10-x.toml"), "").unwrap();
        let findings = transforms(dir.path(), state);
        assert!(findings[0].text.ends_with("has 1 module"), "{findings:?}");
        assert_eq!((findings[1].name.as_str(), findings[1].level), ("10-x.wasm", Level::Fail));
        assert_eq!(state_folder(dir.path()).level, Level::Ok);
        let file = dir.path().join("10-x.toml");
        assert_eq!(transforms(&file, state)[0].level, Level::Fail);
        assert_eq!(state_folder(&file).level, Level::Fail);

        // None there, and the last chain had one.
        let (empty, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(transforms(empty.path(), state.path())[0].level, Level::Ok);
        let kept = state.path().join("last-good-transforms");
        std::fs::create_dir(&kept).unwrap();
        let digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        std::fs::write(kept.join(digest), "").unwrap();
        let manifest = format!("{{\"10-x.wasm\":{{\"digest\":\"{digest}\",\"settings\":null}}}}");
        std::fs::write(kept.join("manifest.json"), manifest).unwrap();
        let findings = transforms(empty.path(), state.path());
        assert_eq!(findings[0].level, Level::Warn);
        assert!(findings[0].text.ends_with("has 0 modules, and live last were 10-x.wasm"));
    }

    #[test]
    fn room_for_the_store() {
        let level =
            |dir: &Path, bytes_max| room(&State { dir: dir.to_owned(), bytes_max }).unwrap().level;
        let dir = tempfile::tempdir().unwrap();
        for dir in [dir.path(), &dir.path().join("not/yet")] {
            assert_eq!(level(dir, 1), Level::Ok);
            assert_eq!(level(dir, u64::MAX), Level::Warn);
        }
    }
}
