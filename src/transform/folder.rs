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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    /// Of the file; 0 of what cannot be read.
    bytes: u64,
    modified: Option<SystemTime>,
    /// When anything about it changed last, which nobody can set back: seconds and nanoseconds.
    changed: (i64, i64),
    /// Another file renamed into place has another one.
    inode: u64,
    /// Why it cannot be read, where that shows from outside.
    broken: Option<String>,
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
    /// Names that look like a transform's and are none, as far as they can be shown, and why.
    pub(crate) misnamed: Vec<(String, &'static str)>,
}

/// What the two files of a transform hold.
pub(crate) struct Content {
    pub(crate) module: Vec<u8>,
    pub(crate) settings: Option<String>,
}

/// What tells a folder from another one at the same path: its device and inode.
pub(crate) fn identity(dir: &Path) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(dir).map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Lists the folder. Symbolic links are followed, as Kubernetes needs it.
pub(crate) fn look(dir: &Path) -> io::Result<Look> {
    let mut look = Look::default();
    let mut settings = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = match entry.file_name().into_string() {
            Ok(name) => name,
            Err(name) => {
                let name = name.to_string_lossy().into_owned();
                if is_module(&name) || name.ends_with(".toml") {
                    look.misnamed.push((name, "is not UTF-8 text"));
                }
                continue;
            }
        };
        if is_ignored(&name) {
            continue;
        }
        // They would stand in logs and record headers, and split their lines.
        if name.chars().any(char::is_control) {
            if is_module(&name) || name.ends_with(".toml") {
                let shown = name.escape_debug().to_string();
                look.misnamed.push((shown, "has control characters"));
            }
            continue;
        }
        let is_settings = name.ends_with(".toml");
        if !is_settings && !is_module(&name) {
            let small = name.to_ascii_lowercase();
            if is_module(&small) || small.ends_with(".toml") {
                look.misnamed.push((name, "does not end in small letters"));
            }
            continue;
        }
        let Some(fingerprint) = fingerprint(&entry.path()) else { continue };
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
    look.misnamed.sort();
    look.orphans = settings.into_keys().filter(|name| !with_module.contains(name)).collect();
    Ok(look)
}

/// One module and its settings file, as a look at the whole folder would see them; nothing where the module
/// is not there.
pub(crate) fn look_at(dir: &Path, name: &str) -> Option<Seen> {
    let module = fingerprint(&dir.join(name))?;
    let settings = fingerprint(&dir.join(settings_name(name)));
    Some(Seen { module, settings })
}

/// Reads a transform's files whole.
pub(crate) fn read(dir: &Path, name: &str) -> io::Result<Content> {
    let module = dir.join(name);
    // One byte more than is allowed shows that there is more.
    let module = read_at_most(&module, MODULE_BYTES_MAX + 1)
        .map_err(|error| io::Error::other(unreadable(&module, &error)))?;
    let settings = settings_name(name);
    let path = dir.join(&settings);
    let wrong = |what: String| io::Error::other(format!("its settings file `{settings}` {what}"));
    let settings = match read_at_most(&path, SETTINGS_BYTES_MAX + 1) {
        Ok(bytes) if bytes.len() as u64 > SETTINGS_BYTES_MAX => {
            return Err(wrong(format!("has more than {SETTINGS_BYTES_MAX} bytes")));
        }
        Ok(bytes) => {
            Some(String::from_utf8(bytes).map_err(|_| wrong("is not UTF-8 text".to_owned()))?)
        }
        // A link to nothing is no reason to go on without what it named.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => None,
        Err(error) => return Err(wrong(format!("cannot be read: {}", unreadable(&path, &error)))),
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

/// Nothing where it was deleted since it was listed. What cannot be read counts too: it stands where
/// somebody wants a transform, and must not look like one that was taken away.
fn fingerprint(path: &Path) -> Option<Fingerprint> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => {
            let inode = match fs::symlink_metadata(path) {
                Ok(link) => link.ino(),
                Err(gone) if gone.kind() == io::ErrorKind::NotFound => return None,
                // A folder that may be listed and not entered.
                Err(_) => 0,
            };
            let broken = Some(error.to_string());
            return Some(Fingerprint { inode, broken, ..Fingerprint::default() });
        }
    };
    let broken = what_else(&metadata).map(str::to_owned);
    Some(Fingerprint {
        bytes: if broken.is_some() { 0 } else { metadata.len() },
        modified: metadata.modified().ok().filter(|_| broken.is_none()),
        changed: if broken.is_some() { (0, 0) } else { (metadata.ctime(), metadata.ctime_nsec()) },
        inode: metadata.ino(),
        broken,
    })
}

/// Why a file cannot be read, and what to do about it.
fn unreadable(path: &Path, error: &io::Error) -> String {
    const MEND: &str = "put the file itself there, or take it away";
    let is_loop = error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
    match (error.kind(), fs::read_link(path)) {
        (_, Ok(_)) if is_loop => format!("it is a symbolic link that leads back to itself; {MEND}"),
        (io::ErrorKind::NotFound, Ok(to)) => {
            let to = to.to_string_lossy().escape_debug().to_string();
            format!("it is a symbolic link to `{to}`, where nothing is; {MEND}")
        }
        (io::ErrorKind::PermissionDenied, _) => {
            format!("{error}; give the user that runs Sluicebox the right to read it")
        }
        // What it is instead.
        _ if error.get_ref().is_some() => format!("{error}; {MEND}"),
        _ => error.to_string(),
    }
}

/// What is there in place of a file.
fn what_else(metadata: &Metadata) -> Option<&'static str> {
    if metadata.is_file() {
        None
    } else if metadata.is_dir() {
        Some("it is a folder")
    } else {
        Some("it is no file but a pipe, a socket or a device")
    }
}

fn read_at_most(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::OpenOptionsExt as _;
    // A pipe that nobody writes to would be waited for without an end.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    // Before it is opened, which a socket refuses without saying what it is.
    if let Some(what) = what_else(&fs::metadata(path)?) {
        return Err(io::Error::other(what));
    }
    let file = File::options().read(true).custom_flags(nonblocking).open(path)?;
    if let Some(what) = what_else(&file.metadata()?) {
        return Err(io::Error::other(what));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes)?;
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
    let written = write(&mut file).and_then(|()| file.flush()).and_then(|()| file.sync_all());
    if let Err(error) = written.and_then(|()| fs::rename(&temporary, path)) {
        // On a full disk, half of a file takes what room is left.
        fs::remove_file(&temporary).ok();
        return Err(error);
    }
    // The name too has to survive a power loss.
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

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
        fs::write(dir.path().join("60-H.WASM"), "").unwrap();
        let foreign = <OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"70-\xff.wasm");
        fs::write(dir.path().join(foreign), "").unwrap();
        fs::write(dir.path().join("75-two\nlines.wasm"), "").unwrap();
        std::os::unix::fs::symlink("20-b.wasm", dir.path().join("80-j.wasm")).unwrap();

        let look = look(dir.path()).unwrap();
        let names: Vec<&str> = look.modules.keys().map(String::as_str).collect();
        assert_eq!(names, ["10-a.wasm", "20-b.wasm", "50-g.cwasm", "80-j.wasm"]);
        assert!(look.modules["10-a.wasm"].settings.is_some());
        assert!(look.modules["20-b.wasm"].settings.is_none());
        assert_eq!(look.orphans, ["30-c.toml"]);
        let misnamed: Vec<&str> = look.misnamed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(misnamed, ["60-H.WASM", "70-\u{FFFD}.wasm", "75-two\\nlines.wasm"]);
    }

    #[test]
    fn what_stands_in_a_file_s_place_is_seen_and_never_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("10-folder.wasm")).unwrap();
        std::os::unix::fs::symlink("nothing", path("20-dangling.wasm")).unwrap();
        std::os::unix::fs::symlink("30-loop.wasm", path("30-loop.wasm")).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        let mode = rustix::fs::Mode::from_bits_truncate(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, path("40-pipe.wasm"), fifo, mode, 0).unwrap();
        for (module, settings) in [("50-a.wasm", "50-a.toml"), ("60-b.wasm", "60-b.toml")] {
            fs::write(path(module), "a").unwrap();
            std::os::unix::fs::symlink("nothing", path(settings)).unwrap();
        }
        fs::remove_file(path("60-b.toml")).unwrap();
        fs::create_dir(path("60-b.toml")).unwrap();
        let look = look(dir.path()).unwrap();
        assert_eq!(look.modules.len(), 6);
        let check = |name: &str, part: &str| {
            let error = read(dir.path(), name).err().unwrap().to_string();
            assert!(error.contains(part), "{name}: {error}");
        };
        check("10-folder.wasm", "it is a folder");
        check(
            "20-dangling.wasm",
            "it is a symbolic link to `nothing`, where nothing is; put the file",
        );
        check("30-loop.wasm", "it is a symbolic link that leads back to itself; put the file");
        check("40-pipe.wasm", "it is no file");
        let dangling = "cannot be read: it is a symbolic link to `nothing`, where nothing is";
        check("50-a.wasm", &format!("its settings file `50-a.toml` {dangling}"));
        check("60-b.wasm", "its settings file `60-b.toml` cannot be read: it is a folder");
        fs::remove_dir(path("60-b.toml")).unwrap();
        fs::write(path("60-b.toml"), "#".repeat(1024 * 1024 + 1)).unwrap();
        check("60-b.wasm", "`60-b.toml` has more than 1048576 bytes");
        fs::write(path("60-b.toml"), "\u{feff}on_error = \"park\"").unwrap();
        let settings = read(dir.path(), "60-b.wasm").unwrap().settings.unwrap();
        assert!(crate::transform::settings::Settings::parse(&settings).is_ok());
    }

    #[test]
    fn a_file_whose_time_was_set_back_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("10-a.wasm");
        fs::write(&path, "one").unwrap();
        let before = look(dir.path()).unwrap();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        // The clock that changes are noted by goes in steps of some milliseconds.
        std::thread::sleep(std::time::Duration::from_millis(50));
        let mut file = File::options().write(true).open(&path).unwrap();
        file.write_all(b"two").unwrap();
        file.set_modified(modified).unwrap();
        assert_ne!(look(dir.path()).unwrap(), before);
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
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
