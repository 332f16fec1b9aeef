//! What an operator grants for one start, because nobody else can know it: whether another writer is
//! gone for good, and what to do about records that nobody can read any more.
//!
//! A fencing token is `sb-STORE-NUMBER-NONCE`. The store's id says whose parked messages and whose
//! checkpoint belong to the stream; number and nonce make it a token that nobody else draws, not even
//! a process on a copy of the same store. So the stream's token says who wrote last:
//!
//! | the stream's token | what it means | without a grant | with one |
//! | --- | --- | --- | --- |
//! | one that this store has drawn | an earlier session of this store | taken over | |
//! | this store's id, not known here | the state folder was copied, or is an older copy, or S2 was put back to an older state | refused | `--take-over` |
//! | another store's id | the store is new, lost or another's | refused | `--abandon-parked` |
//! | anything else | another program | refused | `--take-over` |
//! | none | nobody has fenced it | taken over | |
//!
//! A process that is fenced out stops. It never takes the stream back by itself: two that do would
//! fence each other out for ever.

use crate::sink::error::Place;

/// What an operator grants. Each holds until the stream was opened once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// The process that holds the state folder or the stream is dead or frozen.
    pub take_over: bool,
    /// The store that belongs to the stream is lost, and what it held is given up.
    pub abandon_parked: bool,
    /// What to do where records after the checkpoint are gone from the stream.
    pub lost_records: Option<LostRecords>,
    /// The slot is lost, was moved or is made anew, and what was changed since it was last read is given
    /// up.
    pub lost_changes: bool,
    /// An empty transforms folder is meant, though it is another one than that with the live modules in
    /// it. Holds for the start.
    pub no_transforms: bool,
}

/// What becomes of the changes that may have been among records that are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LostRecords {
    /// Every change since the checkpoint that is not in what can still be read is sent: none is
    /// missing, and those that were in the lost records come a second time.
    Resend,
    /// Changes up to the newest of ours that can still be read are taken as delivered or, where none
    /// can, all that Postgres has committed by now: none comes twice, and those that had not arrived
    /// are missing. Messages in the store are sent in any case: what failed was not delivered, and only
    /// `messages ack` gives it up. One that was on its way when the process ended may come twice.
    Skip,
}

/// Who drew a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner<'a> {
    ThisStore,
    /// By its id.
    OtherStore(&'a str),
    OtherProgram,
}

/// The id of the store that drew a token, if one did.
#[must_use]
pub fn store_of(token: &str) -> Option<&str> {
    let (id, _) = token.strip_prefix("sb-")?.split_once('-')?;
    (!id.is_empty()).then_some(id)
}

impl<'a> Owner<'a> {
    /// Of a token that this store does not remember.
    #[must_use]
    pub fn of(token: &'a str, pipeline_id: &str) -> Self {
        match store_of(token) {
            Some(id) if id == pipeline_id => Self::ThisStore,
            Some(id) => Self::OtherStore(id),
            None => Self::OtherProgram,
        }
    }
}

impl Grants {
    /// Whether the stream may be taken from this owner.
    #[must_use]
    pub fn covers(self, owner: Owner<'_>) -> bool {
        match owner {
            Owner::ThisStore | Owner::OtherProgram => self.take_over,
            Owner::OtherStore(_) => self.abandon_parked,
        }
    }
}

/// Why the stream is not taken from this owner, and what an operator can do.
#[must_use]
pub fn refusal(place: &Place, token: &str, pipeline_id: &str) -> String {
    let Place { basin, stream, .. } = place;
    let stream = format!("stream `{stream}` in basin `{basin}`");
    match Owner::of(token, pipeline_id) {
        Owner::ThisStore => format!(
            "{stream} was taken over by another process with a copy of this state folder, or S2 was put \
             back to an older state of it (fencing token `{token}`): this one writes nothing. Only one \
             may go on: stop the other one, and if there is none, or it is dead or frozen, and this \
             folder is the newer one, start once with `sluicebox run --take-over`, beside \
             `--lost-records` if that was asked for"
        ),
        Owner::OtherStore(id) => format!(
            "{stream} belongs to another Sluicebox, whose store is {id} and not {pipeline_id} (fencing \
             token `{token}`): what that one has delivered and what it still holds is known only to its \
             state folder, so nothing is written. Start with that folder (state.dir), or stop that \
             Sluicebox or give this one a stream of its own. If the folder is lost: `sluicebox run \
             --abandon-parked` once. The messages that were parked or waiting there are then never \
             delivered, and changes that it had delivered and not yet confirmed to Postgres come twice. \
             End every process that had that folder first: a frozen one that wakes up may still write \
             to streams that transforms route to, until this one opens them"
        ),
        Owner::OtherProgram => format!(
            "{stream} is fenced by another program (fencing token `{token}`): nothing is written. \
             Stop that program or give Sluicebox a stream of its own; if it is gone for good, start \
             once with `sluicebox run --take-over`"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::error::Named;

    #[test]
    fn each_owner_asks_for_its_grant() {
        #[track_caller]
        fn check(token: &str, owner: Owner<'_>, grant: Grants, says: &[&str]) {
            assert_eq!(Owner::of(token, "00ff"), owner);
            assert!(grant.covers(owner) && !Grants::default().covers(owner));
            let other = Grants {
                take_over: !grant.take_over,
                abandon_parked: !grant.abandon_parked,
                lost_records: Some(LostRecords::Resend),
                lost_changes: true,
                no_transforms: true,
            };
            assert!(!other.covers(owner), "{token}");
            let place = Place {
                endpoint: String::new(),
                basin: "my-basin".to_owned(),
                stream: "products".to_owned(),
                named: Named::Sink,
            };
            let text = refusal(&place, token, "00ff");
            for part in ["`products`", "`my-basin`", token].iter().chain(says) {
                assert!(text.contains(part), "{text}");
            }
        }
        let take_over = Grants { take_over: true, ..Grants::default() };
        let abandon = Grants { abandon_parked: true, ..Grants::default() };
        check(
            "sb-00ff-3-1234",
            Owner::ThisStore,
            take_over,
            &["copy", "put back", "--take-over", "--lost-records"],
        );
        check(
            "sb-00aa-3-1234",
            Owner::OtherStore("00aa"),
            abandon,
            &["--abandon-parked", "never delivered", "twice", "End every process"],
        );
        check("sb--1", Owner::OtherProgram, take_over, &["--take-over"]);
        check("flink", Owner::OtherProgram, take_over, &["another program", "--take-over"]);
    }
}
