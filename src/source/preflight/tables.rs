//! The configured tables, and the publication that should hold them.

use std::collections::HashSet;

use super::super::error::{Error, SKIP_LOST_CHANGES};
use super::super::sql::{Session, get};
use super::super::{Settings, TableName, quote_identifier, quote_literal};
use super::Finding;
use super::server::Server;

/// The code of a table whose updates and deletes fail already, because it is published without a
/// usable replica identity. That we stand still too would help nobody.
pub(super) const UPDATES_FAIL: &str = "source_updates_fail";

/// The code of a configured table that does not exist. It stops a pipeline that is new, where it is
/// a slip of the pen; one that flows must not stand still because one of its tables was dropped.
pub(super) const TABLE_MISSING: &str = "source_table_missing";

/// A configured table as the catalogue has it.
#[derive(Debug)]
pub(super) struct TableLook {
    name: TableName,
    /// Nothing where it does not exist.
    found: Option<TableFound>,
    /// Where it does not exist: one whose name differs in its letters' case or its schema alone.
    similar: Option<TableName>,
}

#[derive(Debug)]
pub(super) struct TableFound {
    relkind: String,
    persistence: String,
    replica_identity: String,
    usable_identity: bool,
    may_select: bool,
    is_owner: bool,
}

pub(super) async fn tables(
    session: &Session,
    names: &[TableName],
) -> Result<Vec<TableLook>, Error> {
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
                    coalesce(has_table_privilege(c.oid, 'SELECT'), false), \
                    coalesce(pg_has_role(c.relowner, 'USAGE'), false), s.schema, s.name \
             FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS w(schema, name, place) \
             LEFT JOIN pg_namespace n ON n.nspname = w.schema \
             LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = w.name \
             LEFT JOIN LATERAL ( \
                 SELECT sn.nspname::text AS schema, sc.relname::text AS name \
                 FROM pg_class sc JOIN pg_namespace sn ON sn.oid = sc.relnamespace \
                 WHERE c.oid IS NULL AND lower(sc.relname) = lower(w.name) \
                 AND sc.relkind IN ('r', 'p') \
                 ORDER BY lower(sn.nspname) <> lower(w.schema), sn.nspname, sc.relname LIMIT 1 \
             ) s ON true \
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
                    is_owner: get(row, 7)?,
                }),
            };
            let similar = match (get::<Option<String>>(row, 8)?, get::<Option<String>>(row, 9)?) {
                (Some(schema), Some(name)) => Some(TableName { schema, name }),
                _ => None,
            };
            Ok(TableLook { name, found, similar })
        })
        .collect()
}

impl TableLook {
    pub(super) fn findings(&self, publication: Option<&Publication>, role: &str) -> Vec<Finding> {
        let (name, quoted) = (&self.name, self.name.quoted());
        let subject = format!("table {name}");
        let Some(table) = &self.found else {
            let mend = match &self.similar {
                Some(similar) => format!("write \"{similar}\" in `source.tables`: that one exists"),
                None => "create it, or take it out of `source.tables`".to_owned(),
            };
            let text = format!("table {name} does not exist");
            return vec![Finding::fail(subject, TABLE_MISSING, text).mend(mend)];
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
        if table.relkind == "p" {
            // Its partitions are published as the table itself, and these have no row there.
            let text = format!(
                "{name} is partitioned: a TRUNCATE of one partition alone, and a partition that is \
                 detached or dropped, sends nothing, so that its rows stay as they are in the stream"
            );
            let mend =
                format!("DELETE the partition's rows first, or TRUNCATE {quoted} as a whole");
            findings
                .push(Finding::warn(format!("partitions of {name}"), text).mend(mend).standing());
        }
        if table.usable_identity {
            findings.push(Finding::ok(subject, "exists, with a usable replica identity"));
        } else if publication.is_some_and(|publication| !publication.rewrites()) {
            findings.push(Finding::ok(subject, "exists, published without updates and deletes"));
        } else {
            let why = match table.replica_identity.as_str() {
                "d" => "it has no primary key (or a deferrable one)",
                "i" => "the index of its replica identity is gone",
                _ => "its replica identity is NOTHING",
            };
            let published =
                publication.is_some_and(|publication| publication.tables.contains(name));
            let (code, harm) = if published {
                (UPDATES_FAIL, "The application's own UPDATE and DELETE fail")
            } else {
                (
                    "source_replica_identity",
                    "With it in a publication, the application's own UPDATE and DELETE would fail",
                )
            };
            findings.push(
                Finding::fail(
                    format!("replica identity of {name}"),
                    code,
                    format!("{name} has no usable replica identity: {why}. {harm}"),
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
                    format!("the role may not read {name}: changes flow, `sluicebox verify` cannot compare"),
                )
                .mend(format!("GRANT SELECT ON {quoted} TO {}", quote_identifier(role))),
            );
        }
        findings
    }
}

/// A publication that exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::source) struct Publication {
    pub(super) oid: u32,
    insert: bool,
    update: bool,
    delete: bool,
    truncate: bool,
    tables: HashSet<TableName>,
}

impl Publication {
    /// Whether it publishes what needs a replica identity.
    fn rewrites(&self) -> bool {
        self.update || self.delete
    }
}

pub(super) async fn publication(
    session: &Session,
    name: &str,
) -> Result<Option<Publication>, Error> {
    let row = session
        .first(
            "SELECT oid, pubinsert, pubupdate, pubdelete, pubtruncate FROM pg_publication \
             WHERE pubname = $1",
            &[&name],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Publication {
        oid: get(&row, 0)?,
        insert: get(&row, 1)?,
        update: get(&row, 2)?,
        delete: get(&row, 3)?,
        truncate: get(&row, 4)?,
        tables: published(session, name).await?.into_iter().collect(),
    }))
}

pub(super) fn publication_findings(
    settings: &Settings,
    publication: Option<&Publication>,
    tables: &[TableLook],
    slot_exists: bool,
    offenders: &[TableName],
) -> Vec<Finding> {
    let (name, slot) = (&settings.publication, &settings.slot);
    let (subject, quoted) = (format!("publication {name}"), quote_identifier(name));
    let Some(publication) = publication else {
        return vec![if slot_exists {
            Finding::fail(
                subject,
                "source_publication",
                format!(
                    "slot `{slot}` exists, but publication `{name}` does not: a publication made \
                     now is younger than the slot, which can never pass the changes in between"
                ),
            )
            .mend(format!(
                "SELECT pg_drop_replication_slot({}); then {SKIP_LOST_CHANGES}",
                quote_literal(slot)
            ))
            .fatal()
        } else {
            Finding::ok(subject, "does not exist yet; `sluicebox run` creates it")
        }];
    };
    let mut findings = Vec::new();
    let missing: Vec<_> = tables
        .iter()
        .filter(|table| table.found.is_some() && !publication.tables.contains(&table.name))
        .map(|table| &table.name)
        .collect();
    if missing.is_empty() {
        findings.push(Finding::ok(subject, format!("holds {} tables", publication.tables.len())));
    } else {
        let list = |write: fn(&TableName) -> String| {
            missing.iter().map(|table| write(table)).collect::<Vec<_>>().join(", ")
        };
        findings.push(
            Finding::fail(
                subject,
                "source_publication",
                format!("publication `{name}` does not hold {}", list(ToString::to_string)),
            )
            .mend(format!("ALTER PUBLICATION {quoted} ADD TABLE {}", list(TableName::quoted))),
        );
    }
    let left_out: Vec<_> = [
        (publication.insert, "insert"),
        (publication.update, "update"),
        (publication.delete, "delete"),
        (publication.truncate, "truncate"),
    ]
    .into_iter()
    .filter_map(|(published, action)| (!published).then_some(action))
    .collect();
    if !left_out.is_empty() {
        findings.push(
            Finding::warn(
                format!("actions of publication {name}"),
                format!("it leaves out {}", left_out.join(" and ")),
            )
            .mend(format!(
                "ALTER PUBLICATION {quoted} SET (publish = 'insert, update, delete, truncate')"
            )),
        );
    }
    // Those that nobody configured are not ours to read, but the application breaks too.
    for offender in offenders.iter().filter(|offender| !settings.tables.contains(offender)) {
        findings.push(
            Finding::warn(
                format!("replica identity of {offender}"),
                format!(
                    "{offender} is in publication `{name}` without a usable replica identity: the \
                     application's own UPDATE and DELETE fail"
                ),
            )
            .mend(format!("ALTER TABLE {} REPLICA IDENTITY FULL", offender.quoted())),
        );
    }
    findings
}

/// The tables that a publication holds, partitioned ones by their own name too.
pub(super) async fn published(
    session: &Session,
    publication: &str,
) -> Result<Vec<TableName>, Error> {
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
pub(super) async fn offenders(
    session: &Session,
    publication: &str,
) -> Result<Vec<TableName>, Error> {
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

/// What keeps the role from creating the publication, where it has to be created.
pub(super) fn may_create(
    settings: &Settings,
    server: &Server,
    tables: &[TableLook],
) -> Option<Finding> {
    let is_foreign = |table: &&TableLook| table.found.as_ref().is_some_and(|found| !found.is_owner);
    let foreign: Vec<_> = tables.iter().filter(is_foreign).map(|t| t.name.to_string()).collect();
    let why = match (server.may_create, foreign.is_empty()) {
        (true, true) => return None,
        (false, _) => "it may create nothing in this database".to_owned(),
        (true, false) => format!("it does not own {}", foreign.join(", ")),
    };
    let name = &settings.publication;
    let text = format!(
        "publication `{name}` does not exist, and role `{}` cannot create it: {why}",
        server.role
    );
    let mend = format!("as the owner of the tables: {}", create_command(settings));
    Some(Finding::fail(format!("privilege to publish {name}"), "source_privilege", text).mend(mend))
}

/// Changes of partitions are told under the name of the table that was configured.
fn create_command(settings: &Settings) -> String {
    let tables: Vec<_> = settings.tables.iter().map(TableName::quoted).collect();
    format!(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true)",
        quote_identifier(&settings.publication),
        tables.join(", ")
    )
}

pub(super) async fn create_publication(
    session: &Session,
    settings: &Settings,
) -> Result<u32, Error> {
    let command = create_command(settings);
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

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use crate::group_by::GroupBys;

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
                    is_owner: true,
                }),
                similar: None,
            };
            let findings = look.findings(None, "app");
            let found = findings.iter().find(|finding| {
                finding.text.contains(needle)
                    || finding.mend.as_ref().is_some_and(|mend| mend.contains(needle))
            });
            let found = found.unwrap_or_else(|| panic!("no {needle}: {findings:?}"));
            assert_eq!(found.level, level, "{needle}");
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
        check(Some(("p", "p", "f", true)), Level::Warn, "TRUNCATE of one partition");
    }

    fn without_identity() -> TableLook {
        TableLook {
            name: TableName { schema: "public".into(), name: "t".into() },
            found: Some(TableFound {
                relkind: "r".into(),
                persistence: "p".into(),
                replica_identity: "d".into(),
                usable_identity: false,
                may_select: true,
                is_owner: true,
            }),
            similar: None,
        }
    }

    #[test]
    fn a_table_without_identity_stops_us_only_before_it_is_published() {
        fn check(publication: Option<&Publication>, level: Level, code: &str) {
            let finding = &without_identity().findings(publication, "app")[0];
            assert_eq!((finding.level, finding.code), (level, code), "{publication:?}");
        }
        let tables = HashSet::from([without_identity().name]);
        let inserts = Publication { insert: true, ..Publication::default() };
        let updates = Publication { update: true, ..inserts.clone() };
        check(None, Level::Fail, "source_replica_identity");
        check(Some(&inserts), Level::Ok, "source_setup");
        check(Some(&updates), Level::Fail, "source_replica_identity");
        check(Some(&Publication { tables, ..updates }), Level::Fail, UPDATES_FAIL);
    }

    #[test]
    fn publications() {
        fn check(publication: Option<&Publication>, slot: bool, expected: &[(Level, bool, &str)]) {
            let settings = Settings {
                dsn: "postgres://u@h/d".parse().unwrap(),
                slot: "s".into(),
                publication: "My Pub".into(),
                tables: vec![without_identity().name],
                group_by: GroupBys::new(),
            };
            let tables = [without_identity()];
            let found = publication_findings(&settings, publication, &tables, slot, &[]);
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for (finding, (level, fatal, needle)) in found.iter().zip(expected) {
                let mend = finding.mend.as_deref().unwrap_or_default();
                assert_eq!((finding.level, finding.fatal), (*level, *fatal), "{finding}");
                assert!(format!("{finding} {mend}").contains(needle), "{finding} {mend}");
            }
        }
        let all = Publication {
            insert: true,
            update: true,
            delete: true,
            truncate: true,
            tables: HashSet::from([without_identity().name]),
            ..Publication::default()
        };
        check(None, false, &[(Level::Ok, false, "creates it")]);
        check(None, true, &[(Level::Fail, true, "pg_drop_replication_slot('s')")]);
        check(Some(&all), true, &[(Level::Ok, false, "holds 1 table")]);
        let add = "ALTER PUBLICATION \"My Pub\" ADD TABLE \"public\".\"t\"";
        let empty = Publication { tables: HashSet::new(), ..all.clone() };
        check(Some(&empty), true, &[(Level::Fail, false, add)]);
        check(
            Some(&Publication { truncate: false, ..all }),
            true,
            &[(Level::Ok, false, "holds"), (Level::Warn, false, "leaves out truncate")],
        );
    }
}
