//! Builds the ready-made transforms, so that the binary can carry them.
//!
//! They are compiled for `wasm32-unknown-unknown` by a cargo of their own, in a target folder of
//! their own: cargo cannot build a dependency for another target and hand over its file.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "wasm32-unknown-unknown";

/// The profile in the workspace's manifest.
const PROFILE: &str = "guest";

/// The crates, and the file names of what they build.
const GUESTS: [(&str, &str); 8] = [
    ("sluicebox-compress-columns", "sluicebox_compress_columns.wasm"),
    ("sluicebox-filter", "sluicebox_filter.wasm"),
    ("sluicebox-keep-columns", "sluicebox_keep_columns.wasm"),
    ("sluicebox-mask-columns", "sluicebox_mask_columns.wasm"),
    ("sluicebox-route", "sluicebox_route.wasm"),
    ("sluicebox-split", "sluicebox_split.wasm"),
    ("sluicebox-strip-columns", "sluicebox_strip_columns.wasm"),
    ("sluicebox-truncate-columns", "sluicebox_truncate_columns.wasm"),
];

fn main() {
    for path in ["transforms", "wit", "build.rs", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let out_dir = PathBuf::from(variable("OUT_DIR"));
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    require_target();

    list_sdk(&root, &out_dir.join("sdk.rs"));
    let target_dir = out_dir.join("guests");
    build(&root, &target_dir);
    for (_, file) in GUESTS {
        let built = target_dir.join(TARGET).join(PROFILE).join(file);
        let copy = out_dir.join(file);
        if let Err(error) = fs::copy(&built, &copy) {
            fail(&format!("could not copy {} to {}: {error}", built.display(), copy.display()));
        }
    }
}

/// Writes the SDK's files as a constant, because `transforms new` puts them into projects.
fn list_sdk(root: &Path, out: &Path) {
    let sdk = root.join("transforms/sdk");
    let mut files = Vec::new();
    let mut folders = vec![sdk.clone()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder)
            .unwrap_or_else(|error| fail(&format!("could not read {}: {error}", folder.display())));
        for entry in entries.flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() {
                folders.push(path);
            } else if [".rs", ".toml", ".md"]
                .iter()
                .any(|end| name.to_string_lossy().ends_with(end))
            {
                files.push(path);
            }
        }
    }
    files.sort();
    let mut text = "pub(super) const FILES: &[(&str, &str)] = &[\n".to_owned();
    for file in &files {
        let name = file.strip_prefix(&sdk).unwrap_or(file).to_string_lossy().into_owned();
        let content = fs::read_to_string(file)
            .unwrap_or_else(|error| fail(&format!("could not read {}: {error}", file.display())));
        // The text and not the path: a checkout may be moved after this has run.
        text.push_str(&format!("    ({name:?}, {content:?}),\n"));
    }
    text.push_str("];\n");
    if let Err(error) = fs::write(out, text) {
        fail(&format!("could not write {}: {error}", out.display()));
    }
}

/// With the versions of `Cargo.lock`: cargo asks the network only for what is not there yet.
fn build(root: &Path, target_dir: &Path) {
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .current_dir(root)
        .args(["build", "--locked", "--target", TARGET, "--profile", PROFILE])
        .arg("--target-dir")
        .arg(target_dir);
    for (package, _) in GUESTS {
        cargo.args(["--package", package]);
    }
    // What is meant for the host's build must not reach the guests': flags for another processor,
    // wrappers such as clippy's, profiles.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let is_for_host = text.starts_with("CARGO_PROFILE_")
            || text.starts_with("CARGO_FEATURE_")
            || text.starts_with("CARGO_TARGET_")
            || text.starts_with("CARGO_BUILD_")
            || matches!(
                &*text,
                "RUSTFLAGS"
                    | "CARGO_ENCODED_RUSTFLAGS"
                    | "RUSTC_WRAPPER"
                    | "RUSTC_WORKSPACE_WRAPPER"
                    | "CLIPPY_ARGS"
                    | "TARGET"
                    | "LLVM_PROFILE_FILE"
            );
        if is_for_host {
            cargo.env_remove(name);
        }
    }
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(_) => fail("could not build the ready-made transforms; cargo's messages are above"),
        Err(error) => fail(&format!("could not run cargo: {error}")),
    }
}

/// Says what is missing before cargo says it in a way that hides the mend.
fn require_target() {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| OsString::from("rustc"));
    let output =
        Command::new(rustc).args(["--print", "target-libdir", "--target", TARGET]).output();
    let library = match output {
        Ok(output) => PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()),
        Err(error) => fail(&format!("could not run rustc: {error}")),
    };
    if !library.is_dir() {
        fail(&format!("the Rust target {TARGET} is missing; run `rustup target add {TARGET}`"));
    }
}

fn variable(name: &str) -> OsString {
    env::var_os(name).unwrap_or_else(|| fail(&format!("cargo did not set {name}")))
}

fn fail(text: &str) -> ! {
    println!("cargo::error={text}");
    std::process::exit(1);
}
