//! What is tried before it goes live, what comes back by itself, and what is told of both.

use std::fs;

use super::folder::{STRIP_BODY, STRIP_TITLE, World};
use super::vetting::{Messages, row};
use super::*;
use crate::transform::{Comparison, TransformState, Trial, Vet};

/// A trial that fails as no trial should.
#[derive(Debug)]
struct Defective;

impl Vet for Defective {
    fn compare(&self, _: &mut Trial, _: &mut Trial) -> Comparison {
        panic!("as a defect of the trial would")
    }

    fn handled(&self, _: &mut Trial, _: &[Change]) -> usize {
        panic!("as a defect of the trial would")
    }
}

fn states(world: &World) -> Vec<(String, TransformState)> {
    world.list().into_iter().map(|(file, state, _)| (file, state)).collect()
}

fn reason(world: &World, file: &str) -> String {
    let list = world.list();
    let entry = list.iter().find(|(name, state, _)| name == file && *state != TransformState::Live);
    entry.unwrap_or_else(|| panic!("{list:?}")).2.clone()
}

pub(super) fn warnings(world: &World) -> String {
    world.host().list().warnings.join("\n")
}

/// Lets messages fail as the workers would report it.
pub(super) fn fail(world: &World, file: &str, class: Class) {
    let chain = world.host().chain().borrow().clone();
    for index in 0..10 {
        chain.health().ran(1);
        chain.health().failed(&row(index, "small"), Some(file), Some(class));
    }
}

#[test]
fn a_trial_that_breaks_off_is_an_answer_and_nothing_waits_for_it() {
    let mut world = World::new();
    world.vet = Some(Arc::new(Defective));
    world.start().unwrap();
    world.write("10-strip.toml", STRIP_BODY);
    world.rename_into_place("10-strip.wasm", strip());
    let text = world.wait_for_rejection("10-strip.wasm");
    assert!(text.contains("broke off, by a defect") && text.contains("10-strip.toml"), "{text}");
    assert!(world.files().is_empty());

    // The folder is followed as before, and whoever means it can have it.
    world.write("10-strip.toml", format!("vet = \"off\"\n{STRIP_BODY}"));
    world.wait_for_files(&["10-strip.wasm"]);
    world.write("20-keeps.toml", "vet = \"off\"\n[config]\nact = \"keep\"\n");
    world.rename_into_place("20-keeps.wasm", chaos());
    world.wait_for_files(&["10-strip.wasm", "20-keeps.wasm"]);

    // Nothing can be found out about the versions before: they come back all the same.
    fail(&world, "20-keeps.wasm", Class::Trap);
    world.wait_for_files(&["10-strip.wasm"]);
    assert_eq!(states(&world)[1], ("20-keeps.wasm".to_owned(), TransformState::RolledBack));

    // A start is no different.
    world.host = None;
    world.write("30-strip.toml", STRIP_TITLE);
    world.write("30-strip.wasm", strip());
    world.start().unwrap();
    world.wait_for_files(&["10-strip.wasm"]);
    assert!(world.wait_for_rejection("30-strip.wasm").contains("broke off"));
}

#[test]
fn what_was_rolled_back_is_refused_by_its_content() {
    let mut world = World::new();
    world.write("10-x.toml", STRIP_BODY);
    world.write("10-x.wasm", strip());
    world.start().unwrap();
    let moved = |world: &World, from: &str, to: &str| {
        for end in ["toml", "wasm"] {
            let path = |name: &str| world.path(&format!("{name}.{end}"));
            fs::rename(path(from), path(to)).unwrap();
        }
    };
    let wait = |world: &World, file: &str| {
        world.wait("the refusal", |world| {
            states(world).contains(&(file.to_owned(), TransformState::RolledBack))
        });
    };

    let version = "[config]\nact = \"remove\"\ntext = \"title\"\n";
    world.write("10-x.toml", version);
    world.rename_into_place("10-x.wasm", chaos());
    world.wait("the second version", |world| world.generation() == 2);
    fail(&world, "10-x.wasm", Class::Timeout);
    wait(&world, "10-x.wasm");
    // The one before is back, as a new generation.
    assert_eq!(world.generation(), 3);
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    let text = reason(&world, "10-x.wasm");
    let before = &module(strip()).digest[..16];
    for part in ["10 of 10 messages failed", "10 ran out of time", before, "whatever it is called"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }

    // Renamed: the new one does not go live, and what the old one is there for goes on.
    moved(&world, "10-x", "20-y");
    wait(&world, "20-y.wasm");
    world.wait("a word of it", |world| warnings(world).contains("stays live"));
    assert_eq!(world.files(), ["10-x.wasm"]);
    assert!(reason(&world, "20-y.wasm").starts_with("it is what `10-x.wasm` was: 10 of 10"));
    // Taken away, and put back.
    for name in ["20-y.wasm", "20-y.toml"] {
        fs::remove_file(world.path(name)).unwrap();
    }
    world.wait("an empty folder", |world| world.list().is_empty());
    world.write("10-x.toml", version);
    world.rename_into_place("10-x.wasm", chaos());
    wait(&world, "10-x.wasm");
    // Another content in between changes nothing about this one.
    world.write("10-x.toml", STRIP_BODY);
    world.rename_into_place("10-x.wasm", strip());
    world.wait_for_files(&["10-x.wasm"]);
    world.write("10-x.toml", version);
    world.rename_into_place("10-x.wasm", chaos());
    wait(&world, "10-x.wasm");
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    // Renamed while nothing runs.
    world.host = None;
    moved(&world, "10-x", "30-z");
    world.start().unwrap();
    wait(&world, "30-z.wasm");
    assert_eq!(world.files(), ["10-x.wasm"]);

    // Settings that say something else are a change, and so is another module.
    world.write("30-z.toml", format!("{version}# meant as it is\n"));
    world.wait_for_files(&["30-z.wasm"]);
    let live = ("30-z.wasm".to_owned(), TransformState::Live);
    world.wait("one entry", |world| states(world) == [live.clone()]);
}

/// With three parked messages that nothing can be made of without a transform.
pub(super) fn with_parked() -> (World, Messages) {
    let messages = Messages::new(3, 0);
    let mut world = World::new();
    world.vet = Some(messages.vetting.clone());
    world.start().unwrap();
    world.write("10-strip.toml", STRIP_BODY);
    world.rename_into_place("10-strip.wasm", strip());
    world.wait_for_files(&["10-strip.wasm"]);
    (world, messages)
}

fn report(world: &World, file: &str) -> String {
    let list = world.host().list().transforms;
    let entry = list.into_iter().find(|view| view.file == file).unwrap();
    let text = entry.vet_text.unwrap();
    text.split(", leaves").next().unwrap().split(", slower").next().unwrap().to_owned()
}

#[test]
fn what_is_gone_is_not_the_fault_of_what_comes_with_it() {
    let (world, _messages) = with_parked();
    assert_eq!(report(&world, "10-strip.wasm"), "fixes 3 of 3, breaks 0 of 3");
    fs::remove_file(world.path("10-strip.wasm")).unwrap();
    world.write("20-keeps.toml", "[config]\nact = \"keep\"\n");
    world.rename_into_place("20-keeps.wasm", chaos());
    world.wait_for_files(&["20-keeps.wasm"]);
    assert_eq!(report(&world, "20-keeps.wasm"), "fixes 0 of 3, breaks 0 of 3");
    let warnings = warnings(&world);
    assert!(
        warnings.contains(
            "`10-strip.wasm` was deleted, and left the chain; when it went live it fixed 3 of 3 parked \
             messages, and such ones will be parked again; of 3 messages that were tried, 3 fail without it"
        ),
        "{warnings}"
    );
    assert_eq!(world.generation(), 3);

    // What breaks something itself is refused, and nothing of the step takes place.
    let (world, _messages) = with_parked();
    world.write("15-strip.toml", STRIP_BODY);
    world.rename_into_place("15-strip.wasm", strip());
    world.wait_for_files(&["10-strip.wasm", "15-strip.wasm"]);
    fs::remove_file(world.path("10-strip.wasm")).unwrap();
    world.write("20-traps.toml", "[config]\nact = \"panic\"\n");
    world.rename_into_place("20-traps.wasm", chaos());
    let text = world.wait_for_rejection("20-traps.wasm");
    assert!(text.contains("3 of 3 messages fail"), "{text}");
    assert_eq!(world.files(), ["10-strip.wasm", "15-strip.wasm"]);
}

#[test]
fn what_a_file_mended_outlives_its_versions_and_its_name() {
    let (mut world, _messages) = with_parked();
    // Another version of it, with nothing left to mend: as what it mended is delivered.
    world.write("10-strip.toml", format!("# another\n{STRIP_BODY}"));
    world.wait("another version", |world| world.generation() == 3);
    assert_eq!(report(&world, "10-strip.wasm"), "fixes 0 of 3, breaks 0 of 3");
    // Another name.
    for end in ["toml", "wasm"] {
        let path = |name: &str| world.path(&format!("{name}.{end}"));
        fs::rename(path("10-strip"), path("20-strip")).unwrap();
    }
    world.wait_for_files(&["20-strip.wasm"]);
    assert_eq!(world.generation(), 4);
    assert_eq!(warnings(&world), "");
    // A restart, and gone while nothing runs.
    world.start().unwrap();
    assert_eq!(report(&world, "20-strip.wasm"), "fixes 0 of 3, breaks 0 of 3");
    world.host = None;
    fs::remove_file(world.path("20-strip.wasm")).unwrap();
    fs::remove_file(world.path("20-strip.toml")).unwrap();
    world.start().unwrap();
    let told = warnings(&world);
    let mended = "its versions fixed 3 parked messages as they went live";
    assert!(told.contains("`20-strip.wasm` was deleted") && told.contains(mended), "{told}");
}

#[test]
fn a_rollback_brings_back_what_vetting_said() {
    let (mut world, _messages) = with_parked();
    // Proven, as far as this goes: with a restart, the probation goes on otherwise.
    fs::remove_file(world.state.path().join("last-good-transforms/probation.json")).unwrap();
    world.start().unwrap();
    world.write("10-strip.toml", format!("# worse\n{STRIP_BODY}"));
    world.wait("another version", |world| {
        report(world, "10-strip.wasm").starts_with("fixes 0 of 3")
    });
    world.start().unwrap();
    fail(&world, "10-strip.wasm", Class::Trap);
    world.wait("the rollback", |world| report(world, "10-strip.wasm").starts_with("fixes 3 of 3"));
}
