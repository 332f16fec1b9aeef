use std::collections::HashMap;
use std::env::VarError;

use super::*;
use crate::group_by::{GroupBy, GroupBys};

/// Parses a file in the folder `etc` with a fixed environment.
fn parse(text: &str) -> Result<Config, Error> {
    let variables = HashMap::from([
        ("DATABASE_URL", "postgres://u:hunter2@h/d"),
        ("S2_ACCESS_TOKEN", "token"),
        ("INJECTED", "x\"\ncreate = true\n#"),
        ("EMPTY", ""),
    ]);
    let lookup =
        |name: &str| variables.get(name).map(|v| (*v).to_owned()).ok_or(VarError::NotPresent);
    Config::parse(text, Path::new("etc/sluicebox.toml"), &lookup)
}

const SOURCE: &str = "[source]\nurl = \"${DATABASE_URL}\"\ntables = [\"documents\"]\n";
const SINK: &str = "[sink]\nbasin = \"my-basin\"\nstream = \"s\"\naccess_token = \"t\"\n";

#[test]
fn the_least_configuration_has_defaults() {
    let config = parse(&format!("{SOURCE}{SINK}")).unwrap();
    assert_eq!(config.source.url.expose(), "postgres://u:hunter2@h/d");
    assert_eq!(config.source.tables, ["public.documents".parse().unwrap()]);
    assert_eq!((&*config.source.slot, &*config.source.publication), ("sluicebox", "sluicebox"));
    assert_eq!(config.sink.endpoint, Endpoint::Cloud);
    assert_eq!(config.sink.access_token, Some(AccessToken::Value(Secret::new("t"))));
    assert_eq!(config.sink.mode, Mode::Session);
    assert_eq!(config.sink.linger, Duration::from_millis(5));
    assert_eq!(config.sink.in_flight_bytes_max, 16 * 1024 * 1024);
    assert!(!config.sink.create && config.sink.fencing);
    assert_eq!(config.sink.guarantee, None);
    assert_eq!(config.transforms.dir, Path::new("etc/transforms"));
    assert!((1..=4).contains(&config.transforms.workers));
    assert_eq!(config.state.dir, Path::new("etc/state"));
    assert_eq!(config.console.listen.to_string(), "127.0.0.1:7070");
    assert_eq!(config.delivery.retry_min, Duration::from_secs(1));
    assert_eq!(config.delivery.retry_max, Duration::from_secs(300));
}

#[test]
fn the_example_is_a_configuration() {
    let text = include_str!("../../examples/sluicebox.toml");
    parse(text).unwrap();
    // What is commented out must hold as well.
    let all: String = text
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(setting)
                if setting.contains(" = ") && !setting.starts_with("access_token_file") =>
            {
                format!("{setting}\n")
            }
            Some(_) | None => format!("{line}\n"),
        })
        .collect();
    let config = parse(&all).unwrap();
    assert_ne!(config.sink.endpoint, Endpoint::Cloud, "the commented settings were read");
}

#[test]
fn nothing_shows_a_secret() {
    let config = parse(&format!("{SOURCE}{SINK}")).unwrap();
    assert!(!format!("{config:?}").contains("hunter2"));
    let broken = SOURCE.replace("${DATABASE_URL}", "mysql://u:hunter2@h/d");
    assert!(!format!("{:?}", parse(&format!("{broken}{SINK}")).unwrap_err()).contains("hunter2"));
}

#[test]
fn the_environment_cannot_write_toml() {
    let sink = SINK.replace("\"s\"", "\"${INJECTED}\"");
    let error = parse(&format!("{SOURCE}{sink}")).unwrap_err().to_string();
    assert!(
        error.starts_with("etc/sluicebox.toml:6:10: sink.stream: is no stream name"),
        "{error}"
    );
}

#[test]
fn problems_name_place_key_and_mend() {
    /// What follows `source` and `sink` sections that are right.
    #[track_caller]
    fn check(rest: &str, expected: &str) {
        let text = format!("{SOURCE}{SINK}{rest}");
        assert_eq!(parse(&text).unwrap_err().to_string(), expected, "{text}");
    }
    check(
        "linger = 5",
        "etc/sluicebox.toml:8:1: sink.linger: is not a known key; [sink] takes `basin`, `stream`, \
         `endpoint`, `access_token`, `access_token_file`, `create`, `mode`, `linger_ms`, \
         `in_flight_mib`, `fencing` and `guarantee`",
    );
    check(
        "[console]\nlisen = \"\"",
        "etc/sluicebox.toml:9:1: console.lisen: is not a known key; did you mean `listen`?",
    );
    check(
        "[state]\nslot = \"s\"",
        "etc/sluicebox.toml:9:1: state.slot: is not a known key; it belongs to the section [source]",
    );
    check(
        "[consol]\n",
        "etc/sluicebox.toml:8:2: consol: is not a known key; did you mean [console]?",
    );
    check(
        "[console]\nlisten = 7070",
        "etc/sluicebox.toml:9:10: console.listen: is a TOML integer; write a string in quotes",
    );
    check(
        "[console]\nlisten = \"7070\"",
        "etc/sluicebox.toml:9:10: console.listen: `7070` is no address; write HOST:PORT, such as \
         127.0.0.1:7070 or [::1]:7070",
    );
    check(
        "[console]\nnames = [\"http://x\"]",
        "etc/sluicebox.toml:9:10: console.names: `http://x` is no host name; write a host name \
         without scheme and port, such as \"sluicebox.internal\"",
    );
    check(
        "[state]\ndir = \"${STATE_DIR}\"",
        "etc/sluicebox.toml:9:7: state.dir: the environment variable `STATE_DIR` is not set; set \
         it, or give it a default: ${STATE_DIR:-…}",
    );
    check(
        "in_flight_mib = 0",
        "etc/sluicebox.toml:8:17: sink.in_flight_mib: is 0; write a whole number from 1 to 1024",
    );
    check(
        "create = \"yes\"",
        "etc/sluicebox.toml:8:10: sink.create: is a TOML string; write true or false, without \
         quotes",
    );
    check(
        "mode = \"fast\"",
        "etc/sluicebox.toml:8:8: sink.mode: `fast` is no mode; write \"session\" or \"unary\"",
    );
    check(
        "access_token_file = \"f\"",
        "etc/sluicebox.toml:7:16: sink.access_token: is there beside access_token_file; keep one \
         of access_token and access_token_file",
    );
    check(
        "endpoint = \"https://my-basin.b.s2.dev\"",
        "etc/sluicebox.toml:8:12: sink.endpoint: is S2's cloud; leave it out: the cloud is the \
         default",
    );
    check(
        "[delivery]\nretry_min = \"10s\"\nretry_max = \"1s\"",
        "etc/sluicebox.toml:10:13: delivery.retry_max: is smaller than retry_min; make retry_max \
         the larger one",
    );
    check(
        "[delivery]\nretry_min = \"soon\"",
        "etc/sluicebox.toml:9:13: delivery.retry_min: `soon` is no such duration; write a number \
         with its unit, from \"1ms\" to \"24h\", such as \"5m\"",
    );
}

#[test]
fn groups_are_columns_or_a_word() {
    let two = SOURCE.replace("[\"documents\"]", "[\"documents\", \"orders\", 'public.\"A.b\"']");
    let group_by = |text: &str| {
        parse(&format!("{two}{SINK}[delivery.group_by]\n{text}")).map(|c| c.delivery.group_by)
    };
    let found = group_by(
        "documents = \"none\"\n\"public.orders\" = [\"customer\", \"region\"]\n\
         'public.\"A.b\"' = \"table\"",
    )
    .unwrap();
    let columns = GroupBy::Columns(vec!["customer".to_owned(), "region".to_owned()]);
    let expected =
        [("documents", GroupBy::None), ("orders", columns), ("public.\"A.b\"", GroupBy::Table)];
    assert_eq!(found, expected.map(|(name, by)| (name.parse().unwrap(), by)).into());
    #[track_caller]
    fn check(actual: Result<GroupBys, Error>, expected: &str) {
        let text = actual.unwrap_err().to_string();
        assert!(text.contains(&format!("delivery.group_by: {expected}")), "{text}");
    }
    check(group_by("other = \"none\""), "names public.other, which is not read; name a table");
    check(group_by("documents = \"rows\""), "has no word `rows`; write an array");
    check(group_by("documents = []"), "has an array without columns");
    check(group_by("documents = [1]"), "has a TOML array that is not of strings");
    check(group_by("documents = 1"), "has a TOML integer");
    check(group_by("documents = [\"a\", \"a\"]"), "names the column `a` twice");
    check(group_by("public.orders = \"none\""), "");
    check(
        group_by("documents = \"none\"\n\"public.documents\" = \"none\""),
        "names public.documents twice",
    );
    check(
        parse(&format!("{SOURCE}{SINK}[delivery]\ngroup_by = \"none\"")).map(|_| GroupBys::new()),
        "is a TOML string; write a section [delivery.group_by]",
    );
}

#[test]
fn problems_of_source_and_sink() {
    #[track_caller]
    fn check(text: &str, expected: &str) {
        assert_eq!(parse(text).unwrap_err().to_string(), expected, "{text}");
    }
    check(
        SOURCE,
        "etc/sluicebox.toml has 3 problems\n  \
         etc/sluicebox.toml:1:1: sink.basin: is missing; add basin = \"my-basin\"\n  \
         etc/sluicebox.toml:1:1: sink.stream: is missing; add stream = \"my-stream\"\n  \
         etc/sluicebox.toml:1:1: sink.access_token: is missing; S2's cloud needs one: add \
         access_token = \"${S2_ACCESS_TOKEN}\"",
    );
    check(
        &format!("[source]\nurl = \"mysql://h/d\"\ntables = []\n{SINK}"),
        "etc/sluicebox.toml has 2 problems\n  \
         etc/sluicebox.toml:2:7: source.url: cannot be used: it is neither a URL such as \
         postgres://user:password@host:5432/database nor a list such as `host=… user=… dbname=…`; \
         write postgres://USER:PASSWORD@HOST:PORT/DATABASE, special characters of the password \
         percent-encoded\n  \
         etc/sluicebox.toml:3:10: source.tables: is empty; name the tables, such as tables = \
         [\"public.documents\"]",
    );
    check(
        &format!("[source]\nurl = \"${{DATABASE_URL}}\"\ntables = [\"a\", \"public.a\"]\n{SINK}"),
        "etc/sluicebox.toml:3:16: source.tables: `public.a` is there twice; name each table once",
    );
    check(
        &format!("{SOURCE}[sink]\nbasin = \"b\"\nstream = \"s\"\naccess_token = \"${{EMPTY}}\""),
        "etc/sluicebox.toml has 2 problems\n  \
         etc/sluicebox.toml:5:9: sink.basin: `b` has a length of 1; a basin name has 8 to 48 \
         lower-case letters, digits and dashes, and no dash at either end\n  \
         etc/sluicebox.toml:7:16: sink.access_token: is empty; S2's cloud needs an access token",
    );
    check(
        &format!("source = 1\n{SINK}"),
        "etc/sluicebox.toml has 3 problems\n  \
         etc/sluicebox.toml:1:1: source: is not a section; write a section [source] with its keys \
         below it\n  \
         etc/sluicebox.toml:1:1: source.url: is missing; add url = \"${DATABASE_URL}\"\n  \
         etc/sluicebox.toml:1:1: source.tables: is missing; name the tables, such as tables = \
         [\"public.documents\"]",
    );
    let error = parse("[source\nurl = 1").unwrap_err().to_string();
    assert!(error.starts_with("etc/sluicebox.toml:1:8: not valid TOML: "), "{error}");
}

#[test]
fn a_server_of_ones_own_needs_no_token() {
    #[track_caller]
    fn check(endpoint: &str, expected: Result<Endpoint, &str>) {
        let text = format!(
            "{SOURCE}[sink]\nbasin = \"my-basin\"\nstream = \"s\"\nendpoint = \"{endpoint}\""
        );
        match (parse(&text), expected) {
            (Ok(config), Ok(expected)) => assert_eq!(config.sink.endpoint, expected),
            (Err(error), Err(expected)) => {
                assert!(error.to_string().contains(expected), "{endpoint}: {error}");
                assert!(!error.to_string().contains("hunter2"), "{endpoint}: {error}");
            }
            (actual, expected) => panic!("{endpoint}: {actual:?} is not {expected:?}"),
        }
    }
    check("http://127.0.0.1:8080/", Ok(Endpoint::Url("http://127.0.0.1:8080".to_owned())));
    check("https://s2.internal/x/", Ok(Endpoint::Url("https://s2.internal/x".to_owned())));
    #[cfg(feature = "embedded-s2")]
    check("embedded", Ok(Endpoint::Embedded));
    check("s2.internal:8080", Err("does not begin with http"));
    check("s2.internal", Err("is no URL"));
    check("http://u:hunter2@h", Err("contains a user or a password"));
    check("http://h?a=hunter2", Err("has a query"));
}

#[test]
fn messages_are_tried_for_ever_unless_there_is_a_place_for_dead_ones() {
    let letters = |text: &str| {
        let parsed = parse(&format!("{SOURCE}{SINK}{text}"));
        parsed.map(|config| config.delivery.dead_letters).map_err(|error| error.to_string())
    };
    assert_eq!(letters(""), Ok(None));
    assert_eq!(letters("[dead_letters]\n"), Ok(None));
    let with = |place| Ok(Some(DeadLetters { max_attempts: 3, place }));
    let set = |place: &str| letters(&format!("[delivery]\nmax_attempts = 3\n{place}"));
    let stream = LetterPlace::Stream("dead".into());
    assert_eq!(set("[dead_letters]\nstream = \"dead\"\n"), with(stream));
    let file = LetterPlace::File("etc/d/x.jsonl".into());
    assert_eq!(set("[dead_letters]\nfile = \"d/x.jsonl\"\n"), with(file));
    for (text, expected) in [
        (
            "[delivery]\nmax_attempts = 3\n",
            "delivery.max_attempts: would lose messages; add stream",
        ),
        (
            "[delivery]\nmax_attempts = 0\n",
            "delivery.max_attempts: is 0; write a whole number from 1",
        ),
        ("[dead_letters]\nstream = \"dead\"\n", "dead_letters.stream: gets nothing"),
        ("[dead_letters]\nfile = \"x\"\n", "dead_letters.file: gets nothing"),
        ("[dead_letters]\nfile = \"x\"\nstream = \"y\"\n", "dead_letters.file: is there beside"),
        ("[dead_letters]\nstream = \"s\"\n", "dead_letters.stream: is the stream of [sink]"),
        ("[dead_letters]\nstream = \"..\"\n", "dead_letters.stream: is no stream name"),
    ] {
        let error = letters(text).unwrap_err();
        assert!(error.contains(expected) && !error.contains("problems"), "{error}");
    }
}
