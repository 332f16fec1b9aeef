//! One test's world: a database, an S2 server with a basin and a stream, and a folder for
//! Sluicebox between them.

use std::ops::Deref;

use super::postgres::{Cluster, Database};
use super::s2::{Record, Server, data};
use super::sluicebox::{Home, Settings, TOKEN};
use super::until;

pub const BASIN: &str = "sluicebox-it";
pub const STREAM: &str = "changes";

/// Everything that one test needs. Reads as its [`Home`].
#[derive(Debug)]
pub struct World<'a> {
    pub database: Database<'a>,
    pub s2: Server,
    pub home: Home,
}

impl Deref for World<'_> {
    type Target = Home;

    fn deref(&self) -> &Home {
        &self.home
    }
}

impl<'a> World<'a> {
    /// A database on the shared cluster after these statements, an S2 server in memory with the
    /// basin and the stream, and a configuration that names the tables.
    pub async fn new(test: &str, sql: &str, tables: &[&str]) -> Self {
        let database = Cluster::shared().await.database(test).await;
        let s2 = Server::in_memory().await;
        Self::of(database, s2, sql, tables).await
    }

    /// The same with a database and a server of one's own.
    pub async fn of(database: Database<'a>, s2: Server, sql: &str, tables: &[&str]) -> Self {
        database.run(sql).await;
        s2.create_basin(BASIN).await;
        s2.create_stream(BASIN, STREAM).await;
        let settings = settings(&database, &s2.endpoint(), tables);
        Self { database, s2, home: Home::new(settings) }
    }

    pub async fn sql(&self, statements: &str) {
        self.database.run(statements).await;
    }

    /// The stream's records that are not commands.
    pub async fn records(&self) -> Vec<Record> {
        let all = self.s2.read(BASIN, STREAM).await;
        data(&all).into_iter().cloned().collect()
    }

    /// Waits until the stream holds this many records, and returns them.
    pub async fn until_records(&self, count: usize) -> Vec<Record> {
        let found = until(&format!("{count} records in the stream"), async || {
            let records = self.records().await;
            if records.len() >= count { Ok(records) } else { Err(records.len().to_string()) }
        })
        .await;
        assert_eq!(found.len(), count, "records in the stream");
        found
    }

    /// Waits until Postgres was told that everything written so far is done with.
    pub async fn until_confirmed(&self) {
        let slot = &self.settings.slot;
        let now = self.database.value("select pg_current_wal_lsn()").await.unwrap();
        let sql = format!(
            "select confirmed_flush_lsn >= '{now}'::pg_lsn, confirmed_flush_lsn \
             from pg_replication_slots where slot_name = '{slot}'"
        );
        until(&format!("slot {slot} to be confirmed to {now}"), async || {
            let rows = self.database.rows(&sql).await;
            let row = rows.first().ok_or("there is no such slot")?;
            if row[0].as_deref() == Some("t") { Ok(()) } else { Err(format!("{row:?}")) }
        })
        .await;
    }
}

/// Settings for a database and an S2 endpoint, everything else as tests usually have it. The
/// slot is named like the database: slots belong to the whole cluster.
pub fn settings(database: &Database<'_>, endpoint: &str, tables: &[&str]) -> Settings {
    Settings {
        url: database.url(),
        slot: database.name.clone(),
        publication: "sluicebox".to_owned(),
        tables: tables.iter().map(|table| (*table).to_owned()).collect(),
        token: format!("access_token = \"{TOKEN}\""),
        endpoint: endpoint.to_owned(),
        basin: BASIN.to_owned(),
        stream: STREAM.to_owned(),
        transforms: "transforms".to_owned(),
        state: "state".to_owned(),
        sink: String::new(),
        sections: String::new(),
    }
}

/// `record.<key>` of a record's message, as text.
pub fn field(record: &Record, column: &str) -> String {
    let value = &record.json()["record"][column];
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
