//! What the replication stream leaves out about a table: the meaning of its columns' types, and
//! its primary key.
//!
//! The stream names a type by its OID, and for a domain or an enum that OID is its own. Its Type
//! messages cannot tell an enum from a composite, so we ask `pg_type`. What is built in is known
//! without asking. Nothing is cached: Postgres describes a table once for each connection and after
//! each change of it, and a composite may have gained attributes since the last time.
//!
//! The catalogue is read as it is now, the change may be older. A type or table that has gone is
//! read as text: a row must never wedge the stream because its table was dropped behind it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::TableName;
use super::error::Error;
use super::sql::{Session, Sql, get};
use crate::change::{Column, Grouping, Table};
use crate::decode::Relation;
use crate::group_by::{GroupBys, Unfit};
use crate::pg_type::{Kind, TypeRow};

/// A table ready for the decoder.
#[derive(Clone, Debug)]
pub(super) struct Described {
    pub table: Arc<Table>,
    /// It, or a partitioned table above it, is one that the pipeline reads.
    pub wanted: bool,
}

/// Describes relations, and tells which of them the pipeline reads.
#[derive(Debug)]
pub(super) struct Catalog {
    wanted: HashSet<TableName>,
    group_by: GroupBys,
}

impl Catalog {
    /// `tables` are those that the pipeline reads.
    pub(super) fn new(tables: &[TableName], group_by: &GroupBys) -> Self {
        Self { wanted: tables.iter().cloned().collect(), group_by: group_by.clone() }
    }

    /// Finds out everything about a relation. What the catalogue cannot say any more reads as
    /// text, with a line in the log.
    ///
    /// # Errors
    ///
    /// When Postgres does not answer.
    pub(super) async fn describe(&self, sql: &Sql, relation: Relation) -> Result<Described, Error> {
        let session = sql.session().await?;
        let described = self.describe_on(&session, relation).await;
        if described.is_err() {
            sql.forget().await;
        }
        described
    }

    async fn describe_on(&self, session: &Session, relation: Relation) -> Result<Described, Error> {
        let types = types(session, &relation).await?;
        let Keys { primary_key, ancestors } = keys(session, relation.oid).await?;
        let name = TableName { schema: relation.schema, name: relation.name };
        let column = |column: crate::decode::RelationColumn| {
            let oid = column.type_oid;
            let type_name = match (Kind::builtin(oid), types.get(&oid)) {
                (Some((_, builtin)), _) => builtin.to_owned(),
                (None, Some(row)) => row.name.clone(),
                (None, None) => {
                    let (table, column) = (&name, &column.name);
                    tracing::warn!(
                        "the type of {table}.{column} is not in the catalogue any more (oid \
                         {oid}); its values stay text"
                    );
                    "unknown".to_owned()
                }
            };
            Column {
                primary_key: primary_key.contains(&column.name),
                identity: column.identity,
                kind: Kind::resolve(oid, |oid| types.get(&oid)),
                type_name,
                name: column.name,
            }
        };
        let columns: Vec<Column> = relation.columns.into_iter().map(column).collect();
        let wanted = self.wanted.contains(&name)
            || ancestors.iter().any(|ancestor| self.wanted.contains(ancestor));
        let grouping = self.grouping(&name, &ancestors, &columns);
        let TableName { schema, name } = name;
        let table = Table { oid: relation.oid, schema, name, columns, grouping };
        Ok(Described { table: Arc::new(table), wanted })
    }
}

impl Catalog {
    /// A connection is refused while the catalogue does not fit what is configured. Changes from
    /// before it did, or from after somebody altered the table, keep the order of the whole table
    /// instead: that is in order whatever the group would have been.
    fn grouping(&self, name: &TableName, ancestors: &[TableName], columns: &[Column]) -> Grouping {
        let configured = std::iter::once(name).chain(ancestors);
        let group_by = configured.filter_map(|name| self.group_by.get(name)).next();
        let Some(group_by) = group_by else { return Grouping::Key };
        group_by.resolve(columns).unwrap_or_else(|unfit| {
            let (Unfit::Missing { column } | Unfit::OutsideIdentity { column }) = unfit;
            tracing::warn!(
                "changes of {name} from before {column} was a part of its replica identity are one \
                 group"
            );
            Grouping::Table
        })
    }
}

/// The rows of all types of a relation that are not built in, and of the types inside them.
async fn types(session: &Session, relation: &Relation) -> Result<HashMap<u32, TypeRow>, Error> {
    let unknown: Vec<u32> = relation
        .columns
        .iter()
        .map(|column| column.type_oid)
        .filter(|&oid| Kind::builtin(oid).is_none())
        .collect();
    if unknown.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = session
        .query(
            "WITH RECURSIVE needed(oid) AS ( \
               SELECT unnest($1::oid[]) \
               UNION \
               SELECT inner_type.oid FROM needed JOIN pg_type t ON t.oid = needed.oid \
               CROSS JOIN LATERAL ( \
                 SELECT t.typbasetype \
                 UNION ALL SELECT t.typelem WHERE t.typoutput = 'array_out'::regproc \
                 UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE t.typtype = 'c' \
                   AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped \
               ) AS inner_type(oid) WHERE inner_type.oid <> 0 \
             ) \
             SELECT t.oid, t.typname::text, t.typtype::text, t.typbasetype, \
                    CASE WHEN t.typoutput = 'array_out'::regproc THEN t.typelem \
                         ELSE 0::oid END, \
                    t.typdelim::text, \
                    ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE t.typtype = 'c' \
                      AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped \
                      ORDER BY a.attnum), \
                    ARRAY(SELECT a.atttypid FROM pg_attribute a WHERE t.typtype = 'c' \
                      AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped \
                      ORDER BY a.attnum) \
             FROM needed JOIN pg_type t ON t.oid = needed.oid",
            &[&unknown],
        )
        .await?;
    let mut types = HashMap::with_capacity(rows.len());
    for row in &rows {
        let first = |index: usize| {
            let text: String = get(row, index)?;
            Ok::<_, Error>(text.chars().next().unwrap_or_default())
        };
        let (names, oids): (Vec<String>, Vec<u32>) = (get(row, 6)?, get(row, 7)?);
        let row = TypeRow {
            oid: get(row, 0)?,
            name: get(row, 1)?,
            class: first(2)?,
            base: get(row, 3)?,
            element: get(row, 4)?,
            delimiter: first(5)?,
            attributes: names.into_iter().zip(oids).collect(),
        };
        types.insert(row.oid, row);
    }
    Ok(types)
}

struct Keys {
    /// Column names; none where there is no key, or no table any more.
    primary_key: HashSet<String>,
    /// The partitioned tables that a partition belongs to.
    ancestors: Vec<TableName>,
}

async fn keys(session: &Session, oid: u32) -> Result<Keys, Error> {
    let row = session
        .one(
            "SELECT ARRAY(SELECT a.attname::text FROM pg_index i \
                          JOIN pg_attribute a ON a.attrelid = i.indrelid \
                          AND a.attnum = ANY (i.indkey) \
                          WHERE i.indrelid = $1 AND i.indisprimary), \
                    ARRAY(SELECT n.nspname::text FROM pg_partition_ancestors($1) AS p(oid) \
                          JOIN pg_class c ON c.oid = p.oid \
                          JOIN pg_namespace n ON n.oid = c.relnamespace ORDER BY c.oid), \
                    ARRAY(SELECT c.relname::text FROM pg_partition_ancestors($1) AS p(oid) \
                          JOIN pg_class c ON c.oid = p.oid ORDER BY c.oid)",
            &[&oid],
        )
        .await?;
    let primary_key: Vec<String> = get(&row, 0)?;
    let (schemas, names): (Vec<String>, Vec<String>) = (get(&row, 1)?, get(&row, 2)?);
    let ancestors =
        schemas.into_iter().zip(names).map(|(schema, name)| TableName { schema, name }).collect();
    Ok(Keys { primary_key: primary_key.into_iter().collect(), ancestors })
}
