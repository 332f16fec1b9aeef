//! The way between a process and S2, with everything that can happen on it.
//!
//! What is under way belongs to the world and not to the process: a batch of a process that has died
//! may still land, and so may one that its sender has given up.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use rand::RngExt as _;
use reqwest::{Body, Request, Response};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::faults::Fault;
use super::process::Process;
use super::world::{STREAM, World, lock};
use crate::sink::error::Fault as Broken;
use crate::sink::model::{Answer, Frame, FrameDecoder, error, frame};
use crate::sink::transport::{Answering, Failed, Lane, Transport};

/// One process's way to S2.
pub(super) struct Network {
    world: Arc<World>,
    process: Arc<Process>,
}

impl Network {
    pub(super) fn new(world: &Arc<World>, process: &Arc<Process>) -> Self {
        Self { world: Arc::clone(world), process: Arc::clone(process) }
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("process", &self.process.number).finish_non_exhaustive()
    }
}

impl Transport for Network {
    fn execute(&self, lane: Lane, request: Request) -> Answering {
        let (world, process) = (Arc::clone(&self.world), Arc::clone(&self.process));
        match lane {
            Lane::Unary => Box::pin(unary(world, process, request)),
            Lane::Session => Box::pin(session(world, process, request)),
        }
    }
}

/// What S2 may say by itself: status, code, and whether an append may have landed all the same.
const TROUBLES: [(u16, &str, bool); 17] = [
    (400, "bad_header", false),
    (401, "authn", false),
    (403, "quota_exhausted", false),
    (403, "permission_denied", false),
    (404, "stream_not_found", false),
    (404, "basin_not_found", false),
    (404, "access_token_not_found", false),
    (408, "request_timeout", true),
    (409, "transaction_conflict", false),
    (429, "rate_limited", false),
    (499, "client_hangup", true),
    (500, "storage", true),
    (500, "other", true),
    (502, "hot_server", false),
    (503, "unavailable", true),
    (503, "server_draining", false),
    (504, "upstream_timeout", true),
];

fn trouble(world: &World, stream: &str) -> (Answer, bool) {
    let (status, code, may_land) = loop {
        let drawn = world.draw(|rng| TROUBLES[rng.random_range(0..TROUBLES.len())]);
        let believed = match drawn.1 {
            // Where missing streams are to be created, this one would count as deleted, and so does a
            // routed one.
            "stream_not_found" => world.workload.create || stream != STREAM,
            "basin_not_found" => world.workload.create,
            _ => false,
        };
        if !believed {
            break drawn;
        }
    };
    world.note(code, u64::from(status), 0);
    (error(status, code, "simulated"), may_land && world.chance(0.5))
}

fn failed(fault: Broken) -> Failed {
    Failed { fault, source: None }
}

fn respond(answer: Answer) -> Response {
    let response = http::Response::builder().status(answer.status).body(answer.body);
    Response::from(response.expect("it is an answer"))
}

/// How long something is under way that nobody waits for any more.
fn astray(world: &World, probability: f64) -> Duration {
    if world.fault(Fault::Late, probability) { world.between(1000, 30_000) } else { world.delay() }
}

async fn unary(
    world: Arc<World>,
    process: Arc<Process>,
    request: Request,
) -> Result<Response, Failed> {
    let stream = stream_of(&request);
    let answer = ask(Arc::clone(&world), Arc::clone(&process), request).await;
    if answer.as_ref().map_or(true, |answer| !answer.status().is_success()) {
        world.fails_unread(&stream, process.number);
    }
    answer
}

async fn ask(
    world: Arc<World>,
    process: Arc<Process>,
    request: Request,
) -> Result<Response, Failed> {
    if world.fault(Fault::Refuse, 0.2) || world.is_away() {
        sleep(world.delay()).await;
        return Err(failed(Broken::Connect));
    }
    let patience = request.timeout().copied().unwrap_or(Duration::from_secs(15));
    let there = astray(&world, 0.1);
    let (answer_in, answer) = oneshot::channel();
    let times = world.times_put_back();
    tokio::spawn({
        let world = Arc::clone(&world);
        async move {
            sleep(there).await;
            if world.times_put_back() != times {
                return;
            }
            let stream = stream_of(&request);
            let answer = if let Some((status, code)) = world.is_shut(&stream) {
                error(status, code, "simulated")
            } else if world.fault(Fault::Status, 0.1) {
                let (answer, lands) = trouble(&world, &stream);
                if lands {
                    handle(&world, &process, &request);
                }
                answer
            } else if is_json_append(&request) && world.fault(Fault::RefuseRecord, 0.05) {
                refused(&world, &process)
            } else {
                handle(&world, &process, &request)
            };
            sleep(world.delay()).await;
            drop(answer_in.send(answer));
        }
    });
    if world.fault(Fault::Cut, 0.1) {
        sleep(world.delay()).await;
        return Err(failed(Broken::Cut));
    }
    if world.fault(Fault::Lose, 0.05) {
        sleep(patience).await;
        return Err(failed(Broken::TimeOut));
    }
    match timeout(patience, answer).await {
        Ok(Ok(answer)) => Ok(respond(answer)),
        Ok(Err(_)) | Err(_) => Err(failed(Broken::TimeOut)),
    }
}

/// The stream that a request is about; empty where it is about another thing.
fn stream_of(request: &Request) -> String {
    let path = request.url().path();
    let mut parts = path.split('/').skip_while(|part| *part != "streams").skip(1);
    parts.next().unwrap_or_default().to_owned()
}

fn is_json_append(request: &Request) -> bool {
    request.body().and_then(Body::as_bytes).is_some_and(|body| body.starts_with(b"{\"records"))
}

/// S2 does not take a record, whatever it thinks is wrong with it.
fn refused(world: &World, process: &Process) -> Answer {
    let text = if world.chance(0.5) { "its metered size" } else { "not this one" };
    world.note("refused", process.number, 0);
    world.state().refused_any = true;
    error(422, "invalid", text)
}

fn handle(world: &World, process: &Process, request: &Request) -> Answer {
    let url = request.url();
    let query = |name: &str| {
        let (_, value) = url.query_pairs().find(|(found, _)| found == name)?;
        value.parse().ok()
    };
    let body = request.body().and_then(Body::as_bytes).unwrap_or_default();
    let answer = lock(&world.server).answer(request.method().as_str(), url.path(), query, body);
    world.landed(process.number);
    world.event(url.path(), u64::from(answer.status), process.number);
    answer
}

async fn session(
    world: Arc<World>,
    process: Arc<Process>,
    mut request: Request,
) -> Result<Response, Failed> {
    sleep(world.delay()).await;
    if world.fault(Fault::Refuse, 0.2) || world.is_away() {
        return Err(failed(Broken::Connect));
    }
    if world.fault(Fault::Status, 0.05) {
        return Ok(respond(trouble(&world, &stream_of(&request)).0));
    }
    let stream = stream_of(&request);
    world.has_session(&stream, process.number);
    let body = request.body_mut().take().unwrap_or_default();
    let (answers, mut received) = mpsc::unbounded_channel::<Result<Bytes, io::Error>>();
    let http2 = world.chance(0.5);
    tokio::spawn(serve(Arc::clone(&world), process, stream, body, answers));
    let answers = futures_util::stream::poll_fn(move |context| received.poll_recv(context));
    let version = if http2 { http::Version::HTTP_2 } else { http::Version::HTTP_11 };
    let response = http::Response::builder().version(version).body(Body::wrap_stream(answers));
    Ok(Response::from(response.expect("it is an answer")))
}

/// The far end of an append session.
async fn serve(
    world: Arc<World>,
    process: Arc<Process>,
    stream: String,
    mut body: Body,
    answers: mpsc::UnboundedSender<Result<Bytes, io::Error>>,
) {
    let times = world.times_put_back();
    // Of what was written when its sender let go, all or nothing more arrives.
    let reads_on = world.chance(0.5);
    let late = world.fault(Fault::Late, 0.2);
    let mut silent = false;
    let mut decoder = FrameDecoder::default();
    let mut frames = VecDeque::new();
    let (back, mut on_their_way) = mpsc::unbounded_channel::<(Instant, Result<Bytes, io::Error>)>();
    let closed = answers.clone();
    let answers_cut = answers.clone();
    tokio::spawn(async move {
        while let Some((due, answer)) = on_their_way.recv().await {
            sleep_until(due).await;
            if answers.send(answer).is_err() {
                return;
            }
        }
    });
    let mut due = Instant::now();
    let mut send = |delay: Duration, answer| {
        due = due.max(Instant::now() + delay);
        drop(back.send((due, answer)));
    };
    loop {
        let input = tokio::select! {
            biased;
            () = world.cut.notified() => {
                drop(answers_cut.send(Err(io::ErrorKind::ConnectionReset.into())));
                return;
            }
            input = next_frame(&mut body, &mut decoder, &mut frames) => input,
        };
        let Some(input) = input else { break };
        sleep(world.delay()).await;
        if late && world.chance(0.3) {
            sleep(world.between(1000, 30_000)).await;
        }
        if !process.is_alive() && world.chance(0.3) {
            sleep(world.between(0, 3000)).await;
        }
        let is_gone = world.times_put_back() != times;
        if is_gone || (!reads_on && (closed.is_closed() || !process.is_alive())) {
            return;
        }
        let append = |input: &[u8]| {
            let result = lock(&world.server).append(&stream, input);
            world.landed(process.number);
            let (what, number) = match &result {
                Ok(ack) => ("appended up to", ack.end.unwrap_or_default().seq_num),
                Err(refused) => ("append refused", u64::from(refused.status)),
            };
            world.event(what, number, process.number);
            result
        };
        let shut = world.shuts_unanswered(&stream);
        if shut.is_some() || world.fault(Fault::Cut, 0.05) {
            if shut.is_some() || world.chance(0.5) {
                drop(append(&input));
            }
            if let Some(stream) = shut {
                world.shut(stream);
                world.reroute();
            }
            world.note("cut", process.number, 0);
            send(world.delay(), Err(io::ErrorKind::ConnectionReset.into()));
            return;
        }
        if let Some((status, code)) = world.is_shut(&stream) {
            send(world.delay(), Ok(frame(Err(error(status, code, "simulated")))));
            return;
        }
        if !silent && world.fault(Fault::Status, 0.05) {
            let (answer, lands) = trouble(&world, &stream);
            if lands {
                drop(append(&input));
            }
            send(world.delay(), Ok(frame(Err(answer))));
            return;
        }
        if !silent && world.fault(Fault::RefuseRecord, 0.03) {
            send(world.delay(), Ok(frame(Err(refused(&world, &process)))));
            return;
        }
        // From here on nothing comes back: answers come in order, or not at all.
        silent |= world.fault(Fault::Lose, 0.02);
        let result = append(&input);
        let over = result.is_err();
        if !silent {
            let mut answer = frame(result).to_vec();
            if world.fault(Fault::Advise, 0.05) && !over {
                answer[3] |= 0b0001_0000;
            }
            send(world.delay(), Ok(answer.into()));
        }
        if over && !silent {
            return;
        }
        if over {
            break;
        }
    }
    if silent {
        closed.closed().await;
    }
}

async fn next_frame(
    body: &mut Body,
    decoder: &mut FrameDecoder,
    frames: &mut VecDeque<Bytes>,
) -> Option<Bytes> {
    loop {
        if let Some(frame) = frames.pop_front() {
            return Some(frame);
        }
        while let Some(Frame::Message { payload, .. }) = decoder.next_frame().ok()? {
            frames.push_back(payload);
        }
        if frames.is_empty() {
            let piece = body.frame().await?.ok()?;
            decoder.push(&piece.into_data().ok()?);
        }
    }
}
