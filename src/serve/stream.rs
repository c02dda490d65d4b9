//! The body of an answer that is told as it grows. It holds the job's events: once a connection ends, so does the body,
//! and the job is cancelled.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use hyper::body::{Body, Frame};
use tokio::time::{Instant, Sleep};

use super::connection::AtWork;
use super::error::ApiError;
use super::job::Event;
use super::outbox::Inbox;
use super::steps::{Answers, Dialect, Step, Steps};

/// Bytes after which what there is to say is sent.
const FRAME_BYTES: usize = 16 << 10;

/// A body that grows.
pub struct Stream {
    events: Inbox<Event>,
    steps: Steps,
    dialect: Box<dyn Dialect>,
    /// What is to be sent first.
    begin: Option<String>,
    ended: bool,
    ping: Duration,
    next_ping: Pin<Box<Sleep>>,
    /// When the request has taken too long.
    end: Pin<Box<Sleep>>,
    limit: Duration,
    /// Until the job has ended, the connection gives way to no other.
    at_work: Option<AtWork>,
}

impl Stream {
    /// A body of these events; a ping comes where `ping` goes by without one, and an error at `end`, which is `limit`
    /// after the request.
    pub fn new(
        events: Inbox<Event>,
        steps: Steps,
        mut dialect: Box<dyn Dialect>,
        ping: Duration,
        (end, limit): (Instant, Duration),
        at_work: Option<AtWork>,
    ) -> Stream {
        let mut begin = String::new();
        dialect.begin(&mut begin);
        Stream {
            events,
            steps,
            dialect,
            begin: Some(begin).filter(|b| !b.is_empty()),
            ended: false,
            ping,
            next_ping: Box::pin(tokio::time::sleep(ping)),
            end: Box::pin(tokio::time::sleep_until(end)),
            limit,
            at_work,
        }
    }

    fn frame(&mut self, text: String) -> Poll<Option<Result<Frame<Bytes>, std::convert::Infallible>>> {
        self.next_ping.as_mut().reset(Instant::now() + self.ping);
        Poll::Ready(Some(Ok(Frame::data(text.into()))))
    }

    fn add(&mut self, event: Event, out: &mut String) {
        if matches!(event, Event::Done(_) | Event::Failed(_)) {
            (self.ended, self.at_work) = (true, None);
        }
        let dialect = &mut self.dialect;
        self.steps.of(event, &mut |step| dialect.step(step, out));
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::convert::Infallible>>> {
        let this = self.get_mut();
        if let Some(begin) = this.begin.take() {
            return this.frame(begin);
        }
        if this.ended {
            return Poll::Ready(None);
        }
        let mut out = String::new();
        while out.len() < FRAME_BYTES && !this.ended {
            match this.events.poll(cx) {
                Poll::Ready(Some(event)) => this.add(event, &mut out),
                Poll::Ready(None) => {
                    this.add(Event::Failed(ApiError::failed("the answer ended without a reason")), &mut out);
                }
                Poll::Pending => break,
            }
        }
        if !out.is_empty() {
            return this.frame(out);
        }
        if this.ended {
            return Poll::Ready(None);
        }
        if this.end.as_mut().poll(cx).is_ready() {
            this.events.close();
            this.add(Event::Failed(ApiError::timed_out(this.limit.as_secs())), &mut out);
            return this.frame(out);
        }
        if this.next_ping.as_mut().poll(cx).is_ready() {
            if let Some(ping) = this.dialect.ping() {
                return this.frame(ping.to_owned());
            }
            this.next_ping.as_mut().reset(Instant::now() + this.ping);
            // Its timer is asked once, so that it wakes.
            let _ = this.next_ping.as_mut().poll(cx);
        }
        Poll::Pending
    }
}

/// The whole answer of a job.
///
/// # Errors
/// Why there is none.
pub async fn whole(
    mut events: Inbox<Event>,
    mut steps: Steps,
    dialect: &mut dyn Dialect,
    (end, limit): (Instant, Duration),
) -> Result<serde_json::Value, ApiError> {
    let mut answers = Answers::default();
    let all = async {
        while let Some(event) = events.hear().await {
            let done = matches!(event, Event::Done(_));
            let mut failed = None;
            steps.of(event, &mut |step: Step| failed = failed.take().or(answers.add(step).err()));
            match failed {
                Some(e) => return Err(e),
                None if done => return Ok(()),
                None => {}
            }
        }
        Err(ApiError::failed("the answer ended without a reason"))
    };
    match tokio::time::timeout_at(end, all).await {
        Ok(result) => result?,
        Err(_) => return Err(ApiError::timed_out(limit.as_secs())),
    }
    Ok(dialect.whole(&answers))
}
