//! The transforms that the binary carries, so that an operator needs no WebAssembly toolchain.
//!
//! They are built from `transforms/` together with the binary (`build.rs`).

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use super::engine::Engine;
use super::folder::settings_name;
use super::instance::Instance;
use super::loader;
use super::settings::Settings;

/// The steps between the numbers of file names, so that others fit between.
const NUMBER_STEP: u32 = 10;

/// A transform that is ready to be installed.
#[derive(Clone, Copy, Debug)]
pub struct ReadyMade {
    pub name: &'static str,
    /// One line.
    pub description: &'static str,
    /// Its `config`, as an example that works once the columns are the table's.
    pub example: &'static str,
    module: &'static [u8],
}

impl ReadyMade {
    /// The module's bytes.
    #[must_use]
    pub fn module(&self) -> &'static [u8] {
        self.module
    }
}

macro_rules! module {
    ($file:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/sluicebox_", $file, ".wasm"))
    };
}

/// All of them, by name.
pub const ALL: [ReadyMade; 8] = [
    ReadyMade {
        name: "compress-columns",
        description: "compresses the values of columns (zstd or gzip, in base64)",
        example: "[config]\ncolumns = [\"body\"]\ncodec = \"zstd\"\nmin_bytes = 1024\n\
                  only_oversize = false\n",
        module: module!("compress_columns"),
    },
    ReadyMade {
        name: "filter",
        description: "keeps or drops messages by the values of columns",
        example: "[config]\nkeep = [{ column = \"status\", is = [\"active\", \"new\"] }]\n\
                  drop = [{ column = \"internal\", is = true }]\nunknown = \"keep\"\n",
        module: module!("filter"),
    },
    ReadyMade {
        name: "keep-columns",
        description: "takes all columns out of messages but the key and some",
        example: "[config]\ncolumns = [\"title\"]\nonly_oversize = false\n",
        module: module!("keep_columns"),
    },
    ReadyMade {
        name: "mask-columns",
        description: "hides the values of columns, by a text or a keyed hash",
        example: "[config]\ncolumns = [\"email\"]\nmethod = \"redact\"\ntext = \"***\"\n",
        module: module!("mask_columns"),
    },
    ReadyMade {
        name: "route",
        description: "sends messages to streams named by table, action or a column's value",
        example: "[config]\nstream = \"cdc/{schema}.{table}\"\n",
        module: module!("route"),
    },
    ReadyMade {
        name: "split",
        description: "cuts messages that are too large into numbered parts",
        example: "[config]\npart_bytes = 0\n",
        module: module!("split"),
    },
    ReadyMade {
        name: "strip-columns",
        description: "takes columns out of messages",
        example: "[config]\ncolumns = [\"body\"]\nonly_oversize = false\n",
        module: module!("strip_columns"),
    },
    ReadyMade {
        name: "truncate-columns",
        description: "cuts the texts of columns to a number of bytes",
        example: "[config]\ncolumns = [\"body\"]\nmax_bytes = 10000\nonly_oversize = false\n",
        module: module!("truncate_columns"),
    },
];

/// Why a transform was not installed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no ready-made transform `{name}`; there are: {}", names())]
    Unknown { name: String },
    #[error("the settings of {name} are not usable: {reason}; such are:\n{example}")]
    Settings { name: &'static str, reason: String, example: &'static str },
    #[error("WebAssembly cannot run here: {reason}")]
    Engine { reason: String },
    #[error("there is a file {} already; choose another number, or remove it", path.display())]
    Exists { path: PathBuf },
    #[error("could not write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

fn names() -> String {
    ALL.map(|ready_made| ready_made.name).join(", ")
}

/// The ready-made transform of that name.
///
/// # Errors
///
/// When there is none.
pub fn find(name: &str) -> Result<&'static ReadyMade, Error> {
    const ALL: &[ReadyMade] = &self::ALL;
    ALL.iter()
        .find(|ready_made| ready_made.name == name)
        .ok_or_else(|| Error::Unknown { name: name.to_owned() })
}

/// Writes `NN-name.toml` and `NN-name.wasm` into a transforms folder, and answers with the module's
/// path. Without a number, it takes the next free one, so that the transform runs last.
///
/// The settings are there before the module, and the module is there at once and whole: a host that
/// watches the folder never sees half of it. The folder is made where its parent is there already.
///
/// # Errors
///
/// When there is no such transform, the settings cannot be read or the module refuses them, a file of that name is there
/// already, or the folder cannot be written to.
pub fn install(
    dir: &Path,
    name: &str,
    settings: &str,
    number: Option<u32>,
) -> Result<PathBuf, Error> {
    let ready_made = find(name)?;
    try_out(ready_made, settings)?;
    if let Err(source) = fs::create_dir(dir)
        && source.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(Error::Write { path: dir.into(), source });
    }
    let number = match number {
        Some(number) => number,
        None => next_number(dir).map_err(|source| Error::Write { path: dir.into(), source })?,
    };
    let file = format!("{number:02}-{name}.wasm");
    let module_path = dir.join(&file);
    let settings_path = dir.join(settings_name(&file));
    for path in [&module_path, &settings_path] {
        if path.exists() {
            return Err(Error::Exists { path: path.clone() });
        }
    }
    write(&settings_path, settings.as_bytes())?;
    write(&module_path, ready_made.module)?;
    Ok(module_path)
}

/// Starts the module with the settings, so that what it refuses is heard of before it is there.
fn try_out(ready_made: &'static ReadyMade, settings: &str) -> Result<(), Error> {
    let refused = |reason: String| Error::Settings {
        name: ready_made.name,
        reason,
        example: ready_made.example,
    };
    let broken = |reason: String| Error::Engine { reason };
    let engine = Engine::new().map_err(|error| broken(loader::chain(&error)))?;
    let module = loader::load(&engine, ready_made.module, None)
        .map_err(|error| broken(error.to_string()))?;
    let settings = Settings::of(settings, module.schema.as_ref())
        .map_err(|error| refused(error.to_string()))?;
    match Instance::start(&engine, &ready_made.name.into(), &module, &settings, true) {
        Ok(_) => Ok(()),
        Err(fault) => Err(refused(format!("it {}", fault.reason))),
    }
}

/// The first multiple of ten above all numbers in the folder.
fn next_number(dir: &Path) -> io::Result<u32> {
    let mut last = 0;
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let digits: String =
            name.to_string_lossy().chars().take_while(char::is_ascii_digit).collect();
        last = last.max(digits.parse().unwrap_or(0));
    }
    Ok((last / NUMBER_STEP + 1).saturating_mul(NUMBER_STEP))
}

/// Through a temporary file in the same folder. Readable by others, like any file that an operator
/// puts there.
fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp"));
    let mut file = fs::File::create(&temporary).map_err(failed)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::super::schema;
    use super::*;

    #[test]
    fn numbers_go_on_in_tens() {
        let dir = tempfile::tempdir().unwrap();
        let settings = "[config]\ncolumns = [\"body\"]\n";
        let install = |number| install(dir.path(), "strip-columns", settings, number);
        let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(name(install(None).unwrap()), "10-strip-columns.wasm");
        assert_eq!(name(install(Some(5)).unwrap()), "05-strip-columns.wasm");
        fs::write(dir.path().join("42-other.wasm"), "").unwrap();
        assert_eq!(name(install(None).unwrap()), "50-strip-columns.wasm");
        assert_eq!(fs::read_to_string(dir.path().join("50-strip-columns.toml")).unwrap(), settings);
        assert!(matches!(install(Some(5)), Err(Error::Exists { .. })));
    }

    #[test]
    fn every_example_works_and_every_one_has_its_page() {
        for ready_made in &ALL {
            try_out(ready_made, ready_made.example).unwrap();
            let schema = schema::of(ready_made.module).unwrap();
            assert_eq!(schema["additionalProperties"], false, "{schema}");
            assert!(schema["description"].is_string(), "{schema}");
            let misspelt = format!("{}\nnonsense = 1\n", ready_made.example);
            let error = try_out(ready_made, &misspelt).unwrap_err().to_string();
            assert!(error.contains("`config.nonsense` is no setting of this module"), "{error}");
            let root = concat!(env!("CARGO_MANIFEST_DIR"), "/transforms");
            let page = fs::read_to_string(format!("{root}/{}/README.md", ready_made.name)).unwrap();
            assert!(page.starts_with(&format!("# {}\n", ready_made.name)), "{page}");
            let settings = page.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
            try_out(ready_made, settings).unwrap();
            // Also those that the page shows and leaves out.
            let keys = schema["properties"].as_object().unwrap();
            let left_out = settings.lines().filter_map(|line| line.strip_prefix("# "));
            let shown: Vec<&str> = settings
                .lines()
                .chain(left_out)
                .filter_map(|line| Some(line.split_once(" = ")?.0))
                .filter(|key| !key.starts_with('#'))
                .collect();
            for key in keys.keys() {
                assert!(shown.contains(&key.as_str()), "{}: {key} is not shown", ready_made.name);
            }
            for key in shown {
                assert!(keys.contains_key(key), "{}: {key} does not exist", ready_made.name);
            }
        }
    }

    #[test]
    fn a_missing_folder_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("transforms");
        let example = find("strip-columns").unwrap().example;
        let path = install(&folder, "strip-columns", example, None).unwrap();
        assert_eq!(path, folder.join("10-strip-columns.wasm"));
        assert!(path.is_file());
    }

    #[test]
    fn what_cannot_be_installed_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = install(dir.path(), "strip", "", None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no ready-made transform `strip`; there are: compress-columns, filter, \
             keep-columns, mask-columns, route, split, strip-columns, truncate-columns"
        );
        assert!(matches!(
            install(dir.path(), "strip-columns", "a", None),
            Err(Error::Settings { .. })
        ));
        let example = find("strip-columns").unwrap().example;
        let missing = dir.path().join("missing/transforms");
        let error = install(&missing, "strip-columns", example, None).unwrap_err();
        assert!(matches!(error, Error::Write { .. }));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = install(&file, "strip-columns", example, None).unwrap_err();
        assert!(matches!(error, Error::Write { .. }));
        fs::remove_file(&file).unwrap();
        let error = install(dir.path(), "split", "[config]\npart_bytes = 10", None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the settings of split are not usable: it refused its settings: `config.part_bytes` is \
             less than 1024; leave it out for parts as large as they may be; such are:\n[config]\n\
             part_bytes = 0\n"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
