//! Rules that a test build can break, to see whether the simulation notices.
//!
//! A rule is asked for where it is kept: `if !mutation::broken(Rule::X) { … }`. Outside of test builds
//! the answer is the constant `false`, so that the product contains no switch and no trace of one.

/// A rule that delivery rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Postgres is told only what a checkpoint on disk covers.
    ConfirmBehindCheckpoint,
    /// The end of the stream is read before anything is sent.
    ReadTheEnd,
    /// Each opening fences what came before it out.
    Fence,
    /// Where a stream begins is on disk before the first record goes to it.
    BeginBeforeSending,
    /// What a broken session left goes in front of everything else.
    FrontOfQueue,
    /// A message in the store holds what follows it in its groups.
    HoldTheGroup,
    /// A message beyond the checkpoint waits until what the source has read before it left the workers.
    PassInTurn,
    /// What S2 refused takes what is behind it along, and that again what is behind it.
    HoldInTurn,
    /// A truncate waits for its table and holds it.
    HoldTheTable,
    /// A change of the key belongs to the group that it leaves, too.
    BothGroups,
    /// A checkpoint's number passes no record whose acknowledgement is not covered.
    CheckpointNumber,
    /// A message leaves the store with the checkpoint that covers its record.
    RemoveWithCheckpoint,
    /// A checkpoint that covers a message in the store brings it there.
    StoreWithCheckpoint,
    /// What is settled already is left out when it is read again.
    SkipReplayed,
    /// What was given up leaves a mark until the checkpoint has passed it.
    Tombstone,
    /// A message beyond the checkpoint waits until the source has read past it.
    WaitForTheSource,
    /// Each opening has a token that was never used before.
    FreshToken,
    /// What the disk did not take is written again, before anything newer.
    WriteAgain,
    /// A stream with somebody else's token is left alone.
    StandDown,
    /// Stored messages behind what is spilled wait until that has been read again.
    WaitForTheSpill,
    /// What was sent and is spilled without an answer is looked for in the stream.
    FindWhatWasSpilled,
    /// A checkpoint does not pass what is spilled.
    CheckpointBehindSpill,
    /// Chunks leave the disk when the checkpoint has passed them.
    KeepTheSpill,
    /// While something is spilled, what comes from the source goes behind it.
    BehindTheSpill,
    /// Nothing is spilled beyond the bound.
    SpillBound,
    /// A message that meets its table under another grouping waits for all of it.
    BarrierBetweenGroupings,
    /// Results of the workers are taken in the order of the source.
    InOrder,
    /// A process that has lost its store writes nothing to it.
    OneOwner,
    /// Memory is given back for what is settled.
    GiveBack,
    /// The store knows of a routed stream before its first record is sent.
    RowBeforeRecord,
    /// What the store says of a routed stream passes no record whose acknowledgement is not covered.
    RowNumber,
    /// A routed stream is closed, and forgotten, once all of it is covered.
    CloseCovered,
    /// At a start, every stream that may hold something unknown is read before anything is sent.
    ReadEveryStream,
    /// What follows in a group waits for what is on its way to another stream.
    WaitForOtherStreams,
    /// What was sent to a stream that is shut goes nowhere else before that is read.
    DoubtWhatWasSent,
    /// What may be in a stream that could not be read since the start goes nowhere before that.
    DoubtTheUnread,
    /// What stands behind messages of a stream that is shut waits, too.
    HoldBehindShut,
    /// A routed stream is promised what the pipeline's own is.
    PromiseForAll,
    /// What was delivered from the store is found by a restart that reads it from the source again.
    FindWhatWasStored,
    /// How far an operator skips is on disk before anything is sent.
    SkipOnDisk,
    /// The store is not told of the file of dead letters beyond one whose message it holds.
    FindTheLetter,
    /// What may be in the file of dead letters is not tried once more before that is read.
    DoubtTheLetter,
    /// A stream that ends before what it had reached is an older state of itself, or another one.
    NoticeOlderState,
    /// How far a routed stream has reached is known when it is opened again, too.
    RememberTheEnd,
    /// Between events the driver waits.
    WaitForEvents,
}

#[cfg(test)]
impl Rule {
    pub(crate) const ALL: [Self; 45] = [
        Self::ConfirmBehindCheckpoint,
        Self::ReadTheEnd,
        Self::Fence,
        Self::BeginBeforeSending,
        Self::FrontOfQueue,
        Self::HoldTheGroup,
        Self::PassInTurn,
        Self::HoldInTurn,
        Self::HoldTheTable,
        Self::BothGroups,
        Self::CheckpointNumber,
        Self::RemoveWithCheckpoint,
        Self::StoreWithCheckpoint,
        Self::SkipReplayed,
        Self::Tombstone,
        Self::WaitForTheSource,
        Self::FreshToken,
        Self::WriteAgain,
        Self::StandDown,
        Self::WaitForTheSpill,
        Self::FindWhatWasSpilled,
        Self::CheckpointBehindSpill,
        Self::KeepTheSpill,
        Self::BehindTheSpill,
        Self::SpillBound,
        Self::BarrierBetweenGroupings,
        Self::InOrder,
        Self::OneOwner,
        Self::GiveBack,
        Self::RowBeforeRecord,
        Self::RowNumber,
        Self::CloseCovered,
        Self::ReadEveryStream,
        Self::WaitForOtherStreams,
        Self::DoubtWhatWasSent,
        Self::DoubtTheUnread,
        Self::HoldBehindShut,
        Self::PromiseForAll,
        Self::FindWhatWasStored,
        Self::SkipOnDisk,
        Self::FindTheLetter,
        Self::DoubtTheLetter,
        Self::NoticeOlderState,
        Self::RememberTheEnd,
        Self::WaitForEvents,
    ];
}

/// Whether a rule is not to be kept.
#[cfg(not(test))]
pub(crate) const fn broken(_: Rule) -> bool {
    false
}

#[cfg(test)]
thread_local! {
    /// A run of the simulation has one thread of its own.
    static BROKEN: std::cell::Cell<Option<Rule>> = const { std::cell::Cell::new(None) };
}

/// Whether a rule is not to be kept.
#[cfg(test)]
pub(crate) fn broken(rule: Rule) -> bool {
    BROKEN.get() == Some(rule)
}

/// Whether any rule is not to be kept.
#[cfg(test)]
pub(crate) fn is_broken() -> bool {
    BROKEN.get().is_some()
}

/// Breaks a rule on this thread, or none.
#[cfg(test)]
pub(crate) fn set(rule: Option<Rule>) {
    BROKEN.set(rule);
}
