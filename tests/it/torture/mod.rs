//! The torture run: real Postgres, the real s2-lite on disk and Sluicebox as processes of their own,
//! writers with a ledger, a relay between each pair, a proxy in front of S2, a small disk under the
//! state folder, and faults drawn from a seed. Transforms route part of the changes to other streams, a
//! row's own changes to one after the other; with every third seed there are none, and all is in one
//! stream. Then everything is healed and drained, and all streams are
//! judged: every committed change once in all of them, none that was rolled back or given up, each group
//! in its order in each, and the streams, folded, equal the tables. With every other seed attempts have
//! an end: what has spent them is a dead letter, once, and is in no stream.
//!
//! `make torture ARGS='--seed N --minutes M'` runs it for long; without that, as in `make test`, every
//! kind of fault comes once, in an order that is always the same. The seed fixes what is done and in
//! which order, how the writers write and how far S2 is away, but not how the processes interleave: a seed
//! that fails once may have to be run again.

mod bursts;
mod faults;
mod operator;

use std::time::{Duration, Instant};

use serde_json::Value;

use self::bursts::{Bursts, MANY, MORE_TABLES};
use self::faults::{DISK_SIZE, Deck, Fault, Healed, Stage, Surroundings};
use self::operator::{Chain, LANES, Operator};
use crate::support::Random;
use crate::support::disk::SmallDisk;
use crate::support::oracle::{
    GivenUp, TABLES, Workload, check_records, judge_streams_without, whole,
};
use crate::support::postgres::Cluster;
use crate::support::proxy::{Front, Relay, Wire};
use crate::support::s2::{Record, Server, data};
use crate::support::sluicebox::Home;
use crate::support::world::{BASIN, World};

/// How long to go on.
#[derive(Clone, Copy, Debug)]
enum Length {
    /// Until each fault has come.
    OfEach,
    For(Duration),
}

/// What `SLUICEBOX_TORTURE` asks for; without it, the short form.
fn asked() -> (u64, Length) {
    let Ok(text) = std::env::var("SLUICEBOX_TORTURE") else { return (1, Length::OfEach) };
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

/// How the writers write, and how far S2 is away: another way with each seed, except in the short form; as
/// much as gets through in the time, and as the disk holds.
fn shape(seed: u64, length: Length, url: String) -> (Workload, Wire) {
    let usual = Workload { seed, oversize_one_in: 40, more_tables: true, ..Workload::new(url, 3) };
    if let Length::OfEach = length {
        return (usual, Wire::Pass);
    }
    let mut random = Random::new(seed ^ 0x5ead);
    let mut one_of = |values: [u64; 4]| values[random.index(values.len())];
    let writers = one_of([1, 3, 3, 8]);
    let operations = one_of([1, 4, 4, 50]);
    // Of what the usual writers do.
    let speed = one_of([1, 1, 2, 4]);
    let load = Workload {
        writers,
        operations,
        pause: Duration::from_millis(writers * operations / 3 / speed),
        rows: one_of([4, 40, 40, 400]),
        oversize_one_in: one_of([10, 40, 40, 200]) * speed,
        more_tables: one_of([0, 1, 1, 1]) == 1,
        ..usual
    };
    (load, if one_of([0, 1, 1, 1]) == 1 { Wire::Pass } else { Wire::Delay })
}

/// How often a fault that found nothing to be done to is tried again.
const RETURNS_MAX: u32 = 100;

const SECTIONS: &str = "[delivery]
retry_min = \"100ms\"
retry_max = \"2s\"
spill_after = \"1s\"
";

/// After [`SECTIONS`], for whoever wants an end of attempts.
const DEAD_LETTERS: &str = "max_attempts = 3
[dead_letters]
stream = \"dead\"
";

const GROUPS: &str = "[delivery.group_by]
\"public.orders\" = [\"customer\"]";

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_happens_to_processes_and_wires_loses_doubles_or_reorders_a_change() {
    let (seed, length) = asked();
    println!("torture: --seed {seed}, {length:?}");
    let cluster = Cluster::start(&[("wal_sender_timeout", "6s")]).await;
    let database = cluster.database("torture").await;
    let dir = tempfile::tempdir().unwrap();
    let s2 = Server::on_disk(dir.path()).await;
    let tables = ["items", "pairs", "bag", "pad", "orders", "shapes", "nothing", "swaps"];
    let many = (0..MANY).map(|number| format!("many_{number}"));
    let tables: Vec<_> = tables.into_iter().map(str::to_owned).chain(many).collect();
    let tables: Vec<_> = tables.iter().map(|table| format!("public.{table}")).collect();
    let names: Vec<_> = tables.iter().map(String::as_str).collect();
    let sql = format!("{TABLES}{LANES}{MORE_TABLES}");
    let mut world = World::of(database, s2, &sql, &names).await;
    let to_postgres = Relay::to(cluster.port()).await;
    let front = Front::of(&world.s2).await;
    let to_s2 = Relay::to(front.port()).await;
    let (direct, relayed) = (format!(":{}/", cluster.port()), format!(":{}/", to_postgres.port()));
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let settings = &mut world.home.settings;
    settings.url = settings.url.replace(&direct, &relayed);
    settings.endpoint = to_s2.endpoint();
    let has_dead_letters = seed.is_multiple_of(2);
    let letters = if has_dead_letters { DEAD_LETTERS } else { "" };
    settings.sections = format!("{SECTIONS}{letters}{GROUPS}");
    settings.sink = "create = true".to_owned();
    settings.state = state.to_str().unwrap().to_owned();
    world.home.write_config();
    let disk = SmallDisk::mount(&state, DISK_SIZE);
    let has_disk = disk.is_some();
    if !has_disk {
        println!("torture: only root may mount a small disk; it is never full here");
    }
    let mut settings = world.home.settings.clone();
    settings.transforms = world.transforms().to_str().unwrap().to_owned();
    let second = Home::new(settings);
    let _keeper = Keeper { seed, homes: [&world.home, &second] };
    let operator = Operator::new(&world.home, !seed.is_multiple_of(3)).await;

    let running = world.start().ready().await;
    let (load, usual_to_s2) = shape(seed, length, world.database.url());
    println!(
        "torture: {} writers of {} rows each, {} operations, {:?}, one in {} too large, more tables: {}; \
         wire to S2: {usual_to_s2:?}",
        load.writers,
        load.rows,
        load.operations,
        load.pause,
        load.oversize_one_in,
        load.more_tables
    );
    to_s2.set(usual_to_s2);
    let work = load.start();
    let begun = Instant::now();
    let mut random = Random::new(seed);
    let mut deck = Deck::new(Random::new(random.next()));
    let bursts = Bursts::new(world.database.url());
    let around = Surroundings {
        homes: [&world.home, &second],
        s2: &world.s2,
        cluster: &cluster,
        to_postgres: &to_postgres,
        to_s2: &to_s2,
        usual_to_s2,
        front: &front,
        disk,
    };
    let mut stage = Stage::new(around, operator, bursts, running);
    // Without root there is no disk that could be full.
    let may_be_done = |fault| fault != Fault::FullDisk || has_disk;
    let (mut rounds, mut returns) = (0, 0);
    while match length {
        Length::OfEach => !deck.is_through(),
        Length::For(time) => begun.elapsed() < time,
    } {
        rounds += 1;
        let mut put_back = Vec::new();
        for fault in deck.round() {
            if !stage.provoke(fault).await && returns < RETURNS_MAX && may_be_done(fault) {
                returns += 1;
                deck.put_back(fault);
                put_back.push(fault);
            }
            tokio::time::sleep(Duration::from_millis(random.below(600))).await;
        }
        tokio::time::sleep(Duration::from_millis(random.below(1_000))).await;
        stage.heal().await;
        for fault in put_back {
            stage.make_possible(fault).await;
        }
        // Mostly the next fault meets a pipeline that has not recovered yet.
        if random.one_in(4) {
            work.commits(random.below(60)).await;
        }
    }
    work.stop().await;

    let Healed { running, mut operator, tally, disk: _disk } = stage.healed().await;
    let parked = world.messages(Some("failed")).await.len();
    operator.change_chain(&world.home, Chain::Empty);
    operator.change_chain(&world.home, Chain::Strips);
    world.until_confirmed().await;
    // What is spilled is confirmed, and neither a message nor in a stream.
    world.until_nothing_is_spilled().await;
    world.until_no_messages().await;
    let mut streams = world.s2.streams(BASIN).await;
    let dead = if has_dead_letters { dead_letters(&world).await } else { Vec::new() };
    let in_ledger = dead.iter().filter_map(operation);
    operator.given_up.extend(in_ledger.map(|op| (op, GivenUp::Surely)));
    streams.retain(|stream| stream != DEAD);
    let names: Vec<&str> = streams.iter().map(String::as_str).collect();
    let counts = judge_streams_without(&world, &names, &operator.given_up).await;
    let [records, in_parts] = counts.into_iter().fold([0, 0], |[records, in_parts], stream| {
        [records + stream.records, in_parts + stream.in_parts]
    });
    // The module that drops is not in the chain any more, which verify would try.
    let older: &[&str] = if operator.has_dropped { &["--allow-older"] } else { &[] };
    let verdict = world.ok(&[&["verify"], older].concat()).await;
    for stream in &streams {
        assert!(
            verdict.contains(&format!("stream `{stream}`")),
            "{stream} was not read: {verdict}"
        );
    }
    running.stop().await;
    if let Length::OfEach = length {
        let never = tally.never();
        assert!(never.iter().all(|kind| *kind == "FullDisk" && !has_disk), "{never:?}");
    }
    println!(
        "torture: {rounds} rounds in {} s, {records} records in {} streams, {in_parts} of them parts, \
         {parked} parked at the end, \
         {} given up, {} dead letters; \
         {tally}\n{verdict}\ntorture: --seed {seed} holds",
        begun.elapsed().as_secs(),
        streams.len(),
        operator.given_up.len(),
        dead.len(),
    );
}

/// The stream of dead letters.
const DEAD: &str = "dead";

/// All dead letters, each of which is there once.
async fn dead_letters(world: &World<'_>) -> Vec<Value> {
    if world.s2.tail(BASIN, DEAD).await.is_err() {
        return Vec::new();
    }
    let records = world.s2.read(BASIN, DEAD).await;
    let records = data(&records);
    check_records(&records);
    whole(&records).iter().map(Record::json).collect()
}

/// The operation in the ledger of a row of `items`.
fn operation(letter: &Value) -> Option<u64> {
    let change = &letter["change"];
    let table = change["table"]["name"].as_str().expect("a change has a table");
    let op = change["new"]["op"].as_str().filter(|_| table == "items")?;
    Some(op.parse().expect("an op is a number"))
}

/// Keeps what the processes have printed, for whoever looks for the cause of a failure.
struct Keeper<'a> {
    seed: u64,
    homes: [&'a Home; 2],
}

impl Drop for Keeper<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (number, home) in self.homes.iter().enumerate() {
                let name = format!("torture-{}-{number}.log", self.seed);
                let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
                println!("torture: what was printed is kept in {}", path.display());
                drop(std::fs::write(path, home.log()));
            }
        }
    }
}
