//! Why Postgres keeps WAL for the slot, and when that is worth a line in the log. Pure.
//!
//! Two distances count: *kept* is from the slot's `restart_lsn` to the end of the WAL, which is what
//! fills the database's disk; *unconfirmed* is from what we have confirmed. Where most of what is kept
//! is unconfirmed, something here or behind us holds it, and the first of these in order is named:
//!
//! | code | what holds it |
//! | --- | --- |
//! | `stuck` | a part of the pipeline stands still |
//! | `spill_full`, `store_full`, `store_failed` | the disk of the store, or its bound |
//! | `sink_away` | S2 does not take records |
//! | `halted` | a transform failed a message, and its settings say that all wait for it |
//! | `inactive_slot` | nothing is read from the slot |
//! | `slow_transforms`, `slow_sink` | less gets through than is written |
//! | `catching_up` | nothing but Postgres's own speed of reading |
//!
//! Where most of it is confirmed already, Postgres itself holds it: for a transaction that has written
//! and is still open (`open_transaction`), or only until it next writes down what is running
//! (`settling`), which is every quarter of a minute.

/// What is kept below this is not worth a word: Postgres recycles whole segments of it.
pub const KEPT_BYTES_MIN: u64 = 16 * 1024 * 1024;

/// From here on, what is kept is in the log, again at each [`LEVEL_FACTOR`] times as much.
const FIRST_LEVEL_BYTES: u64 = 256 * 1024 * 1024;
const LEVEL_FACTOR: u64 = 4;

/// What is known of the slot and of what keeps changes from getting through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// In bytes; see the module.
    pub kept: u64,
    pub unconfirmed: u64,
    /// The oldest transaction that is open and has written, in words.
    pub open_transaction: Option<String>,
    /// Codes of what is wrong, as in [`Reason`](super::control::Reason).
    pub troubles: Vec<(String, String)>,
    pub is_spilling: bool,
    pub transforms_are_busy: bool,
    pub sink_is_busy: bool,
}

/// What keeps WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keeper {
    /// See the module.
    pub code: &'static str,
    /// One sentence: what it is, and what mends it.
    pub text: String,
}

/// Every code that there is.
pub const CODES: [&str; 12] = [
    "stuck",
    "spill_full",
    "store_full",
    "store_failed",
    "sink_away",
    "halted",
    "inactive_slot",
    "slow_transforms",
    "slow_sink",
    "catching_up",
    "open_transaction",
    "settling",
];

/// What keeps the WAL, if there is enough of it to be worth asking.
#[must_use]
pub fn keeper(facts: &Facts) -> Option<Keeper> {
    if facts.kept < KEPT_BYTES_MIN {
        return None;
    }
    let keeper = |code, text: &str| Some(Keeper { code, text: text.to_owned() });
    if facts.unconfirmed < facts.kept / 2 {
        return match &facts.open_transaction {
            Some(transaction) => keeper(
                "open_transaction",
                &format!(
                    "a transaction that has written is still open, and the slot needs the WAL since its \
                     start: {transaction}. End it; all that was written since is confirmed already"
                ),
            ),
            None => {
                keeper("settling", "it is confirmed, and Postgres lets it go by itself in a moment")
            }
        };
    }
    let trouble = |part: &str, code: &str| {
        let fits = |(found, of): &&(String, String)| {
            found == part && (code.is_empty() || of.starts_with(code))
        };
        facts.troubles.iter().find(fits).map(|(_, code)| code.as_str())
    };
    let stuck = facts.troubles.iter().find(|(_, code)| code.starts_with("stuck_"));
    if let Some((part, _)) = stuck {
        return keeper("stuck", &format!("the {part} stands still; see the reasons"));
    }
    for (code, text) in [
        ("spill_full", "what is spilled has reached delivery.spill_max, so that nothing is read"),
        ("store_full", "the store has reached state.bytes_max, so that nothing is read"),
        ("store_failed", "the message store cannot be written, so that nothing is confirmed"),
    ] {
        if trouble("store", code).is_some() {
            return keeper(code, text);
        }
    }
    if trouble("transforms", "halted").is_some() {
        return keeper(
            "halted",
            "everything waits at a message that a transform failed (on_error = \"halt\")",
        );
    }
    if let Some(code) = trouble("source", "") {
        return keeper("inactive_slot", &format!("nothing is read from the slot ({code})"));
    }
    if let Some(code) = trouble("sink", "") {
        let spill = if facts.is_spilling {
            "; changes move on to disk here, and it is let go as they do"
        } else {
            ""
        };
        return keeper("sink_away", &format!("S2 does not take records ({code}){spill}"));
    }
    if facts.transforms_are_busy {
        return keeper(
            "slow_transforms",
            "the transforms let through less than is written; see `sluicebox transforms list`, or \
             raise transforms.workers",
        );
    }
    if facts.sink_is_busy {
        return keeper(
            "slow_sink",
            "S2 takes less than is written; see its throttling and the way there, or raise \
             sink.in_flight_mib",
        );
    }
    keeper("catching_up", "it is being read as fast as Postgres gives it out")
}

/// Which amounts were said already.
#[derive(Debug, Default)]
pub struct Levels {
    /// How many levels the last amount had passed.
    passed: u32,
}

/// What is worth a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// More is kept than the next level.
    Rising,
    /// It is below the first level again, by half.
    LetGo,
}

impl Levels {
    /// So much was kept that it was said.
    #[must_use]
    pub fn is_high(&self) -> bool {
        self.passed > 0
    }

    /// Looks at how much is kept now.
    pub fn look(&mut self, kept: u64) -> Option<News> {
        let levels =
            std::iter::successors(Some(FIRST_LEVEL_BYTES), |level| level.checked_mul(LEVEL_FACTOR));
        let passed = levels.take_while(|level| *level <= kept).count();
        let passed = u32::try_from(passed).unwrap_or(u32::MAX);
        if passed > self.passed {
            self.passed = passed;
            Some(News::Rising)
        } else if self.passed > 0 && kept < FIRST_LEVEL_BYTES / 2 {
            self.passed = 0;
            Some(News::LetGo)
        } else {
            None
        }
    }
}

/// A warning where Postgres may drop the slot's WAL: its own word for it, and the bytes that may still
/// be written.
#[must_use]
pub fn danger(kept: u64, status: Option<&str>, safe: Option<i64>) -> Option<String> {
    let mend = "let the pipeline catch up now, or raise max_slot_wal_keep_size (ALTER SYSTEM SET \
                max_slot_wal_keep_size = '…'; SELECT pg_reload_conf())";
    if status == Some("unreserved") {
        return Some(format!(
            "Postgres drops the slot's WAL at its next checkpoint, and changes are lost then; {mend}"
        ));
    }
    let safe = safe?;
    let left = u64::try_from(safe).unwrap_or(0);
    // Three quarters of what it may keep are kept.
    (kept >= KEPT_BYTES_MIN && left < kept / 3).then(|| {
        format!(
            "Postgres drops the slot's WAL, and changes are lost, once {left} more bytes are written \
             ({kept} are kept, and max_slot_wal_keep_size is near); {mend}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn facts(troubles: &[(&str, &str)]) -> Facts {
        let owned = |(part, code): &(&str, &str)| ((*part).to_owned(), (*code).to_owned());
        Facts {
            kept: 100 * MIB,
            unconfirmed: 100 * MIB,
            troubles: troubles.iter().map(owned).collect(),
            ..Facts::default()
        }
    }

    #[test]
    fn the_most_urgent_is_named() {
        let check = |facts: Facts, expected: &str| {
            let found = keeper(&facts).unwrap();
            assert_eq!(found.code, expected, "{facts:?}");
            assert!(CODES.contains(&found.code));
        };
        check(facts(&[]), "catching_up");
        check(facts(&[("sink", "sink_503")]), "sink_away");
        check(facts(&[("sink", "sink_503"), ("store", "spill_full")]), "spill_full");
        check(facts(&[("store", "store_full")]), "store_full");
        check(facts(&[("transforms", "halted")]), "halted");
        check(facts(&[("store", "store_failed")]), "store_failed");
        check(facts(&[("source", "source_slot_active"), ("sink", "sink_401")]), "inactive_slot");
        check(facts(&[("sink", "sink_timeout"), ("sink", "stuck_sink")]), "stuck");
        check(Facts { sink_is_busy: true, ..facts(&[]) }, "slow_sink");
        let busy = Facts { transforms_are_busy: true, sink_is_busy: true, ..facts(&[]) };
        check(busy, "slow_transforms");
        let transaction = Facts {
            unconfirmed: MIB,
            open_transaction: Some("pid 7".to_owned()),
            ..facts(&[("sink", "sink_503")])
        };
        check(transaction, "open_transaction");
        check(Facts { unconfirmed: MIB, ..facts(&[]) }, "settling");
        // An open transaction is not to blame for what nobody has confirmed.
        let both =
            Facts { open_transaction: Some("pid 7".to_owned()), ..facts(&[("sink", "sink_503")]) };
        check(both, "sink_away");
    }

    #[test]
    fn little_is_not_worth_a_word() {
        assert_eq!(keeper(&Facts { kept: KEPT_BYTES_MIN - 1, ..facts(&[]) }), None);
    }

    #[test]
    fn each_level_is_said_once_until_it_is_let_go() {
        let mut levels = Levels::default();
        let said: Vec<_> = [1, 255, 256, 300, 1024, 1000, 1030, 40_000, 50_000, 200, 127, 1, 256]
            .map(|mib| levels.look(mib * MIB))
            .into();
        let (up, down) = (Some(News::Rising), Some(News::LetGo));
        let expected = [None, None, up, None, up, None, None, up, None, None, down, None, up];
        assert_eq!(said, expected);
        assert_eq!(levels.look(u64::MAX), Some(News::Rising));
    }

    #[test]
    fn a_slot_in_danger_is_said_in_time() {
        assert_eq!(danger(100 * MIB, Some("reserved"), None), None, "unlimited");
        assert_eq!(danger(100 * MIB, Some("extended"), Some(40 << 20)), None);
        assert!(danger(100 * MIB, Some("extended"), Some(30 << 20)).unwrap().contains("31457280"));
        assert!(danger(100 * MIB, Some("extended"), Some(-5)).is_some());
        assert!(danger(0, Some("unreserved"), Some(-5)).unwrap().contains("next checkpoint"));
        assert_eq!(danger(MIB, Some("reserved"), Some(1)), None, "a small limit, and little kept");
    }
}
