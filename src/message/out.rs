//! Where JSON is written: into memory, into a counter, or into memory up to a limit.
//!
//! Every byte of a message goes through [`Out`], so that its measured size and its bytes cannot
//! disagree.

/// A place to write to.
pub trait Out {
    fn put(&mut self, bytes: &[u8]);

    /// What was written so far, in bytes, stored or not.
    fn written(&self) -> u64;

    /// Takes back what was written after `length` bytes.
    fn rewind(&mut self, length: u64);

    /// True where only the number of bytes matters: known sizes may be given to [`Self::skip`].
    fn counts_only(&self) -> bool {
        false
    }

    /// Counts bytes without writing them. Called only where [`Self::counts_only`] is true.
    fn skip(&mut self, _bytes: u64) {}
}

impl Out for Vec<u8> {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }

    fn written(&self) -> u64 {
        self.len() as u64
    }

    fn rewind(&mut self, length: u64) {
        self.truncate(usize::try_from(length).unwrap_or(usize::MAX));
    }
}

/// Stores nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter(u64);

impl Out for Counter {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.0 += bytes.len() as u64;
    }

    fn written(&self) -> u64 {
        self.0
    }

    fn rewind(&mut self, length: u64) {
        self.0 = self.0.min(length);
    }

    fn counts_only(&self) -> bool {
        true
    }

    fn skip(&mut self, bytes: u64) {
        self.0 += bytes;
    }
}

/// Stores the first `bytes_max` bytes and goes on counting.
///
/// Invariant: `stored` is what was written, cut at `bytes_max`.
#[derive(Clone, Debug)]
pub struct Capped {
    stored: Vec<u8>,
    bytes_max: usize,
    written: u64,
}

impl Capped {
    /// `expected` bytes are reserved, but never more than the limit.
    #[must_use]
    pub fn new(bytes_max: usize, expected: usize) -> Self {
        Self { stored: Vec::with_capacity(expected.min(bytes_max)), bytes_max, written: 0 }
    }

    /// What was written.
    ///
    /// # Errors
    ///
    /// With the number of bytes that were written, when they are more than the limit.
    pub fn finish(self) -> Result<Vec<u8>, u64> {
        if self.stored.len() as u64 == self.written { Ok(self.stored) } else { Err(self.written) }
    }

    /// What was stored, and whether more was written than that.
    #[must_use]
    pub fn into_stored(self) -> (Vec<u8>, bool) {
        let cut = self.stored.len() as u64 != self.written;
        (self.stored, cut)
    }
}

impl Out for Capped {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        let room = self.bytes_max - self.stored.len();
        self.stored.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
        self.written += bytes.len() as u64;
    }

    fn written(&self) -> u64 {
        self.written
    }

    fn rewind(&mut self, length: u64) {
        self.written = self.written.min(length);
        self.stored.rewind(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Put(Vec<u8>),
        Rewind(u64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => proptest::collection::vec(any::<u8>(), 0..40).prop_map(Step::Put),
            1 => (0..200_u64).prop_map(Step::Rewind),
        ];
        proptest::collection::vec(step, 0..30)
    }

    proptest! {
        #[test]
        fn all_three_agree(steps in steps(), bytes_max in 0..200_usize) {
            let (mut all, mut counter) = (Vec::new(), Counter::default());
            let mut capped = Capped::new(bytes_max, 1000);
            for step in &steps {
                match step {
                    Step::Put(bytes) => {
                        all.put(bytes);
                        counter.put(bytes);
                        capped.put(bytes);
                    }
                    Step::Rewind(length) => {
                        all.rewind(*length);
                        counter.rewind(*length);
                        capped.rewind(*length);
                    }
                }
                prop_assert_eq!(all.written(), counter.written());
                prop_assert_eq!(all.written(), capped.written());
            }
            if all.len() <= bytes_max {
                prop_assert_eq!(capped.finish(), Ok(all));
            } else {
                prop_assert_eq!(capped.finish(), Err(all.len() as u64));
            }
        }
    }
}
