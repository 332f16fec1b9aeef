//! How fast, how large and how costly the pipeline is, beside what bounds it on the same machine.
//!
//! ```text
//! cargo bench --bench pipeline                        throughput, CPU and memory: 500,000 rows and the rest
//! cargo bench --bench pipeline -- delivery            what the guarantees cost, and how soon they are kept
//! cargo bench --bench pipeline -- folder              replacing transforms while rows come in, and starting
//! cargo bench --bench pipeline -- --quick             a tenth of everything, to see that it works
//! cargo bench --bench pipeline -- --rows 200000       another number of rows
//! cargo bench --bench pipeline -- --only strip        only what has the word in its name
//! ```
//!
//! Each part says what it measures; `make bench ARGS=delivery` does the same. `sluicebox run` and
//! s2-lite are processes of their own, and Postgres is a throwaway cluster. CPU is user and system
//! time of the Sluicebox process alone, peak memory its `VmHWM`; both need `/proc`. Compare numbers
//! of one run only.

#![allow(clippy::unwrap_used, reason = "a benchmark that meets the unexpected is meant to fail")]

mod delivery;
mod folder;
mod measure;
#[path = "../../tests/it/support/mod.rs"]
mod support;
mod throughput;

use support::postgres::Cluster;

fn main() {
    let options = Options::from_args();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let cluster = Cluster::start(&[
            ("shared_buffers", "512MB"),
            ("max_wal_size", "32GB"),
            ("checkpoint_timeout", "1h"),
            ("autovacuum", "off"),
        ])
        .await;
        match options.part {
            Part::Throughput => throughput::run(&cluster, &options).await,
            Part::Delivery => delivery::run(&cluster, &options).await,
            Part::Folder => folder::run(&cluster, &options).await,
        }
    });
}

enum Part {
    Throughput,
    Delivery,
    Folder,
}

struct Options {
    part: Part,
    rows: u64,
    quick: bool,
    only: String,
}

impl Options {
    fn from_args() -> Self {
        let mut options =
            Self { part: Part::Throughput, rows: 500_000, quick: false, only: String::new() };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "throughput" => options.part = Part::Throughput,
                "delivery" => options.part = Part::Delivery,
                "folder" => options.part = Part::Folder,
                "--quick" => (options.quick, options.rows) = (true, 50_000),
                "--rows" => options.rows = args.next().unwrap().parse().unwrap(),
                "--only" => options.only = args.next().unwrap(),
                // Cargo's own.
                "--bench" => {}
                other => panic!("unknown option {other}: see the head of benches/pipeline/main.rs"),
            }
        }
        options
    }

    fn wants(&self, name: &str) -> bool {
        name.contains(&self.only)
    }
}
