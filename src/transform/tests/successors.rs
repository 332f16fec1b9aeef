//! Files that go while others come, of which some are not admitted: the chain is never left without
//! what was there before, and says so.

use std::fs;
use std::time::Duration;

use super::folder::{STRIP_BODY, STRIP_TITLE, World};
use super::trials::{fail, warnings, with_parked};
use super::*;
use crate::transform::{TransformState, TransformView};

/// Longer than a file must be gone, and what does not load is waited for.
const LONG_ENOUGH: Duration = Duration::from_millis(2500);

/// A folder with this one transform, which hides `body`.
fn hiding() -> World {
    let mut world = World::new();
    put(&world, "10-hide", STRIP_BODY, strip());
    world.start().unwrap();
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    world
}

fn put(world: &World, stem: &str, settings: &str, module: &[u8]) {
    world.write(&format!("{stem}.toml"), settings);
    world.rename_into_place(&format!("{stem}.wasm"), module);
}

fn take(world: &World, stem: &str) {
    for end in ["wasm", "toml"] {
        fs::remove_file(world.path(&format!("{stem}.{end}"))).unwrap();
    }
}

/// Waits until it is said that this file stays for that one, which goes on to be so.
#[track_caller]
fn stays(world: &World, file: &str, refused: &str) {
    let started = std::time::Instant::now();
    let parts = [format!("`{file}` was deleted, and stays live"), format!("refused (`{refused}`)")];
    while !parts.iter().all(|part| warnings(world).contains(part)) {
        assert!(started.elapsed() < Duration::from_secs(30), "{}", warnings(world));
        assert!(world.files().contains(&file.to_owned()), "{:?}", world.files());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(world.files().contains(&file.to_owned()), "{:?}", world.files());
}

#[test]
fn what_is_renamed_and_refused_leaves_the_old_version_live() {
    let mut world = hiding();
    take(&world, "10-hide");
    put(&world, "20-hide", STRIP_BODY, b"not a module");
    stays(&world, "10-hide.wasm", "20-hide.wasm");
    std::thread::sleep(LONG_ENOUGH);
    stays(&world, "10-hide.wasm", "20-hide.wasm");
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    assert_eq!(world.generation(), 1);

    // A restart knows it, though it knows what is refused for long.
    for _ in 0..2 {
        world.start().unwrap();
        stays(&world, "10-hide.wasm", "20-hide.wasm");
        assert_eq!((world.files(), world.generation()), (vec!["10-hide.wasm".to_owned()], 1));
    }
    // Mended, it takes the place in one step.
    put(&world, "20-hide", STRIP_BODY, strip());
    world.wait_for_files(&["20-hide.wasm"]);
    assert_eq!((world.generation(), warnings(&world)), (2, String::new()));

    // What cannot be seen to be one is no different.
    fs::rename(world.path("20-hide.wasm"), world.path("20-hide.WASM")).unwrap();
    stays(&world, "20-hide.wasm", "20-hide.WASM");
    world.start().unwrap();
    stays(&world, "20-hide.wasm", "20-hide.WASM");
    // However often it is renamed.
    for (from, to) in [("20-hide.WASM", "25-hide.Wasm"), ("25-hide.Wasm", "30-hide.wat")] {
        fs::rename(world.path(from), world.path(to)).unwrap();
        stays(&world, "20-hide.wasm", to);
        std::thread::sleep(LONG_ENOUGH);
        stays(&world, "20-hide.wasm", to);
    }
    fs::rename(world.path("30-hide.wat"), world.path("40-hide.cwasm")).unwrap();
    stays(&world, "20-hide.wasm", "40-hide.cwasm");
    std::thread::sleep(LONG_ENOUGH);
    stays(&world, "20-hide.wasm", "40-hide.cwasm");
    // Taken away, the deletion is no more than a deletion.
    fs::remove_file(world.path("40-hide.cwasm")).unwrap();
    world.wait_for_files(&[]);
}

#[test]
fn what_comes_with_a_deletion_goes_live_with_it_or_not_at_all() {
    let world = hiding();
    take(&world, "10-hide");
    put(&world, "20-hide", STRIP_BODY, strip_too());
    put(&world, "30-broken", STRIP_TITLE, b"not a module");
    stays(&world, "10-hide.wasm", "30-broken.wasm");
    std::thread::sleep(LONG_ENOUGH);
    assert_eq!((world.files(), world.generation()), (vec!["10-hide.wasm".to_owned()], 1));
    let waits = |view: &&TransformView| view.file == "20-hide.wasm";
    let list = world.host().list().transforms;
    let view = list.iter().find(waits).unwrap();
    assert_eq!(view.state, TransformState::Vetting);
    assert!(view.reason.as_ref().unwrap().starts_with("it waits for what came with it"));

    // What has nothing to do with it waits for nothing.
    std::thread::sleep(Duration::from_secs(5));
    put(&world, "40-late", STRIP_TITLE, strip());
    world.wait_for_files(&["10-hide.wasm", "40-late.wasm"]);
    take(&world, "40-late");
    world.wait_for_files(&["10-hide.wasm"]);

    // Put back, it was no deletion, and nothing waits for it.
    put(&world, "10-hide", STRIP_BODY, strip());
    world.wait_for_files(&["10-hide.wasm", "20-hide.wasm"]);
    take(&world, "10-hide");
    put(&world, "30-broken", STRIP_TITLE, b"not a module, again");
    stays(&world, "10-hide.wasm", "30-broken.wasm");
    let generation = world.generation();
    put(&world, "30-broken", STRIP_TITLE, strip());
    world.wait_for_files(&["20-hide.wasm", "30-broken.wasm"]);
    assert_eq!(world.generation(), generation + 1);
}

#[test]
fn what_vetting_refuses_leaves_what_it_came_for_live() {
    let (mut world, _messages) = with_parked();
    put(&world, "15-strip", STRIP_BODY, strip_too());
    world.wait_for_files(&["10-strip.wasm", "15-strip.wasm"]);
    // While nothing runs.
    world.host = None;
    take(&world, "10-strip");
    put(&world, "20-traps", "[config]\nact = \"panic\"\n", chaos());
    put(&world, "30-keeps", "[config]\nact = \"keep\"\n", chaos());
    world.start().unwrap();
    stays(&world, "10-strip.wasm", "20-traps.wasm");
    assert_eq!(world.files(), ["10-strip.wasm", "15-strip.wasm"]);
    // And while it runs.
    take(&world, "20-traps");
    world.wait_for_files(&["15-strip.wasm", "30-keeps.wasm"]);
    put(&world, "10-strip", STRIP_BODY, strip());
    world.wait_for_files(&["10-strip.wasm", "15-strip.wasm", "30-keeps.wasm"]);
    take(&world, "10-strip");
    put(&world, "20-traps", "[config]\nact = \"panic\"\n", chaos());
    stays(&world, "10-strip.wasm", "20-traps.wasm");
    take(&world, "20-traps");
    world.wait_for_files(&["15-strip.wasm", "30-keeps.wasm"]);
}

#[test]
fn a_rollback_brings_back_what_was_replaced_under_another_name() {
    let mut world = hiding();
    take(&world, "10-hide");
    put(&world, "20-hide", "[config]\nact = \"remove\"\ntext = \"body\"\n", chaos());
    world.wait_for_files(&["20-hide.wasm"]);
    // Its place is taken once more, and by two.
    take(&world, "20-hide");
    put(&world, "25-hide", "[config]\nact = \"remove\"\ntext = \"title\"\n", chaos());
    put(&world, "30-hide", STRIP_BODY, strip_too());
    world.wait_for_files(&["25-hide.wasm", "30-hide.wasm"]);
    // A restart proves nothing.
    world.start().unwrap();
    let generation = world.generation();
    fail(&world, "25-hide.wasm", Class::Trap);
    world.wait_for_files(&["10-hide.wasm"]);
    assert_eq!(world.generation(), generation + 1);
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    let list = world.list();
    let back = list.iter().find(|(file, _, _)| file == "25-hide.wasm").unwrap();
    assert_eq!(back.1, TransformState::RolledBack);
    assert!(back.2.contains("`10-hide.wasm`, which was there before, is back"), "{}", back.2);
    for _ in 0..2 {
        stays(&world, "10-hide.wasm", "25-hide.wasm");
        std::thread::sleep(LONG_ENOUGH);
        assert_eq!(world.files(), ["10-hide.wasm"]);
        world.start().unwrap();
    }
    // Whoever wants neither says so.
    take(&world, "25-hide");
    world.wait_for_files(&["30-hide.wasm"]);

    // What was taken away alone does not come back.
    let world = hiding();
    put(&world, "20-more", "[config]\nact = \"remove\"\ntext = \"title\"\n", chaos());
    world.wait_for_files(&["10-hide.wasm", "20-more.wasm"]);
    std::thread::sleep(Duration::from_secs(5));
    take(&world, "10-hide");
    world.wait_for_files(&["20-more.wasm"]);
    fail(&world, "20-more.wasm", Class::Trap);
    world.wait_for_files(&[]);
}

#[test]
fn a_folder_that_is_not_mounted_any_more_takes_nothing_with_it() {
    let mut world = hiding();
    let away = world.state.path().join("away");
    fs::rename(world.dir.path(), &away).unwrap();
    fs::create_dir(world.dir.path()).unwrap();
    world.wait("the warning", |world| {
        warnings(world).contains("another one than before, and empty")
    });
    std::thread::sleep(LONG_ENOUGH);
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    // Whatever is put there counts, and is followed.
    put(&world, "20-hide", STRIP_TITLE, strip_too());
    world.wait_for_files(&["20-hide.wasm"]);
    assert_eq!(warnings(&world), "`10-hide.wasm` was deleted, and left the chain");
    // One that is emptied is empty.
    take(&world, "20-hide");
    world.wait_for_files(&[]);
    put(&world, "10-hide", STRIP_BODY, strip());
    world.wait_for_files(&["10-hide.wasm"]);
    fs::remove_dir_all(world.dir.path()).unwrap();
    fs::create_dir(world.dir.path()).unwrap();
    std::thread::sleep(LONG_ENOUGH);
    assert_eq!(world.files(), ["10-hide.wasm"]);
    // Whoever means it to be so says so.
    world.no_transforms = true;
    world.start().unwrap();
    assert!(world.files().is_empty());
    // Once.
    world.no_transforms = false;
    world.start().unwrap();
    assert!(world.files().is_empty() && warnings(&world).is_empty(), "{}", warnings(&world));
}

#[test]
fn a_start_without_the_folder_that_was_there_goes_on_with_what_was_live() {
    let mut world = hiding();
    put(&world, "20-hide", STRIP_TITLE, strip_too());
    world.wait_for_files(&["10-hide.wasm", "20-hide.wasm"]);
    world.last.0 = world.generation();
    world.last.1 = Some(world.host().chain().borrow().digest().to_owned());
    let generation = world.generation();
    // One that waits for a mend goes on to do so.
    take(&world, "20-hide");
    put(&world, "30-hide", STRIP_TITLE, b"not a module");
    stays(&world, "20-hide.wasm", "30-hide.wasm");
    let both = ["10-hide.wasm", "20-hide.wasm"];
    world.host = None;
    let away = world.state.path().join("away");
    fs::rename(world.dir.path(), &away).unwrap();
    fs::create_dir(world.dir.path()).unwrap();
    for _ in 0..2 {
        world.start().unwrap();
        // Said at once, and with what to do.
        assert!(warnings(&world).contains("another one than before, and empty"));
        assert!(warnings(&world).contains("`sluicebox run --no-transforms`"));
        assert_eq!(
            (world.files(), world.generation()),
            (both.map(str::to_owned).to_vec(), generation)
        );
        assert_eq!(world.columns(), ["id", "tags"]);
        std::thread::sleep(LONG_ENOUGH);
        assert_eq!(world.files(), both);
    }
    // The volume is mounted, before a start or after it.
    fs::remove_dir(world.dir.path()).unwrap();
    fs::rename(&away, world.dir.path()).unwrap();
    stays(&world, "20-hide.wasm", "30-hide.wasm");
    assert!(!warnings(&world).contains("and empty"));
    world.start().unwrap();
    stays(&world, "20-hide.wasm", "30-hide.wasm");
    assert_eq!((world.files(), world.generation()), (both.map(str::to_owned).to_vec(), generation));

    // Files that were deleted from the very folder are deleted.
    world.host = None;
    fs::remove_file(world.path("30-hide.wasm")).unwrap();
    take(&world, "10-hide");
    world.start().unwrap();
    assert!(world.files().is_empty());

    // Where the copies are gone too, nothing is delivered unshaped.
    let mut world = hiding();
    world.host = None;
    // Renamed and not removed, since the new one could get its number.
    fs::rename(world.dir.path(), world.state.path().join("away")).unwrap();
    fs::create_dir(world.dir.path()).unwrap();
    for entry in fs::read_dir(world.state.path().join("last-good-transforms")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none() {
            fs::remove_file(path).unwrap();
        }
    }
    let error = world.start().unwrap_err().to_string();
    assert!(error.contains("`10-hide.wasm`") && error.contains("--no-transforms`"), "{error}");
    world.no_transforms = true;
    world.start().unwrap();
}

/// The same as [`strip`], and another module.
fn strip_too() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    // An empty custom section called `x`.
    BYTES.get_or_init(|| [strip(), &[0, 2, 1, b'x']].concat())
}
