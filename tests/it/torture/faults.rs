//! What can be done to the three processes and to the wires between them, and how it is healed.

use std::collections::BTreeMap;
use std::fmt;

use crate::support::postgres::Cluster;
use crate::support::proxy::{Relay, Wire};
use crate::support::sluicebox::Running;
use crate::support::world::World;
use crate::support::{Random, signal};
use sluicebox::throwaway::Shutdown;

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    KillSluicebox,
    FreezeSluicebox,
    StopSluicebox,
    KillS2,
    FreezeS2,
    /// As the server's own kernel would: all of it at once, and it recovers from its log.
    CrashPostgres,
    RestartPostgres,
    /// One process of the server: it ends all the others and recovers by itself.
    KillBackend,
    FreezePostgres,
    PostgresWire(Wire),
    S2Wire(Wire),
}

impl Fault {
    pub fn draw(random: &mut Random) -> Self {
        let wires = Wire::FAULTS.len() as u64;
        let wire = Wire::FAULTS[usize::try_from(random.below(wires)).unwrap()];
        match random.below(17) {
            0..=2 => Self::KillSluicebox,
            3 => Self::FreezeSluicebox,
            4 => Self::StopSluicebox,
            5 | 6 => Self::KillS2,
            7 => Self::FreezeS2,
            8 => Self::CrashPostgres,
            9 => Self::RestartPostgres,
            10 => Self::KillBackend,
            11 => Self::FreezePostgres,
            12..=14 => Self::S2Wire(wire),
            _ => Self::PostgresWire(wire),
        }
    }
}

/// How often each fault was provoked.
#[derive(Debug, Default)]
pub struct Tally(BTreeMap<String, u32>);

impl Tally {
    pub fn count(&mut self, fault: Fault) {
        *self.0.entry(format!("{fault:?}")).or_default() += 1;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<_> =
            self.0.iter().map(|(fault, count)| format!("{fault} {count}")).collect();
        f.write_str(&kinds.join(", "))
    }
}

/// Everything that faults are done to.
pub struct Stage<'a> {
    world: &'a World<'a>,
    cluster: &'a Cluster,
    to_postgres: &'a Relay,
    to_s2: &'a Relay,
    /// Nothing after it was killed.
    running: Option<Running<'a>>,
    s2_is_down: bool,
    postgres_is_down: bool,
    frozen: Vec<u32>,
}

impl<'a> Stage<'a> {
    pub fn new(
        world: &'a World<'a>,
        cluster: &'a Cluster,
        to_postgres: &'a Relay,
        to_s2: &'a Relay,
        running: Running<'a>,
    ) -> Self {
        Self {
            world,
            cluster,
            to_postgres,
            to_s2,
            running: Some(running),
            s2_is_down: false,
            postgres_is_down: false,
            frozen: Vec::new(),
        }
    }

    /// Does it, unless what it would be done to is gone already.
    pub async fn provoke(&mut self, fault: Fault) {
        println!("torture: {fault:?}");
        match fault {
            Fault::KillSluicebox => {
                if let Some(running) = self.running.take() {
                    running.kill().await;
                }
            }
            Fault::FreezeSluicebox => {
                if let Some(running) = &self.running {
                    self.freeze(vec![running.pid()]);
                }
            }
            // It has to drain, or to end without: a frozen one cannot.
            Fault::StopSluicebox if self.frozen.is_empty() => {
                if let Some(running) = self.running.take() {
                    running.stop().await;
                }
            }
            Fault::StopSluicebox => {}
            Fault::KillS2 => {
                if !std::mem::replace(&mut self.s2_is_down, true) {
                    self.world.s2.kill().await;
                }
            }
            Fault::FreezeS2 => self.freeze(self.world.s2.pid().into_iter().collect()),
            // A frozen server does not stop.
            Fault::CrashPostgres | Fault::RestartPostgres if self.frozen.is_empty() => {
                let is_crash = fault == Fault::CrashPostgres;
                let shutdown = if is_crash { Shutdown::Immediate } else { Shutdown::Fast };
                if !std::mem::replace(&mut self.postgres_is_down, true) {
                    self.cluster.down(shutdown).await;
                }
            }
            Fault::CrashPostgres | Fault::RestartPostgres => {}
            Fault::KillBackend if self.frozen.is_empty() => {
                let pids = self.cluster.pids().await;
                signal(
                    "KILL",
                    &pids[pids.len().min(1)..].iter().rev().take(1).copied().collect::<Vec<_>>(),
                );
            }
            Fault::KillBackend => {}
            Fault::FreezePostgres => {
                let pids = self.cluster.pids().await;
                self.freeze(pids);
            }
            Fault::PostgresWire(wire) => self.to_postgres.set(wire),
            Fault::S2Wire(wire) => self.to_s2.set(wire),
        }
    }

    fn freeze(&mut self, pids: Vec<u32>) {
        signal("STOP", &pids);
        self.frozen.extend(pids);
    }

    /// Undoes everything, and waits for nothing but the servers' own start.
    pub async fn heal(&mut self) {
        signal("CONT", &std::mem::take(&mut self.frozen));
        self.to_postgres.set(Wire::Pass);
        self.to_s2.set(Wire::Pass);
        if std::mem::take(&mut self.s2_is_down) {
            self.world.s2.up().await;
        }
        if std::mem::take(&mut self.postgres_is_down) {
            self.cluster.up().await;
        }
        match &mut self.running {
            Some(running) => running.assert_alive(),
            None => self.running = Some(self.world.start()),
        }
    }

    /// Heals, and waits until everything works again.
    pub async fn healed(mut self) -> Running<'a> {
        self.heal().await;
        self.running.take().expect("it was just started").ready().await
    }
}
