//! State folders that are not the pipeline's: an empty one, where the right one is lost, or an older copy.
//!
//! An operator starts with one by mistake. Nothing of it may reach a stream or Postgres, and it has to
//! say why it does not go on.

use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tokio::time::timeout;

use super::faults::Fault;
use super::process::{self, Running};
use super::world::{STREAM, World, lock};
use crate::pipeline::grants::Grants;
use crate::store::Database;

/// As long as S2 does not answer, nobody can tell whose stream it is.
const TIME_MAX: Duration = Duration::from_secs(30);

/// A copy of the state folder, and the newest token that it has drawn.
pub(super) struct Copied {
    name: String,
    _kept: Database,
    epoch: u64,
}

/// Keeps a copy of the folder, as a backup does while nothing runs.
pub(super) fn keep_copy(world: &World, number: u64) {
    let name = format!("{}-copy-{number}", world.store_name());
    let database = Database::shared(&world.store_name()).expect("the store can be opened");
    let kept = database.copied(&name).expect("the store can be copied");
    let epoch = kept.epoch();
    world.note("copied", number, epoch);
    *lock(&world.copied) = Some(Copied { name, _kept: kept, epoch });
}

/// Starts a process on another folder than the right one, if that is what happens now, and if the
/// stream says whose it is.
pub(super) async fn mistake(world: &Arc<World>, number: u64) -> bool {
    let token = lock(&world.server).token(STREAM).to_owned();
    // A stream that is deleted at this moment is anybody's.
    if token.is_empty() || world.may(Fault::Recreate) || !world.fault(Fault::WrongFolder, 0.3) {
        return false;
    }
    let newer = |copied: &Copied| process::epoch_of(&token) > Some(copied.epoch);
    let copy = lock(&world.copied)
        .as_ref()
        .filter(|copied| newer(copied))
        .map(|copied| copied.name.clone());
    let (name, kept) = match copy.filter(|_| world.chance(0.7)) {
        Some(name) => (name, None),
        None => {
            let name = format!("{}-empty-{number}", world.store_name());
            let kept = Database::shared(&name).expect("there is memory");
            (name, Some(kept))
        }
    };
    world.note("starts with another folder", number, u64::from(kept.is_none()));
    world.state().strangers.insert(number);
    let mut database = Database::shared(&name).expect("the store can be opened");
    let loaded = {
        let mut rng = world.draw(SmallRng::from_rng);
        database.load(&mut rng).expect("the store can be read")
    };
    let Running { process, driver, .. } =
        process::run(world, number, database, loaded, Grants::default());
    let ended = timeout(TIME_MAX, driver).await;
    process.kill();
    match ended {
        Ok(Ok(Err(error))) => {
            let text = crate::error_chain::error_chain(&error);
            world.note("it stands down", number, 0);
            // An old copy may also ask what to do about records that are gone by now.
            let says = ["--abandon-parked", "--take-over", "--lost-records"];
            if !says.iter().any(|option| text.contains(option)) {
                world.violated(format!("process {number} with another folder says: {text}"));
            }
        }
        Ok(Ok(Ok(()))) => {
            world.violated(format!("process {number} with another folder ended well"))
        }
        Ok(Err(broken)) if broken.is_panic() => {
            world.violated(format!("process {number} with another folder panicked"));
        }
        Ok(Err(_)) | Err(_) => world.note("it learns nothing", number, 0),
    }
    drop(kept);
    true
}
