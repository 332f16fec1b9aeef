//! Who may write the store.
//!
//! Two things keep a second process out. A lock on a file beside the store, held for as long as the
//! process lives, refuses it at its start. And each transaction begins by reading whose the store is:
//! whoever opened it last. The second is for a process that stood still while another was told to take
//! over: its lock still stands, and when it wakes up, it must not write what the other no longer
//! expects. It finds another owner's name, writes nothing, and stops.
//!
//! It may also have stood still after it took the lock and before it made itself the owner. So whoever
//! takes over first writes itself into the lock's file, and nobody becomes the owner whose mark is no
//! longer there.
//!
//! A process that stands still in the middle of a transaction keeps SQLite's own lock as well, which
//! nobody can take from it. Then there is no way around ending it, and that is what the error says.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::{Error, fact, set_fact};
use crate::mutation::{self, Rule};

/// The lock on a state folder.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    /// What the file holds as long as nobody has taken over: our pid, and a number that no other
    /// process draws, since pids are the same on every machine. Nothing where a full disk has no room
    /// for it.
    mark: Option<String>,
}

impl Lock {
    /// Takes the lock. With `take_over` it may be another's still: it is ours as soon as that one ends.
    pub(super) fn take(dir: &Path, take_over: bool) -> Result<Self, Error> {
        let open = |source| Error::Open { path: dir.to_owned(), source };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(dir.join("lock")).map_err(open)?;
        // Of one length, so that it takes the place of another's without room of its own.
        let mark = format!("{:<10} {:016x}", std::process::id(), rand::random::<u64>());
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::Error(source)) => return Err(open(source)),
            Err(TryLockError::WouldBlock) if take_over => {
                tracing::warn!(
                    dir = %dir.display(),
                    "the state folder is taken over from a process that still has it open"
                );
                let waiting = file.try_clone().map_err(open)?;
                // It shares the lock with the file that is kept. Where it fails, the folder is merely
                // not locked against a third process, and the owner's name still is.
                let wait = move || drop(waiting.lock());
                std::thread::Builder::new().name("lock".to_owned()).spawn(wait).map_err(open)?;
            }
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                drop(file.read_to_string(&mut holder));
                let pid = holder.split_whitespace().next().and_then(|pid| pid.parse().ok());
                return Err(Error::Locked { path: dir.to_owned(), pid });
            }
        }
        let written = file
            .rewind()
            .and_then(|()| file.write_all(mark.as_bytes()))
            .and_then(|()| file.set_len(mark.len() as u64));
        Ok(Self { file, mark: written.is_ok().then_some(mark) })
    }

    /// Whether nobody has taken over since.
    fn is_ours(&self) -> std::io::Result<bool> {
        let Some(mark) = &self.mark else { return Ok(true) };
        let mut file = &self.file;
        file.rewind()?;
        let mut found = String::new();
        file.read_to_string(&mut found)?;
        Ok(found == *mark)
    }
}

/// Whose the store is from now on. Nothing locks a database in memory.
pub(super) fn claim(
    connection: &mut Connection,
    owner: &str,
    lock: Option<&Lock>,
) -> Result<(), Error> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate);
    let transaction = transaction.map_err(|error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
            Error::Busy
        }
        _ => error.into(),
    })?;
    // Whoever takes over writes its mark before its own claim, which waits for this transaction.
    if lock.is_some_and(|lock| !lock.is_ours().unwrap_or(false)) {
        return Err(Error::TakenOver);
    }
    set_fact(&transaction, "owner", owner)?;
    Ok(transaction.commit()?)
}

/// Begins to write, if the store is still ours.
pub(super) fn begin<'a>(
    connection: &'a mut Connection,
    owner: &str,
) -> Result<Transaction<'a>, Error> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    // Nobody can become the owner before this transaction ends.
    match fact(&transaction, "owner")? {
        Some(found) if found == owner || mutation::broken(Rule::OneOwner) => Ok(transaction),
        _ => Err(Error::TakenOver),
    }
}
