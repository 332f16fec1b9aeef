//! What every test needs: a Postgres, an S2 server, a Sluicebox between them, and an oracle that
//! says whether the stream tells the table's story.

#![allow(dead_code, reason = "the benchmark uses this module too, and needs only a part of it")]

pub mod disk;
pub mod guest;
pub mod oracle;
pub mod postgres;
pub mod proxy;
pub mod s2;
pub mod sluicebox;
pub mod world;

use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long a test waits for what must happen. Generous, because it only bounds failures: two
/// cores run a whole suite of servers.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Where the commands keep compiled modules, instead of the user's own folder.
pub const CACHE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/cache");

/// Every value that a test writes into a row holds this word, so that a log which shows a row's
/// values is caught.
pub const ROW_MARK: &str = "r0wv4lue";

/// Asks `probe` again and again until it answers `Ok`, and fails the test with the last refusal.
pub async fn until<T>(what: &str, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(reason) => {
                assert!(
                    Instant::now() < deadline,
                    "waited {}s in vain for {what}; at last: {reason}",
                    PATIENCE.as_secs()
                );
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Sends a signal to processes, some of which may be gone.
pub fn signal(name: &str, pids: &[u32]) {
    let mut kill = std::process::Command::new("kill");
    kill.arg(format!("-{name}")).args(pids.iter().map(u32::to_string));
    kill.stderr(std::process::Stdio::null()).status().expect("`kill` is everywhere");
}

/// A TCP port that nobody listens on. Taken from below the range that the kernel uses for
/// outgoing connections, so that a server can come back on its port after it was killed.
pub fn free_port() -> u16 {
    const FIRST: u32 = 16_000;
    const COUNT: u32 = 16_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Test processes that run side by side start at different places.
    let start = std::process::id().wrapping_mul(257);
    for _ in 0..COUNT {
        let offset = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = u16::try_from(FIRST + offset).expect("the range ends below 65,536");
        if TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], port))).is_ok() {
            return port;
        }
    }
    panic!("no free TCP port between {FIRST} and {}", FIRST + COUNT);
}

/// Numbers that look random and repeat from their seed (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed of this run: `SLUICEBOX_SEED`, or the clock. Printed, so that a failure repeats.
    pub fn seed() -> u64 {
        let seed = match std::env::var("SLUICEBOX_SEED") {
            Ok(text) => text.parse().expect("SLUICEBOX_SEED is a number"),
            Err(_) => {
                let since = std::time::UNIX_EPOCH.elapsed().expect("the clock is past 1970");
                u64::from(since.subsec_nanos()) ^ since.as_secs()
            }
        };
        eprintln!("seed: SLUICEBOX_SEED={seed}");
        seed
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 to `end`, exclusive.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A place in something of this length.
    pub fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).expect("it is below a length")
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Text of this length that does not compress well, with the row mark in it.
    pub fn text(&mut self, bytes: usize) -> String {
        let mut text = String::with_capacity(bytes + 16);
        text.push_str(ROW_MARK);
        while text.len() < bytes {
            text.push_str(&format!("{:016x}", self.next()));
        }
        text.truncate(bytes.max(ROW_MARK.len()));
        text
    }
}
