//! Is what S2 holds what Postgres holds? The stream, folded into tables by their keys, against the
//! source's tables, while the pipeline runs.
//!
//! ```text
//! read the stream ──▶ choose a moment ──▶ wait until all before it is confirmed ──▶ who is held?
//!                     snapshot of the tables                                          │
//!        report ◀── compare row by row ◀── read the rest of the stream ◀──────────────┘
//! ```
//!
//! **The moment.** The tables are read in one snapshot, and the stream is judged up to it. Postgres
//! does not say which commit a snapshot ends with: a commit has its place in the log shortly before
//! others can see it. So the moment is two places: the end of the log [`SETTLE`] before the snapshot
//! was taken, and its end right after. What committed before the first is in the snapshot, what
//! committed behind the second is not, and a row that changed in between may be in any of the states
//! that it had there. A commit that stays invisible for longer than that (a synchronous standby that
//! does not answer) shows as a difference.
//!
//! **Memory** has a bound that does not depend on the tables: the fold lives in a temporary file (see
//! [`scratch`]), the source is read as a stream of rows, and S2 by pages.
//!
//! **What is not lost.** Once everything up to the moment is confirmed, each change is in the stream
//! or in the store; those in the store are asked for then, so that their rows count as held. Where no
//! pipeline runs, nothing is confirmed, and the moment is not waited for: what the slot still has counts
//! as held, too ([`Verifier::choose_moment_without_pipeline`]). What an operator gave up the store
//! remembers, so that such rows are named as that. Where a
//! transform has altered a value it says so in the metadata, in a list or object whose name ends in
//! `_columns`, or the operator names the column. Nobody writes down what a transform dropped: the chain
//! that is live is asked whether it would drop the row as it is now, see [`drops`].
//!
//! **Several streams**, to which transforms route, are compared as one: see [`fold`]. Where they route to new
//! ones meanwhile, all that have something of before the moment are known once it is confirmed, and are read
//! then ([`Verifier::read_also`]).
//!
//! Values come from Postgres as text and become JSON by the mapper that the pipeline uses, unless the
//! caller has an SQL expression for a column's JSON: the demonstration has one for every type.

mod canon;
mod compare;
mod drops;
mod fault;
mod fold;
mod message;
mod order;
mod report;
mod scratch;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use self::compare::{Comparison, Rules};
use self::drops::{Question, SourceRow};
use self::fold::Fold;
use crate::change::{Action, Change, Column, Lsn, Position};
use crate::message::value_json;
use crate::pipeline::group::key_columns;
use crate::sink;
use crate::sink::error::Named;
use crate::source::{self, Inspector, Published};
use crate::store;
use crate::store::given_up::GivenUp;
use crate::table_name::TableName;

pub use drops::Drops;
pub use fault::{Fault, Faults, Found};
pub use fold::{Applied, Moment, Observer};
pub use report::{Counts, Report, StreamReport, TableReport};

/// How long before the snapshot the moment begins: commits become visible within milliseconds.
const SETTLE: Duration = Duration::from_secs(1);

/// How often Postgres is asked whether the moment is confirmed.
const ASK_INTERVAL: Duration = Duration::from_millis(200);

/// Stands for the key of a row in a table that has none.
const WHOLE_TABLE: &str = "";

/// Why the comparison could not be made at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not read the source to compare it")]
    Source(#[from] source::Error),
    #[error("could not read the stream")]
    Sink(#[from] sink::Error),
    #[error("could not make a temporary folder (TMPDIR chooses where)")]
    Folder(#[source] std::io::Error),
    #[error("could not use the temporary file of the comparison (TMPDIR chooses where it is)")]
    Scratch(#[from] rusqlite::Error),
    #[error(
        "the pipeline has not passed {moment} after {} s: slot `{slot}` is confirmed up to \
         {confirmed}. Whether it runs, and what it waits for, is said by `sluicebox check`; --wait \
         waits longer",
        waited.as_secs()
    )]
    Behind { slot: String, moment: Lsn, confirmed: String, waited: Duration },
    #[error("{table} is not among `source.tables`, so that its changes are not in the stream")]
    NotPublished { table: TableName },
    #[error("`{column}` is no column of a table that is compared")]
    NoColumn { column: String },
    #[error("the thread that asks the transforms broke off, a defect of Sluicebox")]
    Chain,
}

/// What to compare, and how.
#[derive(Clone, Debug)]
pub struct Settings {
    pub source: source::Settings,
    /// Which of its tables; all of them where there is none.
    pub tables: Vec<TableName>,
    /// The streams to read, in the client's basin; the client's own alone where there is none.
    pub streams: Vec<String>,
    /// Whose records are meant; those of whoever wrote the first record where it is not known.
    pub pipeline_id: Option<String>,
    /// The range of the stream; from its first record to its tail where there is none. With an end,
    /// the tables are not looked at.
    pub from: Option<u64>,
    pub to: Option<u64>,
    /// `column`, `table.column` or `schema.table.column`, as they are.
    pub ignore_columns: Vec<String>,
    /// The only columns that transforms may have altered; any, where there is none.
    pub alterable: Option<Vec<String>>,
    /// Rows that no record names are older than the slot.
    pub allow_unmentioned: bool,
    /// Keep values, and show them where they differ.
    pub show_values: bool,
    /// For a column, SQL that gives its JSON as text.
    pub expressions: HashMap<String, String>,
    /// How long the pipeline may take to confirm the moment.
    pub wait: Duration,
}

impl Settings {
    #[must_use]
    pub fn new(source: source::Settings) -> Self {
        Self {
            source,
            tables: Vec::new(),
            streams: Vec::new(),
            pipeline_id: None,
            from: None,
            to: None,
            ignore_columns: Vec::new(),
            alterable: None,
            allow_unmentioned: false,
            show_values: false,
            expressions: HashMap::new(),
            wait: Duration::from_secs(60),
        }
    }
}

/// A change that is in the store or still in the slot.
#[derive(Clone, Debug)]
pub struct Held {
    /// `schema.name`.
    pub table: String,
    pub position: Position,
    /// The keys of the rows that it concerns, as objects by column with their values as the store shows
    /// them; all rows, where there is none.
    pub keys: Vec<serde_json::Value>,
}

impl Held {
    /// What a change concerns.
    #[must_use]
    pub fn of(change: &Change) -> Self {
        let keys = match change.action {
            Action::Truncate => Vec::new(),
            Action::Insert | Action::Update | Action::Delete | Action::Read => {
                store::primary_keys(change)
            }
        };
        Self { table: change.table.qualified_name(), position: change.position, keys }
    }
}

/// One of the streams that are read.
#[derive(Debug)]
struct Stream {
    client: sink::Client,
    next: u64,
    report: StreamReport,
}

impl Stream {
    fn new(client: sink::Client, from: u64) -> Self {
        let name = client.place().stream.clone();
        let report =
            StreamReport { name, from, to: from, trimmed_before: None, is_gone: false, faults: 0 };
        Self { client, next: from, report }
    }
}

/// A comparison under way.
pub struct Verifier<'a> {
    settings: Settings,
    streams: Vec<Stream>,
    inspector: Inspector,
    published: Vec<Published>,
    fold: Fold<'a>,
    drops: Option<Drops>,
}

impl std::fmt::Debug for Verifier<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").field("streams", &self.streams).finish_non_exhaustive()
    }
}

impl<'a> Verifier<'a> {
    /// Looks at the tables' columns.
    ///
    /// # Errors
    ///
    /// When Postgres does not answer, or the settings name what is not there.
    pub async fn open(mut settings: Settings, client: sink::Client) -> Result<Self, Error> {
        for table in &settings.tables {
            if !settings.source.tables.contains(table) {
                return Err(Error::NotPublished { table: table.clone() });
            }
        }
        if !settings.tables.is_empty() {
            settings.source.tables.clone_from(&settings.tables);
        }
        let inspector = Inspector::connect(&settings.source).await?;
        let published = inspector.tables().await?;
        let mut unknown = settings.ignore_columns.clone();
        let tables = published.iter().map(|table| {
            let folded = folded(table, &settings, &mut unknown);
            (folded, table.names.clone())
        });
        let from = settings.from.unwrap_or(0);
        let own = client.place().stream.clone();
        let streams: Vec<Stream> = match settings.streams.as_slice() {
            [] => vec![Stream::new(client, from)],
            names => names
                .iter()
                .map(|name| {
                    let client = if *name == own {
                        client.clone()
                    } else {
                        client.for_stream(name, Named::Route)?
                    };
                    Ok(Stream::new(client, from))
                })
                .collect::<Result<_, sink::Error>>()?,
        };
        let names = streams.iter().map(|stream| stream.report.name.clone()).collect();
        let mut fold = Fold::new(tables.collect(), names)?;
        if let Some(column) = unknown.into_iter().next() {
            return Err(Error::NoColumn { column });
        }
        fold.partial = settings.from.is_some() || settings.allow_unmentioned;
        fold.keep_values = settings.show_values;
        fold.pipeline.clone_from(&settings.pipeline_id);
        Ok(Self { settings, streams, inspector, published, fold, drops: None })
    }

    /// Has a chain asked about rows that are not in the stream.
    pub fn ask(&mut self, drops: Option<Drops>) {
        self.drops = drops;
    }

    /// Also tells each change to somebody else, in the stream's order.
    pub fn observe(&mut self, observer: Box<Observer<'a>>) {
        self.fold.observe(observer);
    }

    /// Reads on to each stream's present end, or to the end of the range.
    ///
    /// # Errors
    ///
    /// When S2 does not answer, or the temporary file cannot be written.
    pub async fn read(&mut self, mut progress: impl FnMut(u64, u64)) -> Result<(), Error> {
        let is_alone = self.streams.len() == 1;
        for (index, stream) in self.streams.iter_mut().enumerate() {
            let tail = match stream.client.tail().await {
                Ok(tail) => tail.next_seq,
                // One of several may have been deleted since messages were routed to it.
                Err(error) if error.is_stream_missing() && !is_alone => {
                    stream.report.is_gone = true;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let end = self.settings.to.map_or(tail, |to| to.min(tail));
            let mut reader = stream.client.read_range(stream.next, end);
            while let Some(records) = reader.next().await? {
                if stream.next == 0
                    && let Some(first) = records.first().filter(|first| first.seq > 0)
                {
                    stream.report.trimmed_before = Some(first.seq);
                    self.fold.partial = true;
                }
                let before = self.fold.faults.total();
                for record in &records {
                    self.fold.add(index, record)?;
                }
                self.fold.found[index] += self.fold.faults.total() - before;
                stream.next = reader.next_seq();
                progress(stream.next, end);
            }
            stream.next = stream.next.max(end);
            stream.report.to = stream.next;
        }
        Ok(())
    }

    /// Chooses the moment, and waits until the pipeline has confirmed everything before it. Whoever
    /// knows what is in the store has to be asked after this, and before [`Self::finish`].
    ///
    /// # Errors
    ///
    /// When Postgres does not answer, or the pipeline does not get there in time.
    pub async fn choose_moment(&mut self) -> Result<(), Error> {
        if self.settings.to.is_some() {
            return Ok(());
        }
        let to = self.take_snapshot().await?;
        self.inspector.push_wal().await?;
        let begun = Instant::now();
        loop {
            let confirmed = self.inspector.confirmed().await?;
            if confirmed.is_some_and(|confirmed| confirmed >= to) {
                return Ok(());
            }
            if begun.elapsed() > self.settings.wait {
                return Err(Error::Behind {
                    slot: self.settings.source.slot.clone(),
                    moment: to,
                    confirmed: confirmed.map_or("nothing".to_owned(), |lsn| lsn.to_string()),
                    waited: self.settings.wait,
                });
            }
            tokio::time::sleep(ASK_INTERVAL).await;
        }
    }

    async fn take_snapshot(&mut self) -> Result<Lsn, Error> {
        let from = self.inspector.wal_end().await?;
        tokio::time::sleep(SETTLE).await;
        let to = self.inspector.begin().await?;
        self.fold.moment = Some(Moment { from, to });
        Ok(to)
    }

    /// The same where no pipeline runs, so that nobody confirms anything: what the slot has not been told
    /// of is looked at without taking it. Returned as held are the changes that are not in the stream for
    /// that reason.
    ///
    /// # Errors
    ///
    /// When Postgres does not answer, or the slot is in use or not there.
    pub async fn choose_moment_without_pipeline(&mut self) -> Result<Vec<Held>, Error> {
        if self.settings.to.is_some() {
            return Ok(Vec::new());
        }
        self.take_snapshot().await?;
        let mut held = Vec::new();
        let mut pending = self.inspector.pending().await?;
        while let Some(changes) = pending.next().await? {
            held.extend(changes.iter().map(Held::of));
        }
        Ok(held)
    }

    /// Reads these streams, too: messages were routed there since the others were named. Whoever knows them has
    /// to be asked after the moment was confirmed and after what is held, so that a change of before the moment
    /// is in one of them or held, and before what was given up is told. `pipeline_id` is whose records are
    /// meant in several streams.
    ///
    /// # Errors
    ///
    /// When a name is none, or the temporary file cannot be written.
    pub fn read_also(
        &mut self,
        names: impl IntoIterator<Item = String>,
        pipeline_id: Option<String>,
    ) -> Result<(), Error> {
        let is_new = |name: &String| self.streams.iter().all(|known| known.report.name != *name);
        let new: Vec<String> = names.into_iter().filter(is_new).collect();
        let Some(own) = self.streams.first().filter(|_| !new.is_empty()) else { return Ok(()) };
        let client = own.client.clone();
        for name in &new {
            let client = client.for_stream(name, Named::Route)?;
            self.streams.push(Stream::new(client, 0));
        }
        if self.fold.add_streams(new)? {
            self.fold.pipeline = pipeline_id;
            for stream in &mut self.streams {
                stream.next = stream.report.from;
            }
        }
        Ok(())
    }

    /// Reads the rest of the stream and compares. `held` is what was in the store after the moment
    /// had been confirmed.
    ///
    /// # Errors
    ///
    /// As [`Self::read`], and when Postgres does not answer.
    pub async fn finish(
        mut self,
        held: &[Held],
        progress: impl FnMut(u64, u64),
    ) -> Result<Report, Error> {
        self.read(progress).await?;
        self.hold(held)?;
        self.fold.settle()?;
        for (label, found, parts) in self.fold.scratch.incomplete()? {
            self.fold
                .faults
                .add(Fault::Missing, || format!("{label}: {} of its {parts} parts", parts - found));
        }
        let mut tables = Vec::new();
        if self.fold.moment.is_some() {
            for index in 0..self.published.len() {
                tables.push(self.compare(index).await?);
            }
        }
        let reports = self.streams.into_iter().zip(&self.fold.found);
        let reports = reports.map(|(stream, &faults)| StreamReport { faults, ..stream.report });
        let report = Report {
            holds: false,
            streams: reports.collect(),
            counts: self.fold.counts,
            moment: None,
            tables,
            faults: self.fold.faults,
        };
        Ok(report.judge(self.fold.moment))
    }

    /// These were given up by an operator: their rows need not be as in the table. To be told before
    /// the stream is read, and again before [`Self::finish`] for what came meanwhile.
    ///
    /// # Errors
    ///
    /// When the temporary file cannot be written.
    pub fn give_up(&mut self, given_up: &[GivenUp]) -> Result<(), Error> {
        for message in given_up {
            let Some(table) = self.fold.table(&message.table) else { continue };
            let keys = std::slice::from_ref(&message.key);
            let keys = if message.action == "truncate" { &[] } else { keys };
            for key in self.rows(table, keys) {
                self.fold.scratch.give_up(table, &key)?;
            }
        }
        Ok(())
    }

    fn hold(&mut self, held: &[Held]) -> Result<(), Error> {
        for message in held {
            let Some(table) = self.fold.table(&message.table) else { continue };
            // Delivered since: then the stream tells.
            if self.fold.scratch.has_seen(message.position)? {
                continue;
            }
            for key in self.rows(table, &message.keys) {
                self.fold.scratch.hold(table, &key)?;
            }
        }
        Ok(())
    }

    /// The rows that a message concerns, by their keys as they are known here.
    fn rows(&self, table: usize, keys: &[serde_json::Value]) -> Vec<String> {
        if !self.fold.tables[table].has_key || keys.is_empty() {
            return vec![WHOLE_TABLE.to_owned()];
        }
        let columns = &self.published[table].table.columns;
        let row = |key: &serde_json::Value| {
            // The store has the text that Postgres sent.
            let mut values: HashMap<&str, String> = HashMap::new();
            for column in columns {
                let Some(value) = key.get(&column.name) else { continue };
                let json = match value.as_str() {
                    Some(text) => value_json(&column.kind, text),
                    None => value.to_string(),
                };
                values.insert(&column.name, json);
            }
            self.fold.key_of(table, |name| values.get(name).map(String::as_str))
        };
        keys.iter().filter_map(row).collect()
    }

    async fn compare(&mut self, index: usize) -> Result<TableReport, Error> {
        let rules =
            Rules { allow_unmentioned: self.fold.partial, show_values: self.settings.show_values };
        let published = &self.published[index];
        let columns = &published.table.columns;
        let expressions: Vec<Option<&str>> = columns
            .iter()
            .map(|column| self.settings.expressions.get(&column.name).map(String::as_str))
            .collect();
        let mut comparison = Comparison::new(&self.fold, index, rules);
        let mut rows = self.inspector.rows(published, &expressions).await?;
        while let Some(row) = rows.next().await? {
            let values: Vec<Cow<'_, str>> = columns
                .iter()
                .zip(&expressions)
                .enumerate()
                .map(|(at, (column, expression))| match (row.get(at), expression) {
                    (None, _) => Cow::Borrowed("null"),
                    (Some(json), Some(_)) => Cow::Borrowed(json),
                    (Some(text), None) => Cow::Owned(value_json(&column.kind, text)),
                })
                .collect();
            let texts: Vec<Option<&str>> = (0..columns.len()).map(|at| row.get(at)).collect();
            let table = &published.table;
            let ask = |drops| Question { drops, table, values: &texts };
            let question = self.drops.as_ref().map(ask);
            comparison.row(&mut self.fold, SourceRow { json: &values, question })?;
        }
        comparison.finish(&mut self.fold)
    }
}

/// How a table is folded. Takes what it finds out of `unknown`.
fn folded(published: &Published, settings: &Settings, unknown: &mut Vec<String>) -> fold::Table {
    let Published { table, name, .. } = published;
    let key = key_columns(table);
    let column = |(index, column): (usize, &Column)| {
        let names = [
            column.name.clone(),
            format!("{}.{}", name.name, column.name),
            format!("{name}.{}", column.name),
        ];
        unknown.retain(|wanted| !names.contains(wanted));
        let alterable = settings.alterable.as_ref();
        fold::Column {
            is_key: key.contains(&index),
            ignored: settings.ignore_columns.iter().any(|ignored| names.contains(ignored)),
            may_be_altered: alterable.is_none_or(|columns| columns.contains(&column.name)),
            name: column.name.clone(),
        }
    };
    let columns = table.columns.iter().enumerate().map(column).collect();
    fold::Table::new(name.to_string(), columns, table.grouping.clone())
}

/// The beginning of a text, at most so many characters.
pub(crate) fn shorten(text: &str, characters_max: usize) -> String {
    match text.char_indices().nth(characters_max) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}… ({} bytes)", &text[..end], text.len()),
    }
}
