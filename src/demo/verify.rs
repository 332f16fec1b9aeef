//! What the demonstration knows beyond what [`crate::verify`] can know of any pipeline: what JSON each
//! column has to be, asked of Postgres's own functions, and what the clients know that they have
//! committed.
//!
//! Nothing of the path is used to judge the path.

use std::collections::HashMap;
use std::fmt;

use super::narrator::{Narrator, thousands};
use super::workload::{LARGE_COLUMNS, Ledger, Step};
use crate::change::Action;
use crate::verify::{Applied, Error, Fault, Faults, Held, Report, Settings, Verifier};
use crate::{sink, source};

/// Each column, and what Postgres says its JSON is. `NULL` here means JSON's `null`.
const COLUMNS: [(&str, &str); 23] = [
    ("id", "id"),
    ("revision", "revision"),
    ("uid", "to_json(uid)"),
    ("title", "to_json(title)"),
    ("slug", "to_json(slug::text)"),
    ("state", "to_json(state)"),
    ("tags", "to_json(tags)"),
    ("scores", "to_json(scores)"),
    // A JSON number would lose digits in most readers.
    ("price", "to_json(price::text)"),
    ("rating", "to_json(rating)"),
    ("views", "to_json(views)"),
    ("is_public", "to_json(is_public)"),
    ("published_on", "to_json(published_on::text)"),
    ("opens", "to_json(opens::text)"),
    (
        "read_time",
        "CASE WHEN read_time IS NOT NULL THEN json_build_object(
           'months', (extract(year FROM read_time) * 12 + extract(month FROM read_time))::bigint,
           'days', extract(day FROM read_time)::bigint,
           'microseconds', (extract(hour FROM read_time) * 3600000000
             + extract(minute FROM read_time) * 60000000
             + extract(microseconds FROM read_time))::bigint) END",
    ),
    ("pages", "to_json(pages::text)"),
    ("paper", "to_json(paper)"),
    ("author_address", "to_json(author_address)"),
    ("thumbnail", "to_json(thumbnail)"),
    ("meta", "meta"),
    ("body", "to_json(body)"),
    (
        "created_at",
        "CASE WHEN isfinite(created_at) AND created_at >= '0001-01-02'
           THEN to_json(to_char(created_at, 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))
           ELSE to_json(created_at::text) END",
    ),
    (
        "updated_at",
        "CASE WHEN isfinite(updated_at) AND updated_at >= '0001-01-02'
           THEN to_json(updated_at)
           ELSE to_json(updated_at::text) END",
    ),
];

/// Both judgements.
#[derive(Debug)]
pub(super) struct Verdict {
    report: Report,
    /// Against the clients' ledger.
    steps: Faults,
}

impl Verdict {
    /// Whether nothing at all was wrong, and there was something that could have been.
    pub(super) fn holds(&self) -> bool {
        self.report.holds && self.steps.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for found in Fault::ALL.iter().filter_map(|fault| self.steps.of(*fault)) {
            writeln!(f, "NO  {:>9} of the clients' changes {}", found.count, found.fault.text())?;
            for example in &found.examples {
                writeln!(f, "              {example}")?;
            }
        }
        self.report.fmt(f)
    }
}

/// Reads the stream from its first record to its last, and compares it with the table, and with what
/// the clients know. Nothing may be in the store.
pub(super) async fn verify(
    narrator: &Narrator,
    source: source::Settings,
    client: sink::Client,
    ledger: &Ledger,
) -> Result<Verdict, Error> {
    let mut steps: HashMap<i64, Vec<Step>> = HashMap::new();
    let expressions = COLUMNS.iter().map(|(name, sql)| ((*name).to_owned(), (*sql).to_owned()));
    let settings = Settings {
        alterable: Some(LARGE_COLUMNS.map(str::to_owned).to_vec()),
        show_values: true,
        expressions: expressions.collect(),
        ..Settings::new(source)
    };
    let progress = |next, end| {
        narrator.progress(format_args!(
            "{} of {} records read back",
            thousands(next),
            thousands(end)
        ));
    };
    let mut verifier = Verifier::open(settings, client).await?;
    verifier.observe(Box::new(|change| note(&mut steps, change)));
    verifier.read(progress).await?;
    verifier.choose_moment().await?;
    narrator.progress("comparing with the source table");
    let nothing: [Held; 0] = [];
    let report = verifier.finish(&nothing, |_, _| ()).await?;
    Ok(Verdict { report, steps: compare_steps(&steps, ledger) })
}

fn note(steps: &mut HashMap<i64, Vec<Step>>, change: &Applied<'_>) {
    let Some(key) = change.column("id").and_then(|id| id.parse().ok()) else { return };
    let revision = change.column("revision").and_then(|revision| revision.parse().ok());
    let revision = revision.filter(|_| change.action != Action::Delete);
    steps.entry(key).or_default().push(Step { action: change.action, revision });
}

/// Every committed change once, and in the order in which its row had them.
fn compare_steps(found: &HashMap<i64, Vec<Step>>, ledger: &Ledger) -> Faults {
    let mut faults = Faults::default();
    for (key, expected) in &ledger.keys {
        let found = found.get(key).map_or(&[][..], Vec::as_slice);
        if found == expected.as_slice() {
            continue;
        }
        let fault = match found.len().cmp(&expected.len()) {
            std::cmp::Ordering::Less => Fault::Missing,
            std::cmp::Ordering::Greater => Fault::Doubled,
            std::cmp::Ordering::Equal => Fault::Disordered,
        };
        faults
            .add(fault, || format!("id {key}: wrote {}, found {}", Steps(expected), Steps(found)));
    }
    for key in found.keys().filter(|key| !ledger.keys.contains_key(key)) {
        faults.add(Fault::Different, || format!("id {key}: nobody wrote it"));
    }
    faults
}

/// What happened to a row, for people: `insert 1, update 2, delete`.
struct Steps<'a>(&'a [Step]);

impl fmt::Display for Steps<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        for (index, step) in self.0.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{}", step.action)?;
            if let Some(revision) = step.revision {
                write!(f, " {revision}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INSERT: Step = Step { action: Action::Insert, revision: Some(1) };
    const UPDATE: Step = Step { action: Action::Update, revision: Some(2) };

    #[test]
    fn what_the_clients_committed_is_held_against_what_is_found() {
        #[track_caller]
        fn check(found: &[Step], wrote: &[Step], expected: Option<Fault>) {
            let keys = |steps: &[Step]| HashMap::from([(1, steps.to_vec())]);
            let ledger = Ledger { keys: keys(wrote), ..Ledger::default() };
            let faults = compare_steps(&keys(found), &ledger);
            let found = Fault::ALL.into_iter().find(|fault| faults.of(*fault).is_some());
            assert_eq!(found, expected);
        }
        check(&[INSERT, UPDATE], &[INSERT, UPDATE], None);
        check(&[INSERT], &[INSERT, UPDATE], Some(Fault::Missing));
        check(&[INSERT, UPDATE, UPDATE], &[INSERT, UPDATE], Some(Fault::Doubled));
        check(&[UPDATE, INSERT], &[INSERT, UPDATE], Some(Fault::Disordered));
        let found = HashMap::from([(7, vec![INSERT])]);
        let faults = compare_steps(&found, &Ledger::default());
        assert_eq!(faults.of(Fault::Different).map(|found| found.count), Some(1));
    }
}
