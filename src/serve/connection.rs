//! Connections: how many, how slow they may be, which give way to new ones, and their end.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, Sleep};

use super::job::Client;
use super::queue::Phase;

/// The longest that a client may take for a head, and a connection may rest between requests.
const HEAD: Duration = Duration::from_secs(60);
/// The longest that a client may take nothing of what is sent.
const WRITE: Duration = Duration::from_secs(60);
/// The longest that a client may be behind with what is sent.
const BEHIND: Duration = Duration::from_secs(600);
/// Bytes of a head at most, and of a connection's buffer.
const BUFFER_BYTES: usize = 64 << 10;
/// A rest after accepting failed: for want of file descriptors, mostly.
const REST: Duration = Duration::from_millis(50);
/// How often a connection is asked whether its client has closed it, and the time that an answer has still.
const LOOK: Duration = Duration::from_millis(500);

/// Connections that are open.
#[derive(Debug, Default)]
struct Registry {
    all: Mutex<Vec<Entry>>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    /// Since when no job of it waits or runs.
    rests: Option<Instant>,
    evict: Arc<Notify>,
}

impl Registry {
    fn with<T>(&self, work: impl FnOnce(&mut Vec<Entry>) -> T) -> T {
        work(&mut self.all.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends the connection that has rested for longest; false if all are at work.
    fn evict(&self) -> bool {
        self.with(|all| {
            let resting = all.iter_mut().filter(|e| e.rests.is_some());
            let Some(longest) = resting.min_by_key(|e| e.rests) else { return false };
            // It is not chosen twice.
            longest.rests = None;
            longest.evict.notify_one();
            true
        })
    }
}

/// A connection, as its requests know it.
#[derive(Clone, Debug)]
pub struct Connection {
    registry: Arc<Registry>,
    id: u64,
    client: Client,
}

impl Connection {
    fn new(registry: &Arc<Registry>, id: u64, client: Client) -> (Connection, Arc<Notify>) {
        let evict = Arc::new(Notify::new());
        let entry = Entry { id, rests: Some(Instant::now()), evict: evict.clone() };
        registry.with(|all| all.push(entry));
        (Connection { registry: registry.clone(), id, client }, evict)
    }

    /// Whose it is, by its address.
    pub fn client(&self) -> Client {
        self.client
    }

    fn set(&self, rests: Option<Instant>) {
        self.registry.with(|all| all.iter_mut().filter(|e| e.id == self.id).for_each(|e| e.rests = rests));
    }

    /// A job of this connection waits or runs: it gives way to no other until the result is dropped.
    pub fn at_work(&self) -> AtWork {
        self.set(None);
        AtWork(self.clone())
    }
}

/// A connection that gives way to no other.
#[derive(Debug)]
pub struct AtWork(Connection);

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.set(Some(Instant::now()));
    }
}

/// Takes an entry out of the registry with its connection's end.
struct Listed(Connection);

impl Drop for Listed {
    fn drop(&mut self) {
        self.0.registry.with(|all| all.retain(|e| e.id != self.0.id));
    }
}

/// Serves `app` on all connections until `phase` says that the server closes and no job is left; then those at hand have
/// `last` to end. At most `most` at once: a new one takes the place of the one that has rested for longest.
pub async fn serve(listener: TcpListener, app: Router, most: usize, phase: watch::Receiver<Phase>, last: Duration) {
    let places = Arc::new(Semaphore::new(most));
    let registry = Arc::new(Registry::default());
    let mut over = phase.clone();
    let mut id = 0;
    loop {
        let accepted = async {
            let accepted = listener.accept().await;
            let place = match places.clone().try_acquire_owned() {
                Err(_) if accepted.is_ok() => {
                    registry.evict();
                    places.clone().acquire_owned().await.ok()
                }
                place => place.ok(),
            };
            (place, accepted)
        };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            () = reached(&mut over, Phase::Over) => break,
        };
        match accepted {
            Ok((stream, from)) => {
                let (app, phase) = (app.clone(), phase.clone());
                id += 1;
                let (connection, evict) = Connection::new(&registry, id, Client::at(from.ip()));
                tokio::spawn(async move {
                    let listed = Listed(connection);
                    tokio::select! {
                        () = serve_one(stream, app, listed.0.clone(), phase) => {}
                        () = evict.notified() => {}
                    }
                    drop((listed, place));
                });
            }
            Err(e) => {
                tracing::debug!("accepting a connection failed: {e}");
                tokio::time::sleep(REST).await;
            }
        }
    }
    drop(listener);
    let all = u32::try_from(most).unwrap_or(u32::MAX);
    // Whoever does not end in time is cut off with the runtime.
    let _ = tokio::time::timeout(last, places.acquire_many(all)).await;
}

/// Waits until the server is in a phase, or beyond it.
async fn reached(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    let _ = phase.wait_for(|p| *p >= wanted).await;
}

/// Gives each request the connection that it came on.
struct Tagged {
    app: TowerToHyperService<Router>,
    connection: Connection,
    /// A request has come.
    seen: Arc<Notify>,
}

impl hyper::service::Service<hyper::Request<Incoming>> for Tagged {
    type Response = axum::response::Response;
    type Error = std::convert::Infallible;
    type Future = <TowerToHyperService<Router> as hyper::service::Service<hyper::Request<Incoming>>>::Future;

    fn call(&self, mut request: hyper::Request<Incoming>) -> Self::Future {
        self.seen.notify_one();
        request.extensions_mut().insert(self.connection.clone());
        self.app.call(request)
    }
}

async fn serve_one(stream: TcpStream, app: Router, connection: Connection, mut phase: watch::Receiver<Phase>) {
    // A token is sent when it is there, not when more come.
    let _ = stream.set_nodelay(true);
    let (stream, watched) = watched(stream);
    let Some(stream) = stream else { return };
    let io = TokioIo::new(Impatient { stream, stalled: None, behind: None });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(BUFFER_BYTES);
    // While the server closes, a client is told so, once.
    let closes = *phase.borrow() >= Phase::Closing;
    builder.keep_alive(!closes);
    let seen = Arc::new(Notify::new());
    let app = Tagged { app: TowerToHyperService::new(app), connection, seen: seen.clone() };
    let served = builder.serve_connection(io, app);
    tokio::pin!(served);
    let ended = tokio::select! {
        ended = served.as_mut() => ended,
        () = closed_by_client(watched) => return,
        () = reached(&mut phase, Phase::Closing), if !closes => {
            // A connection that was made just now has its first request under way: it is answered, not dropped.
            tokio::select! {
                ended = served.as_mut() => ended,
                _ = tokio::time::timeout(LOOK, seen.notified()) => {
                    served.as_mut().graceful_shutdown();
                    served.await
                }
            }
        }
    };
    if let Err(e) = ended {
        tracing::debug!("a connection ended: {e}");
    }
}

/// The stream, and another hold of the same connection that only watches it. What a client sent behind its request lies
/// unread while that is answered, and hides the connection's end from whoever reads.
fn watched(stream: TcpStream) -> (Option<TcpStream>, Option<TcpStream>) {
    let Ok(stream) = stream.into_std() else { return (None, None) };
    let watched = stream.try_clone().and_then(TcpStream::from_std).ok();
    (TcpStream::from_std(stream).ok(), watched)
}

/// Waits until the client has closed the connection, and a moment longer, in which an answer may still go out.
async fn closed_by_client(watched: Option<TcpStream>) {
    let Some(stream) = watched else { return std::future::pending().await };
    loop {
        let closed = stream.ready(Interest::READABLE).await.is_ok_and(|ready| ready.is_read_closed());
        tokio::time::sleep(LOOK).await;
        if closed {
            return;
        }
    }
}

/// A stream whose other end must take what is written in time.
struct Impatient {
    stream: TcpStream,
    /// When it has taken nothing for too long; there while it takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// When it has been behind for too long; there from the first byte that it did not take at once to the last.
    behind: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn timed<T>(&mut self, cx: &mut Context<'_>, written: Poll<std::io::Result<T>>) -> Poll<std::io::Result<T>> {
        let after = |time| move || Box::pin(tokio::time::sleep_until(Instant::now() + time));
        if written.is_ready() {
            self.stalled = None;
        } else {
            let stalled = self.stalled.get_or_insert_with(after(WRITE));
            if stalled.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()));
            }
            self.behind.get_or_insert_with(after(BEHIND));
        }
        if self.behind.as_mut().is_some_and(|behind| behind.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Err(std::io::ErrorKind::TimedOut.into()));
        }
        written
    }
}

impl AsyncRead for Impatient {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.timed(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.timed(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let this = self.get_mut();
        // All of it is written.
        this.behind = None;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_that_rested_for_longest_gives_way() {
        let registry = Arc::new(Registry::default());
        let all: Vec<_> = (0..3).map(|id| Connection::new(&registry, id, Client::Key(0))).collect();
        let evicted = |i: usize| {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            std::pin::pin!(all[i].1.notified()).poll(&mut cx).is_ready()
        };
        let work = all[0].0.at_work();
        assert!(registry.evict() && !evicted(0) && evicted(1) && !evicted(2));
        drop(work);
        // The first rests since a moment ago, and the second has been chosen.
        assert!(registry.evict() && evicted(2) && !evicted(0));
        assert!(registry.evict() && evicted(0) && !registry.evict());
    }
}
