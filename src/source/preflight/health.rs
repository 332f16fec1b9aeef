//! The slot and the publication while changes flow.

use std::collections::HashSet;

use super::super::error::Error;
use super::super::sql::{Session, get};
use super::super::{Settings, TableName};
use super::slot::{OpenTransaction, oldest_transaction};
use super::tables::published;
use crate::change::Lsn;
use crate::pipeline::wal::KEPT_BYTES_MIN;

/// The slot and the publication while streaming, asked every few seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::source) struct Health {
    /// Where the server's WAL ends.
    pub wal_end: Lsn,
    pub publication: Option<u32>,
    /// Configured tables that the publication does not hold any more.
    pub unpublished: Vec<TableName>,
    pub slot: Option<SlotHealth>,
}

/// How much the slot keeps, and how much longer it may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotHealth {
    pub restart_lsn: Option<Lsn>,
    pub confirmed_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// How many bytes may still be written before the slot may be lost, where that is limited.
    pub safe_wal_bytes: Option<i64>,
    /// The oldest transaction that has written and is still open, asked for where the slot keeps much
    /// more than what is not confirmed.
    pub oldest: Option<OpenTransaction>,
}

/// Up to where WAL is given to anybody.
const WAL_END: &str = "CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
                       ELSE pg_current_wal_flush_lsn() END::text";

/// Where the server's WAL ends: nothing beyond it was given to anybody.
pub(in crate::source) async fn wal_end(session: &Session) -> Result<Lsn, Error> {
    let row = session.one(&format!("SELECT {WAL_END}"), &[]).await?;
    let text: String = get(&row, 0)?;
    text.parse().map_err(|_| Error::Protocol { what: "a place in the WAL that is none".to_owned() })
}

/// Which cluster it is, where the role may ask.
pub(in crate::source) async fn system_identifier(session: &Session) -> Option<String> {
    let asked = session.one("SELECT system_identifier::text FROM pg_control_system()", &[]).await;
    get(&asked.ok()?, 0).ok()
}

pub(in crate::source) async fn health(
    session: &Session,
    settings: &Settings,
) -> Result<Health, Error> {
    let lsn = |text: Option<String>| text.and_then(|text| text.parse::<Lsn>().ok());
    let row = session
        .one(
            &format!(
                "SELECT {WAL_END}, \
                        (SELECT oid FROM pg_publication WHERE pubname = $1), \
                        s.slot_name IS NOT NULL, s.restart_lsn::text, s.confirmed_flush_lsn::text, \
                        s.wal_status, s.safe_wal_size \
                 FROM (SELECT 1) AS one LEFT JOIN pg_replication_slots s ON s.slot_name = $2"
            ),
            &[&settings.publication, &settings.slot],
        )
        .await?;
    let publication: Option<u32> = get(&row, 1)?;
    let wal_end = lsn(get(&row, 0)?).unwrap_or_default();
    let slot = if get::<bool>(&row, 2)? {
        let restart_lsn = lsn(get(&row, 3)?);
        let confirmed_lsn = lsn(get(&row, 4)?);
        let since = |lsn: Option<Lsn>| lsn.map_or(0, |lsn| wal_end.0.saturating_sub(lsn.0));
        // What confirming does not let go.
        let pinned = since(restart_lsn).saturating_sub(since(confirmed_lsn));
        let oldest =
            if pinned >= KEPT_BYTES_MIN { oldest_transaction(session).await? } else { None };
        Some(SlotHealth {
            restart_lsn,
            confirmed_lsn,
            wal_status: get(&row, 5)?,
            safe_wal_bytes: get(&row, 6)?,
            oldest,
        })
    } else {
        None
    };
    let published: HashSet<_> =
        published(session, &settings.publication).await?.into_iter().collect();
    let unpublished =
        settings.tables.iter().filter(|table| !published.contains(*table)).cloned().collect();
    Ok(Health { wal_end, publication, unpublished, slot })
}
