//! Dead letters in a file: one on each line, appended and synced before its message leaves the store.
//!
//! What a crash leaves between the two is found again: the store knows up to where the file holds what
//! has left it, and whatever lies behind that is read before anything is appended; the store is not told
//! of letters whose messages it still holds. So each letter is in
//! the file once, also over crashes; a file that was moved away in between may leave a second copy, which
//! has the same identity. A line that was cut in the middle is taken back.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Error, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use serde::Deserialize;

use super::Facts;

/// Who may read it: row values are in there.
const MODE: u32 = 0o600;

/// How a line of ours begins.
const BEGINNING: &[u8] = b"{\"dead_letter\":";

/// A letter for the file.
#[derive(Debug)]
pub struct Line {
    /// As [`Facts::key`].
    pub key: String,
    /// JSON without a line break.
    pub text: String,
}

#[derive(Deserialize)]
struct Written {
    dead_letter: Facts,
}

/// What letters are appended to.
pub trait Medium: Read + Write + Seek {
    /// Up to where it reaches.
    ///
    /// # Errors
    ///
    /// As those of files.
    fn length(&self) -> Result<u64, Error>;

    /// Takes off what is behind this length.
    ///
    /// # Errors
    ///
    /// As those of files.
    fn cut(&mut self, length: u64) -> Result<(), Error>;

    /// Makes certain that it outlasts a loss of power.
    ///
    /// # Errors
    ///
    /// As those of files.
    fn sync(&mut self) -> Result<(), Error>;
}

impl Medium for File {
    fn length(&self) -> Result<u64, Error> {
        Ok(self.metadata()?.len())
    }

    fn cut(&mut self, length: u64) -> Result<(), Error> {
        self.set_len(length)
    }

    fn sync(&mut self) -> Result<(), Error> {
        self.sync_all()
    }
}

/// Opens or makes the file.
///
/// # Errors
///
/// When it cannot be opened, or it is not certain that it stays.
pub fn open(path: &Path) -> Result<File, Error> {
    let is_new = !path.exists();
    let file = OpenOptions::new().read(true).append(true).create(true).mode(MODE).open(path)?;
    if is_new && let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        File::open(folder)?.sync_all()?;
    }
    Ok(file)
}

/// What is in the file behind what was known of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Appended {
    /// Its end.
    pub end: u64,
    /// Letters of ours that were there already and are others than these, by their key, with their place.
    pub others: Vec<(String, u64)>,
}

/// Appends what is not in the file behind `known` already. `pipeline` is whose lines count.
///
/// # Errors
///
/// When it is not certain that all of it is on disk. What is, is found the next time.
pub fn append(
    file: &mut impl Medium,
    known: u64,
    pipeline: &str,
    lines: &[Line],
) -> Result<Appended, Error> {
    let length = file.length()?;
    // A shorter one is another one.
    let found = look(file, if known <= length { known } else { 0 }, pipeline)?;
    for line in lines.iter().filter(|line| !found.contains_key(&line.key)) {
        let mut bytes = Vec::with_capacity(line.text.len() + 1);
        bytes.extend_from_slice(line.text.as_bytes());
        bytes.push(b'\n');
        file.write_all(&bytes)?;
    }
    file.sync()?;
    let is_other = |key: &String| lines.iter().all(|line| line.key != *key);
    let others = found.into_iter().filter(|(key, _)| is_other(key)).collect();
    Ok(Appended { end: file.length()?, others })
}

/// The keys of our letters from there on, after whatever was cut has been taken off.
fn look(file: &mut impl Medium, from: u64, pipeline: &str) -> Result<HashMap<String, u64>, Error> {
    file.seek(SeekFrom::Start(from))?;
    let mut reader = BufReader::new(&mut *file);
    let mut keys = HashMap::new();
    let mut at = from;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.by_ref().read_until(b'\n', &mut line)?;
        if read == 0 {
            break;
        }
        if line.last() != Some(&b'\n') {
            drop(reader);
            end_the_cut(file, at, &line)?;
            break;
        }
        let begins = at;
        at += read as u64;
        if let Ok(Written { dead_letter }) = serde_json::from_slice(&line)
            && dead_letter.pipeline == pipeline
        {
            keys.insert(dead_letter.key, begins);
        }
    }
    Ok(keys)
}

/// A line of ours goes; somebody else's is ended, so that ours begins on one of its own.
fn end_the_cut(file: &mut impl Medium, at: u64, line: &[u8]) -> Result<(), Error> {
    let same = line.len().min(BEGINNING.len());
    if line[..same] == BEGINNING[..same] {
        tracing::warn!(
            bytes = line.len(),
            "a dead letter that was cut is taken off its file's end"
        );
        file.cut(at)
    } else {
        file.write_all(b"\n")
    }
}

/// Whether letters can be appended to a file, without leaving anything in it.
///
/// # Errors
///
/// Why not.
pub fn check(path: &Path) -> Result<(), Error> {
    match OpenOptions::new().append(true).open(path) {
        Ok(file) if file.metadata()?.is_file() => file.write_at(&[], 0).map(drop),
        Ok(_) => Err(Error::new(ErrorKind::InvalidInput, "it is no file")),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new("."));
            match folder.metadata()? {
                found if !found.is_dir() => Err(Error::new(ErrorKind::NotADirectory, "no folder")),
                found if found.permissions().readonly() => {
                    Err(Error::new(ErrorKind::PermissionDenied, "its folder cannot be written"))
                }
                _ => Ok(()),
            }
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::tests::{envelope, letter};
    use super::*;
    use crate::transform::Chain;

    fn line(key: &str) -> Line {
        let text = letter(10).text(&envelope(), &Chain::empty(1)).unwrap();
        let own = crate::message::idempotency_key(letter(10).change.position);
        Line { key: key.to_owned(), text: text.replace(&own, key) }
    }

    fn put(path: &Path, known: u64, pipeline: &str, lines: &[Line]) -> Result<u64, Error> {
        append(&mut open(path)?, known, pipeline, lines).map(|appended| appended.end)
    }

    fn keys(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        let key = |line: &str| serde_json::from_str::<Written>(line).unwrap().dead_letter.key;
        text.lines().map(key).collect()
    }

    #[test]
    fn each_letter_is_there_once_whatever_the_store_has_heard_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dead.jsonl");
        let first = put(&path, 0, "0123", &[line("a"), line("b")]).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let second = put(&path, first, "0123", &[line("c")]).unwrap();
        assert!(second > first);
        // The store has not heard of the second time.
        assert_eq!(put(&path, first, "0123", &[line("c")]).unwrap(), second);
        // Another pipeline has keys of its own.
        put(&path, first, "4567", &[line("c")]).unwrap();
        assert_eq!(keys(&path), ["a", "b", "c", "c"]);
    }

    #[test]
    fn letters_of_others_are_told_with_their_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dead.jsonl");
        let first = put(&path, 0, "0123", &[line("a")]).unwrap();
        let second = put(&path, first, "0123", &[line("b"), line("c")]).unwrap();
        // The store has not heard of the second time, and asks for one of them.
        let appended = append(&mut open(&path).unwrap(), first, "0123", &[line("c")]).unwrap();
        assert_eq!(appended, Appended { end: second, others: vec![("b".to_owned(), first)] });
        assert_eq!(keys(&path), ["a", "b", "c"]);
    }

    #[test]
    fn a_line_that_was_cut_is_taken_back_and_a_foreign_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dead.jsonl");
        let end = put(&path, 0, "0123", &[line("a")]).unwrap();
        for cut in [1, BEGINNING.len(), 100] {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            file.write_all(&line("b").text.as_bytes()[..cut]).unwrap();
            put(&path, end, "0123", &[]).unwrap();
            assert_eq!(keys(&path), ["a"]);
        }
        put(&path, end, "0123", &[line("b")]).unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"a note").unwrap();
        put(&path, end, "0123", &[line("c")]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 4);
        assert_eq!(text.lines().nth(2), Some("a note"));
    }

    #[test]
    fn a_file_that_was_moved_away_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dead.jsonl");
        let end = put(&path, 0, "0123", &[line("a")]).unwrap();
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        put(&path, end, "0123", &[line("b")]).unwrap();
        assert_eq!(keys(&path), ["b"]);
        assert!(check(&path).is_ok() && check(&dir.path().join("new")).is_ok());
        assert!(check(&dir.path().join("none/new")).is_err());
    }
}
