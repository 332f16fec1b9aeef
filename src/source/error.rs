//! What goes wrong between us and Postgres, and what each of it means for the pipeline.
//!
//! Postgres's texts differ between its major versions and languages; the decisions here rest on
//! SQLSTATE codes and on where we were. Passwords are in none of these texts.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::time::Duration;

use crate::change::Lsn;

/// An ErrorResponse of Postgres.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    /// SQLSTATE, five characters.
    pub code: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({})", detail.trim_end_matches('.'))?;
        }
        write!(f, " [{}]", self.code)
    }
}

impl StdError for ServerError {}

impl ServerError {
    /// Reads the fields of an ErrorResponse: a letter and a zero-terminated text each.
    pub(super) fn parse(mut body: &[u8]) -> Self {
        let mut error = Self { code: "XX000".to_owned(), ..Self::default() };
        while let Some((&field, rest)) = body.split_first() {
            let end = memchr::memchr(0, rest).unwrap_or(rest.len());
            let text = || String::from_utf8_lossy(&rest[..end]).into_owned();
            match field {
                b'C' => error.code = text(),
                b'M' => error.message = text(),
                b'D' => error.detail = Some(text()),
                b'H' => error.hint = Some(text()),
                0 => break,
                _ => {}
            }
            body = rest.get(end + 1..).unwrap_or_default();
        }
        error
    }
}

/// Why the source could not connect, prepare or go on streaming.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not connect to Postgres at {address}")]
    Connect { address: String, source: io::Error },
    #[error("Postgres at {address} did not answer within {} s", timeout.as_secs())]
    ConnectTimeout { address: String, timeout: Duration },
    #[error(
        "Postgres at {address} does not offer TLS, and sslmode={mode} asks for it: \
         set `ssl = on` there, or choose another sslmode"
    )]
    TlsNotOffered { address: String, mode: &'static str },
    #[error("TLS with Postgres at {address} failed")]
    Tls { address: String, source: io::Error },
    #[error("could not use {option}={path}")]
    TlsFile { option: &'static str, path: String, source: io::Error },
    #[error("could not set up TLS")]
    TlsSetup(#[source] rustls::Error),
    #[error("Postgres asks role `{role}` for a password, and the URL has none")]
    PasswordMissing { role: String },
    #[error("Postgres asks for an authentication that Sluicebox does not speak: {method}")]
    AuthenticationMethod { method: String },
    #[error("the authentication with Postgres failed")]
    Authentication(#[source] io::Error),
    #[error("channel_binding=require, and Postgres did not bind the channel")]
    ChannelBinding,
    #[error("Postgres: {0}")]
    Server(ServerError),
    #[error("Postgres: {0}")]
    Stream(ServerError),
    #[error("a query to Postgres failed")]
    Query(#[source] Box<dyn StdError + Send + Sync>),
    #[error("a query to Postgres took more than {} s", timeout.as_secs())]
    QueryTimeout { timeout: Duration },
    #[error("the connection to Postgres was lost")]
    Lost(#[source] io::Error),
    #[error("Postgres closed the connection")]
    Closed,
    #[error("Postgres is shutting down")]
    ShuttingDown,
    #[error("Postgres sent nothing for {} s", silence.as_secs())]
    Silent { silence: Duration },
    #[error(
        "Postgres has more WAL for the slot and sent none of it: the connection is opened anew"
    )]
    Stuck,
    #[error("Postgres sent what the replication protocol does not know: {what}")]
    Protocol { what: String },
    #[error("could not decode the replication stream after {after}")]
    Decode { after: Lsn, source: crate::decode::Error },
    #[error("{text}")]
    Unmet { code: &'static str, text: String, mend: Option<String>, fatal: bool },
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(server) => Self::Server(ServerError {
                code: server.code().code().to_owned(),
                message: server.message().to_owned(),
                detail: server.detail().map(str::to_owned),
                hint: server.hint().map(str::to_owned),
            }),
            None if error.is_closed() => Self::Closed,
            None => Self::Query(Box::new(error)),
        }
    }
}

/// What an operator does where changes are gone for good.
pub(super) const SKIP_LOST_CHANGES: &str = "start once with `sluicebox run --skip-lost-changes`: what \
    was changed since the slot was last read is never delivered, and `sluicebox verify` shows the rows \
    that differ";

/// What an error means: a stable code for machines, a text for people, and whether waiting helps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// `source_unreachable`, `source_slot_active`, …
    pub code: &'static str,
    /// Names the thing, the place and the mend.
    pub text: String,
    /// Nothing heals this but another configuration or the loss of data.
    pub fatal: bool,
    /// Worth a first retry at once: the other side has only just gone.
    pub lost: bool,
}

impl Error {
    /// Sorts the error. The only place that decides between waiting and stopping.
    #[must_use]
    pub fn trouble(&self) -> Trouble {
        let waits = |code| Trouble { code, text: chain(self), fatal: false, lost: false };
        let with = |code, mend: &str| Trouble {
            code,
            text: format!("{}; {mend}", chain(self)),
            fatal: false,
            lost: false,
        };
        match self {
            Self::Connect { .. } | Self::ConnectTimeout { .. } => with(
                "source_unreachable",
                "check host and port in source.url, that Postgres runs and listens there \
                 (listen_addresses), and that a firewall lets this machine through",
            ),
            Self::TlsNotOffered { .. }
            | Self::Tls { .. }
            | Self::TlsFile { .. }
            | Self::TlsSetup(_) => waits("source_tls"),
            Self::PasswordMissing { .. } => {
                with("source_password", "write it as postgres://role:password@host/database")
            }
            Self::AuthenticationMethod { .. } | Self::ChannelBinding => with(
                "source_authentication",
                "use scram-sha-256, md5, cert or trust in pg_hba.conf",
            ),
            Self::Authentication(_) => waits("source_authentication"),
            Self::Server(error) => server_trouble(error, false),
            Self::Stream(error) => server_trouble(error, true),
            Self::Query(_) | Self::QueryTimeout { .. } => waits("source_query"),
            Self::Lost(_) | Self::Closed => Trouble { lost: true, ..waits("source_lost") },
            Self::Silent { .. } => Trouble { lost: true, ..waits("source_silent") },
            Self::Stuck => Trouble { lost: true, ..waits("source_stuck") },
            Self::ShuttingDown => waits("source_restarting"),
            Self::Protocol { .. } => waits("source_protocol"),
            Self::Decode { .. } => Trouble { fatal: true, ..waits("source_decode") },
            Self::Unmet { code, text, mend, fatal } => Trouble {
                code,
                text: match mend {
                    Some(mend) => format!("{text}; mend it with: {mend}"),
                    None => text.clone(),
                },
                fatal: *fatal,
                lost: false,
            },
        }
    }
}

/// What a SQLSTATE means, outside of streaming and during it.
fn server_trouble(error: &ServerError, streaming: bool) -> Trouble {
    let trouble = |code, mend: Option<&str>, fatal| Trouble {
        code,
        text: match mend {
            Some(mend) => format!("Postgres: {error}; {mend}"),
            None => format!("Postgres: {error}"),
        },
        fatal,
        lost: false,
    };
    match error.code.as_str() {
        "28P01" => trouble("source_password", Some("check user and password in source.url"), false),
        "28000" => trouble(
            "source_refused",
            Some(
                "create the role if it is missing, or correct it in source.url; else allow role, \
                 database and host in pg_hba.conf, then `SELECT pg_reload_conf()`",
            ),
            false,
        ),
        "3D000" => trouble(
            "source_database",
            Some("create the database, or name another in source.url"),
            false,
        ),
        "42501" => trouble(
            "source_privilege",
            Some("run `sluicebox check` for the missing privilege"),
            false,
        ),
        "53300" => trouble(
            "source_connections",
            Some("raise max_wal_senders or max_connections, or end another client"),
            false,
        ),
        "53400" => trouble(
            "source_slots",
            Some("drop a slot that nobody uses, or raise max_replication_slots"),
            false,
        ),
        "55006" => trouble(
            "source_slot_active",
            Some("another client streams from the slot; Sluicebox goes on when it ends"),
            false,
        ),
        // While streaming the slot is certainly there: pgoutput misses the publication, and it
        // looks for it in the catalogue as it was at the change's place in the WAL.
        "42704" if streaming => trouble(
            "source_publication",
            Some(
                "the publication did not exist yet at the change that the slot has reached, so the \
                 slot can never pass it; drop the slot with `SELECT pg_drop_replication_slot(…)`, then \
                 start once with `sluicebox run --skip-lost-changes` (changes that the slot still held \
                 are lost)",
            ),
            true,
        ),
        "22021" | "22P05" if streaming => trouble(
            "source_encoding",
            Some(
                "the table holds bytes that are not valid in its encoding; the slot cannot pass \
                  them",
            ),
            true,
        ),
        "57P01" | "57P02" | "57P03" => trouble("source_restarting", None, false),
        _ => trouble("source_error", error.hint.as_deref(), false),
    }
}

/// An error and its causes in one line.
#[must_use]
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some libraries repeat the cause in their own text.
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(code: &str) -> ServerError {
        ServerError { code: code.to_owned(), message: "no".to_owned(), ..Default::default() }
    }

    #[test]
    fn fields_of_an_error_response() {
        let body = b"SFATAL\0C55006\0Mslot is active for PID 7\0Dsome detail.\0Hwait\0\0";
        let error = ServerError::parse(body);
        assert_eq!(error.code, "55006");
        assert_eq!(error.to_string(), "slot is active for PID 7 (some detail) [55006]");
        assert_eq!(error.hint.as_deref(), Some("wait"));
        // Cut anywhere, it is still no panic.
        for end in 0..body.len() {
            let _error = ServerError::parse(&body[..end]);
        }
    }

    #[test]
    fn codes_decide() {
        fn check(error: Error, code: &str, fatal: bool) {
            let trouble = error.trouble();
            assert_eq!((trouble.code, trouble.fatal), (code, fatal), "{error}");
        }
        check(Error::Server(server("28P01")), "source_password", false);
        check(Error::Server(server("28000")), "source_refused", false);
        check(Error::Server(server("42501")), "source_privilege", false);
        check(Error::Server(server("55006")), "source_slot_active", false);
        check(Error::Server(server("57P03")), "source_restarting", false);
        check(Error::Server(server("42704")), "source_error", false);
        check(Error::Stream(server("42704")), "source_publication", true);
        check(Error::Stream(server("22021")), "source_encoding", true);
        check(Error::Stream(server("57P01")), "source_restarting", false);
        check(Error::Server(server("XX000")), "source_error", false);
        check(Error::Closed, "source_lost", false);
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        let error = Error::Connect {
            address: "db:5432".to_owned(),
            source: io::Error::other("connection refused"),
        };
        assert_eq!(chain(&error), "could not connect to Postgres at db:5432: connection refused");
    }
}
