//! What has to hold before changes can flow: looked at for `check` and before each connection, and
//! the publication and the slot made where they are missing.
//!
//! The user's own application comes first. Publishing updates and deletes of a table without a
//! usable replica identity makes *their* UPDATE and DELETE fail, so tables are looked at before a
//! publication is made. And the publication is made before the slot: a slot that is older than its
//! publication can never pass the changes in between.
//!
//! Nothing that exists is ever changed here. Where something has to be, the command is named.

mod groups;
mod health;
mod server;
mod slot;
mod tables;

use std::fmt;
use std::sync::Arc;

use super::dsn::Dsn;
use super::error::{Error, SKIP_LOST_CHANGES, Trouble};
use super::sql::{Session, Sql};
use super::transport::Replication;
use super::{Settings, quote_identifier};
use crate::change::Lsn;
use crate::finding::Level;

pub(super) use health::{Health, health, system_identifier, wal_end};
use server::Server;
use tables::{Publication, TABLE_MISSING, UPDATES_FAIL};

pub use health::SlotHealth;
pub use slot::{OpenTransaction, is_slot_name};

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
    /// A trait of what is read, to be known once: nothing is wrong that could be mended, and a warning
    /// that never ends hides those that come.
    pub standing: bool,
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
            standing: false,
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

    fn standing(self) -> Self {
        Self { standing: true, ..self }
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
        connection.terminate().await?;
        Ok::<_, Error>(identity)
    };
    match tried.await {
        Ok(identity) => Finding::ok(name, format!("system {} answers", identity.system_identifier)),
        Err(Error::Server(error)) if error.code == "42501" => {
            Finding::fail(name, "source_privilege", format!("Postgres: {error}")).mend(format!(
                "ALTER ROLE {} REPLICATION, on Amazon RDS GRANT rds_replication TO it",
                quote_identifier(dsn.user())
            ))
        }
        Err(error) => {
            let Trouble { code, text, .. } = error.trouble();
            Finding::fail(name, code, text)
        }
    }
}

/// What the server, the tables, the publication and the slot look like.
#[derive(Debug)]
struct Look {
    findings: Vec<Finding>,
    server: Server,
    publication: Option<Publication>,
    /// Up to where it is confirmed.
    slot: Option<Lsn>,
}

impl Look {
    /// The first failure that keeps changes from flowing.
    fn first_failure(&mut self) -> Result<(), Error> {
        let flows = self.slot.is_some() && self.publication.is_some();
        let tolerated = |code: &str| code == UPDATES_FAIL || code == TABLE_MISSING && flows;
        let failed = |finding: &Finding| finding.level == Level::Fail && !tolerated(finding.code);
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
    /// Just now.
    pub made_slot: bool,
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
        .mend(SKIP_LOST_CHANGES)
        .fatal()
        .into_error());
    }
    looked.first_failure()?;
    let publication = match looked.publication {
        Some(publication) => publication.oid,
        None => tables::create_publication(session, settings).await?,
    };
    let made_slot = looked.slot.is_none();
    let confirmed = match looked.slot {
        Some(confirmed) => confirmed,
        None => slot::create_slot(session, settings).await?,
    };
    looked.findings.retain(|finding| finding.level != Level::Ok);
    let Look { server, findings: warnings, .. } = looked;
    Ok(Prepared { server, publication, confirmed, made_slot, warnings })
}

async fn look(session: &Session, settings: &Settings) -> Result<Look, Error> {
    let server = server::server(session).await?;
    let mut findings = server.findings();
    let tables = tables::tables(session, &settings.tables).await?;
    let before = findings.len();
    let slot = slot::slot(session, settings, &mut findings).await?;
    // One that belongs to something else says nothing about ours.
    let is_ours = !findings[before..].iter().any(|finding| finding.code == slot::NOT_OURS);
    let publication = tables::publication(session, &settings.publication).await?;
    // In the order in which they have to be mended.
    for table in &tables {
        findings.extend(table.findings(publication.as_ref(), &server.role));
    }
    findings.extend(groups::findings(session, &settings.group_by).await?);
    let offenders = tables::offenders(session, &settings.publication).await?;
    findings.extend(tables::publication_findings(
        settings,
        publication.as_ref(),
        &tables,
        slot.is_some() && is_ours,
        &offenders,
    ));
    if publication.is_none() && slot.is_none() {
        findings.extend(tables::may_create(settings, &server, &tables));
    }
    if slot.is_none() {
        server.room_for_slot(&mut findings);
        let blockers = slot::blockers(session).await?;
        if !blockers.is_empty() {
            findings.push(Finding::warn("open transactions", blockers));
        }
    }
    Ok(Look { findings, server, publication, slot })
}
