//! Work that the writers do not do: what is large, rare, or changes the tables themselves. Each piece
//! is done once, by a connection of its own that comes back until it is done, whatever happens to the
//! server meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_postgres::error::SqlState;

use crate::support::PATIENCE;
use crate::support::postgres::try_connect;

/// One piece of such work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Burst {
    /// A row of 20 MiB, one of 1.5 MiB, and what happens to them later.
    LargeRows,
    BigTransaction,
    /// Hundreds of savepoints, a third of which is rolled back.
    Subtransactions,
    /// Columns that come and go, between transactions and within one.
    Columns,
    /// Several tables in one statement.
    Truncate,
    /// Rows that change hands between groups, some of which are held back.
    Groups,
    /// Rows that the module of [`super::operator`] traps on.
    Traps,
    /// A little in each of many tables.
    ManyTables,
    /// Rows that take each other's keys, large values that move without being sent, a table without
    /// columns.
    Keys,
}

impl Burst {
    pub const ALL: [Self; 9] = [
        Self::ManyTables,
        Self::Keys,
        Self::LargeRows,
        Self::BigTransaction,
        Self::Subtransactions,
        Self::Columns,
        Self::Truncate,
        Self::Groups,
        Self::Traps,
    ];

    /// The transactions, in order. Rows, and operations in the ledger, are numbered from `first`; a
    /// burst has room for ten thousand.
    fn transactions(self, first: u64) -> Vec<String> {
        let n = |number: u64| first + number;
        let ledger = |op: u64, id: u64, action: &str| {
            format!("insert into ledger (op, id, action) values ({op}, {id}, '{action}');")
        };
        let insert = |op: u64, id: u64, label: &str, body: &str| {
            format!("insert into items values ({id}, {op}, 'r0wv4lue {label}', {body});")
                + &ledger(op, id, "insert")
        };
        let update = |op: u64, id: u64| {
            format!("update items set op = {op}, label = 'r0wv4lue later' where id = {id};")
                + &ledger(op, id, "update")
        };
        let delete = |op: u64, id: u64| {
            format!("delete from items where id = {id};") + &ledger(op, id, "delete")
        };
        match self {
            Self::LargeRows => vec![
                insert(n(0), n(0), "large", "repeat('x', 20 * 1024 * 1024)"),
                insert(n(1), n(1), "large", "repeat('y', 1536 * 1024)"),
                update(n(2), n(0)) + &update(n(3), n(1)),
                delete(n(4), n(1)) + &insert(n(5), n(1), "small again", "'z'"),
            ],
            Self::BigTransaction => {
                let rows = format!("generate_series({}, {}) n", n(0), n(2999));
                let note = |shift: u64, action: &str, which: &str| {
                    format!(
                        "insert into ledger (op, id, action)
                         select n + {shift}, n, '{action}' from {rows} where {which};"
                    )
                };
                vec![
                    format!(
                        "insert into items select n, n, 'r0wv4lue', repeat('w', 300) from {rows};"
                    ) + &note(0, "insert", "true")
                        + &format!(
                            "update items set op = op + 3000 where id between {} and {} and id % 2 = 0;",
                            n(0),
                            n(2999)
                        )
                        + &note(3000, "update", "n % 2 = 0")
                        + &format!(
                            "delete from items where id between {} and {} and id % 4 = 0;",
                            n(0),
                            n(2999)
                        )
                        + &note(6000, "delete", "n % 4 = 0"),
                ]
            }
            Self::Subtransactions => vec![format!(
                "do $$ declare n bigint; begin for i in 0..399 loop begin
                   n := {} + i;
                   insert into items values (n, n, 'r0wv4lue', 'b');
                   insert into ledger (op, id, action) values (n, n, 'insert');
                   if n % 3 = 0 then raise exception 'no'; end if;
                 exception when raise_exception then null; end; end loop; end $$;",
                n(0)
            )],
            Self::Columns => vec![
                format!("alter table items add column if not exists extra_{first} text;"),
                format!(
                    "insert into items (id, op, label, body, extra_{first})
                       values ({0}, {0}, 'r0wv4lue', 'b', 'r0wv4lue');",
                    n(0)
                ) + &ledger(n(0), n(0), "insert"),
                update(n(1), n(0)),
                // The ledger keeps this one from being done twice.
                ledger(n(2), n(2), "insert")
                    + &format!("insert into items values ({0}, {0}, 'r0wv4lue', 'b');", n(2))
                    + &format!(
                        "insert into shapes (id) values ({0});
                         alter table shapes add column c{first} text;
                         insert into shapes (id, c{first}) values ({1}, 'r0wv4lue');
                         alter table shapes alter column c{first} type varchar;
                         insert into shapes (id, c{first}) values ({2}, 'r0wv4lue');
                         alter table shapes drop column c{first};
                         delete from shapes where id = {1};",
                        n(3),
                        n(4),
                        n(5)
                    ),
                format!("alter table items drop column if exists extra_{first};"),
                update(n(6), n(0)),
            ],
            Self::Truncate => vec![
                format!("insert into shapes values ({}), ({});", n(0), n(1)),
                "truncate pad, bag, shapes;".to_owned(),
                format!("insert into shapes values ({});", n(0)),
            ],
            Self::Groups => {
                let order = |id: u64, customer: u64, body: &str| {
                    format!("insert into orders values ({id}, {customer}, {id}, {body});")
                };
                let (a, b, c) = (n(1), n(2), n(3));
                let hand_over = |id: u64, customer: u64| {
                    format!("update orders set customer = {customer}, op = op + 1 where id = {id};")
                };
                vec![
                    order(n(10), a, "repeat('x', 1200000)") + &order(n(11), b, "'s'"),
                    order(n(12), a, "'s'") + &hand_over(n(11), a),
                    order(n(13), b, "'s'") + &hand_over(n(12), c),
                    order(n(14), c, "repeat('y', 1200000)"),
                    hand_over(n(10), b) + &order(n(15), a, "'s'"),
                    format!("delete from orders where id in ({}, {});", n(10), n(13)),
                    hand_over(n(15), c),
                ]
            }
            Self::ManyTables => {
                let each = |sql: &dyn Fn(u64) -> String| (0..MANY).map(sql).collect::<String>();
                let id = n(0);
                vec![
                    each(&|table| format!("insert into many_{table} values ({id}, 'r0wv4lue');")),
                    each(&|table| format!("update many_{table} set v = 'x' where id = {id};"))
                        + &each(&|table| {
                            format!("insert into many_{table} values ({id} + 1, 'y');")
                        })
                        + &each(&|table| format!("delete from many_{table} where id = {id};")),
                ]
            }
            Self::Keys => {
                let (a, b, c) = (n(0), n(1), n(2));
                let move_to =
                    |from: u64, to: u64| format!("update swaps set id = {to} where id = {from};");
                vec![
                    format!(
                        "insert into swaps select i, repeat(md5(i::text), 300), 0
                           from generate_series({a}, {b}) i;
                         insert into nothing default values; insert into nothing default values;"
                    ),
                    // They take each other's place, by way of a third.
                    move_to(a, c) + &move_to(b, a) + &move_to(c, b),
                    // The large value stays where it is, and is not sent.
                    format!("update swaps set n = n + 1 where id in ({a}, {b});") + &move_to(a, c),
                    format!("delete from swaps where id = {c};")
                        + &move_to(b, c)
                        + &format!("update swaps set n = n + 1 where id = {c};"),
                    "delete from nothing;".to_owned(),
                ]
            }
            Self::Traps => {
                let bad = |op: u64, label: &str| {
                    format!("insert into items values ({op}, {op}, '{label} r0wv4lue', 'b');")
                        + &ledger(op, op, "insert")
                };
                vec![
                    bad(n(0), "trap") + &bad(n(1), "error") + &bad(n(2), "fine"),
                    update(n(3), n(0)) + &delete(n(4), n(1)) + &update(n(5), n(2)),
                ]
            }
        }
    }
}

/// All that was begun.
#[derive(Debug)]
pub struct Bursts {
    url: String,
    begun: u64,
    under_way: JoinSet<()>,
    /// Those that change tables wait for each other.
    turn: Arc<Mutex<()>>,
    /// Operations in the ledger that a module fails on.
    failing: Vec<u64>,
}

/// How many tables [`Burst::ManyTables`] writes.
pub const MANY: u64 = 40;

/// What the bursts write beside the tables of the workload. Large values are kept apart, as they are.
pub const MORE_TABLES: &str = "
    create table nothing ();
    alter table nothing replica identity full;
    create table swaps (id bigint primary key, body text, n int);
    alter table swaps alter column body set storage external;
    do $$ begin for i in 0..39 loop
        execute format('create table many_%s (id bigint primary key, v text)', i);
    end loop; end $$;";

/// Rows of the writers have smaller numbers.
const FIRST: u64 = 1_000_000_000_000;

impl Bursts {
    pub fn new(url: String) -> Self {
        Self { url, begun: 0, under_way: JoinSet::new(), turn: Arc::default(), failing: Vec::new() }
    }

    pub fn begin(&mut self, burst: Burst) {
        let first = FIRST + self.begun * 10_000;
        let transactions = burst.transactions(first);
        self.begun += 1;
        if burst == Burst::Traps {
            self.failing.extend([first, first + 1]);
        }
        let (url, turn) = (self.url.clone(), Arc::clone(&self.turn));
        self.under_way.spawn(async move {
            let _turn = turn.lock().await;
            for sql in transactions {
                let begun = Instant::now();
                while let Err(error) = commit(&url, &sql).await {
                    assert!(begun.elapsed() < PATIENCE, "{burst:?} cannot be done: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        });
    }

    /// Waits for all of them, and says which operations a module failed on while it was there.
    pub async fn ended(mut self) -> Vec<u64> {
        while let Some(burst) = self.under_way.join_next().await {
            burst.unwrap();
        }
        self.failing
    }
}

/// Commits it, or finds that it was committed before.
async fn commit(url: &str, sql: &str) -> Result<(), String> {
    let client = try_connect(url).await.map_err(|error| error.to_string())?;
    match client.batch_execute(&format!("begin; {sql} commit")).await {
        Ok(()) => Ok(()),
        // An answer was lost.
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => Ok(()),
        Err(error) if error.as_db_error().is_some_and(|error| !may_pass(error.code())) => {
            panic!("{error:?} in {sql:.900}")
        }
        Err(error) => Err(error.to_string()),
    }
}

/// The server leaves or comes, or others were in the way.
fn may_pass(code: &SqlState) -> bool {
    code.code().starts_with("57P") || *code == SqlState::T_R_DEADLOCK_DETECTED
}
