//! What can be done to the three processes, to the wires between them, to the disk and by an operator,
//! and how it is healed.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use super::bursts::{Burst, Bursts};
use super::operator::{Chain, Operator};
use crate::support::disk::SmallDisk;
use crate::support::oracle::GivenUp;
use crate::support::postgres::Cluster;
use crate::support::proxy::{self, Front, Relay, Wire};
use crate::support::s2::Server;
use crate::support::sluicebox::{Home, Running};
use crate::support::{Random, signal, until};
use sluicebox::throwaway::Shutdown;

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    KillSluicebox,
    FreezeSluicebox,
    StopSluicebox,
    /// A second process takes over from the first, which is frozen and wakes up later.
    TakeOver,
    KillS2,
    FreezeS2,
    /// For so long that changes are spilled.
    S2IsAway,
    /// Every request is answered with this status by something in front of S2.
    S2Answers(u16),
    /// The same, for one of the streams alone.
    OneStreamAnswers(u16),
    /// Something in front of S2 refuses bodies that S2 would take.
    S2RefusesLarge,
    /// As the server's own kernel would: all of it at once, and it recovers from its log.
    CrashPostgres,
    RestartPostgres,
    /// One process of the server: it ends all the others and recovers by itself.
    KillBackend,
    FreezePostgres,
    /// The process that sends us changes, and no other.
    FreezeWalsender,
    /// As an administrator does who sees that process in the way.
    EndWalsender,
    /// Another process with the same state, which is turned away.
    SecondProcess,
    PostgresWire(Wire),
    S2Wire(Wire),
    /// The one that holds the state folder.
    FullDisk,
    Chain(Chain),
    Retry,
    Acknowledge,
    Work(Burst),
}

/// What S2, or a proxy in front of it, may answer without having taken anything.
const ANSWERS: [(u16, &str); 9] = [
    (401, "authn"),
    (403, "permission_denied"),
    (404, "stream_not_found"),
    (408, "request_timeout"),
    (409, "transaction_conflict"),
    (429, "rate_limited"),
    (500, "other"),
    (503, "unavailable"),
    (504, "upstream_timeout"),
];

fn code_of(status: u16) -> &'static str {
    let (_, code) = ANSWERS.iter().find(|(known, _)| *known == status).unwrap();
    code
}

impl Fault {
    /// Needs everything else to be well.
    pub fn stands_alone(self) -> bool {
        matches!(self, Self::TakeOver | Self::S2IsAway)
    }
}

/// All kinds in an order that the seed gives; each comes before any comes again, the usual ones more
/// often.
#[derive(Debug)]
pub struct Deck {
    random: Random,
    cards: Vec<Fault>,
}

impl Deck {
    pub fn new(random: Random) -> Self {
        let mut deck = Self { random, cards: Vec::new() };
        deck.shuffle();
        deck
    }

    fn shuffle(&mut self) {
        let mut answer = || ANSWERS[self.random.index(ANSWERS.len())].0;
        let answers = [
            Fault::S2Answers(answer()),
            Fault::S2Answers(answer()),
            Fault::OneStreamAnswers(answer()),
            Fault::OneStreamAnswers(answer()),
        ];
        self.cards = vec![
            Fault::KillSluicebox,
            Fault::KillSluicebox,
            Fault::KillSluicebox,
            Fault::FreezeSluicebox,
            Fault::StopSluicebox,
            Fault::TakeOver,
            Fault::KillS2,
            Fault::KillS2,
            Fault::FreezeS2,
            Fault::S2IsAway,
            Fault::S2RefusesLarge,
            Fault::CrashPostgres,
            Fault::RestartPostgres,
            Fault::KillBackend,
            Fault::FreezePostgres,
            Fault::FreezeWalsender,
            Fault::EndWalsender,
            Fault::SecondProcess,
            Fault::FullDisk,
            Fault::Retry,
            Fault::Retry,
            Fault::Acknowledge,
            Fault::Acknowledge,
        ];
        self.cards.extend(answers);
        self.cards.extend(Wire::FAULTS.map(Fault::PostgresWire));
        self.cards.extend(Wire::FAULTS.map(Fault::S2Wire));
        self.cards.extend(Chain::ALL.map(Fault::Chain));
        self.cards.extend(Burst::ALL.map(Fault::Work));
        // A message of many batches takes both, and a while.
        self.cards.extend([Fault::Work(Burst::LargeRows), Fault::Chain(Chain::Splits)]);
        for last in (1..self.cards.len()).rev() {
            let other = self.random.index(last + 1);
            self.cards.swap(last, other);
        }
    }

    /// It could not be done: it comes first in the next round, which finds everything well.
    pub fn put_back(&mut self, fault: Fault) {
        self.cards.push(fault);
    }

    /// Whether every card was drawn.
    pub fn is_through(&self) -> bool {
        self.cards.is_empty()
    }

    /// What happens in the next round, one after the other.
    pub fn round(&mut self) -> Vec<Fault> {
        if self.cards.is_empty() {
            self.shuffle();
        }
        let mut round = Vec::new();
        let size = 1 + self.random.index(4);
        while round.len() < size {
            match self.cards.last() {
                Some(next) if next.stands_alone() && !round.is_empty() => break,
                Some(_) => round.extend(self.cards.pop()),
                None => break,
            }
        }
        round
    }
}

/// How often each fault was provoked, and what was in its way when it was not.
#[derive(Debug, Default)]
pub struct Tally {
    done: BTreeMap<String, u32>,
    left_out: BTreeMap<String, u32>,
}

impl Tally {
    fn count(&mut self, fault: Fault, done: bool) {
        let kinds = if done { &mut self.done } else { &mut self.left_out };
        *kinds.entry(format!("{fault:?}")).or_default() += 1;
    }

    /// The kinds that could never be provoked.
    pub fn never(&self) -> Vec<&str> {
        let never = self.left_out.keys().filter(|kind| !self.done.contains_key(*kind));
        never.map(String::as_str).collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<_> =
            self.done.iter().map(|(fault, count)| format!("{fault} {count}")).collect();
        f.write_str(&kinds.join(", "))?;
        match self.never().as_slice() {
            [] => f.write_str("; no kind was left out"),
            never => write!(f, "; left out: {}", never.join(", ")),
        }
    }
}

/// What faults are done to, beside Sluicebox itself.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// Two folders with a configuration for the same pipeline and the same state.
    pub homes: [&'a Home; 2],
    pub s2: &'a Server,
    pub cluster: &'a Cluster,
    pub to_postgres: &'a Relay,
    pub to_s2: &'a Relay,
    /// How that is while nothing is wrong.
    pub usual_to_s2: Wire,
    pub front: &'a Front,
    pub disk: Option<SmallDisk>,
}

/// Everything that faults are done to.
pub struct Stage<'a> {
    around: Surroundings<'a>,
    pub operator: Operator,
    pub bursts: Bursts,
    pub tally: Tally,
    /// Nothing after it was killed.
    running: Option<Running<'a>>,
    /// Of which home.
    here: usize,
    /// Processes that were taken over from.
    zombies: Vec<Running<'a>>,
    /// Something fails soon that can be given up.
    failure_is_due: bool,
    s2_is_down: bool,
    postgres_is_down: bool,
    disk_is_full: bool,
    frozen: Vec<u32>,
}

impl<'a> Stage<'a> {
    pub fn new(
        around: Surroundings<'a>,
        operator: Operator,
        bursts: Bursts,
        running: Running<'a>,
    ) -> Self {
        Self {
            around,
            operator,
            bursts,
            tally: Tally::default(),
            running: Some(running),
            here: 0,
            zombies: Vec::new(),
            failure_is_due: false,
            s2_is_down: false,
            postgres_is_down: false,
            disk_is_full: false,
            frozen: Vec::new(),
        }
    }

    fn home(&self) -> &'a Home {
        self.around.homes[self.here]
    }

    /// Does it, unless what it would be done to is gone already; says whether.
    pub async fn provoke(&mut self, fault: Fault) -> bool {
        println!("torture: {fault:?}");
        let done = match fault {
            Fault::KillSluicebox => match self.running.take() {
                Some(running) => {
                    running.kill().await;
                    true
                }
                None => false,
            },
            Fault::FreezeSluicebox => match &self.running {
                Some(running) => {
                    let pid = running.pid();
                    self.freeze(vec![pid])
                }
                None => false,
            },
            // It has to drain, or to end without: a frozen one cannot.
            Fault::StopSluicebox if self.frozen.is_empty() => match self.running.take() {
                Some(running) => {
                    running.signal("TERM");
                    let status = running.ended().await;
                    // One that has only just begun ends by the signal.
                    let ended = status.code() == Some(0) || status.signal() == Some(15);
                    assert!(ended, "`sluicebox run` after SIGTERM: {status}");
                    true
                }
                None => false,
            },
            Fault::StopSluicebox => false,
            Fault::TakeOver => self.take_over().await,
            Fault::KillS2 => self.kill_s2().await,
            Fault::FreezeS2 => self.freeze(self.around.s2.pid().into_iter().collect()),
            Fault::S2IsAway => self.leave_without_s2().await,
            Fault::S2Answers(status) => {
                self.around.front.set(proxy::Fault::status(status, code_of(status)));
                true
            }
            Fault::OneStreamAnswers(status) => {
                let code = code_of(status);
                self.around.front.set(proxy::Fault::OfStream { stream: "cdc/left", status, code });
                true
            }
            Fault::S2RefusesLarge => {
                self.around.front.set(proxy::Fault::BodiesOver { bytes: 20_000 });
                true
            }
            // A frozen server does not stop.
            Fault::CrashPostgres | Fault::RestartPostgres if self.frozen.is_empty() => {
                let is_crash = fault == Fault::CrashPostgres;
                let shutdown = if is_crash { Shutdown::Immediate } else { Shutdown::Fast };
                let was_up = !std::mem::replace(&mut self.postgres_is_down, true);
                if was_up {
                    self.around.cluster.down(shutdown).await;
                }
                was_up
            }
            Fault::CrashPostgres | Fault::RestartPostgres => false,
            Fault::KillBackend if self.frozen.is_empty() => {
                let pids = self.around.cluster.pids().await;
                let youngest = pids.get(1..).and_then(<[u32]>::last).copied();
                signal("KILL", youngest.as_slice());
                youngest.is_some()
            }
            Fault::KillBackend => false,
            Fault::FreezePostgres => {
                let pids = self.around.cluster.pids().await;
                self.freeze(pids)
            }
            Fault::FreezeWalsender => {
                let pids = self.around.cluster.walsenders().await;
                self.freeze(pids)
            }
            Fault::EndWalsender => {
                let pids = self.around.cluster.walsenders().await;
                signal("TERM", &pids);
                !pids.is_empty()
            }
            Fault::SecondProcess => self.turn_away_a_second().await,
            Fault::PostgresWire(wire) => {
                self.around.to_postgres.set(wire);
                true
            }
            Fault::S2Wire(wire) => {
                self.around.to_s2.set(wire);
                true
            }
            Fault::FullDisk => match &self.around.disk {
                Some(disk) => {
                    disk.fill();
                    self.disk_is_full = true;
                    true
                }
                None => false,
            },
            Fault::Chain(chain) => {
                self.operator.change_chain(self.home(), chain);
                true
            }
            Fault::Retry => self.operator.retry(self.home()).await,
            Fault::Acknowledge if std::mem::take(&mut self.failure_is_due) => {
                self.operator.acknowledge_within(self.home(), FAILURE_TIME).await
            }
            Fault::Acknowledge => self.operator.acknowledge(self.home()).await,
            Fault::Work(burst) => {
                self.bursts.begin(burst);
                true
            }
        };
        self.tally.count(fault, done);
        done
    }

    fn freeze(&mut self, pids: Vec<u32>) -> bool {
        signal("STOP", &pids);
        let any = !pids.is_empty();
        self.frozen.extend(pids);
        any
    }

    /// As long as the first one is there, frozen or not, and has the folder: of two that have only just
    /// begun, either may be the first.
    async fn turn_away_a_second(&mut self) -> bool {
        let Some(running) = &mut self.running else { return false };
        // One that was taken over from still listens where the second would.
        if running.has_ended() || !running.has_the_state() || !self.zombies.is_empty() {
            return false;
        }
        let home = self.around.homes[1 - self.here];
        let before = home.log().len();
        let status = home.start().ended().await;
        let log = home.log()[before..].to_owned();
        assert_eq!(status.code(), Some(1), "{log}");
        // A disk that is full may leave no room for finding out.
        assert!(log.contains("in use by another sluicebox") || self.disk_is_full, "{log}");
        true
    }

    async fn kill_s2(&mut self) -> bool {
        let was_up = !std::mem::replace(&mut self.s2_is_down, true);
        if was_up {
            self.around.s2.kill().await;
        }
        was_up
    }

    async fn leave_without_s2(&mut self) -> bool {
        self.kill_s2().await;
        let home = self.home();
        let running = self.running.as_mut().expect("it was healed");
        until("changes to be spilled", async || {
            running.assert_alive();
            let status = home.status().await?;
            if status["spilled_changes"].as_u64() > Some(0) {
                Ok(())
            } else {
                Err(status.to_string())
            }
        })
        .await;
        true
    }

    /// The second one begins while the first one stands still, which happens in the middle of a write
    /// now and then: then nobody gets in, and the first one goes on.
    async fn take_over(&mut self) -> bool {
        let first = self.running.take().expect("it was healed");
        // Nothing is taken from one that has only just begun.
        if !first.has_the_state() {
            self.running = Some(first);
            return false;
        }
        let there = 1 - self.here;
        match self.around.homes[there].try_take_over_from(&first).await {
            Some(second) => {
                self.frozen.push(first.pid());
                self.zombies.push(first);
                self.running = Some(second);
                self.here = there;
                true
            }
            None => {
                self.running = Some(first);
                false
            }
        }
    }

    /// Undoes everything, and waits for nothing but the servers' own start.
    pub async fn heal(&mut self) {
        if let (true, Some(disk)) = (std::mem::take(&mut self.disk_is_full), &self.around.disk) {
            disk.resize(DISK_SIZE);
        }
        signal("CONT", &std::mem::take(&mut self.frozen));
        self.around.to_postgres.set(Wire::Pass);
        self.around.to_s2.set(self.around.usual_to_s2);
        self.around.front.set(proxy::Fault::None);
        if std::mem::take(&mut self.s2_is_down) {
            self.around.s2.up().await;
        }
        if std::mem::take(&mut self.postgres_is_down) {
            self.around.cluster.up().await;
        }
        match &mut self.running {
            Some(running) => running.assert_alive(),
            None => {
                self.zombies_ended().await;
                self.running = Some(self.home().start());
            }
        }
    }

    /// Sees to it that a fault that found nothing to be done to finds it in the next round, where all is
    /// well when it comes.
    pub async fn make_possible(&mut self, fault: Fault) {
        // One that was taken over from keeps a second process from the folder.
        self.zombies_ended().await;
        if fault == Fault::Acknowledge {
            self.operator.change_chain(self.home(), Chain::Empty);
            self.bursts.begin(Burst::LargeRows);
            self.failure_is_due = true;
        }
    }

    /// Waits until those that were taken over from have found out, which they do when they have anything
    /// to write. Until then they keep the folder from others.
    pub async fn zombies_ended(&mut self) {
        for mut zombie in std::mem::take(&mut self.zombies) {
            until("a process that was taken over from to end", async || {
                if zombie.has_ended() { Ok(()) } else { Err("it runs".to_owned()) }
            })
            .await;
            assert_eq!(zombie.ended().await.code(), Some(1), "of one that was taken over from");
        }
    }

    /// Heals, waits until everything works again, in the first of the homes, and until whoever was
    /// taken over from has found out.
    pub async fn healed(mut self) -> Healed<'a> {
        self.around.usual_to_s2 = Wire::Pass;
        self.heal().await;
        self.zombies_ended().await;
        let failing = self.bursts.ended().await;
        let mut running = self.running.take().expect("it was just started").ready().await;
        if self.here != 0 {
            running.stop().await;
            running = self.around.homes[0].start().ready().await;
        }
        let Self { mut operator, tally, around, .. } = self;
        if operator.has_dropped {
            let perhaps = failing.into_iter().map(|op| (op, GivenUp::Perhaps));
            operator.given_up.extend(perhaps);
        }
        Healed { running, operator, tally, disk: around.disk }
    }
}

/// What is left when nothing is wrong any more.
pub struct Healed<'a> {
    pub running: Running<'a>,
    pub operator: Operator,
    pub tally: Tally,
    /// The state is on it.
    pub disk: Option<SmallDisk>,
}

/// Until a message fails that is made to.
const FAILURE_TIME: Duration = Duration::from_secs(20);

/// Of the disk while it is not full: more than a run can fill.
pub const DISK_SIZE: &str = "2g";
