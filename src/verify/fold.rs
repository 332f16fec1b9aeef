//! The stream as tables: each record done to a row, and held against what was there before.
//!
//! Order and doubling are judged by what the records say of themselves; no other knowledge of the
//! source is needed for that. Rows are kept as digests in [`Scratch`].
//!
//! Where transforms route messages, a row's changes lie in several streams. Nothing in one stream says
//! where another was at that time, so each is judged by itself as it is read, and its messages are laid
//! aside in [`Scratch`]; when all are read, they are done to the rows in the order of the source. So are
//! those of a table whose changes wait for nothing, where a parked one comes behind what was committed
//! after it.

use std::collections::{HashMap, HashSet};

use super::canon::{canonical, digest};
use super::fault::{Fault, Faults};
use super::message::{Columns, Headers, Message};
use super::order::Order;
use super::scratch::{Cell, Row, Scratch, Spooled, State};
use super::{Counts, Error};
use crate::change::{Action, Grouping, Lsn, Position};
use crate::message::header;
use crate::pipeline::grants::store_of;
use crate::sink::ReadRecord;
use crate::sink::record::{RECORD_BYTES_MAX, metered_bytes};

/// A column that is compared, or not.
#[derive(Clone, Debug)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) is_key: bool,
    /// The operator does not want it compared.
    pub(super) ignored: bool,
    /// Whether a transform may have altered it; a note about any other is a fault.
    pub(super) may_be_altered: bool,
}

/// A table whose records are folded.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) name: String,
    pub(super) columns: Vec<Column>,
    /// Without a key its rows can only be counted.
    pub(super) has_key: bool,
    /// What keeps its order: order is judged by it, and row by row.
    pub(super) grouping: Grouping,
    /// Records that a transform gave a body of its own: nothing says what they did to which row.
    pub(super) opaque: u64,
    /// For each column, the rows of the table that differ there.
    pub(super) different: Vec<u64>,
    /// For each stream.
    pub(super) order: Vec<Order>,
}

impl Table {
    pub(super) fn new(name: String, columns: Vec<Column>, grouping: Grouping) -> Self {
        let has_key = columns.iter().any(|column| column.is_key);
        let different = vec![0; columns.len()];
        Self { name, columns, has_key, grouping, opaque: 0, different, order: Vec::new() }
    }

    /// The key's values as a JSON array; nothing where one is missing.
    pub(super) fn key<'a>(&self, value: impl Fn(&str) -> Option<&'a str>) -> Option<String> {
        let keys = self.columns.iter().filter(|column| column.is_key);
        let values = keys.map(|column| value(&column.name).map(canonical));
        let values: Vec<_> = values.collect::<Option<_>>()?;
        Some(format!("[{}]", values.join(",")))
    }

    /// The group that a row belongs to, where columns make the groups and the row has them all.
    pub(super) fn group<'a>(&self, value: impl Fn(&str) -> Option<&'a str>) -> Option<String> {
        let Grouping::Columns(columns) = &self.grouping else { return None };
        let part = |index: &usize| {
            let name = &self.columns.get(*index)?.name;
            Some(format!("{name}={}", canonical(value(name)?)))
        };
        Some(columns.iter().map(part).collect::<Option<Vec<_>>>()?.join(", "))
    }

    /// A key as people read it: `id=7, part="a"`.
    pub(super) fn show(&self, key: &str) -> String {
        let Ok(values) = serde_json::from_str::<Vec<&serde_json::value::RawValue>>(key) else {
            return key.to_owned();
        };
        let names = self.columns.iter().filter(|column| column.is_key);
        let pairs = names.zip(values).map(|(column, value)| format!("{}={value}", column.name));
        format!("{} {}", self.name, pairs.collect::<Vec<_>>().join(", "))
    }
}

/// What is known of one applied change, for who has more to compare it with.
#[derive(Debug)]
pub struct Applied<'a> {
    /// The row's key as a JSON array.
    pub key: &'a str,
    pub action: Action,
    record: &'a Columns<'a>,
}

impl Applied<'_> {
    /// The JSON of a column that the record has.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<&str> {
        self.record.get(name).map(|value| value.get())
    }
}

/// The moment that the tables are compared at, as positions: what committed before `from` is in
/// the snapshot, what committed at or after `to` is not, and of what lies between nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub from: Lsn,
    pub to: Lsn,
}

/// What watches the folding.
pub type Observer<'a> = dyn FnMut(&Applied<'_>) + Send + 'a;

/// The stream as far as it was read.
pub(super) struct Fold<'a> {
    pub(super) tables: Vec<Table>,
    by_name: HashMap<String, usize>,
    pub(super) scratch: Scratch,
    pub(super) faults: Faults,
    pub(super) counts: Counts,
    /// The stream is read from somewhere in the middle: rows may be older than that.
    pub(super) partial: bool,
    pub(super) keep_values: bool,
    /// Known before records are read that may be later than it.
    pub(super) moment: Option<Moment>,
    /// The streams that are read, by their names.
    streams: Vec<String>,
    /// Whose records are folded.
    pub(super) pipeline: Option<String>,
    /// And theirs who have fenced a stream, and so had it to themselves: where a state folder was given up
    /// as lost, another store goes on behind it.
    stores: HashSet<String>,
    /// How many faults were found by each stream's own records.
    pub(super) found: Vec<u64>,
    observer: Option<Box<Observer<'a>>>,
}

impl<'a> Fold<'a> {
    /// Each table with the names that its records may carry, and the streams that are read.
    pub(super) fn new(
        tables: Vec<(Table, Vec<String>)>,
        streams: Vec<String>,
    ) -> Result<Self, Error> {
        let mut by_name = HashMap::new();
        for (index, (_, names)) in tables.iter().enumerate() {
            by_name.extend(names.iter().map(|name| (name.clone(), index)));
        }
        Ok(Self {
            tables: tables.into_iter().map(|(table, _)| table).collect(),
            by_name,
            scratch: Scratch::create()?,
            faults: Faults::default(),
            counts: Counts::default(),
            partial: false,
            keep_values: false,
            moment: None,
            found: vec![0; streams.len()],
            streams,
            pipeline: None,
            stores: HashSet::new(),
            observer: None,
        })
    }

    pub(super) fn observe(&mut self, observer: Box<Observer<'a>>) {
        self.observer = Some(observer);
    }

    /// The table of that name, if it is compared.
    pub(super) fn table(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The key of a row whose values somebody knows as JSON.
    pub(super) fn key_of<'v>(
        &self,
        table: usize,
        value: impl Fn(&str) -> Option<&'v str>,
    ) -> Option<String> {
        self.tables[table].key(value)
    }

    pub(super) fn has_several_streams(&self) -> bool {
        self.streams.len() > 1
    }

    /// Whether a table's messages are laid aside until all streams are read.
    fn is_spooled(&self, table: usize) -> bool {
        self.has_several_streams() || self.tables[table].grouping == Grouping::None
    }

    /// How a record is named in what is found.
    pub(super) fn record(&self, stream: usize, seq: u64) -> String {
        match self.streams.get(stream).filter(|_| self.has_several_streams()) {
            Some(name) => format!("record {seq} of `{name}`"),
            None => format!("record {seq}"),
        }
    }

    /// Takes a stream's next record. Command records are no data and are passed over.
    pub(super) fn add(&mut self, stream: usize, record: &ReadRecord) -> Result<(), Error> {
        if record.is_command() {
            self.counts.commands += 1;
            self.stores.extend(record.fence().and_then(store_of).map(str::to_owned));
            return Ok(());
        }
        self.counts.records += 1;
        let lengths = record.headers.iter().map(|header| (header.name.len(), header.value.len()));
        let bytes = metered_bytes(lengths, record.body.len());
        self.counts.largest_bytes = self.counts.largest_bytes.max(bytes);
        let name = self.record(stream, record.seq);
        if bytes > RECORD_BYTES_MAX {
            self.faults.add(Fault::Oversize, || format!("{name}: {bytes} bytes"));
        }
        // Nothing takes this header from a record of ours.
        if record.header(header::PIPELINE).is_none() {
            self.counts.foreign += 1;
            return Ok(());
        }
        let headers = match Headers::of(record) {
            Ok(headers) => headers,
            Err(header) => {
                self.faults.add(Fault::Malformed, || {
                    format!("{name}: the header {header} is missing or cannot be read")
                });
                return Ok(());
            }
        };
        let pipeline = self.pipeline.get_or_insert_with(|| headers.pipeline.clone());
        if *pipeline != headers.pipeline && !self.stores.contains(&headers.pipeline) {
            self.counts.foreign += 1;
            return Ok(());
        }
        // Not a message but what became of one: the store says of which.
        if record.header(header::DEAD_LETTER).is_some() {
            return Ok(());
        }
        if !self.scratch.see(headers.position, headers.part)? {
            let Headers { key, part, parts, .. } = &headers;
            self.faults
                .add(Fault::Doubled, || format!("{name}: sb-key {key}, sb-part {part}/{parts}"));
            return Ok(());
        }
        if headers.parts > 1 {
            let label = format!("{} with sb-key {}", headers.table, headers.key);
            self.scratch.add_part(headers.position, headers.parts, &label)?;
        }
        let Some(table) = self.table(&headers.table) else {
            self.counts.other_tables += 1;
            return Ok(());
        };
        if let Ok(message) = serde_json::from_slice(&record.body) {
            return self.take(stream, record, table, &headers, &message, &record.body);
        }
        self.tables[table].opaque += 1;
        // A message that was cut is put together as its consumers do it.
        let Headers { position, part, parts, .. } = headers;
        if parts > 1
            && let Some(body) = self.scratch.join(position, part, parts, &record.body)?
            && let Ok(message) = serde_json::from_slice(&body)
        {
            self.tables[table].opaque -= u64::from(parts);
            let whole = Headers { part: 0, parts: 1, ..headers };
            return self.take(stream, record, table, &whole, &message, &body);
        }
        Ok(())
    }

    /// Takes what a record, or the last of several, has told.
    fn take(
        &mut self,
        stream: usize,
        record: &ReadRecord,
        table: usize,
        headers: &Headers,
        message: &Message<'_>,
        body: &[u8],
    ) -> Result<(), Error> {
        let name = self.record(stream, record.seq);
        self.check_headers(&name, headers, message);
        self.judge_order(stream, &name, table, headers.position, message)?;
        if self.is_spooled(table) {
            return self.scratch.spool(&Spooled {
                at: headers.position,
                part: headers.part,
                parts: headers.parts,
                stream,
                seq: record.seq,
                table,
                body: body.to_vec(),
            });
        }
        self.apply(&name, table, headers.position, headers.parts, message)
    }

    /// Takes more streams than before. Says whether it has forgotten what it was told, because one alone
    /// was done to the rows at once: all are to be read again then.
    pub(super) fn add_streams(&mut self, names: Vec<String>) -> Result<bool, Error> {
        let was_spooled = self.has_several_streams();
        self.streams.extend(names);
        self.found.resize(self.streams.len(), 0);
        if was_spooled {
            return Ok(false);
        }
        self.scratch = Scratch::create()?;
        self.faults = Faults::default();
        self.counts = Counts::default();
        self.found.fill(0);
        for table in &mut self.tables {
            table.opaque = 0;
            table.different.fill(0);
            table.order.clear();
        }
        Ok(true)
    }

    /// Does what was laid aside, in the order of the source. To be called once, when all streams have
    /// been read and what is held has been told.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        let mut after = None;
        while let Some(spooled) = self.scratch.next_spooled(after)? {
            after = Some((spooled.at, spooled.part));
            let before = self.faults.total();
            let name = self.record(spooled.stream, spooled.seq);
            // It could be read when it was laid aside.
            if let Ok(message) = serde_json::from_slice::<Message<'_>>(&spooled.body) {
                self.apply(&name, spooled.table, spooled.at, spooled.parts, &message)?;
            }
            self.found[spooled.stream] += self.faults.total() - before;
        }
        Ok(())
    }

    /// Holds the headers against the body.
    fn check_headers(&mut self, record: &str, headers: &Headers, message: &Message<'_>) {
        let metadata = &message.metadata;
        let table = format!("{}.{}", metadata.table_schema, metadata.table_name);
        for (what, found, expected) in [
            ("metadata.idempotency_key", metadata.idempotency_key.as_str(), headers.key.as_str()),
            ("the table in metadata", &table, &headers.table),
            ("action", message.action.as_str(), &headers.action),
        ] {
            if found != expected {
                self.faults.add(Fault::Malformed, || {
                    format!("{record}: {what} is `{found}`, and its header `{expected}`")
                });
            }
        }
    }

    /// Does to our table what the message says was done to the source's.
    fn apply(
        &mut self,
        record: &str,
        table: usize,
        at: Position,
        parts: u32,
        message: &Message<'_>,
    ) -> Result<(), Error> {
        let is_later = self.moment.is_some_and(|moment| at.commit_lsn >= moment.to);
        let is_late = self.moment.is_some_and(|moment| at.commit_lsn >= moment.from);
        self.counts.later += u64::from(is_later);
        if message.action == Action::Truncate {
            return if is_later { Ok(()) } else { self.scratch.truncate(table, is_late) };
        }
        if !self.tables[table].has_key {
            return if is_later {
                self.add_to_bag(record, table, message, Some(true))
            } else {
                self.add_to_bag(record, table, message, is_late.then_some(false))
            };
        }
        let new = |name: &str| message.after(name);
        let old = |name: &str| message.before(name);
        let state = &self.tables[table];
        let (Some(key), Some(old_key)) = (state.key(new), state.key(old)) else {
            self.tables[table].opaque += 1;
            return Ok(());
        };
        if let Some(observer) = &mut self.observer {
            observer(&Applied { key: &key, action: message.action, record: &message.record });
        }
        // The row, and where a key was changed the one that it becomes.
        let mut touched = vec![(old_key.clone(), self.scratch.row(table, &old_key)?)];
        if key != old_key {
            touched.push((key.clone(), self.scratch.row(table, &key)?));
        }
        for (key, row) in &touched {
            if let Some(last) = row.as_ref().map(|row| row.at).filter(|last| *last > at) {
                let row = self.tables[table].show(key);
                self.faults
                    .add(Fault::Disordered, || format!("{record}: {row} at {at}, after {last}"));
                // What is known of the row is newer.
                return Ok(());
            }
        }
        let empty = |state| Row { at, state, cells: Vec::new(), values: None };
        if is_later {
            for (key, row) in touched {
                let row = row.map_or_else(|| empty(State::Unknown), |row| Row { at, ..row });
                self.scratch.put(table, &key, &row)?;
            }
            return Ok(());
        }
        let former = touched[0].1.take();
        // What came before it need not have been sent.
        if !self.scratch.is_given_up(table, &old_key)? && !self.scratch.is_held(table, &old_key)? {
            self.check_former(record, table, &old_key, message, former.as_ref(), parts);
        }
        if is_late {
            let gone = if self.partial { State::Unknown } else { State::Deleted };
            let gone = empty(gone);
            self.scratch.put_version(table, &old_key, former.as_ref().unwrap_or(&gone))?;
            if let Some((key, row)) = touched.get(1) {
                self.scratch.put_version(table, key, row.as_ref().unwrap_or(&gone))?;
            }
        }
        if key != old_key {
            self.scratch.put(table, &old_key, &empty(State::Deleted))?;
        }
        let row = if parts > 1 {
            empty(State::Opaque)
        } else if message.action == Action::Delete {
            empty(State::Deleted)
        } else {
            self.row_after(record, table, at, message, former)
        };
        self.scratch.put(table, &key, &row)
    }

    /// An insert needs a row that is not there, and anything else one that is.
    fn check_former(
        &mut self,
        record: &str,
        table: usize,
        key: &str,
        message: &Message<'_>,
        former: Option<&Row>,
        parts: u32,
    ) {
        let state = former.map(|row| row.state);
        let known = match state {
            None => (!self.partial).then_some(false),
            Some(State::Live) => Some(true),
            Some(State::Deleted) => Some(false),
            Some(State::Unknown | State::Opaque) => None,
        };
        let Some(is_there) = known.filter(|_| parts == 1) else { return };
        let expected = match message.action {
            Action::Insert => false,
            Action::Update | Action::Delete => true,
            Action::Read | Action::Truncate => return,
        };
        if is_there == expected {
            return;
        }
        let (row, action) = (self.tables[table].show(key), message.action);
        if is_there {
            self.faults.add(Fault::Different, || {
                format!("{record}: {action} of {row}, which is there already")
            });
        } else {
            self.faults.add(Fault::Missing, || {
                format!(
                    "before {record}: the insert of {row}, of which this is the {action} \
                     (--allow-older, where it is older than the slot or a transform dropped it)"
                )
            });
        }
    }

    fn row_after(
        &mut self,
        record: &str,
        table: usize,
        at: Position,
        message: &Message<'_>,
        former: Option<Row>,
    ) -> Row {
        let former = former.filter(|row| row.state == State::Live);
        let table = &self.tables[table];
        let mut values = self.keep_values.then(|| Vec::with_capacity(table.columns.len()));
        let mut cells = Vec::with_capacity(table.columns.len());
        for (index, column) in table.columns.iter().enumerate() {
            let unchanged = message.metadata.unchanged_columns.contains(&column.name);
            let altered = message.metadata.is_altered(&column.name);
            if altered && !column.may_be_altered {
                let (table, column) = (&table.name, &column.name);
                self.faults.add(Fault::Different, || {
                    format!("{record}: `{column}` of {table} is noted as altered")
                });
            }
            let mut value = None;
            cells.push(match message.record.get(&column.name) {
                _ if column.ignored || altered => Cell::Altered,
                Some(json) => {
                    let json = canonical(json.get());
                    let digest = digest(&json);
                    value = self.keep_values.then(|| json.into_owned());
                    Cell::Value(digest)
                }
                None if unchanged => {
                    let before = former.as_ref();
                    value = before.and_then(|row| row.values.as_ref()?.get(index)?.clone());
                    before.and_then(|row| row.cells.get(index)).cloned().unwrap_or(Cell::Unknown)
                }
                None => Cell::Absent,
            });
            values.iter_mut().for_each(|values| values.push(value.take()));
        }
        Row { at, state: State::Live, cells, values }
    }

    /// Rows of a table without a key are equal or not; `late` says that the moment is near, and
    /// whether the change is behind it.
    fn add_to_bag(
        &mut self,
        record: &str,
        index: usize,
        message: &Message<'_>,
        late: Option<bool>,
    ) -> Result<(), Error> {
        let table = &self.tables[index];
        let new = row_digest(table, |name| message.after(name));
        let old = row_digest(table, |name| message.before(name));
        let steps = match message.action {
            Action::Insert | Action::Read => [Some((new, 1)), None],
            Action::Delete => [Some((new, -1)), None],
            Action::Update => [Some((old, -1)), Some((new, 1))],
            Action::Truncate => [None, None],
        };
        for (row, n) in steps.into_iter().flatten() {
            let Some(row) = row else {
                let name = &table.name;
                self.faults.add(Fault::Different, || {
                    format!("{record}: a row of {name}, which has no key, is not whole")
                });
                continue;
            };
            let n = if late == Some(true) { 0 } else { n };
            self.scratch.add_to_bag(index, row, n, late.is_some())?;
        }
        Ok(())
    }
}

/// The digest of a whole row; nothing where a column that is compared is not there.
pub(super) fn row_digest<'v>(
    table: &Table,
    value: impl Fn(&str) -> Option<&'v str>,
) -> Option<super::canon::Digest> {
    let columns = table.columns.iter().filter(|column| !column.ignored);
    let values: Vec<_> =
        columns.map(|column| value(&column.name).map(canonical)).collect::<Option<_>>()?;
    Some(digest(&values.join(",")))
}
