//! How the changes of a table are grouped, as the configuration says it.

use std::collections::BTreeMap;

use crate::change::{Column, Grouping};
use crate::table_name::TableName;

/// What `delivery.group_by` says of a table. Tables that are not named are grouped by their key.
pub type GroupBys = BTreeMap<TableName, GroupBy>;

/// What keeps its order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum GroupBy {
    /// The changes of one row, by the table's key; all of a table that has none.
    #[default]
    Key,
    /// The changes with the same values in these columns, at least one.
    Columns(Vec<String>),
    /// All changes of the table.
    Table,
    /// Nothing: each change goes when it can.
    None,
}

/// A table that cannot be grouped as it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// The table has no such column, or it is not published.
    Missing { column: String },
    /// Deletes, and updates that change the column, would not say which group they leave.
    OutsideIdentity { column: String },
}

impl GroupBy {
    /// The same for a table with these columns.
    ///
    /// # Errors
    ///
    /// The first column that cannot be a part of a group.
    pub fn resolve(&self, columns: &[Column]) -> Result<Grouping, Unfit> {
        let names = match self {
            Self::Key => return Ok(Grouping::Key),
            Self::Table => return Ok(Grouping::Table),
            Self::None => return Ok(Grouping::None),
            Self::Columns(names) => names,
        };
        let place = |name: &String| match columns.iter().position(|column| column.name == *name) {
            None => Err(Unfit::Missing { column: name.clone() }),
            Some(place) if !columns[place].identity => {
                Err(Unfit::OutsideIdentity { column: name.clone() })
            }
            Some(place) => Ok(place),
        };
        Ok(Grouping::Columns(names.iter().map(place).collect::<Result<_, _>>()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg_type::Kind;

    #[test]
    fn columns_have_to_be_there_and_in_the_identity() {
        #[track_caller]
        fn check(group_by: &GroupBy, expected: Result<Grouping, Unfit>) {
            let column = |name: &str, identity| Column {
                name: name.to_owned(),
                type_name: "text".to_owned(),
                kind: Kind::Text,
                identity,
                primary_key: false,
            };
            let columns = [column("id", true), column("customer", true), column("body", false)];
            assert_eq!(group_by.resolve(&columns), expected);
        }
        let by = |names: &[&str]| GroupBy::Columns(names.iter().map(|n| (*n).to_owned()).collect());
        check(&GroupBy::Key, Ok(Grouping::Key));
        check(&GroupBy::Table, Ok(Grouping::Table));
        check(&GroupBy::None, Ok(Grouping::None));
        check(&by(&["customer", "id"]), Ok(Grouping::Columns(vec![1, 0])));
        let outside = Unfit::OutsideIdentity { column: "body".to_owned() };
        check(&by(&["id", "body"]), Err(outside));
        check(&by(&["Customer"]), Err(Unfit::Missing { column: "Customer".to_owned() }));
    }
}
