//! What counts as a mend of a failed message, and what is said of one that only looks like it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::*;
use crate::pipeline::group::Groups;
use crate::pipeline::sample::{Sample, Sampler};
use crate::pipeline::vetting::Vetting;
use crate::store::{Attempts, Database, Store, StoredState, Write};
use crate::transform::{Comparison, Trial, Vet as _, VetReport};

/// A store with rows in it that no record can hold, and a sample of rows that one can.
pub(super) struct Messages {
    pub(super) runtime: tokio::runtime::Runtime,
    pub(super) vetting: Arc<Vetting>,
}

pub(super) fn row(index: u64, body: &str) -> Change {
    let mut change = change_of("documents", body);
    change.position.index = index;
    let number = index.to_string();
    change.new = Some(tuple(&[Some(&number), Some("a title"), Some(body), Some("{\"a\": 1}")]));
    change
}

impl Messages {
    pub(super) fn new(parked: u64, recent: u64) -> Self {
        Self::of(parked, recent, &"large".repeat(300_000))
    }

    /// The same with parked rows that hold this.
    fn of(parked: u64, recent: u64, large: &str) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let guard = runtime.enter();
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("vetting-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let mut database = Database::shared(&name).unwrap();
        database.load(&mut rand::rng()).unwrap();
        let database = Arc::new(std::sync::Mutex::new(database));
        let shared = Arc::clone(&database);
        let store = Store::over(&database.lock().unwrap(), move |task| {
            task.carry_out(&mut shared.lock().unwrap());
        });
        let insert = |id: u64| Write::Insert {
            id,
            change: Box::new(row(id, large)),
            groups: Groups::of(&row(id, large)),
            state: StoredState::Parked,
            attempts: Attempts { all: 1, own: 1 },
            next_attempt: None,
            failure: None,
        };
        let writes: Vec<Write> = (1..=parked).map(insert).collect();
        runtime.block_on(store.write(writes.into())).unwrap();
        let sample = Sample::default();
        let mut sampler = Sampler::new(sample.clone());
        let mut now = Instant::now();
        for index in 0..recent {
            let change = row(1000 + index, "small");
            now += std::time::Duration::from_secs(1);
            sampler.look(now, 1, |_| &change);
        }
        let vetting = Arc::new(Vetting::new(store, sample, EnvelopeSettings::default()));
        drop(guard);
        Self { runtime, vetting }
    }

    fn compare(&self, before: Arc<Chain>, after: Arc<Chain>) -> Comparison {
        let trial = |chain| Trial { chain, runner: Runner::quiet(Arc::clone(engine())) };
        let compare = || self.vetting.compare(&mut trial(before), &mut trial(after));
        // As in the product, no thread of the runtime waits for the store.
        std::thread::scope(|scope| scope.spawn(compare).join().unwrap())
    }

    /// What is said of a module that does this.
    fn says(&self, act: &str, text: &str) -> (Option<String>, String) {
        let text = text.replace('"', "\\\"");
        let settings = format!("[config]\nact = \"{act}\"\ntext = \"{text}\"\n");
        let after = chain(vec![transform("10-chaos.wasm", chaos(), &settings)]);
        let comparison = self.compare(Arc::new(Chain::empty(0)), after);
        let report = VetReport::of(&comparison);
        (comparison.refusal("10-chaos.toml"), format!("{} | {}", report.text(), report.doubts()))
    }

    #[track_caller]
    fn passes(&self, act: &str, text: &str, expected: &str) {
        let (refusal, said) = self.says(act, text);
        assert_eq!(refusal, None, "{act} {text}: {said}");
        let said = said.split(", slower").next().unwrap().split(", faster").next().unwrap();
        assert_eq!(said.trim_end_matches(" | "), expected, "{act} {text}");
    }

    #[track_caller]
    fn is_refused(&self, act: &str, text: &str, parts: &[&str]) {
        let (refusal, said) = self.says(act, text);
        let refusal = refusal.unwrap_or_else(|| panic!("{act} {text} is not refused: {said}"));
        for part in parts {
            assert!(refusal.contains(part), "{part} is not in {refusal}");
        }
    }
}

#[test]
fn a_mend_has_the_row_in_it() {
    let messages = Messages::new(3, 4);
    messages.passes("remove", "", "fixes 3 of 3, breaks 0 of 7, leaves out 1 of 4 columns (body)");
    messages.passes("keep", "", "fixes 0 of 3, breaks 0 of 7");
    messages.passes(
        "keep-only",
        "title",
        "fixes 3 of 3, breaks 0 of 7, leaves out 3 of 4 columns (body, id, tags), does not \
         tell the row of 7 | 7 do not tell any more of which row they are, some lack 3 of 4 columns",
    );
    // Something else for each row may hold it in a form of its own.
    messages.passes(
        "packed",
        "",
        "fixes 3 of 3, breaks 0 of 7, no value can be recognised in 7 | 7 have none of their row's values \
         in a form that can be recognised",
    );
    drop(messages.runtime);
}

#[test]
fn what_says_nothing_of_its_row_is_no_mend() {
    let vanish = "does not fix 3 of 3 parked messages";
    let messages = Messages::new(3, 4);
    for (act, text) in [
        ("drop", ""),
        ("keep-only", ""),
        ("message", "{}"),
        ("message", "null"),
        ("message", "{\"ok\":true}"),
        ("message", "\"too large\""),
        (
            "message",
            "{\"record\":{\"status\":\"too large\"},\"action\":\"insert\",\"metadata\":{}}",
        ),
        ("set-all", "null"),
        ("set-all", "\"\""),
        ("set-all", "\"x\""),
    ] {
        messages.is_refused(
            act,
            text,
            &[vanish, "may_drop = true in 10-chaos.toml", "messages ack"],
        );
    }
    // With a single message there is nothing to compare it with.
    let one = Messages::new(1, 0);
    one.is_refused("message", "{\"ok\":true}", &["does not fix 1 of 1 parked messages"]);
    // All that come now, and nothing is parked.
    let recent = Messages::new(0, 12);
    recent.is_refused("message", "{\"ok\":true}", &["all of the 12 recent messages"]);
}

#[test]
fn a_trial_is_bounded_says_so_and_has_no_effects() {
    let messages = Messages::of(1100, 5, "small");
    let act =
        |act: &str| transform("10-chaos.wasm", chaos(), &format!("[config]\nact = \"{act}\"\n"));
    let (fails, keeps) = (act("panic"), act("keep"));
    let (before, after) = (chain(vec![Arc::clone(&fails)]), chain(vec![Arc::clone(&keeps)]));
    for _ in 0..2 {
        let found = messages.compare(Arc::clone(&before), Arc::clone(&after));
        // Less where this machine is busy; and the second time, all of them are there still.
        assert!((10..=1000).contains(&found.of), "{found:?}");
        assert_eq!((found.parked, found.fixes), (1100, found.of));
        let text = VetReport::of(&found).text();
        let expected = format!("fixes {0} of {0} (tried {0} of 1100), breaks 0", found.of);
        assert!(text.starts_with(&expected), "{text}");
    }
    for (chain, transform) in [(before, fails), (after, keeps)] {
        assert_eq!((transform.counters.calls(), transform.counters.errors()), (0, 0));
        assert_eq!(chain.health().tally(), crate::transform::Tally::default());
    }
}

#[test]
fn the_chain_is_tried_as_it_would_be_and_not_the_module_alone() {
    let messages = Messages::of(3, 4, &"x".repeat(600_000));
    let with = |file: &str, settings: &str| transform(file, chaos(), settings);
    let fails = || with("20-fails.wasm", "[config]\nact = \"panic\"\n");
    let keeps = || with("10-keeps.wasm", "[config]\nact = \"keep\"\n");
    // Alone it mends, and with a neighbour that fails it does not.
    let strip = || transform("10-strip.wasm", strip(), "[config]\ncolumns = [\"body\"]\n");
    let before = chain(vec![fails()]);
    let found = messages.compare(Arc::clone(&before), chain(vec![strip(), fails()]));
    assert_eq!((found.fixes, found.of, found.breaks), (0, 3, 0));
    let found = messages.compare(before, chain(vec![strip(), keeps()]));
    assert_eq!((found.fixes, found.of, found.breaks), (3, 3, 0));
}
