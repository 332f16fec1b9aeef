//! Rights on the transforms folder that are taken and given back while changes flow, for a process that
//! is not above them: what cannot be read is not gone.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use crate::folder::{check_chains, entry, list};
use crate::hostile_folder::until_warned;
use crate::support::oracle::{Order, TABLES, Workload, judge};
use crate::support::sluicebox::Running;
use crate::support::until;
use crate::support::world::World;

/// Starts it without what lets root read everything.
fn start<'a>(world: &'a World<'_>) -> Running<'a> {
    if fs::read_to_string("/proc/self/status").unwrap().contains("CapEff:\t0000000000000000") {
        return world.start();
    }
    const NO_OVERRIDE: &str = "--bounding-set=-dac_override,-dac_read_search";
    world.start_by("setpriv", &[NO_OVERRIDE])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_for_a_while_stays_live() {
    let world = World::new("rights", TABLES, &["public.items"]).await;
    let load = Workload::new(world.database.url(), 2);
    world.ok(&["transforms", "add", "strip-columns", "--column", "body"]).await;
    let file = "10-strip-columns.wasm";
    let mut running = start(&world).ready().await;
    entry(&world, file, "live").await;
    let generation = list(&world).await["generation"].clone();
    let work = load.start();
    work.commits(10).await;
    let folder = world.transforms();
    let module = folder.join(file);
    let settings = module.with_extension("toml");
    for (path, mode, told) in [
        (module, 0o000, "Permission denied"),
        (settings, 0o000, "`10-strip-columns.toml` cannot be read: Permission denied"),
        // It may be listed, and nothing in it may be looked at.
        (folder.clone(), 0o600, "Permission denied"),
        (folder, 0o000, "cannot be read, and the chain stays as it is: Permission"),
    ] {
        let before = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let is_whole_folder = mode == 0o000 && path.ends_with("transforms");
        if is_whole_folder {
            until_warned(&world, &[told]).await;
        } else {
            let rejected = entry(&world, file, "rejected").await;
            assert!(rejected["reason"].as_str().unwrap().contains(told), "{rejected}");
        }
        // Longer than what is gone counts as deleted.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        entry(&world, file, "live").await;
        work.commits(10).await;

        // A start in the middle of it does not go without, either.
        running.kill().await;
        if is_whole_folder {
            // As with every mistake in the configuration.
            let status = start(&world).ended().await;
            assert_eq!(status.code(), Some(2));
            assert!(world.log().contains("could not read the transforms folder"));
            fs::set_permissions(&path, before).unwrap();
            running = start(&world).ready().await;
        } else {
            running = start(&world).ready().await;
            entry(&world, file, "live").await;
            work.commits(10).await;
            fs::set_permissions(&path, before).unwrap();
        }
        until("all to be well", async || {
            let list = list(&world).await;
            let is_well = list["transforms"].as_array().unwrap().len() == 1
                && list["warnings"].as_array().unwrap().is_empty();
            if is_well { Ok(()) } else { Err(list.to_string()) }
        })
        .await;
    }
    assert_eq!(list(&world).await["generation"], generation);
    work.commits(10).await;
    work.stop().await;
    judge(&world, Order::Whole).await;
    let columns = check_chains(&world).await;
    assert!(columns.values().all(|columns| !columns.contains(&"body".to_owned())), "{columns:?}");
    running.assert_alive();
    running.stop().await;
}
