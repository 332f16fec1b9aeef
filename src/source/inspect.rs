//! Tables as they are at one moment, for whoever compares them with the stream.
//!
//! Values come as the text that the replication connection sends too, under the same settings of the
//! session, column by column as the publication has them, and row by row: a table of any size passes
//! through.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::StreamExt as _;
use serde::Deserialize;
use tokio_postgres::{SimpleQueryMessage, SimpleQueryRow, SimpleQueryStream};

use super::catalog::Catalog;
use super::error::Error;
use super::sql::{Session, Sql, get};
use super::transport::VALUE_SETTINGS;
use super::{Settings, quote_identifier, quote_literal};
use crate::change::{Change, Lsn, Table};
use crate::decode::{Decoded, Decoder, Relation, RelationColumn};
use crate::table_name::TableName;

/// A table as the publication sends it.
#[derive(Clone, Debug)]
pub struct Published {
    /// As the configuration names it.
    pub name: TableName,
    /// With the columns that are published.
    pub table: Arc<Table>,
    /// The names under which its changes may come: its own, and those of its partitions.
    pub names: Vec<String>,
    /// What selects its rows, behind the columns.
    from: String,
}

/// A row of `pg_publication_tables`; since Postgres 15 with columns and filter.
#[derive(Deserialize)]
struct PublicationRow {
    attnames: Option<Vec<String>>,
    rowfilter: Option<String>,
}

/// Reads the source beside the pipeline. Changes nothing.
#[derive(Debug)]
pub struct Inspector {
    settings: Settings,
    /// Holds the snapshot.
    reader: Session,
    _reader: Sql,
    /// Asks in between.
    sql: Sql,
}

impl Inspector {
    /// Connects.
    ///
    /// # Errors
    ///
    /// When Postgres cannot be reached.
    pub async fn connect(settings: &Settings) -> Result<Self, Error> {
        let dsn = Arc::new(settings.dsn.clone());
        let connection = Sql::new(Arc::clone(&dsn));
        let reader = connection.session().await?;
        // A table may take longer to read than any answer of a few rows.
        reader.execute("SET statement_timeout = 0").await?;
        for (name, value) in VALUE_SETTINGS {
            reader.execute(&format!("SET {name} = '{value}'")).await?;
        }
        let sql = Sql::new(dsn);
        Ok(Self { settings: settings.clone(), reader, _reader: connection, sql })
    }

    /// The tables of the settings, as they are now.
    ///
    /// # Errors
    ///
    /// When one does not exist, or Postgres does not answer.
    pub async fn tables(&self) -> Result<Vec<Published>, Error> {
        let mut tables = Vec::new();
        for name in &self.settings.tables {
            tables.push(self.table(name).await?);
        }
        Ok(tables)
    }

    async fn table(&self, name: &TableName) -> Result<Published, Error> {
        let session = &self.reader;
        let row = session
            .first(
                "SELECT c.oid, c.relkind = 'p', c.relreplident::text, \
                        (SELECT to_jsonb(p)::text FROM pg_publication_tables p \
                         WHERE p.pubname = $3 AND p.schemaname = $1 AND p.tablename = $2), \
                        ARRAY(SELECT format('%s.%s', n2.nspname, c2.relname) \
                              FROM pg_partition_tree(c.oid) t JOIN pg_class c2 ON c2.oid = t.relid \
                              JOIN pg_namespace n2 ON n2.oid = c2.relnamespace) \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                 WHERE n.nspname = $1 AND c.relname = $2",
                &[&name.schema, &name.name, &self.settings.publication],
            )
            .await?;
        let Some(row) = row else {
            return Err(Error::Unmet {
                code: "source_table",
                text: format!("table {name} does not exist"),
                mend: None,
                fatal: false,
            });
        };
        let oid: u32 = get(&row, 0)?;
        let partitioned: bool = get(&row, 1)?;
        let identity: String = get(&row, 2)?;
        let published: Option<String> = get(&row, 3)?;
        let published = published.and_then(|json| serde_json::from_str(&json).ok());
        let PublicationRow { attnames, rowfilter } =
            published.unwrap_or(PublicationRow { attnames: None, rowfilter: None });
        let mut names: Vec<String> = get(&row, 4)?;
        names.push(name.to_string());
        let columns = session
            .query(
                "SELECT a.attname::text, a.atttypid, a.atttypmod, \
                        a.attgenerated <> '' \
                          AND current_setting('server_version_num')::int < 180000, \
                        a.attnum = ANY (coalesce((SELECT i.indkey::int2[] FROM pg_index i \
                          WHERE i.indrelid = a.attrelid AND CASE $2 WHEN 'd' THEN i.indisprimary \
                          WHEN 'i' THEN i.indisreplident ELSE false END), '{}')) \
                 FROM pg_attribute a \
                 WHERE a.attrelid = $1 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
                &[&oid, &identity],
            )
            .await?;
        let mut relation = Relation {
            oid,
            schema: name.schema.clone(),
            name: name.name.clone(),
            replica_identity: identity.bytes().next().unwrap_or(b'd'),
            columns: Vec::new(),
        };
        for column in &columns {
            let (column_name, never_sent): (String, bool) = (get(column, 0)?, get(column, 3)?);
            // Before 18, a generated column is in the view, and in no message.
            let is_published = attnames.as_ref().is_none_or(|names| names.contains(&column_name));
            let is_sent = is_published && !never_sent;
            if is_sent {
                relation.columns.push(RelationColumn {
                    name: column_name,
                    type_oid: get(column, 1)?,
                    type_modifier: get(column, 2)?,
                    identity: identity == "f" || get(column, 4)?,
                });
            }
        }
        let catalog = Catalog::new(&self.settings.tables, &self.settings.group_by);
        let table = catalog.describe(&self.sql, relation).await?.table;
        let only = if partitioned { "" } else { "ONLY " };
        let filter = rowfilter.map(|filter| format!(" WHERE {filter}")).unwrap_or_default();
        let from = format!("FROM {only}{}{filter}", name.quoted());
        Ok(Published { name: name.clone(), table, names, from })
    }

    /// The end of the log.
    ///
    /// # Errors
    ///
    /// When Postgres does not answer.
    pub async fn wal_end(&self) -> Result<Lsn, Error> {
        wal_end(&self.reader).await
    }

    /// Takes the snapshot in which [`Self::rows`] reads, and returns the end of the log after it.
    ///
    /// # Errors
    ///
    /// When Postgres does not answer.
    pub async fn begin(&self) -> Result<Lsn, Error> {
        self.reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1").await?;
        wal_end(&self.reader).await
    }

    /// Writes a little into the log, so that an idle server has something to confirm behind the
    /// present end. It concerns no table, and becomes no record.
    ///
    /// # Errors
    ///
    /// When Postgres does not answer.
    pub async fn push_wal(&self) -> Result<(), Error> {
        let session = self.sql.session().await?;
        session.execute("SELECT pg_logical_emit_message(false, 'sluicebox.verify', '')").await
    }

    /// Up to where the slot is confirmed; nothing where there is no slot.
    ///
    /// # Errors
    ///
    /// When Postgres does not answer.
    pub async fn confirmed(&self) -> Result<Option<Lsn>, Error> {
        let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
        let session = self.sql.session().await?;
        let Some(row) = session.first(sql, &[&self.settings.slot]).await? else { return Ok(None) };
        let confirmed: Option<String> = get(&row, 0)?;
        Ok(confirmed.and_then(|lsn| lsn.parse().ok()))
    }

    /// What the slot has not been told of, as it would be sent, without taking it. Nobody may use the slot
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// When Postgres does not answer, and when the slot is in use or not there.
    pub async fn pending(&self) -> Result<Pending, Error> {
        let Settings { slot, publication, tables, group_by, .. } = &self.settings;
        // A connection of its own: the other one has a snapshot, and every answer here may take long.
        let connection = Sql::new(Arc::new(self.settings.dsn.clone()));
        let session = connection.session().await?;
        session.execute("SET statement_timeout = 0").await?;
        for (name, value) in VALUE_SETTINGS {
            session.execute(&format!("SET {name} = '{value}'")).await?;
        }
        let sql = format!(
            "SELECT encode(data, 'hex') FROM pg_logical_slot_peek_binary_changes({}, NULL, NULL, \
             'proto_version', '1', 'publication_names', {})",
            quote_literal(slot),
            quote_literal(&quote_identifier(publication)),
        );
        let rows = Rows { stream: Box::pin(session.stream(&sql).await?) };
        Ok(Pending {
            rows,
            decoder: Decoder::new(),
            after: Lsn(0),
            catalog: Catalog::new(tables, group_by),
            describer: Sql::new(Arc::new(self.settings.dsn.clone())),
            _connection: connection,
        })
    }

    /// The rows of a table. `expressions` has, for each column, the SQL to select in its place.
    ///
    /// # Errors
    ///
    /// When Postgres does not answer, or does not let this role read the table.
    pub async fn rows(
        &self,
        published: &Published,
        expressions: &[Option<&str>],
    ) -> Result<Rows, Error> {
        let columns = published.table.columns.iter().zip(expressions);
        let select = columns.map(|(column, expression)| match expression {
            Some(sql) => format!("({sql})::text"),
            None => quote_identifier(&column.name),
        });
        let select = select.collect::<Vec<_>>().join(", ");
        let sql = format!("SELECT {select} {}", published.from);
        Ok(Rows { stream: Box::pin(self.reader.stream(&sql).await?) })
    }
}

async fn wal_end(session: &Session) -> Result<Lsn, Error> {
    let row = session.one("SELECT pg_current_wal_insert_lsn()::text", &[]).await?;
    let lsn: String = get(&row, 0)?;
    lsn.parse().map_err(|_| Error::Protocol { what: format!("`{lsn}` where an LSN is expected") })
}

/// Changes that are still in the slot.
pub struct Pending {
    rows: Rows,
    decoder: Decoder,
    /// The transaction that it is in.
    after: Lsn,
    catalog: Catalog,
    /// Asks what tables look like, while the other connection sends.
    describer: Sql,
    _connection: Sql,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").finish_non_exhaustive()
    }
}

impl Pending {
    /// The next changes, in their order; nothing after the last.
    ///
    /// # Errors
    ///
    /// When Postgres ends the query, or sends what is not a change.
    pub async fn next(&mut self) -> Result<Option<Vec<Change>>, Error> {
        loop {
            let Some(row) = self.rows.next().await? else { return Ok(None) };
            let bytes = row.get(0).and_then(bytes_of_hex).ok_or_else(|| Error::Protocol {
                what: "a message of the slot that is not hexadecimal".to_owned(),
            })?;
            let after = self.after;
            let decoded = self.decoder.decode(bytes.into());
            match decoded.map_err(|source| Error::Decode { after, source })? {
                Decoded::Change(change) => return Ok(Some(vec![change])),
                Decoded::Truncate(changes) => return Ok(Some(changes)),
                Decoded::Relation(relation) => {
                    let described = self.catalog.describe(&self.describer, relation).await?;
                    self.decoder.define(described.table);
                }
                Decoded::Begin { commit_lsn, .. } => self.after = commit_lsn,
                Decoded::Commit { .. } | Decoded::Other => {}
            }
        }
    }
}

fn bytes_of_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pairs = text.as_bytes().chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    pairs.map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

/// Rows on their way.
pub struct Rows {
    stream: Pin<Box<SimpleQueryStream>>,
}

impl std::fmt::Debug for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rows").finish_non_exhaustive()
    }
}

impl Rows {
    /// The next row's values as text, `None` for NULL; nothing after the last.
    ///
    /// # Errors
    ///
    /// When Postgres ends the query.
    pub async fn next(&mut self) -> Result<Option<SimpleQueryRow>, Error> {
        while let Some(message) = self.stream.next().await {
            if let SimpleQueryMessage::Row(row) = message? {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }
}
