//! A change in memory, so that a transform's tests run where no Sluicebox and no WebAssembly is.
//!
//! It keeps to `wit/transform.wit` in what can be told from the outside, by the rules and the code
//! of the host (`sluicebox-edits`), with one exception: `size` counts the body and the transform's
//! own headers only.

use std::cell::RefCell;
use std::convert::Infallible;
use std::error::Error;

use sluicebox_edits::{
    Compressed, Content, EditError, Stopped, check_column, check_header, check_json, check_key,
    check_stream_name, no_column,
};

use crate::{Action, Algorithm, Codec, Column, Level};

/// A change as the transform sees it, for tests.
///
/// ```
/// use sluicebox_transform::{Action, Change};
///
/// let change = Change::new(Action::Update, "public", "users")
///     .with_key("id", "int4", "1")
///     .with("email", "text", "\"a@b.example\"")
///     .with_old("email", "\"old@b.example\"");
/// change.set_text("email", "***").unwrap();
/// assert_eq!(change.get("email").unwrap().as_deref(), Some("\"***\""));
/// assert_eq!(change.get_old("email").unwrap(), None);
/// ```
#[derive(Debug)]
pub struct Change {
    action: Action,
    schema: String,
    table: String,
    limit: u64,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    columns: Vec<Stored>,
    annotations: Vec<(String, String)>,
    headers: Vec<(String, Vec<u8>)>,
    body: Option<String>,
    stream: Option<String>,
    /// Names and entries of `metadata.compressed_columns` and `metadata.truncated_columns`.
    compressed: Vec<(String, String)>,
    truncated: Vec<(String, String)>,
}

#[derive(Clone, Debug)]
struct Stored {
    name: String,
    type_name: String,
    key: bool,
    /// JSON text; nothing where the update did not touch it.
    json: Option<String>,
    old: Option<String>,
}

type Answer<T> = Result<T, String>;

impl Change {
    /// A change of a table without columns.
    #[must_use]
    pub fn new(action: Action, schema: &str, table: &str) -> Self {
        let (schema, table) = (schema.to_owned(), table.to_owned());
        let limit = sluicebox_edits::RECORD_BYTES_MAX;
        Self { action, schema, table, limit, state: RefCell::default() }
    }

    /// Adds a column with a value, as JSON text.
    ///
    /// # Panics
    ///
    /// Where the text is not JSON.
    #[must_use]
    pub fn with(self, column: &str, type_name: &str, json: &str) -> Self {
        told(check_json(column, json)).unwrap_or_else(|error| panic!("{error}"));
        self.with_column(column, type_name, false, Some(json))
    }

    /// Adds a column of the primary key.
    ///
    /// # Panics
    ///
    /// Where the text is not JSON.
    #[must_use]
    pub fn with_key(self, column: &str, type_name: &str, json: &str) -> Self {
        told(check_json(column, json)).unwrap_or_else(|error| panic!("{error}"));
        self.with_column(column, type_name, true, Some(json))
    }

    /// Adds a column that the update did not touch, and that Postgres did not send.
    #[must_use]
    pub fn with_unchanged(self, column: &str, type_name: &str) -> Self {
        self.with_column(column, type_name, false, None)
    }

    /// Gives a column a value in `changes`, as JSON text.
    ///
    /// # Panics
    ///
    /// Where there is no such column.
    #[must_use]
    pub fn with_old(self, column: &str, json: &str) -> Self {
        let mut state = self.state.borrow_mut();
        let found = state.columns.iter_mut().find(|stored| stored.name == column);
        found.unwrap_or_else(|| panic!("there is no column `{column}`")).old = Some(json.into());
        drop(state);
        self
    }

    /// Sets what [`Self::limit`] answers, so that small messages can be too large.
    #[must_use]
    pub fn with_limit(self, bytes: u64) -> Self {
        Self { limit: bytes, ..self }
    }

    /// The headers that the transform added.
    #[must_use]
    pub fn headers(&self) -> Vec<(String, Vec<u8>)> {
        self.state.borrow().headers.clone()
    }

    fn with_column(self, name: &str, type_name: &str, key: bool, json: Option<&str>) -> Self {
        self.state.borrow_mut().columns.push(Stored {
            name: name.to_owned(),
            type_name: type_name.to_owned(),
            key,
            json: json.map(str::to_owned),
            old: None,
        });
        self
    }
}

/// What the interface has.
#[allow(missing_docs, reason = "wit/transform.wit describes each of them")]
impl Change {
    #[must_use]
    pub fn action(&self) -> Action {
        self.action
    }

    #[must_use]
    pub fn table_schema(&self) -> String {
        self.schema.clone()
    }

    #[must_use]
    pub fn table_name(&self) -> String {
        self.table.clone()
    }

    #[must_use]
    pub fn commit_lsn(&self) -> u64 {
        1
    }

    #[must_use]
    pub fn commit_index(&self) -> u64 {
        0
    }

    #[must_use]
    pub fn commit_timestamp(&self) -> i64 {
        1_750_000_000_000_000
    }

    #[must_use]
    pub fn columns(&self) -> Vec<Column> {
        self.state.borrow().columns.iter().map(Stored::info).collect()
    }

    #[must_use]
    pub fn column_names(&self) -> Vec<String> {
        self.state.borrow().columns.iter().map(|stored| stored.name.clone()).collect()
    }

    #[must_use]
    pub fn column(&self, name: &str) -> Option<Column> {
        self.state.borrow().find(name).map(Stored::info)
    }

    pub fn get(&self, column: &str) -> Answer<Option<String>> {
        Ok(self.state.borrow().find(column).and_then(|stored| stored.json.clone()))
    }

    pub fn get_text(&self, column: &str) -> Answer<Option<String>> {
        let json = self.get(column)?.filter(|json| json != "null");
        Ok(json.map(|json| serde_json::from_str(&json).unwrap_or(json)))
    }

    pub fn get_old(&self, column: &str) -> Answer<Option<String>> {
        Ok(self.state.borrow().find(column).and_then(|stored| stored.old.clone()))
    }

    pub fn set(&self, column: &str, json: &str) -> Answer<()> {
        told(check_column(column).and_then(|()| check_json(column, json)))?;
        let mut state = self.editable()?;
        state.forget(column);
        match state.columns.iter_mut().find(|stored| stored.name == column) {
            Some(stored) => {
                stored.json = Some(json.trim().to_owned());
                stored.old = None;
            }
            None => state.columns.push(Stored {
                name: column.to_owned(),
                type_name: "json".into(),
                key: false,
                json: Some(json.trim().to_owned()),
                old: None,
            }),
        }
        Ok(())
    }

    pub fn set_text(&self, column: &str, text: &str) -> Answer<()> {
        self.set(column, &json_string(text))
    }

    pub fn set_old(&self, column: &str, json: &str) -> Answer<()> {
        if self.action != Action::Update {
            return told(Err(EditError::NoOldValues { column: column.to_owned() }));
        }
        told(check_json(column, json))?;
        let mut state = self.editable()?;
        let found = state.columns.iter_mut().find(|stored| stored.name == column);
        told(found.ok_or_else(|| no_column(column)))?.old = Some(json.trim().to_owned());
        Ok(())
    }

    pub fn remove(&self, column: &str) -> Answer<bool> {
        let mut state = self.editable()?;
        state.forget(column);
        let before = state.columns.len();
        state.columns.retain(|stored| stored.name != column);
        Ok(state.columns.len() < before)
    }

    pub fn rename(&self, column: &str, to: &str) -> Answer<()> {
        let mut state = self.editable()?;
        told(check_column(to))?;
        let is_taken = column != to && state.find(to).is_some();
        let found = state.columns.iter_mut().find(|stored| stored.name == column);
        let found = told(found.ok_or_else(|| no_column(column)))?;
        if is_taken {
            return told(Err(EditError::ColumnExists { column: to.to_owned() }));
        }
        found.name = to.to_owned();
        let State { compressed, truncated, .. } = &mut *state;
        for (name, _) in compressed.iter_mut().chain(truncated) {
            if name == column {
                *name = to.to_owned();
            }
        }
        Ok(())
    }

    pub fn annotate(&self, key: &str, json: &str) -> Answer<()> {
        told(check_key(key).and_then(|()| check_json(key, json)))?;
        let mut state = self.editable()?;
        state.annotations.retain(|(known, _)| known != key);
        state.annotations.push((key.to_owned(), json.trim().to_owned()));
        Ok(())
    }

    pub fn append(&self, key: &str, json: &str) -> Answer<()> {
        let list = sluicebox_edits::appended(key, self.annotation(key).as_deref(), json);
        self.annotate(key, &told(list)?)
    }

    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<String> {
        let state = self.state.borrow();
        state.annotations.iter().find(|(known, _)| known == key).map(|(_, json)| json.clone())
    }

    pub fn add_header(&self, name: &str, value: &[u8]) -> Answer<()> {
        let mut state = self.state.borrow_mut();
        told(check_header(name, state.headers.len()))?;
        state.headers.push((name.to_owned(), value.to_owned()));
        Ok(())
    }

    pub fn route_to(&self, stream: Option<&str>) -> Answer<()> {
        if let Some(name) = stream {
            told(check_stream_name(name).map_err(Into::into))?;
        }
        self.state.borrow_mut().stream = stream.map(str::to_owned);
        Ok(())
    }

    #[must_use]
    pub fn routed_to(&self) -> Option<String> {
        self.state.borrow().stream.clone()
    }

    pub fn size(&self) -> Answer<u64> {
        let body = self.message()?.len();
        let state = self.state.borrow();
        let headers = state.headers.iter().map(|(name, value)| 2 + name.len() + value.len());
        Ok((8 + body + headers.sum::<usize>()) as u64)
    }

    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    pub fn message(&self) -> Answer<String> {
        let state = self.state.borrow();
        if let Some(body) = &state.body {
            return Ok(body.clone());
        }
        let object = |members: Vec<(&str, &str)>| {
            let member = |(key, json): (&str, &str)| format!("{}:{json}", json_string(key));
            format!("{{{}}}", members.into_iter().map(member).collect::<Vec<_>>().join(","))
        };
        let columns = state.columns.iter();
        let record = columns.clone().filter_map(|c| Some((&*c.name, c.json.as_deref()?)));
        let old = columns.clone().filter_map(|c| Some((&*c.name, c.old.as_deref()?)));
        let unchanged = columns.filter(|c| c.json.is_none()).map(|c| json_string(&c.name));
        let unchanged = format!("[{}]", unchanged.collect::<Vec<_>>().join(","));
        let changes = match self.action {
            Action::Update => object(old.collect()),
            _ => "null".to_owned(),
        };
        let (schema, table) = (json_string(&self.schema), json_string(&self.table));
        let mut metadata = vec![("table_schema", &*schema), ("table_name", &*table)];
        if unchanged != "[]" {
            metadata.push(("unchanged_columns", &unchanged));
        }
        metadata.extend(state.annotations.iter().map(|(key, json)| (&**key, &**json)));
        let action = json_string(match self.action {
            Action::Insert => "insert",
            Action::Update => "update",
            Action::Delete => "delete",
            Action::Read => "read",
            Action::Truncate => "truncate",
        });
        Ok(object(vec![
            ("record", &object(record.collect())),
            ("changes", &changes),
            ("action", &action),
            ("metadata", &object(metadata)),
        ]))
    }

    pub fn set_message(&self, json: &str) -> Answer<()> {
        told(check_json("the whole message", json))?;
        self.state.borrow_mut().body = Some(json.to_owned());
        Ok(())
    }

    #[must_use]
    pub fn is_replaced(&self) -> bool {
        self.state.borrow().body.is_some()
    }

    pub fn compress(&self, column: &str, codec: Codec, level: u32) -> Answer<bool> {
        if self.state.borrow().compressed.iter().any(|(known, _)| known == column) {
            return Ok(false);
        }
        let Some(json) = self.get(column)? else { return Ok(false) };
        let Some(content) = content(column, &json)? else { return Ok(false) };
        let codec = match codec {
            Codec::Zstd => sluicebox_edits::Codec::Zstd,
            Codec::Gzip => sluicebox_edits::Codec::Gzip,
        };
        let Compressed { json, entry } =
            match sluicebox_edits::compress(&content, codec, level, go_on) {
                Ok(compressed) => compressed,
                Err(Stopped::Refused(refused)) => return Err(refused.0),
                Err(Stopped::By(never)) => match never {},
            };
        self.set(column, &json)?;
        self.state.borrow_mut().compressed.push((column.to_owned(), entry.to_string()));
        self.note("compressed_columns")?;
        Ok(true)
    }

    pub fn hash(&self, column: &str, algorithm: Algorithm, key: Option<&[u8]>) -> Answer<bool> {
        let Algorithm::Sha256 = algorithm;
        let Some(json) = self.get(column)? else { return Ok(false) };
        let Some(content) = content(column, &json)? else { return Ok(false) };
        match sluicebox_edits::hash(&content, key, go_on) {
            Ok(json) => self.set(column, &json)?,
            Err(never) => match never {},
        }
        Ok(true)
    }

    pub fn truncate(&self, column: &str, max_bytes: u64) -> Answer<bool> {
        let Some(json) = self.get(column)? else { return Ok(false) };
        let Some(content) = content(column, &json)? else { return Ok(false) };
        let cut = sluicebox_edits::truncate(column, &content, max_bytes);
        let Some((text, bytes)) = cut.map_err(|refused| refused.0)? else { return Ok(false) };
        self.set_text(column, &text)?;
        self.state.borrow_mut().truncated.push((column.to_owned(), bytes.to_string()));
        self.note("truncated_columns")?;
        Ok(true)
    }

    fn note(&self, key: &str) -> Answer<()> {
        let state = self.state.borrow();
        let list = if key == "compressed_columns" { &state.compressed } else { &state.truncated };
        let member = |(name, json): &(String, String)| format!("{}:{json}", json_string(name));
        let json = format!("{{{}}}", list.iter().map(member).collect::<Vec<_>>().join(","));
        drop(state);
        self.annotate(key, &json)
    }

    fn editable(&self) -> Answer<std::cell::RefMut<'_, State>> {
        let state = self.state.borrow_mut();
        if state.body.is_some() {
            return told(Err(EditError::Replaced));
        }
        Ok(state)
    }
}

impl State {
    fn find(&self, column: &str) -> Option<&Stored> {
        self.columns.iter().find(|stored| stored.name == column)
    }

    fn forget(&mut self, column: &str) {
        self.compressed.retain(|(name, _)| name != column);
        self.truncated.retain(|(name, _)| name != column);
    }
}

impl Stored {
    fn info(&self) -> Column {
        Column {
            name: self.name.clone(),
            type_name: self.type_name.clone(),
            key: self.key,
            unchanged: self.json.is_none(),
            size: self.json.as_ref().map_or(0, |json| json.len() as u64),
        }
    }
}

thread_local! {
    static LOGS: RefCell<Vec<(Level, String)>> = const { RefCell::new(Vec::new()) };
}

/// Writes a line to Sluicebox's log; in a test, to where [`take_logs`] finds it.
pub fn log(level: Level, message: &str) {
    LOGS.with(|logs| logs.borrow_mut().push((level, message.to_owned())));
}

/// The lines that this thread's transforms have logged since the last time.
#[must_use]
pub fn take_logs() -> Vec<(Level, String)> {
    LOGS.with(|logs| logs.take())
}

fn json_string(text: &str) -> String {
    serde_json::to_string(text).expect("a text is JSON")
}

/// What the host says of an edit.
fn told<T>(result: Result<T, EditError>) -> Answer<T> {
    result.map_err(|error| {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    })
}

fn content<'a>(column: &str, json: &'a str) -> Answer<Option<Content<'a>>> {
    Content::of(column, json.into()).map_err(|refused| refused.0)
}

/// A test has time.
fn go_on() -> Result<(), Infallible> {
    Ok(())
}
