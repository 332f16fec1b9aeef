//! The server as a whole: version, settings, privileges, room.

use std::time::Duration;

use super::super::error::Error;
use super::super::quote_identifier;
use super::super::sql::{Session, get};
use super::Finding;

/// The oldest server that is known to send what we ask for (`messages`, since 14).
pub(super) const SERVER_VERSION_MIN: i32 = 14_00_00;

/// Logical decoding on a standby, since 16.
pub(super) const STANDBY_VERSION_MIN: i32 = 16_00_00;

/// What the server says of itself.
#[derive(Clone, Debug)]
pub(in crate::source) struct Server {
    version: i32,
    version_text: String,
    standby: bool,
    encoding: String,
    wal_level: String,
    slot_keep_bytes: i64,
    walsenders_max: i32,
    walsenders: i32,
    slots_max: i32,
    slots: i32,
    pub(super) role: String,
    may_replicate: bool,
    /// In this database.
    pub(super) may_create: bool,
    /// After how long without a word from us the server gives the connection up; none if never.
    pub(in crate::source) wal_sender_timeout: Option<Duration>,
}

pub(super) async fn server(session: &Session) -> Result<Server, Error> {
    let row = session
        .one(
            "SELECT current_setting('server_version_num')::int4, \
                    current_setting('server_version'), \
                    pg_is_in_recovery(), \
                    current_setting('server_encoding'), \
                    current_setting('wal_level'), \
                    pg_size_bytes(coalesce(current_setting('max_slot_wal_keep_size', true), '-1')), \
                    current_setting('max_wal_senders')::int4, \
                    (SELECT count(*)::int4 FROM pg_stat_replication), \
                    current_setting('max_replication_slots')::int4, \
                    (SELECT count(*)::int4 FROM pg_replication_slots), \
                    r.rolname::text, \
                    r.rolsuper OR r.rolreplication OR EXISTS ( \
                        SELECT FROM pg_roles g WHERE g.rolname = 'rds_replication' \
                        AND pg_has_role(r.oid, g.oid, 'MEMBER')), \
                    (SELECT setting::int8 FROM pg_settings WHERE name = 'wal_sender_timeout'), \
                    has_database_privilege(current_database(), 'CREATE') \
             FROM pg_roles r WHERE r.rolname = current_user",
            &[],
        )
        .await?;
    let timeout_ms: i64 = get(&row, 12)?;
    Ok(Server {
        version: get(&row, 0)?,
        version_text: get(&row, 1)?,
        standby: get(&row, 2)?,
        encoding: get(&row, 3)?,
        wal_level: get(&row, 4)?,
        slot_keep_bytes: get(&row, 5)?,
        walsenders_max: get(&row, 6)?,
        walsenders: get(&row, 7)?,
        slots_max: get(&row, 8)?,
        slots: get(&row, 9)?,
        role: get(&row, 10)?,
        may_replicate: get(&row, 11)?,
        may_create: get(&row, 13)?,
        wal_sender_timeout: u64::try_from(timeout_ms)
            .ok()
            .filter(|&ms| ms > 0)
            .map(Duration::from_millis),
    })
}

impl Server {
    pub(super) fn findings(&self) -> Vec<Finding> {
        let version = &self.version_text;
        let mut findings = vec![if self.version < SERVER_VERSION_MIN {
            Finding::fail(
                "server version",
                "source_version",
                format!("Postgres is {version}, and Sluicebox needs 14 or later"),
            )
            .fatal()
        } else if self.standby && self.version < STANDBY_VERSION_MIN {
            Finding::fail(
                "server version",
                "source_standby",
                format!("this is a standby, and Postgres {version} decodes on the primary alone"),
            )
            .mend(
                "name the primary in source.url, or target_session_attrs=read-write with all hosts",
            )
        } else {
            Finding::ok("server version", format!("Postgres {version}"))
        }];
        findings.push(if self.wal_level == "logical" {
            Finding::ok("wal_level", "logical")
        } else {
            Finding::fail(
                "wal_level",
                "source_wal_level",
                format!(
                    "wal_level is `{}`, and changes are only there with `logical`",
                    self.wal_level
                ),
            )
            .mend("ALTER SYSTEM SET wal_level = 'logical'; then restart Postgres")
        });
        findings.push(if self.may_replicate {
            Finding::ok("privilege to replicate", format!("role `{}` has it", self.role))
        } else {
            Finding::fail(
                "privilege to replicate",
                "source_privilege",
                format!("role `{}` may not replicate", self.role),
            )
            .mend(format!("ALTER ROLE {} REPLICATION", quote_identifier(&self.role)))
        });
        if matches!(self.encoding.as_str(), "UTF8") {
            findings.push(Finding::ok("server_encoding", "UTF8"));
        } else {
            findings.push(Finding::warn(
                "server_encoding",
                format!(
                    "the database is {}: a row with bytes that cannot become UTF-8 would stop the slot",
                    self.encoding
                ),
            ));
        }
        if self.slot_keep_bytes < 0 {
            findings.push(
                Finding::warn(
                    "max_slot_wal_keep_size",
                    "it is unlimited: while Sluicebox is stopped, the slot keeps WAL until the disk is \
                     full",
                )
                .mend("ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf()")
                .standing(),
            );
        } else {
            let mebibytes = self.slot_keep_bytes / (1024 * 1024);
            findings.push(Finding::ok("max_slot_wal_keep_size", format!("{mebibytes} MiB")));
        }
        let (used, most) = (self.walsenders, self.walsenders_max);
        findings.push(if used < most {
            Finding::ok("walsenders", format!("{used} of {most} in use"))
        } else {
            // One of them may be ours, so that this alone does not stop a run.
            Finding::warn("walsenders", format!("all {most} are in use"))
                .mend(format!("ALTER SYSTEM SET max_wal_senders = {}; then restart", most + 5))
        });
        findings
    }

    pub(super) fn room_for_slot(&self, findings: &mut Vec<Finding>) {
        let (used, most) = (self.slots, self.slots_max);
        findings.push(if used < most {
            Finding::ok("replication slots", format!("{used} of {most} in use"))
        } else {
            Finding::fail("replication slots", "source_slots", format!("all {most} are in use"))
                .mend(
                    "SELECT slot_name, active FROM pg_replication_slots; drop one that nobody uses \
                     with pg_drop_replication_slot(…), or raise max_replication_slots",
                )
        });
    }
}
