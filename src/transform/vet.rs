//! What a chain that is about to go live is tried on, and what came of it.
//!
//! The host decides when to try and what to do about the result; what there is to try on is known to
//! the pipeline, which implements [`Vet`]. Trials have no effects: they run on [`Trial`]s, whose
//! guests' log lines are kept out of the process's log and whose calls are not counted.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::chain::Chain;
use super::instance::without_words;
use super::runner::Runner;
use crate::change::Change;

/// A chain with instances of its own, beside the traffic.
#[derive(Debug)]
pub struct Trial {
    pub(crate) chain: Arc<Chain>,
    pub(crate) runner: Runner,
}

/// Tries chains on the messages that there are. Called on a thread of low priority, one call at a
/// time, and never for long.
pub trait Vet: Send + Sync + std::fmt::Debug {
    /// Runs both chains over parked messages and recent changes.
    fn compare(&self, before: &mut Trial, after: &mut Trial) -> Comparison;

    /// How many of these changes the chain makes something of that can be sent.
    fn handled(&self, trial: &mut Trial, changes: &[Change]) -> usize;
}

/// What became of the same messages with two chains.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Failed messages of the store that could be sent now.
    pub fixes: u64,
    /// Failed messages of the store that were tried.
    pub of: u64,
    /// Failed messages that are in the store.
    pub parked: u64,
    /// Messages that the chain before handles and this one does not.
    pub breaks: u64,
    /// Recent changes that were tried.
    pub sample: u64,
    /// Messages that the chain before does not drop and this one does: a verdict that a transform is
    /// free to give, and neither a mend nor a break.
    pub drops: u64,
    /// Messages of which the chain before leaves something and this one nothing: no column of the row,
    /// or an empty message in its place. It looks like a mend, and is none.
    pub empties: u64,
    /// Messages that this chain sends to another stream than the chain before.
    pub reroutes: u64,
    /// Columns that are in no record any more with this chain, and were in one with the chain before, or
    /// are part of a failed message that could be sent now. A bounded number of them.
    pub left_out: BTreeSet<String>,
    /// How many columns of how many that one message lacks which lacks most.
    pub left_out_most: (u64, u64),
    /// Messages of which this chain leaves nothing that tells of which row they are.
    pub keyless: u64,
    /// Messages that say another action or table than their change is of.
    pub misnamed: u64,
    /// Messages in which none of the row's values can be recognised, and which differ from each other:
    /// the values may be packed.
    pub unrecognised: u64,
    /// Failed messages of the store that this chain drops or empties by a transform that may not: they
    /// would be gone without having been delivered.
    pub lost: u64,
    /// Recent changes that the chain before sends.
    pub sent: u64,
    /// Those of them that this chain drops or empties by a transform that may not.
    pub sent_lost: u64,
    /// The transforms that dropped or emptied those.
    pub losers: BTreeSet<String>,
    /// How much longer this chain takes, in percent, where enough was tried to say so.
    pub slower_percent: Option<i64>,
    /// The transforms that failed what broke.
    pub culprits: BTreeSet<String>,
    /// Why the first of what broke failed.
    pub example: Option<String>,
}

/// Of so many recent changes not all may be dropped.
const ALL_MIN: u64 = 10;

/// So many columns are noted down by name.
const NAMED_MAX: usize = 20;

impl Comparison {
    /// Notes the columns down that one message lacks, of so many.
    pub(crate) fn leave_out(&mut self, names: BTreeSet<String>, columns: u64) {
        self.left_out_most = self.left_out_most.max((names.len() as u64, columns));
        let room = NAMED_MAX.saturating_sub(self.left_out.len());
        self.left_out.extend(names.into_iter().take(room));
    }

    /// Whether this chain makes messages vanish as no transform does that is meant to let some through.
    #[must_use]
    pub fn loses(&self) -> bool {
        self.lost > 0 || self.loses_all()
    }

    fn loses_all(&self) -> bool {
        self.sent >= ALL_MIN && self.sent_lost == self.sent
    }

    /// Why it is refused, for the list; nothing where it may go live. `settings` is the name of the settings
    /// file.
    pub(crate) fn refusal(&self, settings: &str) -> Option<String> {
        self.refusal_with(settings, |example| example.to_owned())
    }

    /// The same for the log, which has no words of a guest.
    pub(crate) fn refusal_for_log(&self, settings: &str) -> Option<String> {
        self.refusal_with(settings, |example| match without_words(example) {
            (text, true) => format!("{text} (what it said of it: sluicebox transforms list)"),
            (text, false) => text.to_owned(),
        })
    }

    fn refusal_with(&self, settings: &str, shown: impl Fn(&str) -> String) -> Option<String> {
        let tried = self.of + self.sample;
        let again = "put there anew, it is tried again";
        if self.breaks > 0 {
            let example = shown(self.example.as_deref().unwrap_or("for an unknown reason"));
            return Some(format!(
                "with it, {} of {tried} messages fail that the chain before handles; the first: \
                 {example}. Mend it, or set vet = \"off\" in {settings} if that is meant; {again}",
                self.breaks
            ));
        }
        let what = if self.lost > 0 {
            format!(
                "it does not fix {} of {} parked messages but drops them, or nothing of their rows is in what \
                 it makes of them, so that they would be gone without having been delivered. Mend it; to give messages up there is \
                 `sluicebox messages ack`",
                self.lost, self.of
            )
        } else if self.loses_all() {
            format!(
                "it drops all of the {} recent messages that the chain before sends, or nothing of their rows \
                 is in what it makes of them. Mend it",
                self.sent
            )
        } else {
            return None;
        };
        Some(format!("{what}; or set may_drop = true in {settings} if that is meant; {again}"))
    }
}

/// How a vetting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VetResult {
    /// It breaks nothing that the chain before handles.
    Passed,
    /// It breaks something, and does not go live.
    Refused,
    /// There was nothing to try it on.
    Unvetted,
    /// Its settings say `vet = "off"`.
    Off,
}

/// What vetting said about a version of a file: about the whole chain as it would be with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VetReport {
    pub result: VetResult,
    /// Failed messages that could be sent with it.
    pub fixes: u64,
    /// Failed messages that were tried.
    pub of: u64,
    /// Failed messages that there were. More than were tried where there are very many, or where they
    /// take long.
    #[serde(default)]
    pub parked: u64,
    /// Failed messages that were fixed as this version and the ones before it of the same file went live.
    #[serde(default)]
    pub mended: u64,
    /// Messages that the chain before handles and that fail with it.
    pub breaks: u64,
    /// Recent changes that were tried.
    pub sample: u64,
    /// Messages that the chain before does not drop and that it drops.
    pub drops: u64,
    /// Messages of which the chain before leaves something and it nothing.
    #[serde(default)]
    pub empties: u64,
    /// Messages that it sends to another stream than the chain before.
    #[serde(default)]
    pub reroutes: u64,
    /// Columns that it leaves out, as far as they are noted down, by name.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// How many columns of how many the message lacks that lacks most.
    #[serde(default)]
    pub left_out_most: (u64, u64),
    /// Messages that do not tell any more of which row they are.
    #[serde(default)]
    pub keyless: u64,
    /// Messages that say another action or table than their change is of.
    #[serde(default)]
    pub misnamed: u64,
    /// Messages in which none of the row's values can be recognised.
    #[serde(default)]
    pub unrecognised: u64,
    /// How much slower the chain is with it, in percent; less than nothing is faster.
    pub slower_percent: Option<i64>,
}

impl VetReport {
    pub(crate) fn of(comparison: &Comparison) -> Self {
        let Comparison { fixes, of, breaks, sample, drops, empties, reroutes, .. } = *comparison;
        let Comparison { left_out_most, keyless, misnamed, unrecognised, parked, .. } = *comparison;
        Self {
            result: if of + sample == 0 { VetResult::Unvetted } else { VetResult::Passed },
            fixes,
            of,
            parked,
            mended: fixes,
            breaks,
            sample,
            drops,
            empties,
            reroutes,
            left_out: comparison.left_out.iter().cloned().collect(),
            left_out_most,
            keyless,
            misnamed,
            unrecognised,
            slower_percent: comparison.slower_percent,
        }
    }

    /// What an operator should look at before it is believed, as clauses that follow "of the messages
    /// that were tried"; empty where there is nothing.
    pub(crate) fn doubts(&self) -> String {
        let mut doubts = Vec::new();
        let mut add = |count: u64, what: &str| {
            if count > 0 {
                doubts.push(format!("{count} {what}"));
            }
        };
        add(self.drops, "are dropped that the chain before keeps");
        add(self.empties, "are left with nothing of their rows");
        add(self.keyless, "do not tell any more of which row they are");
        add(self.misnamed, "name another action or table than their change is of");
        add(self.unrecognised, "have none of their row's values in a form that can be recognised");
        let (left_out, columns) = self.left_out_most;
        if left_out * 2 > columns {
            doubts.push(format!("some lack {left_out} of {columns} columns"));
        }
        doubts.join(", ")
    }

    pub(crate) fn with(self, result: VetResult) -> Self {
        Self { result, ..self }
    }

    pub(crate) fn off() -> Self {
        Self::of(&Comparison::default()).with(VetResult::Off)
    }

    /// One clause for logs and lists: `fixes 37 of 40, breaks 0 of 500, slower by 12 %`.
    #[must_use]
    pub fn text(&self) -> String {
        match self.result {
            VetResult::Off => return "off".to_owned(),
            VetResult::Unvetted => return "unvetted".to_owned(),
            VetResult::Passed | VetResult::Refused => {}
        }
        let tried = self.of + self.sample;
        let mut text = format!("fixes {} of {}", self.fixes, self.of);
        if self.parked > self.of {
            write!(text, " (tried {} of {})", self.of, self.parked)
                .expect("a String takes everything");
        }
        write!(text, ", breaks {} of {tried}", self.breaks).expect("a String takes everything");
        let mut add = |part: std::fmt::Arguments<'_>| {
            text.write_fmt(part).expect("a String takes everything");
        };
        if self.drops > 0 {
            add(format_args!(", drops {}", self.drops));
        }
        if self.empties > 0 {
            add(format_args!(", leaves nothing of {}", self.empties));
        }
        let (left_out, columns) = self.left_out_most;
        match self.left_out.as_slice() {
            [] => {}
            names @ ([_] | [_, _] | [_, _, _]) => {
                let names = names.join(", ");
                add(format_args!(", leaves out {left_out} of {columns} columns ({names})"));
            }
            [first, second, rest @ ..] => {
                let rest = rest.len();
                add(format_args!(
                    ", leaves out {left_out} of {columns} columns ({first}, {second} and {rest} more)"
                ));
            }
        }
        if self.keyless > 0 {
            add(format_args!(", does not tell the row of {}", self.keyless));
        }
        if self.misnamed > 0 {
            add(format_args!(", names another action or table in {}", self.misnamed));
        }
        if self.unrecognised > 0 {
            add(format_args!(", no value can be recognised in {}", self.unrecognised));
        }
        if self.reroutes > 0 {
            add(format_args!(", sends {} to another stream", self.reroutes));
        }
        match self.slower_percent {
            Some(percent) if percent > 0 => add(format_args!(", slower by {percent} %")),
            Some(percent) if percent < 0 => add(format_args!(", faster by {} %", -percent)),
            Some(_) | None => {}
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_messages_vanish_is_refused() {
        let check = |comparison: Comparison, part: Option<&str>| {
            let refusal = comparison.refusal("10-x.toml");
            assert_eq!(refusal.is_some(), part.is_some(), "{refusal:?}");
            assert!(refusal.unwrap_or_default().contains(part.unwrap_or_default()));
            assert_eq!(comparison.loses(), part.is_some());
        };
        let some = Comparison { of: 2, sent: 10, sample: 12, ..Comparison::default() };
        check(some.clone(), None);
        // A filter.
        check(Comparison { drops: 9, sent_lost: 9, ..some.clone() }, None);
        check(Comparison { sent: 3, sent_lost: 3, ..some.clone() }, None);
        check(Comparison { sent_lost: 10, ..some.clone() }, Some("drops all of the 10 recent"));
        check(Comparison { lost: 1, ..some }, Some("does not fix 1 of 2 parked messages"));
    }

    #[test]
    fn a_report_is_one_clause() {
        #[track_caller]
        fn check(comparison: Comparison, expected: &str) {
            assert_eq!(VetReport::of(&comparison).text(), expected);
        }
        check(Comparison::default(), "unvetted");
        let some = Comparison { fixes: 37, of: 40, sample: 500, ..Comparison::default() };
        check(some.clone(), "fixes 37 of 40, breaks 0 of 540");
        check(
            Comparison { slower_percent: Some(12), drops: 2, ..some.clone() },
            "fixes 37 of 40, breaks 0 of 540, drops 2, slower by 12 %",
        );
        check(
            Comparison { slower_percent: Some(-3), breaks: 1, ..some.clone() },
            "fixes 37 of 40, breaks 1 of 540, faster by 3 %",
        );
        check(
            Comparison { parked: 41_000, ..some.clone() },
            "fixes 37 of 40 (tried 40 of 41000), breaks 0 of 540",
        );
        check(
            Comparison { empties: 1, reroutes: 2, ..some.clone() },
            "fixes 37 of 40, breaks 0 of 540, leaves nothing of 1, sends 2 to another stream",
        );
        let mut lacking = some.clone();
        lacking.leave_out(["body".to_owned()].into(), 3);
        check(lacking.clone(), "fixes 37 of 40, breaks 0 of 540, leaves out 1 of 3 columns (body)");
        assert_eq!(VetReport::of(&lacking).doubts(), "");
        lacking.leave_out((0..9).map(|number| format!("c{number}")).collect(), 10);
        check(
            Comparison { keyless: 40, misnamed: 1, unrecognised: 2, ..lacking.clone() },
            "fixes 37 of 40, breaks 0 of 540, leaves out 9 of 10 columns (body, c0 and 8 more), does not \
             tell the row of 40, names another action or table in 1, no value can be recognised in 2",
        );
        assert_eq!(
            VetReport::of(&Comparison { keyless: 40, drops: 1, ..lacking }).doubts(),
            "1 are dropped that the chain before keeps, 40 do not tell any more of which row they are, some \
             lack 9 of 10 columns"
        );
        assert_eq!(VetReport::off().text(), "off");
    }
}
