//! The real s2-lite as a child process, spoken to by plain REST: what the tests believe of the
//! stream comes from the server's JSON and not from any code of Sluicebox.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;

use base64::Engine as _;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::free_port;

/// A server, in memory or on a folder, that can be killed and come back at the same address.
#[derive(Debug)]
pub struct Server {
    port: u16,
    dir: Option<PathBuf>,
    child: Mutex<Option<Child>>,
    http: Client,
}

impl Server {
    pub async fn in_memory() -> Self {
        Self::start(None).await
    }

    pub async fn on_disk(dir: &Path) -> Self {
        Self::start(Some(dir.to_owned())).await
    }

    async fn start(dir: Option<PathBuf>) -> Self {
        let server = Self { port: free_port(), dir, child: Mutex::new(None), http: Client::new() };
        server.up().await;
        server
    }

    /// Starts the server again where it was.
    pub async fn up(&self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sluicebox"));
        command.args(["s2", "--listen", &format!("127.0.0.1:{}", self.port)]);
        if let Some(dir) = &self.dir {
            command.arg("--dir").arg(dir);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        let stdout = child.stdout.take().expect("stdout is piped");
        let mut lines = BufReader::new(stdout).lines();
        let line = lines.next_line().await.unwrap();
        let line = line.expect("`sluicebox s2` prints its endpoint before it ends");
        assert_eq!(line.trim(), self.endpoint(), "the endpoint that `sluicebox s2` printed");
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        *self.child.lock().unwrap() = Some(child);
    }

    /// `kill -9`.
    pub async fn kill(&self) {
        let child = self.child.lock().unwrap().take();
        child.expect("the server runs").kill().await.unwrap();
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.lock().unwrap().as_ref().and_then(Child::id)
    }

    pub async fn create_basin(&self, basin: &str) {
        let body = json!({ "basin": basin });
        let request = self.http.post(format!("{}/v1/basins", self.endpoint())).json(&body);
        let answer = request.send().await.unwrap();
        assert!(answer.status().is_success(), "creating a basin: {}", answer.status());
    }

    /// Deletes a basin with all that is in it, and makes it anew once it is gone.
    pub async fn renew_basin(&self, basin: &str) {
        let url = format!("{}/v1/basins/{basin}", self.endpoint());
        let answer = self.http.delete(url).send().await.unwrap();
        assert!(answer.status().is_success(), "deleting a basin: {}", answer.status());
        super::until("the basin to be gone", async || {
            let body = json!({ "basin": basin });
            let request = self.http.post(format!("{}/v1/basins", self.endpoint())).json(&body);
            let answer = request.send().await.unwrap();
            if answer.status().is_success() { Ok(()) } else { Err(answer.text().await.unwrap()) }
        })
        .await;
    }

    /// What is on its disk at this moment, as a snapshot of the volume would have it.
    pub fn snapshot(&self, to: &Path) {
        let pids: Vec<u32> = self.pid().into_iter().collect();
        super::signal("STOP", &pids);
        copy(self.dir.as_deref().expect("it is on a disk"), to);
        super::signal("CONT", &pids);
    }

    /// Comes back from an older state of its disk.
    pub async fn back_to(&self, snapshot: &Path) {
        self.kill().await;
        let dir = self.dir.as_deref().expect("it is on a disk");
        std::fs::remove_dir_all(dir).unwrap();
        copy(snapshot, dir);
        self.up().await;
    }

    pub async fn create_stream(&self, basin: &str, stream: &str) {
        let body = json!({ "stream": stream });
        let request = self.http.post(format!("{}/v1/streams", self.endpoint()));
        let answer = request.header("s2-basin", basin).json(&body).send().await.unwrap();
        assert!(answer.status().is_success(), "creating a stream: {}", answer.status());
    }

    /// The names of all streams.
    pub async fn streams(&self, basin: &str) -> Vec<String> {
        let url = format!("{}/v1/streams?limit=1000", self.endpoint());
        let answer = self.http.get(url).header("s2-basin", basin).send().await.unwrap();
        assert!(answer.status().is_success(), "listing the streams: {}", answer.status());
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["has_more"], false, "{body}");
        let streams = body["streams"].as_array().expect("`streams` is a list");
        streams.iter().filter_map(|stream| stream["name"].as_str()).map(str::to_owned).collect()
    }

    /// Deletes a stream and waits until it is gone.
    pub async fn delete_stream(&self, basin: &str, stream: &str) {
        let url = format!("{}/v1/streams/{}", self.endpoint(), stream.replace('/', "%2F"));
        let answer = self.http.delete(url).header("s2-basin", basin).send().await.unwrap();
        assert!(answer.status().is_success(), "deleting a stream: {}", answer.status());
        super::until("the stream to be gone", async || {
            let body = json!({ "stream": stream });
            let request = self.http.post(format!("{}/v1/streams", self.endpoint())).json(&body);
            let answer = request.header("s2-basin", basin).send().await.unwrap();
            if answer.status().is_success() { Ok(()) } else { Err(answer.text().await.unwrap()) }
        })
        .await;
    }

    /// Appends a record of somebody else, who knows of no token and no number.
    pub async fn append_foreign(&self, basin: &str, stream: &str) {
        let record = json!({ "headers": [["foreign", "yes"]], "body": "of somebody else" });
        self.append(basin, stream, "raw", record).await;
    }

    /// Has everything before this number removed, and waits until it is.
    pub async fn trim(&self, basin: &str, stream: &str, first: u64) {
        let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
        let record = json!({
            "headers": [["", encode(b"trim")]], "body": encode(&first.to_be_bytes()),
        });
        self.append(basin, stream, "base64", record).await;
        super::until("the stream to be trimmed", async || {
            let url = format!("{}?seq_num=0&count=1", self.records_url(stream));
            let request = self.http.get(url).header("s2-basin", basin);
            let answer = request.header("s2-format", "raw").send().await.unwrap();
            let page: Page = answer.json().await.unwrap();
            match page.records.first() {
                Some(record) if record.seq_num < first => Err(record.seq_num.to_string()),
                Some(_) | None => Ok(()),
            }
        })
        .await;
    }

    async fn append(&self, basin: &str, stream: &str, format: &str, record: Value) {
        let request = self.http.post(self.records_url(stream)).header("s2-basin", basin);
        let request = request.header("s2-format", format).json(&json!({ "records": [record] }));
        let answer = request.send().await.unwrap();
        assert!(answer.status().is_success(), "appending: {}", answer.status());
    }

    /// The number that the next record will have, or the status of a refusal.
    pub async fn tail(&self, basin: &str, stream: &str) -> Result<u64, StatusCode> {
        let url = format!("{}/tail", self.records_url(stream));
        let answer = self.http.get(url).header("s2-basin", basin).send().await.unwrap();
        if !answer.status().is_success() {
            return Err(answer.status());
        }
        let body: Value = answer.json().await.unwrap();
        Ok(body["tail"]["seq_num"].as_u64().expect("the tail is a number"))
    }

    /// The whole stream from its beginning to the tail that it has now, page by page.
    pub async fn read(&self, basin: &str, stream: &str) -> Vec<Record> {
        self.read_from(basin, stream, 0).await
    }

    pub async fn read_from(&self, basin: &str, stream: &str, start: u64) -> Vec<Record> {
        let tail = self.tail(basin, stream).await.expect("the stream exists");
        let mut records = Vec::new();
        let mut next = start;
        while next < tail {
            let url = format!("{}?seq_num={next}&count=1000", self.records_url(stream));
            let request = self.http.get(url).header("s2-basin", basin);
            let answer = request.header("s2-format", "raw").send().await.unwrap();
            assert!(answer.status().is_success(), "reading from {next}: {}", answer.status());
            let page: Page = answer.json().await.unwrap();
            assert!(!page.records.is_empty(), "an empty page at {next} before the tail {tail}");
            for record in page.records {
                assert_eq!(record.seq_num, next, "numbers follow each other");
                next += 1;
                records.push(record);
            }
        }
        records
    }

    /// Appends a record that the stream has already, as it is: what a pipeline must never do.
    pub async fn append_again(&self, basin: &str, stream: &str, record: &Record) {
        let body = json!({ "records": [{ "headers": record.headers, "body": record.body }] });
        let request = self.http.post(self.records_url(stream)).header("s2-basin", basin);
        let answer = request.header("s2-format", "raw").json(&body).send().await.unwrap();
        assert!(answer.status().is_success(), "appending: {}", answer.status());
    }

    fn records_url(&self, stream: &str) -> String {
        format!("{}/v1/streams/{}/records", self.endpoint(), stream.replace('/', "%2F"))
    }
}

/// Copies a folder that is not there yet.
fn copy(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success(), "cp -a {} {}", from.display(), to.display());
}

#[derive(Debug, serde::Deserialize)]
struct Page {
    records: Vec<Record>,
}

/// A record as the server's JSON shows it.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Record {
    pub seq_num: u64,
    pub timestamp: u64,
    #[serde(default)]
    pub headers: Vec<(String, String)>,
    #[serde(default)]
    pub body: String,
}

impl Record {
    /// A fence or a trim: for the server, not for consumers.
    pub fn is_command(&self) -> bool {
        self.headers.iter().any(|(name, _)| name.is_empty())
    }

    /// The value of a header that must be there.
    pub fn header(&self, name: &str) -> &str {
        self.find_header(name).unwrap_or_else(|| {
            panic!("record {} has no header {name}: {:?}", self.seq_num, self.headers)
        })
    }

    pub fn find_header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The generation of the chain that made the record.
    pub fn generation(&self) -> u64 {
        let chain = self.header("sb-chain");
        let (generation, digest) = chain.split_once(':').expect("sb-chain is number:digest");
        assert!(
            digest.len() == 16 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "sb-chain has 16 hexadecimal digits: {chain}"
        );
        generation.parse().expect("the generation is a number")
    }

    pub fn metered_bytes(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(n, v)| 2 + n.len() + v.len()).sum();
        8 + headers + self.body.len()
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("record {} is not JSON: {error}", self.seq_num))
    }
}

/// Without the commands, and without what others have appended.
pub fn data(records: &[Record]) -> Vec<&Record> {
    let is_ours =
        |record: &&Record| !record.is_command() && record.find_header("foreign").is_none();
    records.iter().filter(is_ours).collect()
}
