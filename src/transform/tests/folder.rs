//! The folder, changed in every way that people and tools change it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;
use crate::transform::{Host, HostSettings, TransformState, Vet};

pub(super) const STRIP_BODY: &str = "[config]\ncolumns = [\"body\"]\n";
pub(super) const STRIP_TITLE: &str = "[config]\ncolumns = [\"title\"]\n";

/// A transforms folder, its state, and the host that watches it.
pub(super) struct World {
    pub(super) dir: tempfile::TempDir,
    pub(super) state: tempfile::TempDir,
    pub(super) host: Option<Host>,
    pub(super) last: (u64, Option<String>),
    pub(super) vet: Option<Arc<dyn Vet>>,
    pub(super) no_transforms: bool,
}

impl World {
    pub(super) fn new() -> Self {
        let temporary = || tempfile::tempdir().unwrap();
        let (dir, state) = (temporary(), temporary());
        Self { dir, state, host: None, last: (0, None), vet: None, no_transforms: false }
    }

    pub(super) fn start(&mut self) -> Result<(), super::super::Error> {
        self.host = None;
        let host = Host::start(HostSettings {
            dir: self.dir.path().into(),
            state_dir: self.state.path().into(),
            generation: self.last.0,
            digest: self.last.1.clone(),
            vet: self.vet.clone(),
            no_transforms: self.no_transforms,
            compile_apart: false,
        })?;
        self.last = (host.chain().borrow().generation, Some(host.chain().borrow().digest().into()));
        self.host = Some(host);
        Ok(())
    }

    pub(super) fn host(&self) -> &Host {
        self.host.as_ref().unwrap()
    }

    pub(super) fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path(name), bytes).unwrap();
    }

    pub(super) fn rename_into_place(&self, name: &str, bytes: impl AsRef<[u8]>) {
        self.write(".new.tmp", bytes);
        fs::rename(self.path(".new.tmp"), self.path(name)).unwrap();
    }

    pub(super) fn generation(&self) -> u64 {
        self.host().chain().borrow().generation
    }

    pub(super) fn files(&self) -> Vec<String> {
        self.host().chain().borrow().files().map(str::to_owned).collect()
    }

    /// What the live chain leaves of a row's columns.
    pub(super) fn columns(&self) -> Vec<String> {
        let chain = self.host().chain().borrow().clone();
        let message = message(&kept(self.host().runner().run(&chain, draft("text"))));
        message["record"].as_object().unwrap().keys().cloned().collect()
    }

    /// State and reason of every entry of the list.
    pub(super) fn list(&self) -> Vec<(String, TransformState, String)> {
        let list = self.host().list();
        let entry = |view: super::super::TransformView| {
            (view.file, view.state, view.reason.unwrap_or_default())
        };
        list.transforms.into_iter().map(entry).collect()
    }

    pub(super) fn wait(&self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let started = Instant::now();
        while !is_so(self) {
            assert!(started.elapsed() < Duration::from_secs(30), "{what}: {:?}", self.list());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(super) fn wait_for_files(&self, files: &[&str]) {
        self.wait("the chain", |world| world.files() == files);
    }

    pub(super) fn wait_for_rejection(&self, file: &str) -> String {
        let mut reason = String::new();
        self.wait("a rejection", |world| {
            let list = world.list();
            let found = list
                .iter()
                .find(|(name, state, _)| name == file && *state == TransformState::Rejected);
            found.inspect(|(_, _, text)| reason.clone_from(text)).is_some()
        });
        reason
    }
}

/// With one live transform that strips `body`.
fn stripping() -> World {
    let mut world = World::new();
    world.write("10-strip.toml", STRIP_BODY);
    world.write("10-strip.wasm", strip());
    world.start().unwrap();
    assert_eq!(world.files(), ["10-strip.wasm"]);
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    world
}

#[test]
fn generations_count_changes_and_outlive_restarts() {
    let mut world = World::new();
    world.start().unwrap();
    assert_eq!(world.generation(), 1);
    world.start().unwrap();
    assert_eq!(world.generation(), 1);

    world.write("10-strip.toml", STRIP_BODY);
    world.rename_into_place("10-strip.wasm", strip());
    world.wait_for_files(&["10-strip.wasm"]);
    assert_eq!(world.generation(), 2);
    // A restart that finds another chain than the store knows counts it.
    world.start().unwrap();
    assert_eq!(world.generation(), 2);
    world.start().unwrap();
    assert_eq!(world.generation(), 2);
    let chain = world.host().chain().borrow().clone();
    assert_eq!(chain.tag(), format!("2:{}", &chain.digest()[..16]));
}

#[test]
fn files_are_added_replaced_and_deleted() {
    let world = stripping();
    world.write("20-compress.toml", "[config]\ncolumns = [\"tags\"]\nmin_bytes = 1\n");
    world.write("20-compress.wasm", compress());
    world.wait_for_files(&["10-strip.wasm", "20-compress.wasm"]);

    // The same content again, and a touch: nothing changes.
    let generation = world.generation();
    world.rename_into_place("10-strip.wasm", strip());
    fs::File::options()
        .append(true)
        .open(world.path("20-compress.wasm"))
        .unwrap()
        .set_modified(std::time::SystemTime::now())
        .unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(world.generation(), generation);

    // In place, another module under the same name.
    world.write("20-compress.wasm", chaos());
    world.write("20-compress.toml", "[config]\nact = \"rename\"\n");
    world.wait("the new module", |world| world.columns().contains(&"headline".to_owned()));
    fs::remove_file(world.path("20-compress.wasm")).unwrap();
    world.wait_for_files(&["10-strip.wasm"]);
    let deleted = "`20-compress.wasm` was deleted, and left the chain";
    let orphan = "`20-compress.toml` in the transforms folder has no module beside it, and is ignored; put \
                  `20-compress.wasm` there, or take the settings away";
    world.wait("both warnings", |world| world.host().list().warnings == [orphan, deleted]);
    fs::remove_file(world.path("10-strip.wasm")).unwrap();
    world.wait_for_files(&[]);
}

#[test]
fn whoever_puts_the_settings_there_first_is_not_warned_of_them() {
    let mut world = stripping();
    world.write("20-more.toml", STRIP_TITLE);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(1) {
        assert!(world.host().list().warnings.is_empty());
        std::thread::sleep(Duration::from_millis(10));
    }
    world.wait("the warning", |world| !world.host().list().warnings.is_empty());
    // At a start it has been there for long, as far as anybody knows.
    world.start().unwrap();
    assert_eq!(world.host().list().warnings.len(), 1);
}

#[test]
fn a_deletion_beside_other_settings_of_the_same_module_is_a_deletion() {
    let mut world = World::new();
    for stem in ["10-strip", "20-strip"] {
        world.write(&format!("{stem}.toml"), STRIP_BODY);
        world.write(&format!("{stem}.wasm"), strip());
    }
    world.start().unwrap();
    fs::remove_file(world.path("20-strip.toml")).unwrap();
    fs::remove_file(world.path("20-strip.wasm")).unwrap();
    world.write("10-strip.toml", STRIP_TITLE);
    world.wait("both", |world| world.columns() == ["body", "id", "tags"]);
    world.wait_for_files(&["10-strip.wasm"]);
    assert_eq!(world.host().list().warnings, ["`20-strip.wasm` was deleted, and left the chain"]);
}

#[test]
fn settings_alone_are_a_change() {
    let world = stripping();
    world.write("10-strip.toml", STRIP_TITLE);
    world.wait("the new settings", |world| world.columns() == ["body", "id", "tags"]);
    assert_eq!(world.generation(), 2);

    world.write("10-strip.toml", "[config]\ncolumn = 1\n");
    let reason = world.wait_for_rejection("10-strip.wasm");
    assert!(
        reason.contains("line 2: `config.column` is no setting of this module; did you mean"),
        "{reason}"
    );
    assert_eq!(world.columns(), ["body", "id", "tags"]);

    world.write("10-strip.toml", "nonsense = 1\n");
    world.wait("the other reason", |world| {
        world.wait_for_rejection("10-strip.wasm").contains("line 1: unknown field `nonsense`")
    });
    world.write("10-strip.toml", STRIP_BODY);
    world.wait("the mended settings", |world| world.columns() == ["id", "tags", "title"]);
    assert_eq!(world.list().len(), 1);
}

#[test]
fn a_broken_file_never_replaces_a_working_one() {
    let world = stripping();
    for (bytes, part) in [
        (&b"not wasm at all"[..], "text, not WebAssembly"),
        (&strip()[..strip().len() / 2], "ends too early"),
        (b"\0asm\x01\0\0\0", "without an interface"),
    ] {
        world.rename_into_place("10-strip.wasm", bytes);
        world.wait("the rejection", |world| {
            world.wait_for_rejection("10-strip.wasm").contains(part)
        });
        assert_eq!(world.columns(), ["id", "tags", "title"]);
        assert_eq!(world.generation(), 1);
        let states: Vec<_> = world.list().into_iter().map(|(_, state, _)| state).collect();
        assert_eq!(states, [TransformState::Live, TransformState::Rejected]);
    }
    // One whose `init` traps is broken too.
    world.rename_into_place("10-strip.wasm", chaos());
    world.write("10-strip.toml", "[config]\nact = \"init-panic\"\n");
    world.wait("the rejection", |world| {
        world.wait_for_rejection("10-strip.wasm").contains("init panics")
    });
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    assert_eq!(world.generation(), 1);

    world.write("10-strip.toml", STRIP_TITLE);
    world.rename_into_place("10-strip.wasm", strip());
    world.wait("the mended file", |world| world.columns() == ["body", "id", "tags"]);
}

#[test]
fn a_slow_writer_is_waited_for() {
    use std::io::Write as _;
    let world = stripping();
    world.write("20-strip.toml", STRIP_TITLE);
    let mut file = fs::File::create(world.path("20-strip.wasm")).unwrap();
    for piece in strip().chunks(strip().len() / 8 + 1) {
        file.write_all(piece).unwrap();
        std::thread::sleep(Duration::from_millis(250));
        assert!(
            world.list().iter().all(|(_, state, _)| *state != TransformState::Rejected),
            "{:?}",
            world.list()
        );
    }
    world.wait_for_files(&["10-strip.wasm", "20-strip.wasm"]);
    assert_eq!(world.generation(), 2);
}

#[test]
fn a_renamed_file_is_never_live_twice() {
    let world = stripping();
    let mut chain = world.host().chain();
    chain.mark_unchanged();
    fs::rename(world.path("10-strip.toml"), world.path("20-strip.toml")).unwrap();
    fs::rename(world.path("10-strip.wasm"), world.path("20-strip.wasm")).unwrap();
    world.wait_for_files(&["20-strip.wasm"]);
    assert_eq!(world.generation(), 2);
    assert_eq!(world.columns(), ["id", "tags", "title"]);
}

#[test]
fn ten_files_at_once_are_one_change() {
    let world = stripping();
    for number in 20..30 {
        world.write(&format!("{number}-strip.toml"), STRIP_TITLE);
        world.write(&format!("{number}-strip.wasm"), strip());
    }
    world.wait("all of them", |world| world.files().len() == 11);
    assert_eq!(world.generation(), 2);
}

#[test]
fn a_symbolic_link_that_is_swapped_is_followed() {
    // As Kubernetes mounts a ConfigMap.
    let mut world = World::new();
    let version = |name: &str, settings: &str| {
        let dir = world.path(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("10-strip.wasm"), strip()).unwrap();
        fs::write(dir.join("10-strip.toml"), settings).unwrap();
    };
    version("..2026_01", STRIP_BODY);
    version("..2026_02", STRIP_TITLE);
    let link = |from: &str, to: &str| {
        let temporary = world.path("..link.tmp");
        std::os::unix::fs::symlink(to, &temporary).unwrap();
        fs::rename(temporary, world.path(from)).unwrap();
    };
    link("..data", "..2026_01");
    link("10-strip.wasm", "..data/10-strip.wasm");
    link("10-strip.toml", "..data/10-strip.toml");
    world.start().unwrap();
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    let temporary = world.path("..data_tmp");
    std::os::unix::fs::symlink("..2026_02", &temporary).unwrap();
    fs::rename(temporary, world.path("..data")).unwrap();
    world.wait("the new link", |world| world.columns() == ["body", "id", "tags"]);
    assert_eq!(world.generation(), 2);
}

#[test]
fn a_folder_that_vanishes_takes_nothing_with_it() {
    let world = stripping();
    let away = tempfile::tempdir().unwrap();
    let away = away.path().join("away");
    fs::rename(world.dir.path(), &away).unwrap();
    world.wait("the warning", |world| !world.host().list().warnings.is_empty());
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(world.files(), ["10-strip.wasm"]);
    fs::rename(&away, world.dir.path()).unwrap();
    world.wait("the folder", |world| world.host().list().warnings.is_empty());
    world.write("10-strip.toml", STRIP_TITLE);
    world.wait("the new settings", |world| world.columns() == ["body", "id", "tags"]);
}

#[test]
fn a_restart_with_a_broken_file_goes_on_with_the_last_good_one() {
    let mut world = stripping();
    world.host = None;
    world.write("10-strip.wasm", "broken");
    world.write("10-strip.toml", "broken");
    world.start().unwrap();
    assert_eq!(world.generation(), 1);
    assert_eq!(world.columns(), ["id", "tags", "title"]);
    world.wait_for_rejection("10-strip.wasm");

    // The copy itself was damaged: nothing is left to go on with.
    world.host = None;
    let copies = world.state.path().join("last-good-transforms");
    for copy in fs::read_dir(&copies).unwrap() {
        let path = copy.unwrap().path();
        if path.extension().is_none() {
            fs::write(path, "damaged").unwrap();
        }
    }
    let error = world.start().unwrap_err();
    assert!(
        error.to_string().starts_with(
            "these transforms cannot be used, and no working copy of them is known: \
             `10-strip.wasm`: its settings file `10-strip.toml`: line 1: "
        ),
        "{error}"
    );

    // A file that was taken away while nothing ran is taken away.
    fs::remove_file(world.path("10-strip.wasm")).unwrap();
    world.start().unwrap();
    assert_eq!(world.columns(), ["body", "id", "tags", "title"]);
    assert_eq!(world.generation(), 2);
}

#[test]
fn a_start_without_its_folder_is_refused() {
    let mut world = World::new();
    fs::remove_dir(world.dir.path()).unwrap();
    let error = world.start().unwrap_err();
    let dir = world.dir.path().display();
    assert_eq!(
        error.to_string(),
        format!("could not read the transforms folder {dir}; create it, or set `transforms.dir`")
    );
}

#[test]
fn ready_made_transforms_install_into_a_running_host() {
    let mut world = World::new();
    world.start().unwrap();
    let dir: &Path = world.dir.path();
    ready_made::install(dir, "strip-columns", STRIP_BODY, None).unwrap();
    ready_made::install(dir, "compress-columns", "[config]\ncolumns = [\"tags\"]", None).unwrap();
    world.wait_for_files(&["10-strip-columns.wasm", "20-compress-columns.wasm"]);
    for ready_made in ready_made::ALL {
        let settings = Settings::parse(ready_made.example).unwrap();
        let module = module(ready_made.module());
        crate::transform::instance::Instance::start(
            engine(),
            &ready_made.name.into(),
            &module,
            &settings,
            false,
        )
        .unwrap();
    }
}
