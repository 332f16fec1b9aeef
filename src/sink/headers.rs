//! A record's headers, packed as S2's protobuf has them: written once, where they are made.
//!
//! What is the same in many records is copied from one into the next as it is, and a frame takes all
//! of them in one copy. A record of a pipeline has six headers of its own; as values of their own they
//! cost half a dozen shared counters and as many lengths to add up for each change.

use std::fmt;

use bytes::Buf as _;
use prost::encoding::decode_varint;

use super::proto::{
    HEADER_NAME, HEADER_VALUE, RECORD_HEADERS, optional_bytes_len, put_head, put_optional_bytes,
    tag_of,
};
use super::record::{Header, header_metered_bytes};

/// Headers in their order.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Headers {
    /// Fields of an `AppendRecord`.
    packed: Vec<u8>,
    count: usize,
    metered_bytes: u64,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderRef<'a> {
    pub name: &'a [u8],
    pub value: &'a [u8],
}

impl Headers {
    /// With room for so many packed bytes.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> Self {
        Self { packed: Vec::with_capacity(bytes), ..Self::default() }
    }

    /// An empty name makes the record a command to S2.
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        put_head(
            &mut self.packed,
            RECORD_HEADERS,
            optional_bytes_len(name) + optional_bytes_len(value),
        );
        put_optional_bytes(&mut self.packed, HEADER_NAME, name);
        put_optional_bytes(&mut self.packed, HEADER_VALUE, value);
        self.count += 1;
        self.metered_bytes += header_metered_bytes(name.len(), value.len());
    }

    /// All of the others, behind these.
    pub fn extend_from(&mut self, others: &Self) {
        self.packed.extend_from_slice(&others.packed);
        self.count += others.count;
        self.metered_bytes += others.metered_bytes;
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// What S2 counts for them, in bytes.
    #[must_use]
    pub fn metered_bytes(&self) -> u64 {
        self.metered_bytes
    }

    /// As fields of an `AppendRecord`.
    pub(super) fn packed(&self) -> &[u8] {
        &self.packed
    }

    /// What they take packed, for reserving memory.
    #[must_use]
    pub fn packed_bytes(&self) -> usize {
        self.packed.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = HeaderRef<'_>> {
        let mut rest = &*self.packed;
        std::iter::from_fn(move || {
            rest.has_remaining().then(|| {
                let (_, mut header) = field(&mut rest);
                let mut found = HeaderRef { name: &[], value: &[] };
                while header.has_remaining() {
                    match field(&mut header) {
                        (HEADER_NAME, name) => found.name = name,
                        (_, value) => found.value = value,
                    }
                }
                found
            })
        })
    }
}

impl FromIterator<Header> for Headers {
    fn from_iter<I: IntoIterator<Item = Header>>(headers: I) -> Self {
        let mut packed = Self::default();
        for Header { name, value } in headers {
            packed.push(&name, &value);
        }
        packed
    }
}

impl From<Header> for Headers {
    fn from(header: Header) -> Self {
        Self::from_iter([header])
    }
}

/// Names alone: values may be of rows.
impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.iter().map(|header| String::from_utf8_lossy(header.name)))
            .finish()
    }
}

/// Takes the next field off. What is packed was written here.
fn field<'a>(rest: &mut &'a [u8]) -> (u32, &'a [u8]) {
    let mut number = || decode_varint(rest).expect("a header was packed here");
    let (key, length) = (number(), number());
    let length = usize::try_from(length).expect("it is in memory");
    let (bytes, after) = rest.split_at(length);
    *rest = after;
    (tag_of(key), bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_packed_comes_out_again(
            headers in proptest::collection::vec((".{0,200}", ".{0,20000}"), 0..20),
            at in 0..20_usize,
        ) {
            let expected: Vec<HeaderRef<'_>> = headers
                .iter()
                .map(|(name, value)| HeaderRef { name: name.as_bytes(), value: value.as_bytes() })
                .collect();
            let (mut first, mut second) = (Headers::default(), Headers::with_capacity(7));
            for (index, header) in expected.iter().enumerate() {
                if index < at { &mut first } else { &mut second }.push(header.name, header.value);
            }
            first.extend_from(&second);
            prop_assert_eq!(first.iter().collect::<Vec<_>>(), expected);
            prop_assert_eq!(first.len(), headers.len());
            let metered = headers.iter().map(|(name, value)| 2 + name.len() + value.len());
            prop_assert_eq!(first.metered_bytes(), metered.sum::<usize>() as u64);
        }
    }
}
