//! What a comparison has found, as text and as JSON.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::fault::{Fault, Faults};
use super::fold::Moment;

/// What was seen of the stream.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counts {
    /// Records that are no commands.
    pub records: u64,
    pub commands: u64,
    /// Of other writers: without the header `sb-pipeline`, or with that of one who has never fenced the
    /// stream. Not looked at.
    pub foreign: u64,
    /// Of tables that are not compared.
    pub other_tables: u64,
    /// Later than the moment of the comparison: order was judged, rows were not.
    pub later: u64,
    /// Metered bytes of the largest record.
    pub largest_bytes: u64,
}

/// What was seen of one table.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TableReport {
    /// `schema.name`.
    pub table: String,
    /// In the source.
    pub rows: u64,
    /// Of these, equal to the stream in everything that can be compared.
    pub compared: u64,
    /// Rows of which a change is parked, or waits behind one: not lost.
    pub held: u64,
    /// Rows of which an operator has given a change up: not as in the table, and not lost unseen.
    pub given_up: u64,
    /// Rows that are not in the stream as they are in the table, and that a transform drops, by its
    /// file.
    pub dropped: BTreeMap<String, u64>,
    /// Rows that no record names, where that is allowed.
    pub unmentioned: u64,
    /// Rows whose last record does not say what the row is: split, or replaced by a transform.
    pub unjudged: u64,
    /// Records with a body that a transform has put in place of the message.
    pub opaque: u64,
    /// Values that were compared, and those that a transform has altered or nobody wants compared.
    pub values: u64,
    pub altered: u64,
    /// For each column that differs, in how many rows.
    pub columns: BTreeMap<String, u64>,
}

/// What was read of one stream.
#[derive(Clone, Debug, Serialize)]
pub struct StreamReport {
    pub name: String,
    /// The range, its end not included.
    pub from: u64,
    pub to: u64,
    /// The first number that is still there, where records before it were trimmed or have expired.
    pub trimmed_before: Option<u64>,
    /// It is known to the pipeline, and S2 has no such stream any more.
    pub is_gone: bool,
    /// How many of its records are at fault by themselves, beside the others of their rows and groups.
    pub faults: u64,
}

impl StreamReport {
    /// There is more to say of it than how far it was read.
    fn is_special(&self) -> bool {
        self.is_gone || self.trimmed_before.is_some() || self.faults > 0
    }
}

/// Up to so many streams are named each; of more, those of which there is something to say, and no more
/// than this.
const STREAMS_NAMED_MAX: usize = 20;

/// The whole finding.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Nothing is wrong, and there was something that could have been.
    pub holds: bool,
    /// What was read: the pipeline's own stream, and those that transforms route messages to.
    pub streams: Vec<StreamReport>,
    #[serde(flatten)]
    pub counts: Counts,
    /// Where the tables were looked at, as Postgres writes it; nothing where they were not.
    pub moment: Option<String>,
    pub tables: Vec<TableReport>,
    pub faults: Faults,
}

impl Report {
    pub(super) fn judge(mut self, moment: Option<Moment>) -> Self {
        self.moment = moment.map(|moment| moment.to.to_string());
        let opaque = self.tables.iter().any(|table| table.opaque > 0);
        let seen = self.counts.records > 0 || self.tables.iter().any(|table| table.compared > 0);
        self.holds = self.faults.is_empty() && !opaque && seen;
        self
    }
}

impl Report {
    fn write_streams(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // There may be one for each row.
        let is_many = self.streams.len() > STREAMS_NAMED_MAX;
        let mut told = self.streams.iter().filter(|stream| !is_many || stream.is_special());
        for stream in told.by_ref().take(STREAMS_NAMED_MAX) {
            let StreamReport { name, from, to, trimmed_before, is_gone, faults } = stream;
            if *is_gone {
                write!(f, "\n              stream `{name}` is not there any more")?;
                continue;
            }
            write!(f, "\n              of stream `{name}`, from {from} to {to}")?;
            if *faults > 0 {
                write!(f, "; {faults} of the faults above are in it")?;
            }
            if let Some(first) = trimmed_before {
                write!(f, "; {first} is the first that is still there: rows may be older")?;
            }
        }
        let more = told.count();
        if more > 0 {
            write!(
                f,
                "\n              of {more} more of which the same is to be said (--json names all)"
            )?;
        }
        let plain = self.streams.iter().filter(|stream| is_many && !stream.is_special()).count();
        if plain > 0 {
            write!(f, "\n              of {plain} streams without a fault of their own, whole")?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    /// The verdict: a line for each kind of fault, examples below it, and what was compared.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fault in Fault::ALL {
            let found = self.faults.of(fault);
            let count = found.map_or(0, |found| found.count);
            let mark = if count == 0 { "ok" } else { "NO" };
            writeln!(f, "{mark}  {count:>9} {}", fault.text())?;
            for example in found.iter().flat_map(|found| &found.examples) {
                writeln!(f, "              {example}")?;
            }
        }
        let Counts { records, foreign, other_tables, later, largest_bytes, .. } = self.counts;
        write!(f, "    {records:>9} records read, the largest of {largest_bytes} metered bytes")?;
        self.write_streams(f)?;
        for (count, text) in [
            (foreign, "records of other writers left out"),
            (other_tables, "records of other tables left out"),
            (later, "records later than the comparison: only their order was judged"),
        ] {
            if count > 0 {
                write!(f, "\n    {count:>9} {text}")?;
            }
        }
        let Some(moment) = &self.moment else {
            return write!(f, "\n              the tables were not looked at");
        };
        write!(f, "\n              the tables as they were at {moment}:")?;
        for table in &self.tables {
            let TableReport { table: name, rows, compared, values, altered, .. } = table;
            write!(
                f,
                "\n    {rows:>9} rows of {name}, {compared} of them the same, in {values} values; \
                 {altered} values altered or left out"
            )?;
            for (count, text) in [
                (table.held, "rows held back: a change is parked, or waits behind one"),
                (
                    table.given_up,
                    "rows that differ since a change was given up (messages ack) or became a dead \
                     letter",
                ),
                (table.unmentioned, "rows that no record names"),
                (table.unjudged, "rows in parts or a form of a transform's own: not compared"),
            ] {
                if count > 0 {
                    write!(f, "\n    {count:>9}   {text}")?;
                }
            }
            for (file, count) in &table.dropped {
                write!(
                    f,
                    "\n    {count:>9}   rows that `{file}`, as it is now, drops: not in the stream, \
                     or in it as they were before"
                )?;
            }
            if table.opaque > 0 {
                write!(
                    f,
                    "\nNO  {:>9}   records with a body of a transform's own: {name} cannot be \
                     compared (--table names others)",
                    table.opaque
                )?;
            }
            for (column, count) in &table.columns {
                write!(
                    f,
                    "\n    {count:>9}   rows differ in `{column}`; where a transform alters it, or it came \
                     later and rows got its default unwritten: --ignore-column '{name}.{column}'"
                )?;
            }
        }
        Ok(())
    }
}
