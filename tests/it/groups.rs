//! What keeps its order while one of its changes waits, as `delivery.group_by` says it.

use crate::support::oracle::position;
use crate::support::s2::Record;
use crate::support::world::{World, field};

const ORDERS: &str = "create table orders (
    id bigint primary key, customer bigint not null, body text not null, note text
);";

/// What makes a replica identity of customer and id, as `check` proposes it.
const IDENTITY: &str = "create unique index orders_replica_identity on orders (customer, id);
    alter table orders replica identity using index orders_replica_identity;";

async fn orders(test: &str, sql: &str, group_by: &str) -> World<'static> {
    let mut world = World::new(test, &format!("{ORDERS}{sql}"), &["public.orders"]).await;
    world.home.settings.sections = format!("[delivery.group_by]\n\"public.orders\" = {group_by}\n");
    world.home.write_config();
    world
}

fn insert(id: u64, customer: u64, body_bytes: u64) -> String {
    format!(
        "insert into orders values \
         ({id}, {customer}, 'r0wv4lue' || repeat('x', {body_bytes}), 'r0wv4lue');"
    )
}

fn ids(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| field(record, "id")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_outside_the_identity_is_refused_with_the_sql_that_mends_it() {
    let world = orders("group_refused", "", "[\"customer\"]").await;
    let mut running = world.start();
    let text = running.unready("source_group_by").await;
    let check = world.cli(&["check"]).await;
    assert_eq!(check.status.code(), Some(1));
    let report = String::from_utf8_lossy(&check.stdout).into_owned();
    for said in [&text, &report] {
        for part in ["public.orders", "`customer`", "CREATE UNIQUE INDEX", "USING INDEX"] {
            assert!(said.contains(part), "`{part}` is not in:\n{said}");
        }
    }
    // The mend is taken by its word.
    let (_, mend) = text.split_once("mend it with: ").expect("the text says how to mend it");
    let (mend, _) = mend.split_once("; or ALTER").expect("there is another way");
    world.sql(mend).await;
    let running = running.ready().await;
    world.ok(&["check"]).await;
    running.stop().await;
}

/// A row of a customer waits; so does everything else of that customer, a row that joins it and
/// the row's later changes, and nothing of other customers.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_change_holds_the_group_that_columns_make() {
    let world = orders("group_columns", IDENTITY, "[\"customer\"]").await;
    let running = world.start().ready().await;
    world
        .sql(
            &[
                insert(1, 7, 2_000_000),
                insert(2, 8, 10),
                insert(3, 7, 10),
                // Leaves customer 8 for 7, and waits.
                "update orders set customer = 7 where id = 2;".to_owned(),
                insert(4, 8, 10),
                // Leaves 7 for 9, and holds 9 from here on.
                "update orders set customer = 9 where id = 3;".to_owned(),
                insert(5, 9, 10),
                insert(6, 10, 10),
            ]
            .concat(),
        )
        .await;
    // The move of 2 holds its old group as well: 4 comes behind it.
    assert_eq!(ids(&world.until_records(2).await), ["2", "6"]);
    let waiting = world.until_messages("waiting", 5).await;
    assert!(waiting.iter().all(|message| message["behind"].is_string()), "{waiting:#?}");
    world.until_confirmed().await;
    running.kill().await;

    let running = world.start().ready().await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    world.until_no_messages().await;
    let records = world.until_records(8).await;
    for customer in ["7", "8", "9"] {
        let joined = |record: &&Record| field(record, "customer") == customer;
        let positions: Vec<_> =
            records.iter().filter(joined).map(|record| position(&record.json())).collect();
        assert!(positions.is_sorted(), "customer {customer}: {positions:?}");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_groups_nothing_waits_and_a_whole_table_waits_together() {
    let world = orders("group_none", "", "\"none\"").await;
    let running = world.start().ready().await;
    let update = "update orders set note = 'r0wv4lue' where id = 1;";
    world.sql(&[insert(1, 7, 2_000_000).as_str(), update, &insert(2, 7, 10)].concat()).await;
    // The update's body is unchanged, and so not sent.
    assert_eq!(ids(&world.until_records(2).await), ["1", "2"]);
    world.until_messages("parked", 1).await;
    running.stop().await;

    // From now on the whole table is in order, behind what is stored already.
    let mut world = world;
    world.home.settings.sections =
        "[delivery.group_by]\n\"public.orders\" = \"table\"\n".to_owned();
    world.home.write_config();
    let running = world.start().ready().await;
    world.sql(&[insert(3, 7, 10), insert(4, 8, 10)].concat()).await;
    let waiting = world.until_messages("waiting", 2).await;
    let parked = world.until_messages("parked", 1).await;
    for message in &waiting {
        assert_eq!(message["behind"], parked[0]["id"], "{message:#}");
    }
    world.ok(&["messages", "ack", parked[0]["id"].as_str().unwrap()]).await;
    assert_eq!(ids(&world.until_records(4).await), ["1", "2", "3", "4"]);
    world.until_no_messages().await;
    running.stop().await;
}

/// Another grouping takes effect once what is stored under the earlier one is through.
#[tokio::test(flavor = "multi_thread")]
async fn order_holds_while_the_grouping_changes() {
    let world = orders("group_changed", IDENTITY, "\"key\"").await;
    let running = world.start().ready().await;
    world.sql(&[insert(1, 7, 2_000_000), insert(2, 8, 10)].concat()).await;
    assert_eq!(ids(&world.until_records(1).await), ["2"]);
    world.until_messages("parked", 1).await;
    running.stop().await;

    let mut world = world;
    world.home.settings.sections =
        "[delivery.group_by]\n\"public.orders\" = [\"customer\"]\n".to_owned();
    world.home.write_config();
    let running = world.start().ready().await;
    world.sql("update orders set note = 'r0wv4lue' where id in (1, 2);").await;
    world.until_messages("waiting", 2).await;
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let records = world.until_records(4).await;
    assert_eq!(ids(&records), ["2", "1", "1", "2"]);
    world.until_no_messages().await;
    world.sql(&[insert(3, 7, 10), insert(4, 9, 10)].concat()).await;
    world.until_records(6).await;
    running.stop().await;
}
