//! Files of other releases, and files that somebody or something has changed.

use super::*;

const VERSION_1: &[u8] = include_bytes!("../../../tests/fixtures/store-version-1.db");

fn dir_with(file: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("sluicebox.db"), file).unwrap();
    dir
}

/// The fixture was written by the release that had version 1, with [`sample`] and one epoch drawn.
#[tokio::test]
async fn a_file_of_version_1_is_read_and_goes_on() {
    let dir = dir_with(VERSION_1);
    for _start in 0..2 {
        with_store(dir.path(), async |store, loaded| {
            assert_eq!(loaded.pipeline_id, "c4a0e4e29213b682");
            let (seq, reached) = (Some(42), 42);
            let checkpoint = Checkpoint { position: at(250, 7), seq, reached, confirm: Lsn(260) };
            assert_eq!(loaded.checkpoint, Some(checkpoint));
            assert_eq!((loaded.generation, loaded.next_id), (3, 5));
            // The token of its one epoch is still known.
            let tokens = store.draw_token(None, 7).await.unwrap();
            assert_eq!(tokens.known.first().unwrap(), "sb-c4a0e4e29213b682-1");
            assert!(tokens.next.ends_with("-00000007") && tokens.next.len() <= 36);
            assert_eq!(loaded.chain_digest.as_deref(), Some("0b990b8ef8361330"));
            assert_eq!(loaded.source_identity.as_deref(), Some("7321"));
            let states: Vec<_> =
                loaded.messages.iter().map(|known| (known.id, known.state)).collect();
            let expected = [
                (1, StoredState::Parked),
                (2, StoredState::Waiting),
                (3, StoredState::Retrying),
                (4, StoredState::Acknowledged),
            ];
            assert_eq!(states, expected);
            let read = store.read(vec![1, 2, 3, 4], usize::MAX).await.unwrap();
            let changes: Vec<_> = read.iter().map(|message| values(&message.change)).collect();
            let mut expected = Vec::new();
            for write in sample() {
                if let Write::Insert { id: 1..=3, change, .. } = write {
                    expected.push(values(&change));
                }
            }
            assert_eq!(changes, expected);
            assert!(loaded.messages[2].next_attempt.is_some());
        })
        .await;
    }
    with_store(dir.path(), async |store, _| {
        let write = inserted(5, insert_of(9, at(400, 0), b"nine"), StoredState::Waiting, None);
        store.write(vec![Write::Remove { id: 1 }, write].into()).await.unwrap();
    })
    .await;
    let (_store, loaded) = Store::open(dir.path()).unwrap();
    assert_eq!(loaded.messages.iter().map(|known| known.id).collect::<Vec<_>>(), [2, 3, 4, 5]);
}

#[tokio::test]
async fn a_new_file_and_a_migrated_one_have_the_same_tables() {
    let schema = |dir: &Path| {
        let connection = Connection::open(dir.join("sluicebox.db")).unwrap();
        let mut statement = connection
            .prepare("SELECT coalesce(sql, name) FROM sqlite_schema ORDER BY type, name")
            .unwrap();
        let rows = statement.query_map([], |row| row.get::<_, String>(0)).unwrap();
        rows.map(Result::unwrap)
            .map(|sql| sql.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
    };
    let (old, new) = (dir_with(VERSION_1), tempfile::tempdir().unwrap());
    for dir in [&old, &new] {
        with_store(dir.path(), async |_, _| {}).await;
    }
    assert_eq!(schema(old.path()), schema(new.path()));
}

#[tokio::test]
async fn a_file_of_a_newer_release_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    with_store(dir.path(), async |_, _| {}).await;
    let path = dir.path().join("sluicebox.db");
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let before = std::fs::read(&path).unwrap();
    let error = look(dir.path()).unwrap_err();
    assert!(matches!(error, Error::Version { found: 99, .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn what_sluicebox_has_not_written_is_refused() {
    let other = tempfile::tempdir().unwrap();
    let path = other.path().join("sluicebox.db");
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE notes (text TEXT)").unwrap();
    for dir in [other, dir_with(&[b'#'; 20_000]), dir_with(b"SQLite format 3\0")] {
        let error = look(dir.path()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains("state.dir"), "{error}");
    }
}

/// Wherever a file is hurt, nothing is taken from it that was not written.
#[tokio::test]
async fn damage_is_found_or_has_touched_nothing() {
    let dir = tempfile::tempdir().unwrap();
    with_store(dir.path(), async |store, _| {
        store.write(sample().into()).await.unwrap();
        // Values that fill many pages.
        let large = insert_of(7, at(400, 0), &b"0123456789".repeat(30_000));
        let write = inserted(5, large, StoredState::Parked, Some(failure()));
        store.write(vec![write].into()).await.unwrap();
    })
    .await;
    let whole = std::fs::read(dir.path().join("sluicebox.db")).unwrap();
    let reference = look(dir.path()).unwrap();
    let page = 4096;
    let (mut found, mut harmless) = (0, 0);
    let mut check = |damaged: &[u8], what: &str| {
        let dir = dir_with(damaged);
        match look(dir.path()) {
            Err(Error::Corrupt { .. } | Error::Content { .. }) => found += 1,
            Err(error) => panic!("{what}: {error}"),
            Ok(contents) => {
                assert_eq!(contents, reference, "{what} changed what is read");
                harmless += 1;
            }
        }
    };
    for number in 0..whole.len() / page {
        let range = number * page..(number + 1) * page;
        let mut damaged = whole.clone();
        damaged[range.clone()].fill(0);
        check(&damaged, &format!("page {number} of zeros"));
        // One bit, at a few places of each page: the first bytes, cells, the end.
        for offset in [1, 7, 100, 1000, 2500, 3900, 4095] {
            let mut damaged = whole.clone();
            damaged[range.start + offset] ^= 0x10;
            check(&damaged, &format!("a bit at byte {offset} of page {number}"));
        }
        check(&whole[..range.end - page / 2], &format!("cut in page {number}"));
    }
    assert!(found > harmless, "{found} found, {harmless} harmless");
}

#[tokio::test]
async fn damage_that_comes_while_it_runs_is_told_and_never_waited_out() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = Store::open(dir.path()).unwrap();
    // Larger than what SQLite keeps in memory, so that it has to be read again.
    let large = |id: u64| {
        let body = id.to_string().repeat(8_000_000);
        inserted(id, insert_of(id, at(id, 0), body.as_bytes()), StoredState::Waiting, None)
    };
    store.write(vec![large(1), large(2)].into()).await.unwrap();
    let path = dir.path().join("sluicebox.db");
    let other = Connection::open(&path).unwrap();
    other.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 4;
    bytes[middle] ^= 1;
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes[middle..=middle], middle as u64)
        .unwrap();
    let error = store.read(vec![1], usize::MAX).await.unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }) && !error.heals(), "{error}");
    assert_eq!(store.read(vec![2], usize::MAX).await.unwrap().len(), 1, "the other is whole");
}
