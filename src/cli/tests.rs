use clap::CommandFactory as _;

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split(' '))
}

#[test]
fn the_arguments_hold_together() {
    Cli::command().debug_assert();
}

#[test]
fn command_lines() {
    #[track_caller]
    fn check(line: &str, expected: bool) {
        let parsed = parse(line);
        assert_eq!(parsed.is_ok(), expected, "{line}: {parsed:?}");
        if let Err(error) = parsed {
            assert_eq!(error.exit_code(), i32::from(EXIT_USAGE), "{line}");
        }
    }
    for good in [
        "sluicebox run",
        "sluicebox run -c other.toml",
        "sluicebox -c other.toml --log-format json run",
        "sluicebox demo --exit --rows 100 --keep",
        "sluicebox check --json",
        "sluicebox messages list",
        "sluicebox messages list --state failed --table public.t --limit 5 --after 7 --json",
        "sluicebox messages list --console 127.0.0.1:7070",
        "sluicebox messages show 12 --json",
        "sluicebox messages export 12",
        "sluicebox messages export 12 --redact -o case.json",
        "sluicebox messages retry 1 2 3",
        "sluicebox messages retry --all --table t --state parked",
        "sluicebox messages ack --all",
        "sluicebox transforms list --json",
        "sluicebox transforms add",
        "sluicebox transforms add strip-columns --column body --column title",
        "sluicebox transforms add route --set stream=cdc/{table} --set fallback=rest",
        "sluicebox transforms add compress-columns --column body --codec gzip --only-oversize",
        "sluicebox transforms test a.wasm b.wasm --messages m.json --settings a.toml --settings b.toml",
        "sluicebox transforms test a.wasm --case case.json --json --expect e.json",
        "sluicebox transforms test transforms --parked --limit 3 --write-expect e.json",
        "sluicebox transforms new mask-emails --lang rust",
        "sluicebox transforms bench a.wasm --seconds 1",
        "sluicebox transforms inspect a.wasm --json",
        "sluicebox tail",
        "sluicebox tail -f -n 3 --json",
        "sluicebox tail --from 0",
        "sluicebox verify",
        "sluicebox verify --table t --table public.u --stream cdc/a --from 7 --to 9 --json",
        "sluicebox verify --ignore-column public.t.body --allow-older --show-values --wait 5",
        "sluicebox s2",
        "sluicebox s2 --listen 127.0.0.1:0 --dir data",
    ] {
        check(good, true);
    }
    for bad in [
        "sluicebox",
        "sluicebox fly",
        "sluicebox run extra",
        "sluicebox --log-format xml run",
        "sluicebox messages",
        "sluicebox messages list --state odd",
        "sluicebox messages list --limit many",
        "sluicebox messages list --console nowhere",
        "sluicebox messages show",
        "sluicebox messages show twelve",
        "sluicebox messages retry",
        "sluicebox messages retry 1 --all",
        "sluicebox messages ack 1 --table t",
        "sluicebox messages export",
        "sluicebox transforms test",
        "sluicebox transforms test a.wasm --parked --messages m.json",
        "sluicebox transforms test a.wasm --expect e.json --write-expect e.json",
        "sluicebox transforms bench a.wasm --seconds 0",
        "sluicebox transforms inspect",
        "sluicebox transforms new mask-emails",
        "sluicebox transforms new mask-emails --lang cobol",
        "sluicebox transforms add no-such-transform",
        "sluicebox tail -n 5 --from 3",
        "sluicebox s2 --listen 8080",
    ] {
        check(bad, false);
    }
}

/// The commands on the pages of the ready-made transforms.
#[test]
fn what_the_pages_say_to_type_can_be_typed() {
    let mut commands = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/transforms")).unwrap() {
        let Ok(page) = std::fs::read_to_string(entry.unwrap().path().join("README.md")) else {
            continue;
        };
        for command in page.split('`').filter(|text| text.starts_with("sluicebox ")) {
            // As a shell would take it apart: these have no other quotes.
            let mut words = vec![String::new()];
            let mut quoted = false;
            for character in command.chars() {
                match character {
                    '\'' => quoted = !quoted,
                    ' ' if !quoted => words.push(String::new()),
                    other => words.last_mut().unwrap().push(other),
                }
            }
            Cli::try_parse_from(&words).unwrap_or_else(|error| panic!("{command}: {error}"));
            commands += 1;
        }
    }
    assert!(commands >= 8, "{commands}");
}

#[test]
fn exit_codes_of_errors() {
    #[track_caller]
    fn check(error: impl Into<anyhow::Error>, expected: u8) {
        let error = error.into();
        assert_eq!(exit_code(&error), expected, "{error:#}");
    }
    let io_error = || std::io::Error::other("no");
    check(UsageError("no".to_owned()), EXIT_USAGE);
    let missing = config::Error::Read { path: "x.toml".into(), source: io_error() };
    check(anyhow::Error::from(missing).context("could not start"), EXIT_USAGE);
    check(io_error(), EXIT_NO);
    check(OutputError::Failed(io_error()), EXIT_NO);
}

/// What people read first. `UPDATE_SNAPSHOTS=1 cargo test --lib cli::` writes the file anew.
#[test]
fn the_help_is_as_it_was() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/cli/help.txt");
    let mut help = String::new();
    render_help(Cli::command(), "", &mut help);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(path, &help).unwrap();
    }
    assert_eq!(help, std::fs::read_to_string(path).unwrap());
}

fn render_help(command: clap::Command, parents: &str, help: &mut String) {
    let name = format!("{parents}{}", command.get_name());
    let mut command = command.bin_name(&name);
    // Global arguments reach the subcommands only once the tree is built.
    command.build();
    let rendered = command.render_help().to_string();
    help.push_str(&format!("$ {name} --help\n{rendered}\n"));
    for child in command.get_subcommands() {
        if child.get_name() != "help" && !child.is_hide_set() {
            render_help(child.clone(), &format!("{name} "), help);
        }
    }
}
