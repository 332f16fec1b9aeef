//! Why each change is in S2 exactly once, in order, whatever dies and whenever: the argument as a whole.
//!
//! The modules that take part say what they do; this one says why that is enough. It contains no code.
//! After each step stands who puts it to the test: a rule in `mutation.rs` that a test build
//! breaks and that the simulation (`src/simulation`) then has to find out, and a case on real processes
//! under `tests/it`.
//!
//! # What is taken for granted
//!
//! *S2.* A batch lands as a whole or not at all, in the order of its session, and nothing behind the
//! first that failed. An acknowledgement comes after the batch is durable. A batch with a fencing token
//! that is not the stream's, or a number that is not the next one, does not land. Once a fence has
//! landed, nothing with an older token lands behind it. What has landed is read back by its number, until
//! it is trimmed or expires. Nothing else is believed: not that an answer comes, nor when, nor that an
//! error means that nothing has landed.
//!
//! *Postgres.* A slot gives committed transactions in the order of their commits, each change with the
//! same [`Position`](crate::change::Position) each time that it is read, and everything behind what was
//! last confirmed. It may forget a confirmation in a crash of its own, and then gives more again. It
//! forgets nothing that was not confirmed; if an operator makes it, by a slot made anew or moved, that is
//! noticed at the connection and refused.
//!
//! *SQLite.* A transaction is on disk as a whole before it is answered, and found again after a loss of
//! power, or the damage is noticed at the start. One process at a time is the owner: another can only
//! write after it has become the owner, and the earlier one then not any more.
//!
//! *The transforms* may make anything of a change, another thing each time. They cannot touch the headers
//! that make a record's identity, and nothing below rests on what they make.
//!
//! # The state
//!
//! Three things survive a crash: what is in the stream, what is in the store, and how far the slot is.
//! Every change is, at every moment, in at least one of these places: *unconfirmed* in the slot, in the
//! store as a *message* (failed, or behind a failed one) or *spilled*, or *landed* in the stream. Or it
//! is settled without a place: dropped by a transform, or given up by an operator.
//!
//! The checkpoint in the store ties them together: `position`, `seq` and `confirm`, and `reached`, which is of
//! use only where S2 itself forgets (below). The invariants:
//!
//! 1. Every change at or below `position` is landed, a message, dropped or given up.
//! 2. Every change of a transaction that ended at or before `confirm` is that, or spilled.
//! 3. Every record whose change is above `position`, or still in the store, has a number of `seq` or
//!    above. Without a `seq`, this store has sent nothing.
//! 4. The slot was never told more than the `confirm` of a checkpoint that is on disk.
//!
//! Each transaction of the store keeps them by itself, since what makes a change leave one place is in
//! the same transaction as the checkpoint that says so: a message leaves with the checkpoint whose `seq`
//! is behind its record; a chunk of spilled changes leaves with the checkpoint whose `position` has
//! passed it; a change that goes into the store counts as settled once that is written.
//! (`ConfirmBehindCheckpoint`, `CheckpointNumber`, `RemoveWithCheckpoint`, `StoreWithCheckpoint`,
//! `CheckpointBehindSpill`, `KeepTheSpill`; the simulation also looks at each transaction for what a
//! restart from just there would lose or repeat.)
//!
//! # Nothing is lost
//!
//! By 4 and 2, what the slot has forgotten is landed, stored, spilled, dropped or given up. A restart reads
//! the rest of the slot again, leaves out what is at or below `position`, spilled or before `confirm`,
//! and sends what is left. Messages are tried until S2 has them, a transform drops them, or an operator
//! gives them up, who is asked by name. A disk that is full refuses a transaction as a whole; it is
//! written again, before anything newer (`WriteAgain`; `spill::a_full_disk_is_said_and_outlasted`).
//!
//! # Nothing comes twice
//!
//! Before a session sends anything, [`link`](super::link) makes certain what has landed:
//!
//! - It draws a token that was never used, writes it down, and fences the stream with it, guarded by this
//!   store's earlier tokens. From the moment at which the fence lands, nothing of any earlier session can
//!   land any more, however long it was under way (`Fence`, `FreshToken`).
//! - It reads the stream from `seq` up to the fence. By 3, whatever is there and would be sent again is
//!   found, by the position in its header (`ReadTheEnd`, `SkipReplayed`).
//! - It sends with its token, and each batch with the number that it must get. The number guards against a
//!   proxy that plays a request twice; where others append all the time it is left out, because a batch
//!   with this token was sent on this session, in its order.
//!
//! Before its first session a store has no `seq`. It gets the stream's end of that moment, on disk before
//! the first fence is tried, so before anything can be sent; a checkpoint that is written without one,
//! because changes were spilled before S2 was ever reached, leaves alone what is there. If the opening
//! fails behind that, the next may take a later end: still nothing was sent (`BeginBeforeSending`;
//! `first_start`).
//!
//! After *any* failure the session is given up and this begins anew, so that no error has to be trusted
//! about whether something landed. What was on its way goes to the front of the queue again unless it was
//! found (`FrontOfQueue`).
//!
//! A change that was given up leaves a mark with its position until the checkpoint has passed it; without
//! it, a restart would read the change again and send it (`Tombstone`). So does one that became a dead
//! letter.
//!
//! What an operator decides is on disk before anything more is sent: that messages are given up, or up to
//! where changes are skipped. A restart before that would send them, behind what had waited for them
//! (`SkipOnDisk`). What is skipped of a routed stream leaves a mark for each change, since only the chain
//! tells which they are.
//!
//! Which token a stream has is in the store before anything is sent with it, and is never forgotten,
//! however many are drawn in vain after it
//! (`the_token_in_force_is_never_forgotten`).
//!
//! Parts of one change that one batch holds travel in it, and land together or not at all; so finding one
//! is finding all. Where several batches are needed, the records themselves are in the store before the
//! first is sent, and each leaves it with the checkpoint whose `seq` is behind it. What a restart finds in
//! the stream are the first so many of them, by the number in `sb-part`; the others are sent as they are
//! stored, so that no part is made twice and all are of one chain
//! (`parts::each_part_is_once_in_the_stream_…`).
//!
//! A *dead letter* in a stream is a record like any other, with the identity of its change: it is found by
//! it, and its message leaves with the checkpoint behind it. A message that may be in a stream becomes none
//! before that was read. In a file it is synced before its message leaves, and found by its identity behind
//! the place up to which the store knows the file, which is never beyond a letter whose message is still in
//! the store (`FindTheLetter`). What was spent before a restart may be there, and is not tried once more for
//! a new chain (`DoubtTheLetter`, `dead_letters::each_dead_letter_is_once_…`).
//!
//! # Nothing is out of order
//!
//! The order is kept in three places. The [driver](super::driver) takes what the workers made in the order
//! of the source (`InOrder`), and decides there what is held. The [outbox](super::outbox) is a queue, and
//! a session an ordered pipe. The [store](super::holds) holds what stands behind a message of its group:
//!
//! - A change whose group has an unsent message in the store goes there too (`HoldTheGroup`), and what S2
//!   refuses takes along what stood behind it in the queue (`HoldInTurn`).
//! - A change of the key belongs to both groups (`BothGroups`; `story::a_key_that_changes_…`). A truncate
//!   waits for its table and holds it (`HoldTheTable`), and so does a change that meets its table under
//!   another grouping (`BarrierBetweenGroupings`; `groups::order_holds_while_the_grouping_changes`).
//! - Once a message is sent, what follows takes the same queue, behind it.
//! - A message that stands behind changes which were read and had not reached S2 waits until these have
//!   been read again: from the slot after a restart (`WaitForTheSource`), or from the spill
//!   (`WaitForTheSpill`; `spill::a_parked_row_that_is_let_through_…`). They count as read once they have left
//!   the workers: a message whose records are stored, and a dead letter, need not be shaped, and would
//!   overtake them there (`PassInTurn`).
//!
//! # Several streams
//!
//! Transforms may route messages to streams of their own, and a newer chain to others than the one before
//! it. What is said above of the stream holds for each; that a change is in one of them only, and in its
//! order, rests on this:
//!
//! - The store has a row for each with the number to read it from, before the first record goes there
//!   (`RowBeforeRecord`). The row follows the checkpoint, in its transaction, and like `seq` passes no
//!   record whose change is not covered (`RowNumber`): a row overwritten with the number that was
//!   acknowledged last would hide from a restart what lies between. It leaves with the checkpoint that
//!   covers everything (`CloseCovered`).
//! - A start reads every stream that has a row before anything is sent to any: what is in one of them may
//!   be routed to another now (`ReadEveryStream`). All are opened with the promise of the first
//!   (`PromiseForAll`).
//! - One that cannot be read then, by trouble of its own, does not keep the others waiting. What it may
//!   have, or may still get from a batch under way or from a process that stood still, is what somebody
//!   had in memory or in this store before the slot and the store were ours: nothing that was committed
//!   later than the WAL's end as it was asked once our connection had the slot. Everything up to there that
//!   was not found in another stream goes into the store, whatever the chain makes of it, a drop too,
//!   and is sent nowhere before the stream was read (`DoubtTheUnread`). Newer changes are in no stream, and
//!   go on, except behind one in the store of their group. So what that stream turns out to have is in no
//!   other, and nothing that comes after it in its group was sent. Its row stays as it is meanwhile, so
//!   that the next start finds the same. Once it was read, all that it holds leaves the store, or is left
//!   out on its way there, and the rest follows. One thing would be newer: what a frozen process reads that
//!   gets the slot again, in a pause of our own connection. Our confirming keeps it from that, and after
//!   `--take-over`, where one is to be expected, such a stream keeps everything waiting.
//!   (`routes_recovery::a_stream_that_cannot_be_read_at_a_start_…`.)
//! - A stream that is in trouble of its own is shut, and what is bound for it parks. What was sent there
//!   without an answer goes nowhere else before that stream is read (`DoubtWhatWasSent`), and what stands
//!   behind it in its groups waits in the store, whatever stream it is for (`HoldBehindShut`). It is shaped
//!   anew each time that it is tried, by the chain of that time. That makes no second content of one
//!   identity: nothing of it leaves before the stream is read behind a fence, where it is found, or is not
//!   and cannot land any more. Nor does a drop let what follows go: it waits as well. What it costs are
//!   the calls, at the pauses between attempts; to store records instead would keep what an operator has
//!   meanwhile mended in the chain from it.
//! - A stream that was deleted and made anew is begun anew, and nobody is asked as for the pipeline's own.
//!   It has nothing of ours that is older than itself, so that each change is in it at most once and in
//!   order; what is beyond the checkpoint is not missing from it, and comes again for whoever had read it
//!   in the one that was deleted. An operator could hardly choose otherwise, and only for a whole start:
//!   by names that come from rows, each deletion would stop all others. Where one has chosen to skip for
//!   this start, that holds here too. A frozen process gets nothing into it. Its batches have a token that
//!   the new stream has not, and before it sends anything with another it has to write that down, in a
//!   store that is another's by then.
//!   (`routes_recovery::a_stream_that_was_made_anew_…`; the simulation deletes streams under processes
//!   that stand still.) One that ends too early and still has a record of ours was not made anew: S2 was put
//!   back to an older state, what is missing from it is in no stream, and an operator is asked
//!   (`stream_loss::an_older_state_of_a_routed_stream_is_noticed`).
//! - Across streams, a record is sent once everything before it in its groups is acknowledged
//!   ([`crossing`](super::crossing), `WaitForOtherStreams`).
//!
//! On real processes: `routes`.
//!
//! # Moment by moment
//!
//! | the process dies | what a restart finds |
//! | --- | --- |
//! | with a change read, before anything of it was sent | it is unconfirmed, and read again |
//! | with a batch under way, which lands or not | the fence decides which; if it landed, it is read back before anything is sent |
//! | after the acknowledgement, before the checkpoint | the record is at `seq` or above: found, and left out |
//! | after the checkpoint, before Postgres was told | the source gives it again; it is at or below `position` |
//! | between the batches of one message | its records are in the store; those that landed are found, the rest is sent |
//! | with a dead letter in its file or stream, before its message left the store | the letter is found by its identity, and the message leaves |
//! | after a message was sent, before it left the store | its record is at `seq` or above: found, and the message leaves |
//! | after a message was parked in memory, before that was written | it is unconfirmed, is read again, and fails again or not |
//! | before S2 was ever reached, while changes are spilled | the checkpoint says how far Postgres was told, and has no `seq`: nothing was sent |
//! | after a token was drawn, before, while or after its fence landed | it is among the store's tokens, all of which are tried as the guard |
//! | while changes are spilled | what is on disk is left out by the source, the rest is unconfirmed; what had been sent before is found at the restart, and left out when it comes out of the spill (`FindWhatWasSpilled`) |
//! | while the spill is read again | the checkpoint says how far it has got; a chunk that it passes in part is read, and its first changes left out |
//! | while an operator gives a message up | it is still there, or its mark is |
//! | while a chain changes | its number is in the store before a record carries it, so that no record is made by two |
//!
//! On real processes: `restart`, `spill::what_is_spilled_survives_a_kill_at_any_moment`, and `torture`.
//!
//! # Others
//!
//! *Another writer without a token* cannot be kept out, and does no harm: it shifts numbers, which a batch
//! of ours notices or does not need (above); its records are not ours by their headers
//! (`takeover::a_busy_foreign_writer_does_no_harm`).
//!
//! *Another Sluicebox* has another token. It finds ours, is refused unless an operator granted it
//! ([`grants`](super::grants)), and a process whose token is no longer the stream's stops for good
//! (`StandDown`). Two of them never fence each other out in turn.
//!
//! *A zombie*, a process that stood still while another took its store and its stream over, finds its
//! token fenced out at S2, another owner in the store, and its connection to Postgres ended
//! (`OneOwner`; `takeover::a_frozen_process_is_taken_over_…`).
//!
//! *A lost store* takes with it what was parked and where to read from. A stream with another store's token
//! is refused until an operator says that it is given up (`takeover::a_lost_store_…`). Before the stream
//! has said whose it is, nothing is taken from a slot that was there before the store
//! (`first_start::a_slot_of_somebody_else_…`). With the store went the knowledge of which streams messages
//! had been routed to. The new one fences each of them when it first opens it, and a process that
//! stood still with the lost store could write there until then (below). *A copy of the
//! store* draws tokens that the original does not know, and each refuses the other's
//! (`takeover::a_copy_of_the_store_…`).
//!
//! *A stream that was trimmed, has expired or was made anew* beyond `seq` cannot tell what had landed.
//! Nothing is sent; an operator chooses between some changes twice and some perhaps not at all. What the
//! store holds, as messages or spilled, is sent with either choice (`…_made_anew_…`); what is skipped behind
//! something spilled leaves a mark for each change. From
//! where the stream is read from then on is in the store before anything is sent
//! (`takeover::a_stream_that_was_trimmed_…`, `…_made_anew_…`). A stream that was made
//! anew and has grown beyond `seq` by others' records, before we looked, cannot be told from the old one;
//! what is missing from it went into the stream that was deleted.
//!
//! *Skipping and what was parked in doubt.* A stream that could not be read at a start has parked whatever
//! was committed before it, and may turn out to have lost records when it can be read. With `skip`, those
//! messages are sent like all others in the store. To take them as delivered would lose every one that is
//! for another stream or never reached this one, which are most of them, and nobody could tell which;
//! what is risked instead is that those few that were in the lost records come twice. Which messages were
//! parked for that stream is in their error, and `messages ack` gives up what an operator knows to be there.
//!
//! *S2 that was put back to an older state* breaks what is taken for granted: what it had acknowledged, and
//! Postgres and the store have forgotten, is gone. `seq` does not tell: while one stream takes nothing, it
//! stays low in all others, and messages that leave the store go there behind it. So each checkpoint also
//! says how far the stream was known to have reached, which is behind the record of whatever leaves the store
//! with it. A stream that ends before that has lost records (`NoticeOlderState`), and the same choice is asked
//! for, with either of which those that a checkpoint covers do not come again; what is left of the stream
//! is read from `seq` on as always, and not sent twice. One that still reaches it has lost only what no
//! checkpoint covers, which is unconfirmed or in the store, and comes again. What is known of a routed
//! stream is kept when nothing of it is unsettled any more (`RememberTheEnd`), and looked at when the next
//! record is to go there; until then nobody asks. Where nothing was unsettled, the operator's choice makes no
//! difference.
//! A stream that is not there at all any more is one that was deleted, as far as anybody can tell.
//! An older state may have a token that this store has forgotten: that asks for `--take-over`, too.
//! What is below `seq` is never read, and may be trimmed at any time (`stream_loss`).
//!
//! # What is not promised
//!
//! With a token that may not fence, read or check the tail, less holds; which is said at the start
//! ([`Guarantee`](crate::sink::Guarantee)). A change that a transform dropped, and that is read again after
//! a crash, is decided anew by the chain of that time.
//!
//! S2 that is put back to an older state is not noticed where others have appended so much since that a stream
//! has reached again what it had, and it has the newest fencing token still, as a copy made since the last
//! start has. `sluicebox verify` tells what is missing then.
//!
//! After `--abandon-parked`, a process that still lives with the lost store, frozen or cut off, or a batch of
//! it that is still under way, may get into a routed stream until the new store opens that, which is when
//! the chain first routes something there. It is what that process had read, and each change once; but it
//! may be what was abandoned, what the new store sends as well, and older than what that has sent of the
//! same row to another stream. (The judge of the simulation excuses the order of
//! just what that process gets into a stream before the new store has opened it.) The pipeline's
//! own stream is fenced first, so that nothing of it comes there. Looking at that fence before each record
//! for another stream would not help: no request to S2 depends on two streams, and what is on the wire
//! cannot be called back. So an operator ends that process first, as the help and the refusal say. One that
//! was granted this itself, and stood still before it had opened the stream, keeps the grant until it
//! does: where its folder is given up in turn, it has to be ended like any other.
//!
//! # And it goes on
//!
//! When what fails is mended, everything gets through: what S2 or the disk refuses is tried for ever, what
//! is read is bounded by memory that is given back (`GiveBack`), and where the store is full, what its
//! messages wait for is read all the same. The simulation ends each run without faults
//! and wants all that does not fail to be through, then mends the rest and wants it to be empty.
