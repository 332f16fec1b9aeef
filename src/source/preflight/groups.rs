//! Whether the configured groups can be told from what Postgres sends.
//!
//! A delete, and an update that takes a row into another group, name the group that is left only by
//! the columns of the replica identity. So a group's columns have to lie in it.

use super::super::error::Error;
use super::super::sql::{Session, get};
use super::super::{TableName, quote_identifier};
use super::Finding;
use crate::group_by::{GroupBy, GroupBys};

/// The code of a group that the table cannot have.
const GROUP_BY: &str = "source_group_by";

/// A column of a table whose groups are made of columns.
#[derive(Clone, Debug)]
struct ColumnLook {
    name: String,
    not_null: bool,
    generated: bool,
    identity: bool,
    primary_key: bool,
}

/// A table whose groups are made of columns, as the catalogue has it.
#[derive(Clone, Debug)]
struct GroupedTable {
    name: TableName,
    partitioned: bool,
    columns: Vec<ColumnLook>,
}

pub(super) async fn findings(
    session: &Session,
    group_by: &GroupBys,
) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    for (name, group_by) in group_by {
        let GroupBy::Columns(group) = group_by else { continue };
        // A table that does not exist is said elsewhere.
        if let Some(table) = look(session, name).await? {
            findings.push(finding(&table, group));
        }
    }
    Ok(findings)
}

async fn look(session: &Session, name: &TableName) -> Result<Option<GroupedTable>, Error> {
    let rows = session
        .query(
            "SELECT a.attname::text, a.attnotnull, a.attgenerated <> '', \
                    c.relreplident = 'f' OR EXISTS ( \
                        SELECT FROM pg_index i WHERE i.indrelid = c.oid \
                        AND i.indisvalid AND i.indimmediate \
                        AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) \
                        AND CASE c.relreplident WHEN 'd' THEN i.indisprimary \
                                                WHEN 'i' THEN i.indisreplident ELSE false END), \
                    EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary \
                        AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])), \
                    c.relkind = 'p' \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
             WHERE n.nspname = $1 AND c.relname = $2 ORDER BY a.attnum",
            &[&name.schema, &name.name],
        )
        .await?;
    let Some(first) = rows.first() else { return Ok(None) };
    let partitioned = get(first, 5)?;
    let column = |row| {
        Ok(ColumnLook {
            name: get(row, 0)?,
            not_null: get(row, 1)?,
            generated: get(row, 2)?,
            identity: get(row, 3)?,
            primary_key: get(row, 4)?,
        })
    };
    let columns = rows.iter().map(column).collect::<Result<_, Error>>()?;
    Ok(Some(GroupedTable { name: name.clone(), partitioned, columns }))
}

fn finding(table: &GroupedTable, group: &[String]) -> Finding {
    let name = &table.name;
    let subject = format!("groups of {name}");
    let mut outside = Vec::new();
    for wanted in group {
        match table.columns.iter().find(|column| column.name == *wanted) {
            None => {
                let names: Vec<_> = table.columns.iter().map(|c| format!("`{}`", c.name)).collect();
                let text = format!(
                    "delivery.group_by names the column `{wanted}`, and {name} has only {}",
                    names.join(", ")
                );
                return Finding::fail(subject, GROUP_BY, text)
                    .mend("name one of its columns, letter for letter");
            }
            Some(column) if column.generated && !column.identity => {
                let text = format!(
                    "delivery.group_by names `{wanted}` of {name}, which is generated: Postgres \
                     does not publish it"
                );
                return Finding::fail(subject, GROUP_BY, text)
                    .mend("name the columns that it is generated from");
            }
            Some(column) if !column.identity => outside.push(column),
            Some(_) => {}
        }
    }
    if outside.is_empty() {
        let text = format!("by {}, within the replica identity", group.join(", "));
        return Finding::ok(subject, text);
    }
    let names: Vec<_> = outside.iter().map(|column| format!("`{}`", column.name)).collect();
    let text = format!(
        "{name} is grouped by {}, which is not in its replica identity: a delete, and an update \
         that changes it, would not say which group they belong to",
        names.join(" and ")
    );
    Finding::fail(subject, GROUP_BY, text).mend(mend(table, group))
}

/// The cheapest identity that holds the group: an index over the key and the group's columns, which
/// is unique because the key is. Without a key there is only the whole row.
fn mend(table: &GroupedTable, group: &[String]) -> String {
    let quoted = table.name.quoted();
    let is_keyed = table.columns.iter().any(|column| column.primary_key);
    let full = format!("ALTER TABLE {quoted} REPLICA IDENTITY FULL");
    // The identity of a partitioned table is its partitions' own affair.
    if table.partitioned {
        return format!("{full}, and the same for each of its partitions");
    }
    if !is_keyed {
        return full;
    }
    let in_group = |column: &&ColumnLook| group.contains(&column.name);
    let mut statements = Vec::new();
    for column in table.columns.iter().filter(in_group).filter(|column| !column.not_null) {
        let name = quote_identifier(&column.name);
        statements.push(format!("ALTER TABLE {quoted} ALTER COLUMN {name} SET NOT NULL"));
    }
    let rest = table.columns.iter().filter(|c| c.primary_key && !group.contains(&c.name));
    let of_group = group.iter().map(|name| quote_identifier(name));
    let columns: Vec<_> = of_group.chain(rest.map(|c| quote_identifier(&c.name))).collect();
    // Longer names are cut by Postgres, with a notice.
    let name: String = table.name.name.chars().take(40).collect();
    let index = quote_identifier(&format!("{name}_replica_identity"));
    statements.push(format!("CREATE UNIQUE INDEX {index} ON {quoted} ({})", columns.join(", ")));
    statements.push(format!("ALTER TABLE {quoted} REPLICA IDENTITY USING INDEX {index}"));
    format!("{}; or {full}", statements.join("; "))
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    fn column(name: &str, identity: bool, primary_key: bool) -> ColumnLook {
        let not_null = primary_key;
        ColumnLook { name: name.to_owned(), not_null, generated: false, identity, primary_key }
    }

    #[track_caller]
    fn check(columns: &[ColumnLook], group: &[&str], level: Level, needles: &[&str]) {
        let table = GroupedTable {
            name: TableName { schema: "public".into(), name: "orders".into() },
            partitioned: false,
            columns: columns.to_vec(),
        };
        let group: Vec<String> = group.iter().map(|name| (*name).to_owned()).collect();
        let finding = finding(&table, &group);
        assert_eq!(finding.level, level, "{finding}");
        let text = format!("{finding} {}", finding.mend.as_deref().unwrap_or_default());
        for needle in needles {
            assert!(text.contains(needle), "{text}");
        }
    }

    #[test]
    fn groups_have_to_lie_in_the_identity() {
        let keyed = [column("id", true, true), column("customer", false, false)];
        check(&keyed, &["id"], Level::Ok, &["by id"]);
        check(
            &keyed,
            &["customer"],
            Level::Fail,
            &[
                "`customer`",
                "ALTER TABLE \"public\".\"orders\" ALTER COLUMN \"customer\" SET NOT NULL; CREATE \
                 UNIQUE INDEX \"orders_replica_identity\" ON \"public\".\"orders\" (\"customer\", \
                 \"id\"); ALTER TABLE \"public\".\"orders\" REPLICA IDENTITY USING INDEX \
                 \"orders_replica_identity\"",
                "or ALTER TABLE \"public\".\"orders\" REPLICA IDENTITY FULL",
            ],
        );
        check(&keyed, &["Customer"], Level::Fail, &["`Customer`", "`id`, `customer`"]);
        let full = [column("id", true, false), column("customer", true, false)];
        check(&full, &["customer"], Level::Ok, &["by customer"]);
        let bare = [column("id", false, false)];
        check(&bare, &["id"], Level::Fail, &["REPLICA IDENTITY FULL"]);
        let generated = ColumnLook { generated: true, ..column("sum", false, false) };
        check(&[keyed[0].clone(), generated], &["sum"], Level::Fail, &["generated"]);
    }
}
