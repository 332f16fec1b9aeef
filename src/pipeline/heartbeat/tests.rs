use std::process::{Command, Stdio};

use tokio_util::sync::CancellationToken;

use super::fault::Hang;
use super::*;
use crate::app;
use crate::config::Config;
use crate::pipeline::grants::Grants;

/// A driver that is looked at each second; what was found, and when.
fn run(beats: impl IntoIterator<Item = u64>) -> Vec<(u64, &'static str)> {
    let mut judge = Judge::new(Duration::from_secs(10));
    let start = Instant::now();
    let mut found = Vec::new();
    for (second, beats) in (0..).zip(beats) {
        let word = match judge.look(start + Duration::from_secs(second), beats) {
            Verdict::Turns { stood: None } | Verdict::Quiet => continue,
            Verdict::Turns { stood: Some(_) } => "again",
            Verdict::Stands { is_news: true, .. } => "stands",
            Verdict::Stands { is_news: false, .. } => continue,
            Verdict::Over { .. } => "over",
        };
        found.push((second, word));
    }
    found
}

#[test]
fn what_stands_still_is_said_and_then_given_up() {
    assert_eq!(run(std::iter::repeat_n(7, 21)), [(10, "stands"), (20, "over")]);
    assert_eq!(run((0..100).map(|second| second / 9)), []);
    let comes_back = (0..40).map(|second| if second < 15 { 1 } else { second });
    assert_eq!(run(comes_back), [(10, "stands"), (15, "again")]);
    assert_eq!(run(std::iter::repeat_n(0, 100)), [], "it has not begun yet");
}

#[test]
fn a_process_that_stood_still_as_a_whole_is_not_given_up() {
    let mut judge = Judge::new(Duration::from_secs(10));
    let start = Instant::now();
    judge.look(start, 7);
    assert_eq!(judge.look(start + Duration::from_secs(3600), 7), Verdict::Quiet);
}

const HANG: &str = "SLUICEBOX_TEST_HANG";

/// The real driver in a process of its own, which is hung there: the process says so, and ends. With a
/// thread of the runtime blocked, what that thread has yet to do stands still too, so that whether
/// anybody is answered is luck; where the driver merely waits, everybody is.
#[test]
fn a_driver_that_hangs_is_said_and_ends_the_process() {
    if let Ok(how) = std::env::var(HANG) {
        return hang(if how == "await" { Hang::Await } else { Hang::Block });
    }
    for how in ["await", "block"] {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("pipeline::heartbeat::tests::a_driver_that_hangs_is_said_and_ends_the_process")
            .env(HANG, how)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = child.wait_with_output().unwrap();
        let (told, log) = (text(&output.stdout), text(&output.stderr));
        let code = output.status.code();
        assert_eq!(code, Some(i32::from(EXIT_CODE)), "{how}: {told}\n{log}");
        assert!(log.contains("stuck: the task") && log.contains("this process ends"), "{log}");
        if how == "block" {
            continue;
        }
        for expected in [
            "/healthz 200 ok",
            "/healthz 503 stuck_driver: ",
            "/readyz 503 {\"ready\":false,\"reasons\":[{\"part\":\"driver\",\"code\":\"stuck_driver\"",
            "sluicebox_stuck{part=\"driver\"} 1",
            "sluicebox_state{state=\"stuck\"} 1",
        ] {
            assert!(told.contains(&format!("told: {expected}")), "{expected} is not in {told}");
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What the process of the test above does. It does not come back.
fn hang(how: Hang) {
    tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).init();
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("transforms")).unwrap();
    let file = dir.path().join("sluicebox.toml");
    // Neither Postgres nor S2 is there, which the driver waits for.
    let text = "[source]\nurl = \"postgres://nobody@127.0.0.1:1/nothing\"\ntables = [\"public.t\"]\n\
                [sink]\nbasin = \"my-basin\"\nstream = \"s\"\nendpoint = \"http://127.0.0.1:1\"\n\
                access_token = \"t\"\n[transforms]\ndir = \"transforms\"\n[state]\ndir = \"state\"\n\
                [console]\nlisten = \"127.0.0.1:0\"\n[delivery]\nstuck_after = \"1s\"\n";
    std::fs::write(&file, text).unwrap();
    let config = Config::load(&file).unwrap();
    // More threads than one, so that one that is blocked does not take the others along.
    let runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = { runtime }.worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let running = Box::pin(app::start(config, Grants::default(), shutdown)).await.unwrap();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let console = running.console;
        let ask = async |path: &str| {
            let answer = client.get(format!("http://{console}{path}")).send().await.unwrap();
            let (status, body) = (answer.status().as_u16(), answer.text().await.unwrap());
            (status, body)
        };
        let (status, body) = ask("/healthz").await;
        println!("told: /healthz {status} {body}");
        super::fault::set(how);
        loop {
            let (status, body) = ask("/healthz").await;
            if status == 200 {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
            println!("told: /healthz {status} {body}");
            let (status, body) = ask("/readyz").await;
            println!("told: /readyz {status} {body}");
            let (_, scrape) = ask("/metrics").await;
            scrape.lines().for_each(|line| println!("told: {line}"));
            std::future::pending::<()>().await;
        }
    });
}
