//! A layer between SQLite and the files of a store, for tests only: it notes what is written and
//! synced, so that every power loss can be played back, and it can have a full or a failing disk.
//!
//! It lies over the file layer that SQLite uses anyway, so that what is tested is what runs.

#![expect(unsafe_code, reason = "SQLite's file layer is a table of C functions")]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};

use rusqlite::ffi::{self, sqlite3_file, sqlite3_int64, sqlite3_io_methods, sqlite3_vfs};
use rusqlite::{Connection, OpenFlags};

use crate::store::tests::Random;

const NAME: &CStr = c"sluicebox-faults";

/// What reached a disk, in its order. Files are known by their names.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write {
        file: String,
        offset: usize,
        data: Vec<u8>,
    },
    Truncate {
        file: String,
        size: usize,
    },
    Sync {
        file: String,
    },
    Delete {
        file: String,
        synced: bool,
    },
    /// So many transactions were answered.
    Answered(usize),
}

/// The disk under one folder.
#[derive(Debug, Default)]
pub(super) struct Disk {
    ops: Mutex<Vec<Op>>,
    faults: Mutex<Faults>,
}

#[derive(Debug, Default)]
pub(super) struct Faults {
    /// No file grows beyond this.
    pub full_at: Option<u64>,
    /// One write or sync in so many fails.
    pub fails: Option<(u64, Random)>,
}

static DISKS: LazyLock<Mutex<HashMap<PathBuf, Arc<Disk>>>> = LazyLock::new(Mutex::default);

impl Disk {
    /// The disk under this folder from now on.
    pub(super) fn under(dir: &Path) -> Arc<Self> {
        register();
        let disk = Arc::new(Self::default());
        DISKS.lock().unwrap().insert(dir.to_owned(), Arc::clone(&disk));
        disk
    }

    pub(super) fn set(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.faults.lock().unwrap());
    }

    pub(super) fn answered(&self, transactions: usize) {
        self.note(Op::Answered(transactions));
    }

    pub(super) fn ops(&self) -> Vec<Op> {
        self.ops.lock().unwrap().clone()
    }

    fn note(&self, op: Op) {
        self.ops.lock().unwrap().push(op);
    }

    fn fails(&self) -> bool {
        let mut faults = self.faults.lock().unwrap();
        faults.fails.as_mut().is_some_and(|(one_in, random)| random.below(*one_in) == 0)
    }
}

/// Opens a file of a folder that has a [`Disk`].
pub(super) fn connect(path: PathBuf) -> rusqlite::Result<Connection> {
    Connection::open_with_flags_and_vfs(path, OpenFlags::default(), NAME)
}

/// What a power loss leaves of these operations: what was synced, and of the rest as little or as
/// much as the disk happened to take, sectors of one write apart from each other.
pub(super) fn after_power_loss(ops: &[Op], random: &mut Random) -> BTreeMap<String, Vec<u8>> {
    #[derive(Default)]
    struct File {
        there: bool,
        bytes: Vec<u8>,
        pending: Vec<Op>,
        /// What its name stood for before: it was deleted, and the folder is not synced yet.
        before: Option<Vec<u8>>,
    }
    let mut files: BTreeMap<String, File> = BTreeMap::new();
    for op in ops {
        match op {
            Op::Write { file, .. } | Op::Truncate { file, .. } => {
                files.entry(file.clone()).or_default().pending.push(op.clone());
            }
            Op::Sync { file } => {
                if !files.get(file).is_some_and(|file| file.there) {
                    // SQLite's own layer syncs the folder with a new file.
                    files.values_mut().for_each(|file| file.before = None);
                }
                let file = files.entry(file.clone()).or_default();
                file.there = true;
                for op in std::mem::take(&mut file.pending) {
                    apply(&mut file.bytes, &op, |_| true);
                }
            }
            Op::Delete { file, synced } => {
                let deleted = files.remove(file).unwrap_or_default();
                if !synced {
                    let before = Some(deleted.bytes);
                    files.insert(file.clone(), File { before, ..File::default() });
                }
            }
            Op::Answered(_) => {}
        }
    }
    // How much of what is unsynced is lost differs from crash to crash: all, nothing, something.
    let lost = random.below(3);
    let left = files.into_iter().filter_map(|(name, mut file)| {
        if let Some(before) = file.before.filter(|_| random.below(2) == 0) {
            return Some((name, before));
        }
        for op in &file.pending {
            let torn = random.below(3);
            apply(&mut file.bytes, op, |_sector| match (lost, torn) {
                (0, _) | (2, 0) => false,
                (1, _) | (2, 1) => true,
                _ => random.below(2) == 0,
            });
        }
        (file.there || !file.bytes.is_empty()).then_some((name, file.bytes))
    });
    left.collect()
}

fn apply(bytes: &mut Vec<u8>, op: &Op, mut takes: impl FnMut(usize) -> bool) {
    const SECTOR: usize = 512;
    match op {
        Op::Write { offset, data, .. } => {
            for (number, sector) in data.chunks(SECTOR).enumerate() {
                if !takes(number) {
                    continue;
                }
                let start = offset + number * SECTOR;
                let end = start + sector.len();
                if bytes.len() < end {
                    bytes.resize(end, 0);
                }
                bytes[start..end].copy_from_slice(sector);
            }
        }
        Op::Truncate { size, .. } => {
            if takes(0) {
                bytes.resize(*size, 0);
            }
        }
        Op::Sync { .. } | Op::Delete { .. } | Op::Answered(_) => {}
    }
}

/// A file of ours, with SQLite's own behind it in the same memory.
#[repr(C)]
struct Shim {
    base: sqlite3_file,
    /// From `Box::into_raw`.
    place: *mut Place,
}

struct Place {
    disk: Arc<Disk>,
    name: String,
}

fn parent() -> *mut sqlite3_vfs {
    // SAFETY: a null name asks for the default layer, which lives as long as the process.
    unsafe { ffi::sqlite3_vfs_find(std::ptr::null()) }
}

fn register() {
    struct Registered(#[expect(dead_code, reason = "kept for SQLite")] *mut sqlite3_vfs);
    // SAFETY: never read through; SQLite has the pointer.
    unsafe impl Send for Registered {}
    unsafe impl Sync for Registered {}
    static ONCE: LazyLock<Registered> = LazyLock::new(|| {
        let parent = parent();
        // SAFETY: `parent` is a valid layer; what is not overridden works on a copy of its data.
        let mut vfs = unsafe { *parent };
        vfs.zName = NAME.as_ptr();
        vfs.pNext = std::ptr::null_mut();
        vfs.szOsFile += c_int::try_from(size_of::<Shim>()).unwrap();
        vfs.xOpen = Some(open);
        vfs.xDelete = Some(delete);
        let vfs = Box::into_raw(Box::new(vfs));
        // SAFETY: the box is never freed.
        let code = unsafe { ffi::sqlite3_vfs_register(vfs, 0) };
        assert_eq!(code, ffi::SQLITE_OK);
        Registered(vfs)
    });
    LazyLock::force(&ONCE);
}

fn place(name: *const c_char) -> Option<Place> {
    if name.is_null() {
        return None;
    }
    // SAFETY: SQLite gives a path that ends with NUL.
    let path = Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()));
    let disk = DISKS.lock().unwrap().get(path.parent()?).cloned()?;
    Some(Place { disk, name: path.file_name()?.to_str()?.to_owned() })
}

/// SQLite's own file behind ours.
unsafe fn real(file: *mut sqlite3_file) -> *mut sqlite3_file {
    // SAFETY: `szOsFile` asks for room for both.
    unsafe { file.cast::<Shim>().add(1).cast() }
}

unsafe fn at_place<'a>(file: *mut sqlite3_file) -> &'a Place {
    // SAFETY: set in `open`, freed in `close`.
    unsafe { &*(*file.cast::<Shim>()).place }
}

unsafe extern "C" fn open(
    _vfs: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: SQLite gives memory of `szOsFile` bytes.
    unsafe {
        (*file).pMethods = std::ptr::null();
        let parent = parent();
        let Some(place) = place(name) else { return ffi::SQLITE_CANTOPEN };
        let code = (*parent).xOpen.unwrap()(parent, name, real(file), flags, out);
        if code == ffi::SQLITE_OK {
            (*file.cast::<Shim>()).place = Box::into_raw(Box::new(place));
            (*file).pMethods = &METHODS;
        }
        code
    }
}

unsafe extern "C" fn delete(_vfs: *mut sqlite3_vfs, name: *const c_char, sync: c_int) -> c_int {
    let parent = parent();
    // SAFETY: as SQLite would call it.
    let code = unsafe { (*parent).xDelete.unwrap()(parent, name, sync) };
    if let (ffi::SQLITE_OK, Some(Place { disk, name })) = (code, place(name)) {
        disk.note(Op::Delete { file: name, synced: sync != 0 });
    }
    code
}

/// Hands a call on to SQLite's own file.
macro_rules! hand_on {
    ($method:ident, $file:expr $(, $argument:expr)*) => {{
        let real = real($file);
        (*(*real).pMethods).$method.unwrap()(real $(, $argument)*)
    }};
}

unsafe extern "C" fn close(file: *mut sqlite3_file) -> c_int {
    // SAFETY: `place` is from `Box::into_raw`, and nobody calls after the close.
    unsafe {
        let code = hand_on!(xClose, file);
        drop(Box::from_raw((*file.cast::<Shim>()).place));
        code
    }
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    data: *const c_void,
    bytes: c_int,
    offset: sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite gives `bytes` bytes at `data`.
    unsafe {
        let Place { disk, name } = at_place(file);
        let end = (offset + sqlite3_int64::from(bytes)).cast_unsigned();
        if disk.faults.lock().unwrap().full_at.is_some_and(|full_at| end > full_at) {
            return ffi::SQLITE_FULL;
        }
        if disk.fails() {
            return ffi::SQLITE_IOERR_WRITE;
        }
        let code = hand_on!(xWrite, file, data, bytes, offset);
        if code == ffi::SQLITE_OK {
            let data =
                std::slice::from_raw_parts(data.cast::<u8>(), usize::try_from(bytes).unwrap());
            let offset = usize::try_from(offset).unwrap();
            disk.note(Op::Write { file: name.clone(), offset, data: data.to_vec() });
        }
        code
    }
}

unsafe extern "C" fn truncate(file: *mut sqlite3_file, size: sqlite3_int64) -> c_int {
    // SAFETY: as SQLite would call it.
    unsafe {
        let code = hand_on!(xTruncate, file, size);
        let Place { disk, name } = at_place(file);
        if code == ffi::SQLITE_OK {
            let size = usize::try_from(size).unwrap();
            disk.note(Op::Truncate { file: name.clone(), size });
        }
        code
    }
}

unsafe extern "C" fn sync(file: *mut sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: set in `open`. Nothing is synced in truth: the file lives as long as the test.
    let Place { disk, name } = unsafe { at_place(file) };
    if disk.fails() {
        return ffi::SQLITE_IOERR_FSYNC;
    }
    disk.note(Op::Sync { file: name.clone() });
    ffi::SQLITE_OK
}

/// What is only handed on.
macro_rules! pass {
    ($name:ident, $method:ident $(, $argument:ident: $type:ty)*) => {
        unsafe extern "C" fn $name(file: *mut sqlite3_file $(, $argument: $type)*) -> c_int {
            // SAFETY: as SQLite would call it.
            unsafe { hand_on!($method, file $(, $argument)*) }
        }
    };
}

pass!(read, xRead, data: *mut c_void, bytes: c_int, offset: sqlite3_int64);
pass!(file_size, xFileSize, size: *mut sqlite3_int64);
pass!(lock, xLock, level: c_int);
pass!(unlock, xUnlock, level: c_int);
pass!(check_reserved_lock, xCheckReservedLock, out: *mut c_int);
pass!(file_control, xFileControl, op: c_int, argument: *mut c_void);
pass!(sector_size, xSectorSize);
pass!(characteristics, xDeviceCharacteristics);
pass!(shm_map, xShmMap, page: c_int, bytes: c_int, extend: c_int, out: *mut *mut c_void);
pass!(shm_lock, xShmLock, offset: c_int, count: c_int, flags: c_int);
pass!(shm_unmap, xShmUnmap, delete: c_int);
pass!(fetch, xFetch, offset: sqlite3_int64, bytes: c_int, out: *mut *mut c_void);
pass!(unfetch, xUnfetch, offset: sqlite3_int64, data: *mut c_void);

unsafe extern "C" fn shm_barrier(file: *mut sqlite3_file) {
    // SAFETY: as SQLite would call it.
    unsafe { hand_on!(xShmBarrier, file) }
}

static METHODS: sqlite3_io_methods = sqlite3_io_methods {
    iVersion: 3,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(unlock),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: Some(fetch),
    xUnfetch: Some(unfetch),
};
