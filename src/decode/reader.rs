//! Takes numbers and strings off the front of a message, and never reads past its end.

use super::Error;

/// What is left of one message. Integers are big-endian, strings end with a zero byte.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The message's name, for errors.
    message: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], at: usize, message: &'static str) -> Self {
        Self { bytes, at, message }
    }

    /// Where the next read starts, in bytes from the message's beginning.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn message(&self) -> &'static str {
        self.message
    }

    pub(super) fn remaining(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let taken = self
            .at
            .checked_add(count)
            .and_then(|end| self.bytes.get(self.at..end))
            .ok_or(Error::Short { message: self.message, at: self.at })?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.first_chunk::<N>());
        let taken = *taken.ok_or(Error::Short { message: self.message, at: self.at })?;
        self.at += N;
        Ok(taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Error> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    pub(super) fn u16(&mut self) -> Result<u16, Error> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(super) fn i32(&mut self) -> Result<i32, Error> {
        Ok(i32::from_be_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    pub(super) fn i64(&mut self) -> Result<i64, Error> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    /// A zero-terminated name.
    pub(super) fn name(&mut self) -> Result<&'a str, Error> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let length = memchr::memchr(0, rest)
            .ok_or(Error::Short { message: self.message, at: self.bytes.len() })?;
        let name = self.take(length)?;
        self.at += 1;
        std::str::from_utf8(name).map_err(|_| Error::NotUtf8 { message: self.message })
    }

    /// The message must have been read to its end.
    pub(super) fn end(&self) -> Result<(), Error> {
        match self.remaining() {
            0 => Ok(()),
            bytes => Err(Error::Trailing { message: self.message, bytes }),
        }
    }
}
