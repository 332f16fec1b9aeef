//! `sluicebox transforms new`: a project that builds with its language's own command.
//!
//! Everything that a build needs and no package registry has is written into the project: the
//! interface, and for Rust the SDK, both as this program was built with them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::super::UsageError;
use super::super::output::{print, to_stderr};

/// The files of the SDK's crate and of the interface, by their paths in it: `build.rs` lists them.
mod sdk {
    include!(concat!(env!("OUT_DIR"), "/sdk.rs"));
}

const WIT: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/wit/transform.wit"));

#[derive(Debug, Args)]
pub(in crate::cli) struct NewArguments {
    /// The project, and the folder that is made for it.
    name: String,
    /// What to write it in.
    #[arg(long)]
    lang: Language,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Language {
    Rust,
    Js,
    Python,
}

pub(super) fn run(arguments: &NewArguments) -> anyhow::Result<ExitCode> {
    let dir = PathBuf::from(&arguments.name);
    write(&dir, &arguments.name, arguments.lang)?;
    print(&format!("{}\n", dir.display()))?;
    to_stderr(&format!(
        "{} has the commands that build and try it",
        dir.join("README.md").display()
    ));
    Ok(ExitCode::SUCCESS)
}

fn write(dir: &Path, name: &str, language: Language) -> anyhow::Result<()> {
    check_name(name)?;
    let failed = |path: &Path, error: std::io::Error| {
        UsageError(format!("could not write {}: {error}", path.display()))
    };
    // Not even an empty folder: what is there belongs to somebody.
    std::fs::create_dir(dir).map_err(|error| failed(dir, error))?;
    for (path, text) in files(name, language) {
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
        }
        std::fs::write(&path, text).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}

/// What is a good name for a crate, a package, a file and a folder alike.
fn check_name(name: &str) -> Result<(), UsageError> {
    let is_letter = |c: char| c.is_ascii_lowercase();
    let good = name.starts_with(is_letter)
        && name.len() <= 64
        && name.chars().all(|c| is_letter(c) || c.is_ascii_digit() || c == '-')
        && !name.ends_with('-')
        && !["sluicebox-transform", "test", "core", "std", "serde"].contains(&name);
    if good {
        return Ok(());
    }
    Err(UsageError(format!(
        "`{name}` is no name for a project: use lower-case letters, digits and hyphens, a letter \
         first, such as `mask-emails`"
    )))
}

/// Paths in the project, and what is written there.
fn files(name: &str, language: Language) -> Vec<(String, String)> {
    let fill =
        |text: &str| text.replace("{{name}}", name).replace("{{file}}", &name.replace('-', "_"));
    let mut files = vec![(format!("{name}.toml"), fill(include_str!("new/settings.toml.txt")))];
    let mut add = |path: &str, text: &str| files.push((path.to_owned(), fill(text)));
    match language {
        Language::Rust => {
            add("Cargo.toml", include_str!("new/rust/Cargo.toml.txt"));
            add("rust-toolchain.toml", include_str!("new/rust/rust-toolchain.toml.txt"));
            add("src/lib.rs", include_str!("new/rust/lib.rs.txt"));
            add("README.md", include_str!("new/rust/README.md.txt"));
            add(".gitignore", "/target\n");
            files.extend(sdk_files());
        }
        Language::Js => {
            add("package.json", include_str!("new/js/package.json.txt"));
            add("build.mjs", include_str!("new/js/build.mjs.txt"));
            add("transform.js", include_str!("new/js/transform.js.txt"));
            add("README.md", include_str!("new/js/README.md.txt"));
            add(".gitignore", "/node_modules\n/{{name}}.wasm\n");
            files.push(("wit/transform.wit".to_owned(), WIT.to_owned()));
        }
        Language::Python => {
            add("requirements.txt", include_str!("new/python/requirements.txt.txt"));
            add("app.py", include_str!("new/python/app.py.txt"));
            add("README.md", include_str!("new/python/README.md.txt"));
            add(".gitignore", "/.venv\n__pycache__\n/{{name}}.wasm\n");
            files.push(("wit/transform.wit".to_owned(), WIT.to_owned()));
        }
    }
    files
}

/// The SDK finds the interface in its own folder there, where here it lies beside `transforms/`.
fn sdk_files() -> impl Iterator<Item = (String, String)> {
    let crate_files =
        sdk::FILES.iter().map(|(path, text)| (*path, text.replace("../../wit", "wit")));
    let wit = std::iter::once(("wit/transform.wit", WIT.to_owned()));
    crate_files.chain(wit).map(|(path, text)| (format!("sluicebox-transform/{path}"), text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_good_for_all_languages() {
        for good in ["a", "mask-emails", "v2"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "2v", "-a", "a-", "Mask", "a_b", "a/b", "..", "ä", "a b", "std"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_project_needs_nothing_of_this_repository() {
        for language in [Language::Rust, Language::Js, Language::Python] {
            let files = files("my-name", language);
            for (path, text) in &files {
                // Other braces are those of a format in the SDK.
                assert!(!text.contains("{{name}}") && !text.contains("{{file}}"), "{path}");
                assert!(!text.contains("../.."), "{path}");
            }
            let readme = files.iter().find(|(path, _)| path == "README.md").unwrap();
            let commands = readme.1.split("```").nth(1).unwrap().lines().skip(1);
            assert_eq!(commands.count(), 3, "{}", readme.1);
            assert!(files.iter().any(|(path, _)| path.ends_with("wit/transform.wit")));
        }
        let lib = sdk::FILES.iter().filter(|(_, text)| text.contains("path: \"../../wit\""));
        assert_eq!(lib.count(), 1, "the SDK names the interface's folder once");
    }

    #[test]
    fn what_is_there_is_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let project = dir.path().join("mine");
        write(&project, "mine", Language::Js).unwrap();
        assert!(project.join("transform.js").exists());
        let error = write(&project, "mine", Language::Python).unwrap_err();
        assert!(error.is::<UsageError>(), "{error}");
        assert!(!project.join("app.py").exists());
    }
}
