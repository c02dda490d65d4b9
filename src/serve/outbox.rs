//! Events on their way to a client. Whoever computes never waits for a client, so what one leaves unread is counted: a
//! client that leaves more than its share has its answer ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Bytes of events that one client may leave unread.
const OWN_MAX: usize = 4 << 20;
/// Bytes that each may leave unread while all together leave more than [`ALL_MAX`].
const SHARE: usize = 256 << 10;
/// Bytes that all clients together may leave unread, from which on each has its share alone.
const ALL_MAX: usize = 64 << 20;

/// Bytes that wait to be read: of one client, and of all.
#[derive(Clone, Debug, Default)]
struct Unread {
    own: Arc<AtomicUsize>,
    all: Arc<AtomicUsize>,
}

impl Unread {
    fn add(&self, n: usize) {
        self.own.fetch_add(n, Ordering::Relaxed);
        self.all.fetch_add(n, Ordering::Relaxed);
    }

    fn take(&self, n: usize) {
        self.own.fetch_sub(n, Ordering::Relaxed);
        self.all.fetch_sub(n, Ordering::Relaxed);
    }
}

/// What takes memory while it waits to be read.
pub trait Weighed {
    /// About how many bytes.
    fn bytes(&self) -> usize;
}

/// Where events are told.
#[derive(Debug)]
pub struct Outbox<E> {
    out: UnboundedSender<E>,
    unread: Unread,
}

/// Where they are heard.
#[derive(Debug)]
pub struct Inbox<E: Weighed> {
    events: UnboundedReceiver<E>,
    unread: Unread,
}

/// A pair for one job; `all` counts the bytes of all of them.
pub fn outbox<E: Weighed>(all: &Arc<AtomicUsize>) -> (Outbox<E>, Inbox<E>) {
    let (out, events) = unbounded_channel();
    let unread = Unread { own: Arc::default(), all: all.clone() };
    (Outbox { out, unread: unread.clone() }, Inbox { events, unread })
}

impl<E: Weighed> Outbox<E> {
    /// Tells an event; a client that is gone hears nothing.
    pub fn tell(&self, event: E) {
        let n = event.bytes();
        self.unread.add(n);
        if self.out.send(event).is_err() {
            self.unread.take(n);
        }
    }

    /// Whether nobody listens any more.
    pub fn is_closed(&self) -> bool {
        self.out.is_closed()
    }

    /// Whether the client has left more unread than it may.
    pub fn is_full(&self) -> bool {
        let (own, all) = (self.unread.own.load(Ordering::Relaxed), self.unread.all.load(Ordering::Relaxed));
        own > OWN_MAX || (all > ALL_MAX && own > SHARE)
    }
}

impl<E: Weighed> Inbox<E> {
    /// The next event; `None` if there will be no more.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<E>> {
        let event = self.events.poll_recv(cx);
        if let Poll::Ready(Some(event)) = &event {
            self.unread.take(event.bytes());
        }
        event
    }

    /// The next event; `None` if there will be no more.
    pub async fn hear(&mut self) -> Option<E> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    /// Hears nothing more.
    pub fn close(&mut self) {
        self.events.close();
        while let Ok(event) = self.events.try_recv() {
            self.unread.take(event.bytes());
        }
    }
}

impl<E: Weighed> Drop for Inbox<E> {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Weighed for usize {
        fn bytes(&self) -> usize {
            *self
        }
    }

    #[test]
    fn what_is_not_read_is_counted_until_it_is() {
        let all = Arc::new(AtomicUsize::new(0));
        let (out, mut heard) = outbox(&all);
        out.tell(OWN_MAX / 2 + 1);
        assert!(!out.is_full());
        out.tell(OWN_MAX / 2 + 1);
        assert!(out.is_full() && all.load(Ordering::Relaxed) > OWN_MAX);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(matches!(heard.poll(&mut cx), Poll::Ready(Some(_))));
        assert!(!out.is_full());
        // Others have left too much.
        all.fetch_add(ALL_MAX, Ordering::Relaxed);
        assert!(out.is_full());
        all.fetch_sub(ALL_MAX, Ordering::Relaxed);
        drop(heard);
        assert_eq!(all.load(Ordering::Relaxed), 0);
        out.tell(5);
        assert!(out.is_closed() && all.load(Ordering::Relaxed) == 0);
    }
}
