//! The ordinary SQL connection: catalogue, preflight, and the look at the slot every few seconds.
//!
//! It connects when it is asked for something, and again after it was lost. While it idles it is
//! also our sentinel: on a fast shutdown Postgres tells ordinary connections so (57P01), but waits
//! with a replication connection until that has confirmed everything.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, watch};
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::types::{FromSql, ToSql};
use tokio_postgres::{Client, Row, SimpleQueryStream};

use super::dsn::{Dsn, Endpoint};
use super::error::{Error, chain};
use super::socket::{self, AlreadyTls};

/// The server gives a query up after this; creating a publication may wait for a lock on its
/// tables.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// We give it up a little later, when the server does not even say that.
const QUERY_TIMEOUT: Duration = Duration::from_secs(35);

/// A connection that heals by itself.
#[derive(Debug)]
pub(super) struct Sql {
    dsn: Arc<Dsn>,
    live: Mutex<Option<Session>>,
}

/// One connection, as long as it lasts.
#[derive(Clone, Debug)]
pub(super) struct Session {
    client: Arc<Client>,
    /// Where it was opened: the replication connection has to go to the same server.
    pub endpoint: Endpoint,
    /// Set when it has ended: whether Postgres said that it is shutting down.
    ended: watch::Receiver<Option<Ended>>,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// 57P01, 57P02 or 57P03.
    ShuttingDown,
    Lost,
}

impl Sql {
    pub(super) fn new(dsn: Arc<Dsn>) -> Self {
        Self { dsn, live: Mutex::new(None) }
    }

    /// The connection, opened now if there is none. Of several hosts the first that answers, or
    /// the first that is no standby where `target_session_attrs=read-write`.
    pub(super) async fn session(&self) -> Result<Session, Error> {
        let mut live = self.live.lock().await;
        if let Some(session) = live.as_ref().filter(|session| !session.client.is_closed()) {
            return Ok(session.clone());
        }
        *live = None;
        let mut last = None;
        for endpoint in &self.dsn.endpoints {
            match open(&self.dsn, endpoint).await {
                Ok(session) => return Ok(live.insert(session).clone()),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or(Error::Closed))
    }

    /// Opens a new connection at the next call, because this one does not answer.
    pub(super) async fn forget(&self) {
        *self.live.lock().await = None;
    }
}

async fn open(dsn: &Dsn, endpoint: &Endpoint) -> Result<Session, Error> {
    let stream = socket::connect(dsn, endpoint).await?;
    let mut config = dsn.config().clone();
    if stream.is_tls() {
        // The stream is encrypted already; `AlreadyTls` says why this is "direct".
        config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
    } else {
        config.ssl_mode(SslMode::Disable);
    }
    // Names are looked up in the system's schema alone, so that nobody's function is called.
    let ours = format!(
        "-c search_path=pg_catalog -c statement_timeout={}ms",
        STATEMENT_TIMEOUT.as_millis()
    );
    config.options(match dsn.config().get_options() {
        Some(theirs) => format!("{theirs} {ours}"),
        None => ours,
    });
    let timeout = dsn.connect_timeout();
    let logged_in = tokio::time::timeout(timeout, config.connect_raw(stream, AlreadyTls));
    let (client, connection) = logged_in
        .await
        .map_err(|_| Error::ConnectTimeout { address: endpoint.to_string(), timeout })?
        .map_err(|error| log_in_error(dsn, endpoint, error))?;
    let (end, ended) = watch::channel(None);
    tokio::spawn(async move {
        let shutting_down = match connection.await {
            Ok(()) => false,
            Err(error) => {
                error.code().is_some_and(|code| matches!(code.code(), "57P01" | "57P02" | "57P03"))
            }
        };
        end.send_replace(Some(if shutting_down { Ended::ShuttingDown } else { Ended::Lost }));
    });
    let session = Session { client: Arc::new(client), endpoint: endpoint.clone(), ended };
    if dsn.wants_primary() {
        let row = session.one("SELECT pg_is_in_recovery()", &[]).await?;
        if get::<bool>(&row, 0)? {
            return Err(Error::Unmet {
                code: "source_standby",
                text: format!("{endpoint} is a standby, and target_session_attrs=read-write"),
                mend: None,
                fatal: false,
            });
        }
    }
    Ok(session)
}

/// What the library says of a failed login, in our words.
fn log_in_error(dsn: &Dsn, endpoint: &Endpoint, error: tokio_postgres::Error) -> Error {
    if error.as_db_error().is_some() {
        return error.into();
    }
    let text = chain(&error);
    if text.contains("password missing") {
        Error::PasswordMissing { role: dsn.user.clone() }
    } else if text.contains("channel binding") {
        Error::ChannelBinding
    } else {
        Error::Connect { address: endpoint.to_string(), source: std::io::Error::other(text) }
    }
}

impl Session {
    /// Waits until it ends.
    pub(super) async fn wait_ended(&mut self) -> Ended {
        match self.ended.wait_for(Option::is_some).await {
            Ok(ended) => ended.unwrap_or(Ended::Lost),
            Err(_) => Ended::Lost,
        }
    }

    pub(super) async fn query(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        Ok(bounded(self.client.query(sql, parameters)).await??)
    }

    /// The first row.
    pub(super) async fn first(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Error> {
        Ok(self.query(sql, parameters).await?.into_iter().next())
    }

    /// The only row.
    pub(super) async fn one(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Row, Error> {
        let row = self.first(sql, parameters).await?;
        row.ok_or_else(|| Error::Protocol { what: "an empty answer to a query".to_owned() })
    }

    /// The rows of a query as text, as they come: no time-out but the server's own ends it.
    pub(super) async fn stream(&self, sql: &str) -> Result<SimpleQueryStream, Error> {
        Ok(self.client.simple_query_raw(sql).await?)
    }

    /// Statements without parameters or results.
    pub(super) async fn execute(&self, sql: &str) -> Result<(), Error> {
        Ok(bounded(self.client.batch_execute(sql)).await??)
    }
}

async fn bounded<T>(query: impl Future<Output = T>) -> Result<T, Error> {
    tokio::time::timeout(QUERY_TIMEOUT, query)
        .await
        .map_err(|_| Error::QueryTimeout { timeout: QUERY_TIMEOUT })
}

/// A column of a row; an error, not a panic, where the server sends another type.
pub(super) fn get<'a, T: FromSql<'a>>(row: &'a Row, index: usize) -> Result<T, Error> {
    Ok(row.try_get(index)?)
}
