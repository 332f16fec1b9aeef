//! A file that is replaced under another name by one that takes long to compile: the stream shows no
//! record of a chain with neither.

use std::fs;
use std::time::Duration;

use crate::folder::{check_chains, list, until_live};
use crate::hostile_folder::{bomb, until_warned};
use crate::support::guest;
use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::until;
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_under_another_name_is_one_step_however_long_it_is_compiled() {
    let world = World::new("one_step", TABLES, &["public.items"]).await;
    let load = Workload::new(world.database.url(), 2);
    let module = |text: &str| guest::core_module(text, &guest::interface_text());
    let text = guest::stripping_text();
    world.drop_in("10-strip.wasm", &module(&text));
    let mut running = world.start().ready().await;
    let work = load.start();
    let mut generation = until_live(&world, &mut running, "the start").await;
    let at = |name: &str| world.transforms().join(name);
    work.commits(10).await;

    // Each takes longer than what else is ready is held for.
    for (from, to) in [("10-strip.wasm", "11-strip.wasm"), ("11-strip.wasm", "12-strip.wasm")] {
        let slow = module(&guest::slow_text(&text, 6_000, generation.try_into().unwrap()));
        if from == "10-strip.wasm" {
            fs::remove_file(at(from)).unwrap();
            world.drop_in(to, &slow);
        } else {
            world.drop_in(to, &slow);
            fs::remove_file(at(from)).unwrap();
        }
        until_warned(&world, &[from, "stays live until", to]).await;
        work.commits(10).await;
        let now = until_live(&world, &mut running, to).await;
        assert_eq!(now, generation + 1, "it took more than one step");
        generation = now;
        work.commits(10).await;
    }
    let warnings = list(&world).await["warnings"].to_string();
    assert!(!warnings.contains("stays live until"), "{warnings}");
    // What the stream says: there is a body in no record of any generation.
    let columns = check_chains(&world).await;
    assert!(columns.len() >= 3, "{columns:?}");
    assert!(columns.values().all(|columns| !columns.contains(&"body".to_owned())), "{columns:?}");

    // A deletion alone waits for nothing, whatever else is being compiled.
    world.drop_in("30-bomb.wasm", &bomb(1));
    world.until_transform("30-bomb.wasm", "compiling").await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    fs::remove_file(at("12-strip.wasm")).unwrap();
    until("the deletion to be live", async || {
        let list = list(&world).await;
        if list["generation"] == generation + 1 { Ok(()) } else { Err(list.to_string()) }
    })
    .await;
    world.until_transform("30-bomb.wasm", "compiling").await;
    fs::remove_file(at("30-bomb.wasm")).unwrap();
    work.commits(10).await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    running.assert_alive();
    running.stop().await;
}

/// What hides something is not lost by renaming it to what is refused, whatever refuses it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_renamed_and_refused_is_missing_in_no_record() {
    let world = World::new("refused_step", TABLES, &["public.items"]).await;
    let load = Workload::new(world.database.url(), 2);
    let module = |text: &str| guest::core_module(text, &guest::interface_text());
    let text = guest::stripping_text();
    world.drop_in("10-strip.wasm", &module(&text));
    let mut running = world.start().ready().await;
    let work = load.start();
    let generation = until_live(&world, &mut running, "the start").await;
    work.commits(10).await;
    let at = |name: &str| world.transforms().join(name);

    // It fails on every row that there is.
    let failing = text.replace("(local $word i32)", "(local $word i32) unreachable");
    assert_ne!(failing, text);
    fs::rename(at("10-strip.wasm"), at("20-strip.wasm")).unwrap();
    for (file, bytes) in [
        ("20-strip.wasm", b"broken".to_vec()),
        ("20-strip.wasm", module(&failing)),
        ("20-strip.cwasm", b"broken, too".to_vec()),
    ] {
        world.drop_in(file, &bytes);
        if file != "20-strip.wasm" {
            fs::remove_file(at("20-strip.wasm")).unwrap();
        }
        world.until_transform(file, "rejected").await;
        until_warned(&world, &["`10-strip.wasm` was deleted, and stays live", file]).await;
        // Longer than what is gone counts as deleted.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        work.commits(10).await;
        running.kill().await;
        running = world.start().ready().await;
        world.until_transform("10-strip.wasm", "live").await;
        work.commits(10).await;
    }
    assert_eq!(list(&world).await["generation"], generation);
    let columns = check_chains(&world).await;
    assert!(columns.values().all(|columns| !columns.contains(&"body".to_owned())), "{columns:?}");

    // Mended, it goes live in the other one's place, in one step.
    fs::remove_file(at("20-strip.cwasm")).unwrap();
    world.drop_in("20-strip.wasm", &guest::component(&module(&text)));
    let now = until_live(&world, &mut running, "the mended one").await;
    assert_eq!(now, generation + 1);
    work.commits(10).await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    let columns = check_chains(&world).await;
    assert!(columns.values().all(|columns| !columns.contains(&"body".to_owned())), "{columns:?}");
    running.assert_alive();
    running.stop().await;
}
