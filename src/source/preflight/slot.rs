//! The slot: whether it is ours and well, its creation, and who is in the way of that.

use std::time::Duration;

use super::super::error::{Error, SKIP_LOST_CHANGES};
use super::super::sql::{Session, get};
use super::super::{Settings, quote_literal};
use super::Finding;
use crate::change::Lsn;

/// The code of a slot of this name that belongs to something else.
pub(super) const NOT_OURS: &str = "source_slot";

/// How long the creation of a slot may wait for transactions that were open before it.
pub(super) const SLOT_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn slot(
    session: &Session,
    settings: &Settings,
    findings: &mut Vec<Finding>,
) -> Result<Option<Lsn>, Error> {
    let name = &settings.slot;
    let subject = format!("slot {name}");
    if !is_slot_name(name) {
        findings.push(
            Finding::fail(
                subject,
                "source_slot_name",
                format!("`{name}` cannot be a slot's name: use up to 63 of a-z, 0-9 and _"),
            )
            .fatal(),
        );
        return Ok(None);
    }
    let row = session
        .first(
            "SELECT s.plugin::text, s.slot_type, s.database::text, s.active_pid, \
                    s.confirmed_flush_lsn::text, s.wal_status, s.temporary, current_database()::text, \
                    a.application_name, host(a.client_addr) \
             FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid \
             WHERE s.slot_name = $1",
            &[name],
        )
        .await?;
    let Some(row) = row else {
        findings.push(Finding::ok(subject, "does not exist yet; `sluicebox run` creates it"));
        return Ok(None);
    };
    let plugin: Option<String> = get(&row, 0)?;
    let slot_type: String = get(&row, 1)?;
    let database: Option<String> = get(&row, 2)?;
    let here: String = get(&row, 7)?;
    let another = "name another slot under `source.slot`, or drop this one if nobody uses it";
    let before = findings.len();
    if slot_type != "logical" || plugin.as_deref() != Some("pgoutput") {
        let what = plugin.unwrap_or(slot_type);
        findings.push(
            Finding::fail(
                subject.clone(),
                NOT_OURS,
                format!(
                    "slot `{name}` is of `{what}`, not of `pgoutput`: it belongs to something else"
                ),
            )
            .mend(another)
            .fatal(),
        );
    } else if database.as_deref() != Some(here.as_str()) {
        let database = database.unwrap_or_default();
        findings.push(
            Finding::fail(
                subject.clone(),
                NOT_OURS,
                format!("slot `{name}` belongs to database `{database}`, and this is `{here}`"),
            )
            .mend(another)
            .fatal(),
        );
    }
    let wal_status: Option<String> = get(&row, 5)?;
    match wal_status.as_deref() {
        Some("lost") => findings.push(
            Finding::fail(
                subject.clone(),
                "source_slot_lost",
                format!(
                    "slot `{name}` is lost: Postgres removed WAL that it still needed, because it \
                     stood still for longer than max_slot_wal_keep_size allows"
                ),
            )
            .mend(format!(
                "SELECT pg_drop_replication_slot({}); then {SKIP_LOST_CHANGES}",
                quote_literal(name)
            ))
            .fatal(),
        ),
        Some("unreserved") => findings.push(
            Finding::warn(
                subject.clone(),
                format!("slot `{name}` is about to be lost at the next checkpoint"),
            )
            .mend("let the pipeline catch up now, or raise max_slot_wal_keep_size"),
        ),
        _ => {}
    }
    if findings.len() == before {
        let text = match get::<Option<i32>>(&row, 3)? {
            None => "exists and is free".to_owned(),
            Some(pid) => {
                let user: Option<String> = get(&row, 8)?;
                let from: Option<String> = get(&row, 9)?;
                format!(
                    "exists and is in use by `{}` (pid {pid}, from {})",
                    user.unwrap_or_default(),
                    from.as_deref().unwrap_or("this machine")
                )
            }
        };
        findings.push(Finding::ok(subject, text));
    }
    let confirmed: Option<String> = get(&row, 4)?;
    let confirmed = confirmed.and_then(|lsn| lsn.parse().ok()).unwrap_or_default();
    Ok(Some(confirmed))
}

/// Whether Postgres takes the name for a slot.
#[must_use]
pub fn is_slot_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

pub(super) async fn create_slot(session: &Session, settings: &Settings) -> Result<Lsn, Error> {
    let timeout = format!("SET statement_timeout = {}", SLOT_TIMEOUT.as_millis());
    session.execute(&timeout).await?;
    let create = "SELECT pg_create_logical_replication_slot($1, 'pgoutput')::text";
    let created = session.query(create, &[&settings.slot]).await;
    let reset = session.execute("RESET statement_timeout").await;
    match created {
        Ok(_) => tracing::info!(slot = settings.slot, "created the replication slot"),
        // query_canceled: by the time-out.
        Err(Error::Server(error)) if error.code == "57014" => {
            let blockers = blockers(session).await?;
            return Err(Finding::fail(
                "slot",
                "source_slot_blocked",
                format!(
                    "creating slot `{}` waits for transactions that were open before it. {blockers}",
                    settings.slot
                ),
            )
            .mend("end them, or SELECT pg_terminate_backend(PID)")
            .into_error());
        }
        Err(error) => return Err(error),
    }
    reset?;
    let row = session
        .one(
            "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1",
            &[&settings.slot],
        )
        .await?;
    let confirmed: Option<String> = get(&row, 0)?;
    Ok(confirmed.and_then(|lsn| lsn.parse().ok()).unwrap_or_default())
}

/// A transaction that has written and is open: what a new slot waits for, and what keeps an old one's WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenTransaction {
    /// Who it is, as far as our role may know; never what it does.
    pub text: String,
    /// How long it has been open, where that may be known.
    pub seconds: u64,
}

/// All of them, in words. Empty where there is none.
pub(super) async fn blockers(session: &Session) -> Result<String, Error> {
    let open = open_transactions(session).await?;
    if open.is_empty() {
        return Ok(String::new());
    }
    let texts: Vec<_> = open.into_iter().map(|transaction| transaction.text).collect();
    Ok(format!("Open transactions that have written: {}", texts.join("; ")))
}

/// The one that has been open for longest.
pub(super) async fn oldest_transaction(
    session: &Session,
) -> Result<Option<OpenTransaction>, Error> {
    let open = open_transactions(session).await?;
    Ok(open.into_iter().max_by_key(|transaction| transaction.seconds))
}

async fn open_transactions(session: &Session) -> Result<Vec<OpenTransaction>, Error> {
    // `pg_locks` shows everybody's transactions to everybody, `pg_stat_activity` does not. Each savepoint
    // behind which something was written is a lock more of the same process.
    let rows = session
        .query(
            "SELECT l.pid, a.usename::text, a.application_name, a.state, \
                    extract(epoch FROM now() - a.xact_start)::int8 \
             FROM (SELECT DISTINCT pid FROM pg_locks \
                   WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted \
                   AND pid IS NOT NULL AND pid <> pg_backend_pid()) l \
             LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
             ORDER BY a.xact_start NULLS LAST LIMIT 5",
            &[],
        )
        .await?;
    let open_for = |seconds: i64| u64::try_from(seconds).unwrap_or(0);
    let mut open = Vec::new();
    for row in &rows {
        let mut text = format!("pid {}", get::<i32>(row, 0)?);
        if let Some(user) = get::<Option<String>>(row, 1)? {
            text.push_str(&format!(" of `{user}`"));
        }
        if let Some(application) = get::<Option<String>>(row, 2)?.filter(|name| !name.is_empty()) {
            text.push_str(&format!(" ({application})"));
        }
        if let Some(state) = get::<Option<String>>(row, 3)? {
            text.push_str(&format!(", {state}"));
        }
        let seconds = get::<Option<i64>>(row, 4)?.map(open_for);
        if let Some(seconds) = seconds {
            text.push_str(&format!(", open for {seconds} s"));
        }
        open.push(OpenTransaction { text, seconds: seconds.unwrap_or(0) });
    }
    let prepared = session
        .query(
            "SELECT gid, extract(epoch FROM now() - prepared)::int8 FROM pg_prepared_xacts \
             ORDER BY prepared LIMIT 5",
            &[],
        )
        .await?;
    for row in &prepared {
        let seconds = open_for(get(row, 1)?);
        let text =
            format!("prepared transaction `{}`, open for {seconds} s", get::<String>(row, 0)?);
        open.push(OpenTransaction { text, seconds });
    }
    Ok(open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slot_names() {
        for (name, good) in [
            ("sluicebox", true),
            ("a_1", true),
            ("", false),
            ("A", false),
            ("a-b", false),
            ("ä", false),
            (&"a".repeat(63), true),
            (&"a".repeat(64), false),
        ] {
            assert_eq!(is_slot_name(name), good, "{name}");
        }
    }
}
