//! Whether what is connected to is what was read before: the same cluster, publication and slot. Pure.
//!
//! Each of them may be another without any sign of it in the stream, and what was changed in between
//! would be missing without a word. So each is refused, with what changed and what mends it, until an
//! operator says that those changes are given up.

use crate::change::Lsn;
use crate::source::error::{Error, SKIP_LOST_CHANGES};
use crate::source::transport::Identity;
use crate::source::{PublicationId, Settings, TableName, quote_literal};

/// What an earlier connection, or an earlier run, has read from.
#[derive(Debug)]
pub(super) struct Known {
    /// What the slot may have been confirmed to at most; none before the first look at it.
    pub mark: Option<Lsn>,
    /// Every change up to here was read, at least.
    pub read: Lsn,
    pub system_identifier: Option<String>,
    pub publication: Option<PublicationId>,
    /// See [`Resume::lost_changes`](crate::source::Resume::lost_changes).
    pub lost_changes: bool,
}

impl Known {
    /// The slot must not have been confirmed by anybody else.
    pub(super) fn check_slot(&self, slot: &str, confirmed: Lsn) -> Result<(), Error> {
        let Some(mark) = self.mark.filter(|&mark| confirmed > mark) else { return Ok(()) };
        if self.lost_changes {
            tracing::warn!(from = %mark, to = %confirmed, "what was changed in between is given up");
            return Ok(());
        }
        Err(Error::Unmet {
            code: "source_slot_advanced",
            text: format!(
                "slot `{slot}` was confirmed up to {confirmed}, but this pipeline has read only up to \
                 {mark}: changes in between may be lost to it. Something else has read from the \
                 slot, it was made anew, or the state folder is an older copy"
            ),
            mend: Some(format!(
                "put the state folder back that belongs to it; or {SKIP_LOST_CHANGES}"
            )),
            fatal: true,
        })
    }

    /// Whether it is the same cluster, looked at before anything is made there.
    pub(super) fn check_cluster(&self, found: &str, wal_end: Lsn) -> Result<(), Error> {
        let Some(known) = self.system_identifier.as_ref().filter(|known| *known != found) else {
            return Ok(());
        };
        // Else a new change might have the place of one that was read.
        let goes_on = wal_end >= self.read();
        if self.lost_changes && goes_on {
            tracing::warn!(
                known,
                found,
                "another Postgres cluster is read from now on, as was granted"
            );
            return Ok(());
        }
        let upgraded = if goes_on {
            format!("if that one was made into this one by pg_upgrade, {SKIP_LOST_CHANGES}; ")
        } else {
            String::new()
        };
        Err(other_cluster(
            format!(
                "this is another Postgres cluster (system identifier {found}) than the one that the \
                 pipeline has read ({known}): its changes are others, and have other positions"
            ),
            format!(
                "point source.url at the cluster that was read; {upgraded}{}",
                begin_anew("this one takes its place")
            ),
        ))
    }

    /// It must not be an older copy either.
    pub(super) fn check_identity(&self, identity: &Identity) -> Result<(), Error> {
        self.check_cluster(&identity.system_identifier, identity.wal_end)?;
        let Some(mark) = self.mark.filter(|&mark| identity.wal_end < mark) else { return Ok(()) };
        Err(other_cluster(
            format!(
                "the WAL of this Postgres ends at {}, but the pipeline has read up to {mark}: it was \
                 restored from an older copy, and new changes would get the positions of those that \
                 are lost",
                identity.wal_end
            ),
            format!(
                "point source.url at the server that was read; {}",
                begin_anew("the copy takes its place")
            ),
        ))
    }

    fn read(&self) -> Lsn {
        self.read.max(self.mark.unwrap_or_default())
    }

    /// A publication that was dropped and made anew has not published in between; Postgres 18 says
    /// nothing about it. `unpublished` are configured tables that it does not hold.
    pub(super) fn check_publication(
        &self,
        settings: &Settings,
        found: Option<u32>,
        unpublished: &[TableName],
        has_slot: bool,
    ) -> Result<(), Error> {
        let name = &settings.publication;
        // Another one by an operator's own settings is another matter.
        let known = self.publication.as_ref().filter(|known| known.name == *name);
        let Some(known) = known.filter(|known| found != Some(known.oid)) else { return Ok(()) };
        if self.lost_changes {
            tracing::warn!(publication = name, "it is another one than was read, as was granted");
            return Ok(());
        }
        let missing: Vec<String> = unpublished.iter().map(ToString::to_string).collect();
        let text = match found {
            Some(found) => format!(
                "publication `{name}` was dropped and made anew (it was OID {}, and is {found}){}",
                known.oid,
                if missing.is_empty() {
                    String::new()
                } else {
                    format!(", without {}", missing.join(", "))
                }
            ),
            None => format!("publication `{name}` was dropped"),
        };
        let drop = if has_slot {
            format!("SELECT pg_drop_replication_slot({}); then ", quote_literal(&settings.slot))
        } else {
            String::new()
        };
        Err(Error::Unmet {
            code: "source_publication",
            text: format!(
                "{text}: changes since then may not be in the stream, and the slot may not be able to \
                 pass them"
            ),
            mend: Some(format!("{drop}{SKIP_LOST_CHANGES}")),
            fatal: true,
        })
    }
}

fn other_cluster(text: String, mend: String) -> Error {
    Error::Unmet { code: "source_other_cluster", text, mend: Some(mend), fatal: true }
}

fn begin_anew(when: &str) -> String {
    format!(
        "if {when} for good, begin with an empty state folder (state.dir), once with `sluicebox run \
         --abandon-parked`: what is parked in the old one is never delivered"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Known {
        Known {
            mark: Some(Lsn(100)),
            read: Lsn(120),
            system_identifier: Some("7".to_owned()),
            publication: Some(PublicationId { name: "sluicebox".to_owned(), oid: 16_400 }),
            lost_changes: false,
        }
    }

    #[track_caller]
    fn check(found: Result<(), Error>, says: &[&str]) {
        match found {
            Ok(()) => assert!(says.is_empty(), "it should be refused"),
            Err(Error::Unmet { text, mend, fatal, .. }) => {
                let whole = format!("{text}; {}", mend.expect("there is a mend"));
                assert!(fatal && !says.is_empty(), "{whole}");
                for part in says {
                    assert!(whole.contains(part), "`{part}` is not in: {whole}");
                }
            }
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn another_cluster_is_refused_with_what_mends_it() {
        let known = known();
        let identity = |system: &str, wal_end| Identity {
            system_identifier: system.to_owned(),
            timeline: 1,
            wal_end: Lsn(wal_end),
        };
        check(known.check_identity(&identity("7", 100)), &[]);
        check(
            known.check_identity(&identity("8", 119)),
            &["identifier 8", "(7)", "point source.url", "--abandon-parked", "never delivered"],
        );
        check(
            known.check_identity(&identity("8", 120)),
            &["point source.url", "pg_upgrade", "--skip-lost-changes", "--abandon-parked"],
        );
        check(
            known.check_identity(&identity("7", 99)),
            &["older copy", "ends at 0/63", "0/64", "point source.url", "--abandon-parked"],
        );
        let granted = Known { lost_changes: true, ..known };
        check(granted.check_identity(&identity("8", 120)), &[]);
        // Its changes would have the places of those that were read.
        check(granted.check_identity(&identity("8", 119)), &["identifier 8"]);
    }

    #[test]
    fn a_publication_is_known_by_its_name_and_oid() {
        let settings = Settings {
            dsn: "postgres://u@h/d".parse().unwrap(),
            slot: "s".to_owned(),
            publication: "sluicebox".to_owned(),
            tables: Vec::new(),
            group_by: Default::default(),
        };
        let table = TableName { schema: "public".to_owned(), name: "t".to_owned() };
        let missing = std::slice::from_ref(&table);
        let known = known();
        check(known.check_publication(&settings, Some(16_400), missing, true), &[]);
        check(
            known.check_publication(&settings, Some(16_401), missing, true),
            &["made anew", "16400", "16401", "without public.t", "drop_replication_slot('s')"],
        );
        check(
            known.check_publication(&settings, None, &[], false),
            &["was dropped:", "start once with `sluicebox run --skip-lost-changes`"],
        );
        let other = Settings { publication: "other".to_owned(), ..settings.clone() };
        check(known.check_publication(&other, Some(1), &[], true), &[]);
        let granted = Known { lost_changes: true, ..known };
        check(granted.check_publication(&settings, Some(1), &[], true), &[]);
        let first = Known { publication: None, lost_changes: false, ..granted };
        check(first.check_publication(&settings, Some(1), &[], true), &[]);
    }
}
