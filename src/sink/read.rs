//! Reading a stream page by page: up to its end, or following it.

use std::time::Duration;

use bytes::Bytes;

use super::{
    client::{Client, ReadFrom, Tail},
    error::{Error, Operation},
    proto::SequencedRecord,
    record::{BATCH_RECORDS_MAX, Header},
};

/// How long S2 is asked to wait for a record while a stream is followed. Below the minute after
/// which proxies tend to give a request up.
const FOLLOW_WAIT: Duration = Duration::from_secs(30);

/// How often an empty page is asked for again where there should be records, and the first pause.
const EMPTY_PAGES_MAX: u32 = 4;
const EMPTY_PAGE_PAUSE: Duration = Duration::from_millis(50);

/// A record as it is in the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadRecord {
    pub seq: u64,
    /// Milliseconds since the Unix epoch.
    pub timestamp_ms: u64,
    pub headers: Vec<Header>,
    pub body: Bytes,
}

impl ReadRecord {
    /// Whether it is a command to S2, such as a fence, and not data: a header without a name.
    #[must_use]
    pub fn is_command(&self) -> bool {
        self.headers.first().is_some_and(|header| header.name.is_empty())
    }

    /// The fencing token that this record sets, if it is the command for that.
    #[must_use]
    pub fn fence(&self) -> Option<&str> {
        let is_fence = self.is_command() && self.headers[0].value == b"fence"[..];
        std::str::from_utf8(&self.body).ok().filter(|_| is_fence)
    }

    /// The value of the first header of that name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&Bytes> {
        let named = |header: &&Header| header.name == name.as_bytes();
        self.headers.iter().find(named).map(|header| &header.value)
    }
}

impl From<SequencedRecord> for ReadRecord {
    fn from(record: SequencedRecord) -> Self {
        Self {
            seq: record.seq_num,
            timestamp_ms: record.timestamp,
            headers: record
                .headers
                .into_iter()
                .map(|header| Header { name: header.name, value: header.value })
                .collect(),
            body: record.body,
        }
    }
}

/// Records that follow each other, and the tail where S2 told it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    pub records: Vec<ReadRecord>,
    pub tail: Option<Tail>,
}

/// Reads on from page to page. Command records come along: skip them by
/// [`ReadRecord::is_command`].
#[derive(Debug)]
pub struct Reader {
    client: Client,
    next_seq: u64,
    end: End,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Before(u64),
    Never,
}

impl Client {
    /// Everything from `from` to the tail as it is now.
    ///
    /// # Errors
    ///
    /// As [`Client::tail`].
    pub async fn read_to_tail(&self, from: u64) -> Result<Reader, Error> {
        let tail = self.tail().await?;
        Ok(self.read_range(from, tail.next_seq))
    }

    /// Everything from `from` to just before `end`, which must not lie beyond the tail.
    #[must_use]
    pub fn read_range(&self, from: u64, end: u64) -> Reader {
        Reader { client: self.clone(), next_seq: from, end: End::Before(end) }
    }

    /// A page from a number that lies below the tail. It is empty where everything up to the tail is
    /// gone; but one empty answer proves nothing, since whoever stands in between may have cut it
    /// off, and an operator would have to choose between loss and repetition.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub(super) async fn read_below_tail(&self, from: u64, count_max: usize) -> Result<Page, Error> {
        let mut asked = 0;
        loop {
            let page = self.read(ReadFrom::Seq(from), count_max, Duration::ZERO).await?;
            if !page.records.is_empty() || asked == EMPTY_PAGES_MAX {
                return Ok(page);
            }
            tokio::time::sleep(EMPTY_PAGE_PAUSE * 2_u32.pow(asked)).await;
            asked += 1;
        }
    }

    /// Everything from `from`, and whatever is appended later.
    #[must_use]
    pub fn follow(&self, from: u64) -> Reader {
        Reader { client: self.clone(), next_seq: from, end: End::Never }
    }
}

impl Reader {
    /// The number that the next page is asked to begin with.
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The next records, at least one; nothing at the end. A reader that follows waits instead.
    ///
    /// Numbers below those asked for are never returned; a gap means that records were trimmed or
    /// have expired. After an error the same page can be asked for again. Cancel-safe.
    ///
    /// # Errors
    ///
    /// As [`Client::read`].
    pub async fn next(&mut self) -> Result<Option<Vec<ReadRecord>>, Error> {
        loop {
            let page = match self.end {
                End::Before(end) => {
                    let left = end.saturating_sub(self.next_seq);
                    if left == 0 {
                        return Ok(None);
                    }
                    let count = usize::try_from(left).unwrap_or(usize::MAX);
                    self.client.read_below_tail(self.next_seq, count).await?
                }
                End::Never => {
                    let from = ReadFrom::Seq(self.next_seq);
                    self.client.read(from, BATCH_RECORDS_MAX, FOLLOW_WAIT).await?
                }
            };
            let (Some(first), Some(last)) = (page.records.first(), page.records.last()) else {
                match self.end {
                    // Everything up to the end is gone, or S2 contradicts its own tail again and
                    // again: the caller sees which by what it did not get.
                    End::Before(_) => return Ok(None),
                    End::Never => continue,
                }
            };
            if first.seq < self.next_seq
                || page.records.windows(2).any(|pair| pair[0].seq >= pair[1].seq)
            {
                return Err(Error::Protocol {
                    place: self.client.place().clone(),
                    operation: Operation::Read,
                    what: format!(
                        "asked for records from {} it gave {} to {}",
                        self.next_seq, first.seq, last.seq
                    ),
                    source: None,
                });
            }
            self.next_seq = last.seq + 1;
            let mut records = page.records;
            if let End::Before(end) = self.end {
                // After a gap a page may reach beyond the end.
                records.retain(|record| record.seq < end);
                if records.is_empty() {
                    return Ok(None);
                }
            }
            return Ok(Some(records));
        }
    }
}
