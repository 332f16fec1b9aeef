//! Compiled code by content, so that a restart does not compile again what it compiled before.
//!
//! To load compiled code is to trust it like this program itself. Therefore the folder is private
//! to the user (0700), lies outside the watched folder, and every file carries an HMAC under a key
//! that lies there too (0600): a file that was cut short, doctored or copied here from elsewhere
//! is deleted, not executed. The check and the loading use the same bytes in memory. A cache that
//! does not work costs time, never correctness: its failures are logged and otherwise ignored.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sluicebox_edits::hmac;
use wasmtime::Engine;
use wasmtime::component::Component;

use super::folder::{create_private, write_atomically};

/// The folder's name in the state folder.
const FOLDER: &str = "compiled-transforms";

const KEY_FILE: &str = "key";
const KEY_BYTES: usize = 32;
const MAC_BYTES: usize = 32;

/// How many compiled modules are kept, the newest.
const FILES_MAX: usize = 32;

/// Where compiled code is kept.
#[derive(Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
    key: [u8; KEY_BYTES],
}

impl Cache {
    /// Opens the cache in the state folder, and makes it if there is none.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join(FOLDER);
        create_private(&dir)?;
        let path = dir.join(KEY_FILE);
        let key = match fs::read(&path) {
            Ok(bytes) => bytes.try_into().ok(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let key = match key {
            Some(key) => key,
            // With another key, everything that is there counts as foreign.
            None => {
                let key: [u8; KEY_BYTES] = rand::random();
                write_atomically(&path, |file| file.write_all(&key))?;
                key
            }
        };
        Ok(Self { dir, key })
    }

    /// The compiled form of the module with this digest, if it was compiled by this very engine.
    pub(crate) fn get(&self, engine: &Engine, digest: &str) -> Option<Component> {
        let name = file_name(engine, digest);
        let path = self.dir.join(&name);
        let bytes = fs::read(&path).ok()?;
        let Some(code) = self.verified(&name, &bytes) else {
            tracing::warn!(
                file = %path.display(),
                "deleted a file of compiled code that this process did not write"
            );
            remove(&path);
            return None;
        };
        match deserialize(engine, code) {
            Ok(component) => {
                // So that the files in use are the newest.
                if let Ok(file) = File::options().append(true).open(&path) {
                    file.set_modified(SystemTime::now()).ok();
                }
                Some(component)
            }
            Err(error) => {
                tracing::debug!(file = %path.display(), "compiled code is of no use: {error}");
                remove(&path);
                None
            }
        }
    }

    /// Keeps the compiled form of the module with this digest.
    pub(crate) fn put(&self, engine: &Engine, digest: &str, component: &Component) {
        let name = file_name(engine, digest);
        let path = self.dir.join(&name);
        let written = component.serialize().map_err(io::Error::other).and_then(|code| {
            self.restore()?;
            let mac = self.mac(&name, &code);
            write_atomically(&path, |file| {
                file.write_all(&mac)?;
                file.write_all(&code)
            })
        });
        match written {
            Ok(()) => self.prune(),
            Err(error) => {
                tracing::warn!(file = %path.display(), "could not keep compiled code: {error}");
            }
        }
    }

    /// Somebody may have cleared the folder away, to have room or to start anew.
    fn restore(&self) -> io::Result<()> {
        let path = self.dir.join(KEY_FILE);
        if path.try_exists()? {
            return Ok(());
        }
        create_private(&self.dir)?;
        write_atomically(&path, |file| file.write_all(&self.key))
    }

    /// The code behind the MAC, where the MAC is right.
    fn verified<'a>(&self, name: &str, bytes: &'a [u8]) -> Option<&'a [u8]> {
        let (mac, code) = bytes.split_at_checked(MAC_BYTES)?;
        (mac == self.mac(name, code)).then_some(code)
    }

    /// Over the name too, so that no file can be put in the place of another.
    fn mac(&self, name: &str, code: &[u8]) -> Vec<u8> {
        let digest = hmac(&self.key, code);
        hmac(&self.key, &[name.as_bytes(), b"\0", &digest].concat())
    }

    fn prune(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        let mut files: Vec<(SystemTime, PathBuf)> = entries
            .flatten()
            .filter(|entry| entry.file_name() != KEY_FILE)
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        files.sort();
        let excess = files.len().saturating_sub(FILES_MAX);
        for (_, path) in files.drain(..excess) {
            remove(&path);
        }
    }
}

fn file_name(engine: &Engine, digest: &str) -> String {
    let mut hasher = DefaultHasher::new();
    engine.precompile_compatibility_hash().hash(&mut hasher);
    format!("{digest}-{:016x}", hasher.finish())
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(file = %path.display(), "could not delete a file: {error}");
    }
}

#[expect(
    unsafe_code,
    reason = "compiled code cannot be checked, only where it comes from: the caller has verified \
              that this process's user wrote these bytes"
)]
pub(super) fn deserialize(engine: &Engine, code: &[u8]) -> wasmtime::Result<Component> {
    // SAFETY: the bytes are what `Component::serialize` gave: they carry an HMAC under a key that only
    // this user can read, or come from this very program by a pipe; wasmtime itself refuses those of another version or machine.
    unsafe { Component::deserialize(engine, code) }
}

#[cfg(test)]
mod tests {
    use wasmtime::{Config, ModuleVersionStrategy};

    use super::*;

    #[test]
    fn code_of_another_engine_is_another_file() {
        let engine = |version: &str| {
            let mut config = Config::new();
            config.module_version(ModuleVersionStrategy::Custom(version.to_owned())).unwrap();
            Engine::new(&config).unwrap()
        };
        let (one, same, other) = (engine("48"), engine("48"), engine("49"));
        assert_eq!(file_name(&one, "d1"), file_name(&same, "d1"));
        assert_ne!(file_name(&one, "d1"), file_name(&other, "d1"));
        assert_ne!(file_name(&one, "d1"), file_name(&one, "d2"));
    }
}
