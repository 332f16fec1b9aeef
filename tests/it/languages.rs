//! The projects that `transforms new` writes, built by the commands of their own README from the
//! language's own packages, and run in the real host.
//!
//! These need the network where npm's, pip's and cargo's packages are not there yet, and Node.js and
//! Python, which `.ci/setup` installs. A test whose tools are missing fails.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::CACHE;

/// The program as people call it.
const PROGRAM: &str = env!("CARGO_BIN_EXE_sluicebox");

fn run(command: &mut Command, what: &str) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(
        output.status.success(),
        "{what} ended with {}:\n{}\n{}\n(`.ci/setup` installs what building needs)",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// A shell command in the project, with this program on PATH.
fn shell(project: &Path, line: &str) {
    let path = std::env::var("PATH").unwrap();
    let bin = Path::new(PROGRAM).parent().unwrap().display();
    let mut sh = Command::new("sh");
    sh.args(["-e", "-c", line]).current_dir(project);
    sh.env("PATH", format!("{bin}:{path}")).env("XDG_CACHE_HOME", CACHE);
    // What is meant for the build of this test.
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_TARGET_DIR", "RUSTC_WRAPPER"] {
        sh.env_remove(name);
    }
    run(&mut sh, line);
}

/// Makes a project, follows its README to the letter, and looks at what the module does.
fn follow_the_readme(lang: &str, prepare: impl FnOnce(&Path)) {
    let dir = tempfile::Builder::new().prefix("sluicebox-new-").tempdir().unwrap();
    let mut new = Command::new(PROGRAM);
    new.args(["transforms", "new", "hide-it", "--lang", lang]).current_dir(dir.path());
    run(&mut new, "transforms new");
    let project = dir.path().join("hide-it");
    prepare(&project);
    let transforms = dir.path().join("transforms");
    std::fs::create_dir(&transforms).unwrap();

    let readme = std::fs::read_to_string(project.join("README.md")).unwrap();
    let commands = readme.split("```").nth(1).unwrap().strip_prefix("sh\n").unwrap();
    assert_eq!(commands.lines().count(), 3, "{readme}");
    for line in commands.lines() {
        shell(&project, &line.replace("TRANSFORMS", &transforms.display().to_string()));
    }

    let mut test = Command::new(PROGRAM);
    test.args(["transforms", "test", "--json"]).arg(&transforms).env("XDG_CACHE_HOME", CACHE);
    let output = run(&mut test, "transforms test");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["transforms"][0]["file"], "50-hide-it.wasm");
    let insert = &report["samples"][0];
    assert_eq!(insert["records"][0]["body"]["record"]["title"], "***", "{insert}");
    // What an update had before must not stay beside what was hidden.
    let update = &report["samples"][2];
    assert_eq!(update["action"], "update");
    assert!(!update["records"][0]["body"].to_string().contains("draft"), "{update}");
}

#[test]
fn rust() {
    follow_the_readme("rust", |project| {
        // The versions that are here already.
        let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
        std::fs::copy(lock, project.join("Cargo.lock")).unwrap();
    });
}

#[test]
fn javascript() {
    follow_the_readme("js", |_| ());
}

#[test]
fn python() {
    follow_the_readme("python", |_| ());
}
