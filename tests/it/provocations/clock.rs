//! The clocks of the server and of the pipeline, which go back and jump ahead.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use jiff::Timestamp;
use tempfile::TempDir;

use crate::support::guest;
use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Fault, Front};
use crate::support::s2::Server;
use crate::support::until;
use crate::support::world::World;

/// Another clock for whoever is started with its environment.
struct Clock {
    dir: TempDir,
    library: String,
}

impl Clock {
    /// Compiles what moves it.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The server is another user.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let library = dir.path().join("clock.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clock.c");
        let mut cc = Command::new("cc");
        let status = cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
        assert!(status.expect("there is a C compiler where Rust links programs").success());
        let clock = Self { library: library.to_str().unwrap().to_owned(), dir };
        clock.set(0);
        clock
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("clock")
    }

    /// How far it is ahead of the machine's.
    fn set(&self, seconds: i64) {
        let new = self.path().with_extension("new");
        fs::write(&new, seconds.to_string()).unwrap();
        fs::rename(new, self.path()).unwrap();
    }

    fn environment(&self) -> [(&'static str, String); 2] {
        let path = self.path().to_str().unwrap().to_owned();
        [("LD_PRELOAD", self.library.clone()), ("CLOCK_FILE", path)]
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn order_does_not_rest_on_the_servers_clock() {
    let clock = Clock::new();
    let environment = clock.environment();
    let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
    let cluster = Cluster::start_in(&[], &environment).await;
    let database = cluster.database("clock").await;
    let world = World::of(database, Server::in_memory().await, TABLES, &["public.items"]).await;
    let mut running = world.start().ready().await;
    let work = Workload::new(world.database.url(), 2).start();
    for seconds in [-3_600, 7_200, -86_400, 5] {
        clock.set(seconds);
        let now = "select abs(extract(epoch from clock_timestamp())::bigint)";
        let now: i64 = world.database.value(now).await.unwrap().parse().unwrap();
        let here = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed();
        assert!((now - here - seconds).abs() < 60, "the server's clock is moved");
        work.commits(60).await;
        running.assert_alive();
    }
    work.stop().await;
    let running = running.ready().await;
    judge(&world, Order::Whole).await;
    world.ok(&["verify"]).await;
    let records = world.records().await;
    let times: Vec<String> = records
        .iter()
        .map(|record| record.json()["metadata"]["commit_timestamp"].as_str().unwrap().to_owned())
        .collect();
    let day = |time: &String| time[.."0000-00-00".len()].to_owned();
    assert!(times.windows(2).any(|pair| day(&pair[1]) < day(&pair[0])), "it did go back");
    running.stop().await;
}

/// What is to be tried again, spilled, noticed or given time waits by a clock that nobody sets; and what
/// the store says is due tomorrow, because it was written before the clock went back, is not waited for.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_waits_for_the_pipelines_own_clock() {
    let clock = Clock::new();
    let environment = clock.environment().map(|(name, value)| format!("{name}={value}"));
    let environment = environment.each_ref().map(String::as_str);
    let mut world = World::new("own_clock", TABLES, &["public.items"]).await;
    let front = Front::of(&world.s2).await;
    world.home.settings.endpoint = front.endpoint();
    world.home.settings.sections =
        "[delivery]\nretry_min = \"100ms\"\nretry_max = \"2s\"\nspill_after = \"1s\"\n".to_owned();
    world.home.write_config();
    world.drop_in_settings("50-trap.wasm", "on_error = \"park\"\n");
    world.drop_in("50-trap.wasm", &guest::chaos());
    let mut running = world.start_by("env", &environment).ready().await;
    let work = Workload::new(world.database.url(), 2).start();
    // Beyond the rows of the workload.
    let row = 1_000_000_000_000_u64;
    world
        .sql(&format!(
            "insert into items values ({row}, {row}, 'trap r0wv4lue', 'b'); \
             insert into ledger (op, id, action) values ({row}, {row}, 'insert')"
        ))
        .await;
    let tried_again = async || {
        let attempts = async || {
            let failed = world.until_messages("failed", 1).await;
            failed[0]["attempts"].as_u64().expect("it was tried")
        };
        let before = attempts().await;
        until("the message to be tried again", async || {
            let now = attempts().await;
            if now > before + 1 { Ok(()) } else { Err(format!("{now} attempts, {before} before")) }
        })
        .await;
        world.until_messages("failed", 1).await.remove(0)
    };
    tried_again().await;
    let mut hours = 0;
    for jump in [6, -30, 2, 48, -24] {
        work.commits(60).await;
        // In the middle of an outage, which is noticed, spilled, and healed.
        front.set(Fault::status(503, "unavailable"));
        running.unready("sink_503").await;
        hours += jump;
        clock.set(hours * 3_600);
        running.until_spilled().await;
        work.commits(30).await;
        front.set(Fault::None);
        running = running.ready().await;
        let message = tried_again().await;
        let due: Timestamp = message["next_attempt_at"].as_str().unwrap().parse().unwrap();
        let ahead = due.as_second() - Timestamp::now().as_second();
        assert!((ahead - hours * 3_600).abs() < 600, "its clock is moved: {ahead} s, {hours} h");
        // Between two runs.
        running.kill().await;
        hours -= jump;
        clock.set(hours * 3_600);
        running = world.start_by("env", &environment).ready().await;
        tried_again().await;
        let text = world.status().await.unwrap()["stuck"].to_string();
        assert_eq!(text, "[]", "nothing is stuck");
        hours += jump;
        clock.set(hours * 3_600);
    }
    work.stop().await;
    for kind in ["wasm", "toml"] {
        fs::remove_file(world.transforms().join(format!("50-trap.{kind}"))).unwrap();
    }
    world.until_no_messages().await;
    judge(&world, Order::PerRow).await;
    running.stop().await;
}
