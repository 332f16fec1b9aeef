//! Looking at the transforms folder: names, fingerprints and contents. Decides nothing.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::time::SystemTime;

use super::loader::MODULE_BYTES_MAX;

/// The largest settings file, in bytes.
const SETTINGS_BYTES_MAX: u64 = 1024 * 1024;

/// What tells one content of a file from another without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    bytes: u64,
    modified: Option<SystemTime>,
    /// Another file renamed into place has another one.
    inode: u64,
}

/// A module and its settings file, as one look saw them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) module: Fingerprint,
    pub(crate) settings: Option<Fingerprint>,
}

impl Seen {
    /// Whether either file is empty.
    pub(crate) fn has_empty(&self) -> bool {
        self.module.bytes == 0 || self.settings.as_ref().is_some_and(|settings| settings.bytes == 0)
    }

    /// The size of the module.
    pub(crate) fn module_bytes(&self) -> u64 {
        self.module.bytes
    }

    /// When either file was written last.
    pub(crate) fn modified(&self) -> Option<SystemTime> {
        let settings = self.settings.as_ref().and_then(|settings| settings.modified);
        self.module.modified.max(settings)
    }
}

/// What one look at the folder saw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Look {
    /// By file name, which is the order of the chain.
    pub(crate) modules: BTreeMap<String, Seen>,
    /// Settings files without a module.
    pub(crate) orphans: Vec<String>,
}

/// What the two files of a transform hold.
pub(crate) struct Content {
    pub(crate) module: Vec<u8>,
    pub(crate) settings: Option<String>,
}

/// Lists the folder. Symbolic links are followed, as Kubernetes needs it.
pub(crate) fn look(dir: &Path) -> io::Result<Look> {
    let mut look = Look::default();
    let mut settings = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if is_ignored(&name) {
            continue;
        }
        let is_settings = name.ends_with(".toml");
        if !is_settings && !is_module(&name) {
            continue;
        }
        let metadata = match fs::metadata(entry.path()) {
            Ok(metadata) => metadata,
            // Deleted since it was listed, or a link to nothing.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if !metadata.is_file() {
            continue;
        }
        let fingerprint = fingerprint(&metadata);
        if is_settings {
            settings.insert(name, fingerprint);
        } else {
            look.modules.insert(name, Seen { module: fingerprint, settings: None });
        }
    }
    for (name, seen) in &mut look.modules {
        seen.settings = settings.get(&settings_name(name)).cloned();
    }
    let with_module: Vec<String> = look.modules.keys().map(|name| settings_name(name)).collect();
    look.orphans = settings.into_keys().filter(|name| !with_module.contains(name)).collect();
    Ok(look)
}

/// Reads a transform's files whole.
pub(crate) fn read(dir: &Path, name: &str) -> io::Result<Content> {
    // One byte more than is allowed shows that there is more.
    let module = read_at_most(&dir.join(name), MODULE_BYTES_MAX + 1)?;
    let settings = match read_at_most(&dir.join(settings_name(name)), SETTINGS_BYTES_MAX) {
        Ok(bytes) => Some(String::from_utf8(bytes).map_err(|_| {
            io::Error::other(format!("`{}` is not UTF-8 text", settings_name(name)))
        })?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok(Content { module, settings })
}

/// `10-x.toml` for `10-x.wasm`.
pub(crate) fn settings_name(module: &str) -> String {
    let stem = module.rsplit_once('.').map_or(module, |(stem, _)| stem);
    format!("{stem}.toml")
}

/// Names that editors and copying tools use for what is not finished.
fn is_ignored(name: &str) -> bool {
    name.starts_with('.')
        || name.ends_with('~')
        || [".tmp", ".part", ".swp"].iter().any(|end| name.ends_with(end))
}

/// Precompiled code and WebAssembly text are listed too: the loader says why they do not count.
fn is_module(name: &str) -> bool {
    [".wasm", ".cwasm", ".wat"].iter().any(|end| name.ends_with(end))
}

fn fingerprint(metadata: &Metadata) -> Fingerprint {
    Fingerprint {
        bytes: metadata.len(),
        modified: metadata.modified().ok(),
        inode: std::os::unix::fs::MetadataExt::ino(metadata),
    }
}

fn read_at_most(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(bytes_max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Makes a folder that only this user can enter.
pub(crate) fn create_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // It may have been there before, with other rights.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
}

/// Writes a file that only this user can read, so that it is there whole or not at all.
pub(crate) fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let temporary = path.with_file_name(format!(".{}.tmp", name.unwrap_or_default()));
    // A rest of a crash may be in the way, with other rights.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
    write(&mut file)?;
    file.flush()?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    // The name too has to survive a power loss.
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_and_foreign_names_are_not_seen() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "10-a.wasm",
            "10-a.toml",
            "20-b.wasm",
            "30-c.toml",
            ".hidden.wasm",
            "40-d.wasm.tmp",
            "40-e.wasm~",
            "40-f.wasm.part",
            "README.md",
            "50-g.cwasm",
        ] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        fs::create_dir(dir.path().join("60-h.wasm")).unwrap();
        std::os::unix::fs::symlink("nothing", dir.path().join("70-i.wasm")).unwrap();
        std::os::unix::fs::symlink("20-b.wasm", dir.path().join("80-j.wasm")).unwrap();

        let look = look(dir.path()).unwrap();
        let names: Vec<&str> = look.modules.keys().map(String::as_str).collect();
        assert_eq!(names, ["10-a.wasm", "20-b.wasm", "50-g.cwasm", "80-j.wasm"]);
        assert!(look.modules["10-a.wasm"].settings.is_some());
        assert!(look.modules["20-b.wasm"].settings.is_none());
        assert_eq!(look.orphans, ["30-c.toml"]);
    }

    #[test]
    fn a_write_is_whole_and_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(dir.path().join(".file.tmp"), "rest").unwrap();
        write_atomically(&path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let failed = write_atomically(&path, |_| Err(io::Error::other("no")));
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
