//! Broken rules of the interface that a guest has not made good yet.
//!
//! A refused edit leaves the message as it was, and the guest hears of it. One that overlooks the
//! refusal would send what it meant to hide, or send it to the wrong stream; so the refusal of
//! what breaks a rule is kept here, and the verdict is refused for it. No WebAssembly in this file.

use crate::message::Subject;

/// The broken rules of one call, oldest first. The caller charges the guest for what they hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct Breaches(Vec<(Subject, String)>);

impl Breaches {
    /// Keeps a refusal, in place of an earlier one of the same subject.
    pub(crate) fn add(&mut self, subject: Subject, reason: String) {
        self.0.retain(|(known, _)| *known != subject);
        self.0.push((subject, reason));
    }

    /// An edit went through that takes the place of refused ones.
    pub(crate) fn made_good(&mut self, by: &Subject) {
        self.0.retain(|(subject, _)| !covers(by, subject));
    }

    /// The reason of the first one that was not made good.
    pub(crate) fn first(&self) -> Option<&str> {
        self.0.first().map(|(_, reason)| reason.as_str())
    }
}

/// Whether an edit of this that goes through takes the place of a refused one of that.
fn covers(this: &Subject, other: &Subject) -> bool {
    match (this, other) {
        // A new value hides the old one, too.
        (Subject::Column(name), Subject::Old(other)) => name == other,
        (Subject::Message, Subject::Column(_) | Subject::Old(_) | Subject::Metadata(_)) => true,
        (this, other) => this == other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_good_is_forgotten_and_nothing_else() {
        let mut breaches = Breaches::default();
        breaches.add(Subject::Column("a".into()), "first".into());
        breaches.add(Subject::Stream, "second".into());
        breaches.add(Subject::Column("a".into()), "third".into());
        assert_eq!(breaches.first(), Some("second"));
        breaches.made_good(&Subject::Stream);
        assert_eq!(breaches.first(), Some("third"));
        for other in [Subject::Column("b".into()), Subject::Old("a".into())] {
            breaches.made_good(&other);
            assert_eq!(breaches.first(), Some("third"));
        }
        breaches.made_good(&Subject::Column("a".into()));
        assert_eq!(breaches.first(), None);
        breaches.add(Subject::Old("a".into()), "fourth".into());
        breaches.made_good(&Subject::Column("a".into()));
        assert_eq!(breaches.first(), None);
        breaches.add(Subject::Metadata("a".into()), "fifth".into());
        breaches.add(Subject::Header(String::new()), "sixth".into());
        breaches.made_good(&Subject::Message);
        assert_eq!(breaches.first(), Some("sixth"));
    }
}
