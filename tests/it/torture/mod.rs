//! The torture run: real Postgres, the real s2-lite on disk and Sluicebox as processes of their own,
//! writers with a ledger, a relay between each pair, and faults drawn from a seed. Then everything is
//! healed and drained, and the whole stream is judged: every committed change once, none that was
//! rolled back, each group in its order, and the stream, folded, equals the tables.
//!
//! `make torture ARGS='--seed N --minutes M'` runs it for long; without that, as in `make test`, it
//! is a few rounds from a fixed seed. The seed fixes what is done and in which order, not how the
//! processes interleave: a seed that fails once may have to be run again.

mod faults;

use std::time::{Duration, Instant};

use self::faults::{Fault, Stage, Tally};
use crate::support::Random;
use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::postgres::Cluster;
use crate::support::proxy::Relay;
use crate::support::s2::Server;
use crate::support::world::World;

/// How long to go on.
#[derive(Clone, Copy, Debug)]
enum Length {
    Rounds(u32),
    For(Duration),
}

/// What `SLUICEBOX_TORTURE` asks for; without it, the short form.
fn asked() -> (u64, Length) {
    let Ok(text) = std::env::var("SLUICEBOX_TORTURE") else { return (1, Length::Rounds(10)) };
    let mut seed = None;
    let mut minutes = 10;
    let mut words = text.split_whitespace();
    while let Some(word) = words.next() {
        let number = words.next().and_then(|number| number.parse().ok());
        match (word, number) {
            ("--seed", Some(number)) => seed = Some(number),
            ("--minutes", Some(number)) => minutes = number,
            _ => panic!("`{word}`: use --seed N and --minutes M"),
        }
    }
    (seed.unwrap_or_else(Random::seed), Length::For(Duration::from_secs(minutes * 60)))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_happens_to_processes_and_wires_loses_doubles_or_reorders_a_change() {
    let (seed, length) = asked();
    println!("torture: --seed {seed}, {length:?}");
    let cluster = Cluster::start(&[("wal_sender_timeout", "6s")]).await;
    let database = cluster.database("torture").await;
    let dir = tempfile::tempdir().unwrap();
    let s2 = Server::on_disk(dir.path()).await;
    let tables = ["public.items", "public.pairs", "public.bag", "public.pad"];
    let mut world = World::of(database, s2, TABLES, &tables).await;
    let to_postgres = Relay::to(cluster.port()).await;
    let to_s2 = Relay::to(world.s2.port()).await;
    let (direct, relayed) = (format!(":{}/", cluster.port()), format!(":{}/", to_postgres.port()));
    world.home.settings.url = world.home.settings.url.replace(&direct, &relayed);
    world.home.settings.endpoint = to_s2.endpoint();
    world.home.settings.sections =
        "[delivery]\nretry_min = \"100ms\"\nretry_max = \"2s\"".to_owned();
    world.home.write_config();

    let running = world.start().ready().await;
    let load = Workload {
        seed,
        oversize_one_in: 40,
        more_tables: true,
        ..Workload::new(world.database.url(), 3)
    };
    let work = load.start();
    let begun = Instant::now();
    let mut random = Random::new(seed);
    let mut stage = Stage::new(&world, &cluster, &to_postgres, &to_s2, running);
    let mut tally = Tally::default();
    let mut rounds = 0;
    while match length {
        Length::Rounds(count) => rounds < count,
        Length::For(time) => begun.elapsed() < time,
    } {
        rounds += 1;
        let fault = Fault::draw(&mut random);
        // Now and then a second one, while the first is still there.
        let second = random.one_in(3).then(|| Fault::draw(&mut random));
        for fault in [Some(fault), second].into_iter().flatten() {
            tally.count(fault);
            stage.provoke(fault).await;
            tokio::time::sleep(Duration::from_millis(random.below(900))).await;
        }
        tokio::time::sleep(Duration::from_millis(random.below(1_500))).await;
        stage.heal().await;
        // Mostly the next fault meets a pipeline that has not recovered yet.
        if random.one_in(4) {
            work.commits(random.below(60)).await;
        }
    }
    work.stop().await;

    let running = stage.healed().await;
    let parked = world.messages(Some("failed")).await.len();
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    world.until_confirmed().await;
    world.until_no_messages().await;
    judge(&world, Order::PerRow).await;
    let verdict = world.ok(&["verify"]).await;
    let records = world.records().await.len();
    running.stop().await;
    println!(
        "torture: {rounds} rounds in {} s, {records} records, {parked} parked at the end; {tally}\n\
         {verdict}\ntorture: --seed {seed} holds",
        begun.elapsed().as_secs()
    );
}
