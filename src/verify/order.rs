//! Whether the records of one stream come in the order of their groups.

use std::collections::BTreeSet;

use super::Error;
use super::fault::Fault;
use super::fold::Fold;
use super::message::Message;
use crate::change::{Action, Grouping, Position};

/// How far one table has come in one stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Order {
    /// For tables that are one group, and for truncates.
    last: Option<Position>,
    /// The last truncate: everything later comes behind it.
    barrier: Option<Position>,
}

impl Fold<'_> {
    /// Holds a record against those that came before it in its stream.
    pub(super) fn judge_order(
        &mut self,
        stream: usize,
        record: &str,
        table: usize,
        at: Position,
        message: &Message<'_>,
    ) -> Result<(), Error> {
        let is_truncate = message.action == Action::Truncate;
        let state = &mut self.tables[table];
        let one_group = match state.grouping {
            Grouping::Table => true,
            Grouping::Key => !state.has_key || is_truncate,
            Grouping::Columns(_) | Grouping::None => is_truncate,
        };
        if state.order.len() <= stream {
            state.order.resize_with(stream + 1, Order::default);
        }
        let order = &mut state.order[stream];
        let before = order.barrier.max(if one_group { order.last } else { None });
        order.last = order.last.max(Some(at));
        if is_truncate {
            order.barrier = order.barrier.max(Some(at));
        }
        if let Some(before) = before.filter(|before| *before > at) {
            let (name, action) = (&state.name, message.action);
            self.faults.add(Fault::Disordered, || {
                format!("{record}: {action} of {name} at {at}, after {before}")
            });
        }
        if is_truncate || !self.tables[table].has_key {
            return Ok(());
        }
        for (group, shown) in self.groups(table, message) {
            let last = self.scratch.pass_group(stream, table, &group, at)?;
            if let Some(last) = last.filter(|last| *last > at) {
                self.faults
                    .add(Fault::Disordered, || format!("{record}: {shown} at {at}, after {last}"));
            }
        }
        Ok(())
    }

    /// The groups of a message, each with what people call it. A row that changes hands belongs to
    /// both.
    fn groups(&self, table: usize, message: &Message<'_>) -> BTreeSet<(String, String)> {
        let state = &self.tables[table];
        let mut groups = BTreeSet::new();
        // Values that a transform has altered may fall together.
        let is_told = |name: &str| !message.metadata.is_altered(name);
        for group in [
            state.group(|name| is_told(name).then(|| message.after(name)).flatten()),
            state.group(|name| is_told(name).then(|| message.before(name)).flatten()),
        ] {
            groups.extend(group.map(|group| {
                let shown = format!("group {group} of {}", state.name);
                (group, shown)
            }));
        }
        // Of a single stream, the rows themselves tell.
        if self.has_several_streams() && state.grouping != Grouping::None {
            let rows =
                [state.key(|name| message.after(name)), state.key(|name| message.before(name))];
            groups.extend(rows.into_iter().flatten().map(|key| {
                let shown = state.show(&key);
                (format!("row {key}"), shown)
            }));
        }
        groups
    }
}
