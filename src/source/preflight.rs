//! What has to hold before changes can flow: looked at for `check` and before each connection, and
//! the publication and the slot made where they are missing.
//!
//! The user's own application comes first. Publishing updates and deletes of a table without a
//! usable replica identity makes *their* UPDATE and DELETE fail, so tables are looked at before a
//! publication is made. And the publication is made before the slot: a slot that is older than its
//! publication can never pass the changes in between.
//!
//! Nothing that exists is ever changed here. Where something has to be, the command is named.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::dsn::Dsn;
use super::error::{Error, Trouble};
use super::sql::{Session, Sql, get};
use super::transport::Replication;
use super::{Settings, TableName, quote_identifier, quote_literal};
use crate::change::Lsn;

/// The oldest server that is known to send what we ask for (`messages`, since 14).
const SERVER_VERSION_MIN: i32 = 14_00_00;

/// Logical decoding on a standby, since 16.
const STANDBY_VERSION_MIN: i32 = 16_00_00;

/// The code of tables that cannot be published with updates and deletes.
const REPLICA_IDENTITY: &str = "source_replica_identity";

/// How long the creation of a slot may wait for transactions that were open before it.
const SLOT_TIMEOUT: Duration = Duration::from_secs(10);

/// How a finding turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Ok,
    /// It works, and may stop working.
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at, such as `wal_level` or `replica identity of public.t`.
    pub name: String,
    pub level: Level,
    /// What was found, as a sentence.
    pub text: String,
    /// A command or SQL that mends it.
    pub mend: Option<String>,
    /// For machines, as in [`super::State`].
    pub code: &'static str,
    /// `run` has to stop: waiting cannot mend it, or would lose changes.
    pub fatal: bool,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.text)
    }
}

impl Finding {
    fn new(name: impl Into<String>, level: Level, text: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            level,
            text: text.into(),
            mend: None,
            code: "source_setup",
            fatal: false,
        }
    }

    fn ok(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self::new(name, Level::Ok, text)
    }

    fn warn(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self::new(name, Level::Warn, text)
    }

    fn fail(name: impl Into<String>, code: &'static str, text: impl Into<String>) -> Self {
        Self { code, ..Self::new(name, Level::Fail, text) }
    }

    fn mend(self, mend: impl Into<String>) -> Self {
        Self { mend: Some(mend.into()), ..self }
    }

    fn fatal(self) -> Self {
        Self { fatal: true, ..self }
    }

    fn into_error(self) -> Error {
        let Self { text, mend, code, fatal, .. } = self;
        Error::Unmet { code, text, mend, fatal }
    }
}

/// Looks at everything, for `sluicebox check`. Changes nothing. What fails is a finding; only the
/// first failure to reach Postgres ends it early.
pub async fn check(settings: &Settings) -> Vec<Finding> {
    let dsn = Arc::new(settings.dsn.clone());
    let sql = Sql::new(Arc::clone(&dsn));
    let session = match sql.session().await {
        Ok(session) => session,
        Err(error) => {
            let Trouble { code, text, .. } = error.trouble();
            return vec![Finding::fail("connection", code, text)];
        }
    };
    let login = format!("{} as `{}` to `{}`", session.endpoint, dsn.user(), dsn.database());
    let mut findings = vec![Finding::ok("connection", login)];
    match look(&session, settings).await {
        Ok(look) => findings.extend(look.findings),
        Err(error) => {
            let Trouble { code, text, .. } = error.trouble();
            findings.push(Finding::fail("questions to Postgres", code, text));
            return findings;
        }
    }
    findings.push(replication_login(&dsn, &session).await);
    findings
}

/// pg_hba.conf and privileges may differ for replication connections, so one is tried.
async fn replication_login(dsn: &Dsn, session: &Session) -> Finding {
    let name = "replication connection";
    let tried = async {
        let mut connection = Replication::connect(dsn, &session.endpoint).await?;
        let identity = connection.identify().await?;
        connection.close(Lsn::default()).await?;
        Ok::<_, Error>(identity)
    };
    match tried.await {
        Ok(identity) => Finding::ok(name, format!("system {} answers", identity.system_identifier)),
        Err(error) => {
            let Trouble { code, text, .. } = error.trouble();
            Finding::fail(name, code, text)
        }
    }
}

/// The slot, as `pg_replication_slots` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub confirmed: Lsn,
    pub wal_status: Option<String>,
}

/// What the server, the tables, the publication and the slot look like.
#[derive(Debug)]
pub(super) struct Look {
    pub findings: Vec<Finding>,
    pub server: Server,
    pub publication: Option<Publication>,
    pub slot: Option<Slot>,
}

/// A publication that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Publication {
    oid: u32,
    /// It publishes updates or deletes, which need a replica identity.
    rewrites: bool,
}

impl Look {
    /// The first failure that keeps changes from flowing.
    fn first_failure(&mut self) -> Result<(), Error> {
        // In a publication that exists, a table without identity does its harm already: that we
        // stand still too would help nobody.
        let harmless = |finding: &Finding| {
            finding.code == REPLICA_IDENTITY && self.publication.is_some() && !finding.fatal
        };
        let failed = |finding: &Finding| finding.level == Level::Fail && !harmless(finding);
        match self.findings.iter().position(failed) {
            Some(at) => Err(self.findings.swap_remove(at).into_error()),
            None => Ok(()),
        }
    }
}

/// What streaming starts from.
#[derive(Debug)]
pub(super) struct Prepared {
    pub server: Server,
    pub publication: u32,
    pub confirmed: Lsn,
    pub warnings: Vec<Finding>,
}

/// Looks at everything, and makes the publication and the slot where they are missing.
///
/// `cursor` is what an earlier run has confirmed: with one, a missing slot is never made anew,
/// because the changes since then would be lost silently.
///
/// # Errors
///
/// The first thing that does not hold, with its mend.
pub(super) async fn prepare(
    session: &Session,
    settings: &Settings,
    cursor: Option<Lsn>,
) -> Result<Prepared, Error> {
    let mut looked = look(session, settings).await?;
    if let (None, Some(cursor)) = (&looked.slot, cursor) {
        return Err(Finding::fail(
            "slot",
            "source_slot_missing",
            format!(
                "slot `{}` does not exist any more, and this pipeline has read up to {cursor}: \
                 changes since then are lost to it, so it does not go on by itself",
                settings.slot
            ),
        )
        .fatal()
        .into_error());
    }
    looked.first_failure()?;
    let publication = match looked.publication {
        Some(publication) => publication.oid,
        None => create_publication(session, settings).await?,
    };
    let confirmed = match looked.slot {
        Some(slot) => slot.confirmed,
        None => create_slot(session, settings).await?,
    };
    looked.findings.retain(|finding| finding.level != Level::Ok);
    Ok(Prepared { server: looked.server, publication, confirmed, warnings: looked.findings })
}

async fn look(session: &Session, settings: &Settings) -> Result<Look, Error> {
    let server = server(session).await?;
    let mut findings = server.findings();
    let tables = tables(session, &settings.tables).await?;
    let slot = slot(session, settings, &mut findings).await?;
    let publication = publication(session, settings, slot.is_some(), &mut findings).await?;
    for table in &tables {
        findings.extend(table.findings(publication));
    }
    if slot.is_none() {
        server.room_for_slot(&mut findings);
        let blockers = blockers(session).await?;
        if !blockers.is_empty() {
            findings.push(Finding::warn("open transactions", blockers));
        }
    }
    Ok(Look { findings, server, publication, slot })
}

/// What the server says of itself.
#[derive(Clone, Debug)]
pub(super) struct Server {
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
    role: String,
    may_replicate: bool,
    /// After how long without a word from us the server gives the connection up; none if never.
    pub wal_sender_timeout: Option<Duration>,
}

async fn server(session: &Session) -> Result<Server, Error> {
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
                    (SELECT setting::int8 FROM pg_settings WHERE name = 'wal_sender_timeout') \
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
        wal_sender_timeout: u64::try_from(timeout_ms)
            .ok()
            .filter(|&ms| ms > 0)
            .map(Duration::from_millis),
    })
}

impl Server {
    fn findings(&self) -> Vec<Finding> {
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
                    "it is unlimited: while the pipeline stands still, the slot keeps WAL until the \
                     disk is full",
                )
                .mend("ALTER SYSTEM SET max_slot_wal_keep_size = '50GB'; SELECT pg_reload_conf()"),
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

    fn room_for_slot(&self, findings: &mut Vec<Finding>) {
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

/// A configured table as the catalogue has it.
#[derive(Debug)]
struct TableLook {
    name: TableName,
    /// Nothing where it does not exist.
    found: Option<TableFound>,
}

#[derive(Debug)]
struct TableFound {
    relkind: String,
    persistence: String,
    replica_identity: String,
    usable_identity: bool,
    may_select: bool,
}

async fn tables(session: &Session, names: &[TableName]) -> Result<Vec<TableLook>, Error> {
    let schemas: Vec<_> = names.iter().map(|table| table.schema.as_str()).collect();
    let relations: Vec<_> = names.iter().map(|table| table.name.as_str()).collect();
    let rows = session
        .query(
            "SELECT w.schema, w.name, c.relkind::text, c.relpersistence::text, \
                    c.relreplident::text, \
                    c.relreplident = 'f' OR EXISTS ( \
                        SELECT FROM pg_index i WHERE i.indrelid = c.oid \
                        AND i.indisvalid AND i.indimmediate \
                        AND CASE c.relreplident WHEN 'd' THEN i.indisprimary \
                                                WHEN 'i' THEN i.indisreplident ELSE false END), \
                    coalesce(has_table_privilege(c.oid, 'SELECT'), false) \
             FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS w(schema, name, place) \
             LEFT JOIN pg_namespace n ON n.nspname = w.schema \
             LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name \
             ORDER BY w.place",
            &[&schemas, &relations],
        )
        .await?;
    rows.iter()
        .map(|row| {
            let name = TableName { schema: get(row, 0)?, name: get(row, 1)? };
            let found = match get::<Option<String>>(row, 2)? {
                None => None,
                Some(relkind) => Some(TableFound {
                    relkind,
                    persistence: get(row, 3)?,
                    replica_identity: get(row, 4)?,
                    usable_identity: get(row, 5)?,
                    may_select: get(row, 6)?,
                }),
            };
            Ok(TableLook { name, found })
        })
        .collect()
}

impl TableLook {
    fn findings(&self, publication: Option<Publication>) -> Vec<Finding> {
        let (name, quoted) = (&self.name, self.name.quoted());
        let subject = format!("table {name}");
        let Some(table) = &self.found else {
            return vec![
                Finding::fail(subject, "source_table", format!("table {name} does not exist"))
                    .mend(
                        "create it, or take it out of `source.tables` (names are case-sensitive)",
                    ),
            ];
        };
        if !matches!(table.relkind.as_str(), "r" | "p") {
            let text = format!("{name} is a view or something else that has no changes of its own");
            return vec![
                Finding::fail(subject, "source_table", text)
                    .mend("name the tables behind it in `source.tables`"),
            ];
        }
        if table.persistence != "p" {
            let text = format!("{name} is unlogged or temporary: its changes are not in the WAL");
            return vec![
                Finding::fail(subject, "source_table", text)
                    .mend(format!("ALTER TABLE {quoted} SET LOGGED")),
            ];
        }
        let mut findings = Vec::new();
        if table.usable_identity {
            findings.push(Finding::ok(subject, "exists, with a usable replica identity"));
        } else if publication.is_some_and(|publication| !publication.rewrites) {
            findings.push(Finding::ok(subject, "exists, published without updates and deletes"));
        } else {
            let why = match table.replica_identity.as_str() {
                "d" => "it has no primary key (or a deferrable one)",
                "i" => "the index of its replica identity is gone",
                _ => "its replica identity is NOTHING",
            };
            findings.push(
                Finding::fail(
                    format!("replica identity of {name}"),
                    REPLICA_IDENTITY,
                    format!(
                        "{name} has no usable replica identity: {why}. With it in a publication, \
                         the application's own UPDATE and DELETE would fail"
                    ),
                )
                .mend(format!(
                    "ALTER TABLE {quoted} ADD PRIMARY KEY (…), or ALTER TABLE {quoted} REPLICA \
                     IDENTITY FULL"
                )),
            );
        }
        if !table.may_select {
            findings.push(
                Finding::warn(
                    format!("SELECT on {name}"),
                    format!("the role may not read {name}: changes flow, a backfill would not"),
                )
                .mend(format!("GRANT SELECT ON {quoted} TO …")),
            );
        }
        findings
    }
}

async fn publication(
    session: &Session,
    settings: &Settings,
    slot_exists: bool,
    findings: &mut Vec<Finding>,
) -> Result<Option<Publication>, Error> {
    let name = &settings.publication;
    let subject = format!("publication {name}");
    let row = session
        .first(
            "SELECT oid, pubinsert, pubupdate, pubdelete, pubtruncate, puballtables \
             FROM pg_publication WHERE pubname = $1",
            &[name],
        )
        .await?;
    let Some(row) = row else {
        findings.push(if slot_exists {
            Finding::fail(
                subject,
                "source_publication",
                format!(
                    "slot `{}` exists, but publication `{name}` does not: a publication made now is \
                     younger than the slot, which can never pass the changes in between",
                    settings.slot
                ),
            )
            .mend(format!(
                "SELECT pg_drop_replication_slot({}); then start anew (changes that the slot still \
                 held are lost)",
                quote_literal(&settings.slot)
            ))
            .fatal()
        } else {
            Finding::ok(subject, "does not exist yet; `sluicebox run` creates it")
        });
        return Ok(None);
    };
    let oid: u32 = get(&row, 0)?;
    let published: HashSet<_> = published(session, name).await?.into_iter().collect();
    let missing: Vec<_> =
        settings.tables.iter().filter(|table| !published.contains(*table)).collect();
    if missing.is_empty() {
        findings.push(Finding::ok(subject.clone(), format!("holds {} tables", published.len())));
    } else {
        let list = |quote: fn(&TableName) -> String| {
            missing.iter().map(|table| quote(table)).collect::<Vec<_>>().join(", ")
        };
        findings.push(
            Finding::fail(
                subject.clone(),
                "source_publication",
                format!("publication `{name}` does not hold {}", list(ToString::to_string)),
            )
            .mend(format!(
                "ALTER PUBLICATION {} ADD TABLE {}",
                quote_identifier(name),
                list(TableName::quoted)
            )),
        );
    }
    let mut unpublished = Vec::new();
    for (index, action) in [(1, "insert"), (2, "update"), (3, "delete"), (4, "truncate")] {
        if !get::<bool>(&row, index)? {
            unpublished.push(action);
        }
    }
    if !unpublished.is_empty() {
        findings.push(
            Finding::warn(
                format!("actions of publication {name}"),
                format!("it leaves out {}", unpublished.join(" and ")),
            )
            .mend(format!(
                "ALTER PUBLICATION {} SET (publish = 'insert, update, delete, truncate')",
                quote_identifier(name)
            )),
        );
    }
    // Those that nobody configured are the user's business, but their application breaks too.
    let configured: HashSet<_> = settings.tables.iter().collect();
    for offender in offenders(session, name).await? {
        if !configured.contains(&offender) {
            findings.push(
                Finding::warn(
                    format!("replica identity of {offender}"),
                    format!(
                        "{offender} is in publication `{name}` without a usable replica identity: \
                         the application's own UPDATE and DELETE fail"
                    ),
                )
                .mend(format!("ALTER TABLE {} REPLICA IDENTITY FULL", offender.quoted())),
            );
        }
    }
    Ok(Some(Publication { oid, rewrites: get::<bool>(&row, 2)? || get::<bool>(&row, 3)? }))
}

/// The tables that a publication holds, partitioned ones by their own name too.
async fn published(session: &Session, publication: &str) -> Result<Vec<TableName>, Error> {
    let rows = session
        .query(
            "SELECT schemaname::text, tablename::text FROM pg_publication_tables WHERE pubname = $1 \
             UNION \
             SELECT n.nspname::text, c.relname::text FROM pg_publication p \
             JOIN pg_publication_rel r ON r.prpubid = p.oid JOIN pg_class c ON c.oid = r.prrelid \
             JOIN pg_namespace n ON n.oid = c.relnamespace WHERE p.pubname = $1",
            &[&publication],
        )
        .await?;
    rows.iter().map(|row| Ok(TableName { schema: get(row, 0)?, name: get(row, 1)? })).collect()
}

/// Tables whose updates and deletes fail because they are published without replica identity.
async fn offenders(session: &Session, publication: &str) -> Result<Vec<TableName>, Error> {
    let rows = session
        .query(
            "SELECT t.schemaname::text, t.tablename::text FROM pg_publication_tables t \
             JOIN pg_publication p ON p.pubname = t.pubname AND (p.pubupdate OR p.pubdelete) \
             JOIN pg_namespace n ON n.nspname = t.schemaname \
             JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename \
             WHERE t.pubname = $1 AND c.relreplident <> 'f' AND NOT EXISTS ( \
               SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate \
               AND CASE c.relreplident WHEN 'd' THEN i.indisprimary \
                                       WHEN 'i' THEN i.indisreplident ELSE false END)",
            &[&publication],
        )
        .await?;
    rows.iter().map(|row| Ok(TableName { schema: get(row, 0)?, name: get(row, 1)? })).collect()
}

async fn slot(
    session: &Session,
    settings: &Settings,
    findings: &mut Vec<Finding>,
) -> Result<Option<Slot>, Error> {
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
                "source_slot",
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
                "source_slot",
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
                "SELECT pg_drop_replication_slot({}); then start anew and backfill (the changes in \
                 between are lost)",
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
    Ok(Some(Slot { confirmed, wal_status }))
}

/// Whether Postgres takes the name for a slot.
#[must_use]
pub fn is_slot_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

async fn create_publication(session: &Session, settings: &Settings) -> Result<u32, Error> {
    let tables: Vec<_> = settings.tables.iter().map(TableName::quoted).collect();
    // Changes of partitions are told under the name of the table that was configured.
    let command = format!(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true)",
        quote_identifier(&settings.publication),
        tables.join(", ")
    );
    match session.execute(&command).await {
        Ok(()) => tracing::info!(publication = settings.publication, "created the publication"),
        Err(Error::Server(error)) if error.code == "42501" => {
            return Err(Finding::fail(
                "publication",
                "source_privilege",
                format!("role may not create publication `{}`: {error}", settings.publication),
            )
            .mend(format!("run as the tables' owner: {command}"))
            .into_error());
        }
        Err(error) => return Err(error),
    }
    let oid = "SELECT oid FROM pg_publication WHERE pubname = $1";
    get(&session.one(oid, &[&settings.publication]).await?, 0)
}

async fn create_slot(session: &Session, settings: &Settings) -> Result<Lsn, Error> {
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

/// The open transactions that have written: what a new slot waits for. Empty where there is none.
async fn blockers(session: &Session) -> Result<String, Error> {
    // `pg_locks` shows everybody's transactions to everybody, `pg_stat_activity` does not.
    let rows = session
        .query(
            "SELECT l.pid, a.usename::text, a.application_name, a.state, \
                    extract(epoch FROM now() - a.xact_start)::int8 \
             FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid \
             WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted \
             AND l.pid IS NOT NULL AND l.pid <> pg_backend_pid() \
             ORDER BY a.xact_start NULLS LAST LIMIT 5",
            &[],
        )
        .await?;
    let mut texts = Vec::new();
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
        if let Some(seconds) = get::<Option<i64>>(row, 4)? {
            text.push_str(&format!(", open for {seconds} s"));
        }
        texts.push(text);
    }
    let prepared =
        session.query("SELECT gid FROM pg_prepared_xacts ORDER BY prepared LIMIT 5", &[]).await?;
    for row in &prepared {
        texts.push(format!("prepared transaction `{}`", get::<String>(row, 0)?));
    }
    if texts.is_empty() {
        return Ok(String::new());
    }
    Ok(format!("Open transactions that have written: {}", texts.join("; ")))
}

/// The slot and the publication while streaming, asked every few seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Health {
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
}

pub(super) async fn health(session: &Session, settings: &Settings) -> Result<Health, Error> {
    let lsn = |text: Option<String>| text.and_then(|text| text.parse::<Lsn>().ok());
    let row = session
        .one(
            "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
                         ELSE pg_current_wal_flush_lsn() END::text, \
                    (SELECT oid FROM pg_publication WHERE pubname = $1), \
                    s.slot_name IS NOT NULL, s.restart_lsn::text, s.confirmed_flush_lsn::text, \
                    s.wal_status, s.safe_wal_size \
             FROM (SELECT 1) AS one LEFT JOIN pg_replication_slots s ON s.slot_name = $2",
            &[&settings.publication, &settings.slot],
        )
        .await?;
    let publication: Option<u32> = get(&row, 1)?;
    let slot = if get::<bool>(&row, 2)? {
        Some(SlotHealth {
            restart_lsn: lsn(get(&row, 3)?),
            confirmed_lsn: lsn(get(&row, 4)?),
            wal_status: get(&row, 5)?,
            safe_wal_bytes: get(&row, 6)?,
        })
    } else {
        None
    };
    let published: HashSet<_> =
        published(session, &settings.publication).await?.into_iter().collect();
    let unpublished =
        settings.tables.iter().filter(|table| !published.contains(*table)).cloned().collect();
    let wal_end = lsn(get(&row, 0)?).unwrap_or_default();
    Ok(Health { wal_end, publication, unpublished, slot })
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

    #[test]
    fn tables_that_cannot_be_read_say_why() {
        fn check(found: Option<(&str, &str, &str, bool)>, level: Level, needle: &str) {
            let look = TableLook {
                name: TableName { schema: "public".into(), name: "My T".into() },
                found: found.map(|(relkind, persistence, identity, usable)| TableFound {
                    relkind: relkind.into(),
                    persistence: persistence.into(),
                    replica_identity: identity.into(),
                    usable_identity: usable,
                    may_select: true,
                }),
            };
            let finding = &look.findings(None)[0];
            assert_eq!(finding.level, level);
            let text = format!("{} {}", finding.text, finding.mend.as_deref().unwrap_or_default());
            assert!(text.contains(needle), "{text}");
        }
        check(None, Level::Fail, "does not exist");
        check(Some(("v", "p", "n", false)), Level::Fail, "view");
        check(
            Some(("r", "u", "d", true)),
            Level::Fail,
            "ALTER TABLE \"public\".\"My T\" SET LOGGED",
        );
        check(Some(("r", "p", "d", false)), Level::Fail, "no primary key");
        check(Some(("r", "p", "n", false)), Level::Fail, "REPLICA IDENTITY FULL");
        check(Some(("r", "p", "i", false)), Level::Fail, "index");
        check(Some(("r", "p", "d", true)), Level::Ok, "usable");
        check(Some(("p", "p", "f", true)), Level::Ok, "usable");
    }

    #[test]
    fn a_table_without_identity_matters_where_updates_are_published() {
        fn check(publication: Option<Publication>, level: Level, stops: bool) {
            let table = TableLook {
                name: TableName { schema: "public".into(), name: "t".into() },
                found: Some(TableFound {
                    relkind: "r".into(),
                    persistence: "p".into(),
                    replica_identity: "d".into(),
                    usable_identity: false,
                    may_select: true,
                }),
            };
            let findings = table.findings(publication);
            assert_eq!(findings[0].level, level);
            let server = Server {
                version: 150_000,
                version_text: String::new(),
                standby: false,
                encoding: String::new(),
                wal_level: String::new(),
                slot_keep_bytes: 0,
                walsenders_max: 0,
                walsenders: 0,
                slots_max: 0,
                slots: 0,
                role: String::new(),
                may_replicate: true,
                wal_sender_timeout: None,
            };
            let mut look = Look { findings, server, publication, slot: None };
            assert_eq!(look.first_failure().is_err(), stops);
        }
        check(None, Level::Fail, true);
        check(Some(Publication { oid: 1, rewrites: true }), Level::Fail, false);
        check(Some(Publication { oid: 1, rewrites: false }), Level::Ok, false);
    }
}
