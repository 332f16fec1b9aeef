//! The server's clock, which goes back and jumps ahead.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::postgres::Cluster;
use crate::support::s2::Server;
use crate::support::world::World;

/// Compiles what moves the clock of whoever loads it, and returns where it is.
fn compile(dir: &Path) -> String {
    let library = dir.join("clock.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/clock.c");
    let mut cc = Command::new("cc");
    let status = cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
    assert!(status.expect("there is a C compiler where Rust links programs").success());
    library.to_str().unwrap().to_owned()
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn order_does_not_rest_on_the_servers_clock() {
    let dir = tempfile::tempdir().unwrap();
    // The server is another user.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let clock = dir.path().join("clock");
    let set_clock = |seconds: i64| {
        let new = clock.with_extension("new");
        fs::write(&new, seconds.to_string()).unwrap();
        fs::rename(new, &clock).unwrap();
    };
    set_clock(0);
    let library = compile(dir.path());
    let env = [("LD_PRELOAD", library.as_str()), ("CLOCK_FILE", clock.to_str().unwrap())];
    let cluster = Cluster::start_in(&[], &env).await;
    let database = cluster.database("clock").await;
    let world = World::of(database, Server::in_memory().await, TABLES, &["public.items"]).await;
    let mut running = world.start().ready().await;
    let work = Workload::new(world.database.url(), 2).start();
    for seconds in [-3_600, 7_200, -86_400, 5] {
        set_clock(seconds);
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
