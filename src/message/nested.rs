//! Arrays and composite values, whose text nests other values' text with quotes and escapes.
//!
//! Text that does not fit is found while it is being written; what was written is then taken
//! back, and the whole text becomes a JSON string.

use std::borrow::Cow;

use super::out::Out;
use super::string::{NotUtf8, write_string};
use super::value::write_checked;
use crate::pg_type::Kind;

/// Postgres's own limit of an array's dimensions (`MAXDIM`).
const DIMENSIONS_MAX: usize = 6;

/// Why a nested value was not written.
enum Fault {
    /// The text is not what `array_out` or `record_out` write for this type.
    Misfit,
    NotUtf8,
}

impl From<NotUtf8> for Fault {
    fn from(_: NotUtf8) -> Self {
        Self::NotUtf8
    }
}

/// `{1,NULL,"a b"}` as a JSON array. With bounds (`[0:1]={1,2}`) it stays text, because a JSON
/// array could not tell them.
pub(super) fn write_array(
    out: &mut impl Out,
    element: &Kind,
    delimiter: char,
    text: &[u8],
) -> Result<(), NotUtf8> {
    or_string(out, text, |out, scan| {
        let delimiter = u8::try_from(delimiter).map_err(|_| Fault::Misfit)?;
        array(out, element, delimiter, scan, 1)
    })
}

/// `(1,,"a b")` as a JSON object with a key for each attribute.
pub(super) fn write_composite(
    out: &mut impl Out,
    attributes: &[(String, Kind)],
    text: &[u8],
) -> Result<(), NotUtf8> {
    or_string(out, text, |out, scan| composite(out, attributes, scan))
}

fn or_string<O: Out>(
    out: &mut O,
    text: &[u8],
    write: impl FnOnce(&mut O, &mut Scan<'_>) -> Result<(), Fault>,
) -> Result<(), NotUtf8> {
    let start = out.written();
    let mut scan = Scan { rest: text };
    let end = |scan: &Scan<'_>| if scan.rest.is_empty() { Ok(()) } else { Err(Fault::Misfit) };
    match write(out, &mut scan).and_then(|()| end(&scan)) {
        Ok(()) => Ok(()),
        Err(Fault::NotUtf8) => Err(NotUtf8),
        Err(Fault::Misfit) => {
            out.rewind(start);
            write_string(out, text)
        }
    }
}

fn array(
    out: &mut impl Out,
    element: &Kind,
    delimiter: u8,
    scan: &mut Scan<'_>,
    dimension: usize,
) -> Result<(), Fault> {
    if dimension > DIMENSIONS_MAX {
        return Err(Fault::Misfit);
    }
    scan.expect(b'{')?;
    out.put(b"[");
    if scan.eat(b'}') {
        out.put(b"]");
        return Ok(());
    }
    loop {
        match scan.peek()? {
            b'{' => array(out, element, delimiter, scan, dimension + 1)?,
            b'"' => write_checked(out, element, &scan.quoted()?)?,
            _ => {
                let text = scan.until(|byte| byte == delimiter || byte == b'}')?;
                match text {
                    [] => return Err(Fault::Misfit),
                    // The word is NULL only without quotes.
                    b"NULL" => out.put(b"null"),
                    text => write_checked(out, element, text)?,
                }
            }
        }
        if scan.eat(b'}') {
            out.put(b"]");
            return Ok(());
        }
        scan.expect(delimiter)?;
        out.put(b",");
    }
}

fn composite(
    out: &mut impl Out,
    attributes: &[(String, Kind)],
    scan: &mut Scan<'_>,
) -> Result<(), Fault> {
    scan.expect(b'(')?;
    out.put(b"{");
    for (index, (name, kind)) in attributes.iter().enumerate() {
        if index > 0 {
            scan.expect(b',')?;
            out.put(b",");
        }
        write_string(out, name.as_bytes())?;
        out.put(b":");
        match scan.peek()? {
            b'"' => write_checked(out, kind, &scan.quoted()?)?,
            _ => match scan.until(|byte| byte == b',' || byte == b')')? {
                [] => out.put(b"null"),
                text => write_checked(out, kind, text)?,
            },
        }
    }
    scan.expect(b')')?;
    out.put(b"}");
    Ok(())
}

/// What is left of a nested value's text.
struct Scan<'a> {
    rest: &'a [u8],
}

impl<'a> Scan<'a> {
    fn peek(&self) -> Result<u8, Fault> {
        self.rest.first().copied().ok_or(Fault::Misfit)
    }

    fn eat(&mut self, byte: u8) -> bool {
        match self.rest.split_first() {
            Some((first, rest)) if *first == byte => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), Fault> {
        if self.eat(byte) { Ok(()) } else { Err(Fault::Misfit) }
    }

    /// Text without quotes, up to one of its terminators.
    fn until(&mut self, terminates: impl Fn(u8) -> bool) -> Result<&'a [u8], Fault> {
        let length = self.rest.iter().position(|byte| terminates(*byte)).ok_or(Fault::Misfit)?;
        let (text, rest) = self.rest.split_at(length);
        // Both output functions quote a text that holds any of these.
        if text.iter().any(|byte| matches!(byte, b'"' | b'\\')) {
            return Err(Fault::Misfit);
        }
        self.rest = rest;
        Ok(text)
    }

    /// Text in quotes, in which a backslash or a quote before another quote escape what follows.
    fn quoted(&mut self) -> Result<Cow<'a, [u8]>, Fault> {
        self.expect(b'"')?;
        let mut unescaped = Vec::new();
        loop {
            let length = memchr::memchr2(b'"', b'\\', self.rest).ok_or(Fault::Misfit)?;
            let (run, rest) = self.rest.split_at(length);
            match *rest {
                [b'\\', escaped, ref rest @ ..] | [b'"', escaped @ b'"', ref rest @ ..] => {
                    unescaped.extend_from_slice(run);
                    unescaped.push(escaped);
                    self.rest = rest;
                }
                [b'"', ref rest @ ..] => {
                    self.rest = rest;
                    if unescaped.is_empty() {
                        return Ok(Cow::Borrowed(run));
                    }
                    unescaped.extend_from_slice(run);
                    return Ok(Cow::Owned(unescaped));
                }
                _ => return Err(Fault::Misfit),
            }
        }
    }
}
