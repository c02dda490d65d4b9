//! A model served over HTTP: the APIs of OpenAI, Anthropic, Ollama and llama-server in front of one session.
//!
//! A request goes `connection` → `routes` → its dialect (`openai`, …), which reads it into a `job::Task` → `queue` →
//! `worker`, the only one that touches the session, and comes back as events: `steps` tells words, reasoning and
//! calls apart, the dialect writes them, `stream` sends them. No request reaches the file system.

mod anthropic;
mod budget;
mod calls;
mod connection;
mod disk;
mod embedding;
mod error;
mod fields;
mod grammar;
mod histogram;
mod info;
mod job;
mod native;
mod ollama;
mod openai;
mod outbox;
mod page;
mod params;
mod prefix;
mod prompt;
mod queue;
mod responses;
mod routes;
mod served;
mod split;
mod steps;
mod stream;
mod text;
mod tokens;
mod vectors;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use disk::Shelf;
pub use job::Pooling;
pub use routes::Access;
pub use served::{Limits, Served, unix_s};

use crate::engine::Session;
use queue::Queue;

/// Time that connections have to take their last bytes.
const LAST_BYTES: Duration = Duration::from_secs(5);
/// Threads that read requests.
const READERS: usize = 4;

/// A server that listens.
pub struct Server {
    served: Arc<Served>,
    queue: Arc<Queue>,
    http: std::thread::JoinHandle<()>,
}

impl Server {
    /// Begins to listen; requests for text are refused until the model is there.
    ///
    /// # Errors
    /// If the system refuses threads or the listener.
    pub fn start(listener: std::net::TcpListener, served: Served, access: Access) -> std::io::Result<Server> {
        listener.set_nonblocking(true)?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(READERS).build()?;
        let queue = Arc::new(Queue::new(served.limits.queue));
        let served = Arc::new(served);
        let app = routes::router(served.clone(), queue.clone(), access);
        let (connections, phase) = (served.limits.connections, queue.phase());
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let http = std::thread::Builder::new().name("http".into()).spawn(move || {
            runtime.block_on(connection::serve(listener, app, connections, phase, LAST_BYTES));
            runtime.shutdown_timeout(Duration::from_millis(100));
        })?;
        Ok(Server { served, queue, http })
    }

    /// The model.
    pub fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// Answers requests with a session, `slots` at once, until `asked` says to stop, or `now` says to stop at once. Then
    /// those that wait are refused, and those at hand have their grace. Returns whether one was cut off.
    pub fn serve(&self, session: &mut Session, slots: usize, asked: &dyn Fn() -> bool, now: &dyn Fn() -> bool) -> bool {
        self.queue.carried(session.links());
        let since = std::cell::Cell::new(None::<Instant>);
        let cut = std::cell::Cell::new(false);
        let grace = self.served.limits.grace;
        let stop = || {
            if asked() && since.get().is_none() {
                since.set(Some(Instant::now()));
                self.queue.close();
            }
            let stop = now() || since.get().is_some_and(|s| s.elapsed() > grace);
            // It is asked in the middle of a job, too.
            cut.set(cut.get() || stop && !self.queue.view().running.is_empty());
            stop
        };
        let (tokenizer, shelf) = (&self.served.opened.tokenizer, self.served.shelf.as_ref());
        let mut worker = worker::Worker::new(session, tokenizer, &self.queue, &stop, slots, shelf);
        worker.load();
        self.queue.open(slots);
        worker.work();
        worker.save();
        cut.get()
    }

    /// Ends all connections.
    pub fn end(self) {
        self.queue.end();
        let _ = self.http.join();
    }
}
