//! Models served over HTTP: the APIs of OpenAI, Anthropic, Ollama and llama-server in front of one session at a time.
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
mod present;
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
pub use present::Keep;
pub use routes::Access;
pub use served::{Limits, Models, Served, unix_s};

use crate::engine::{EngineError, Session};
use error::ApiError;
use queue::Queue;

/// Time that connections have to take their last bytes.
const LAST_BYTES: Duration = Duration::from_secs(5);
/// Threads that read requests.
const READERS: usize = 4;

/// A model in memory.
pub struct Loaded {
    /// What computes.
    pub session: Session,
    /// Requests of it at once.
    pub slots: usize,
    /// Where its weights lie and what computes them: `session` of `nt run --json`.
    pub about: serde_json::Value,
}

/// Why a model is not loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotLoaded {
    /// It was no longer to be.
    Stopped,
    /// It cannot be: a sentence.
    Failed(String),
}

/// Loads models, of which there is one in memory at a time.
pub trait Loader {
    /// Loads a model, by its number; ends soon after `stop` says so.
    ///
    /// # Errors
    /// Why it is not loaded.
    fn load(&mut self, model: usize, stop: &dyn Fn() -> bool) -> Result<Loaded, NotLoaded>;

    /// Frees a model's memory.
    fn unload(&mut self, model: usize, session: Session);
}

/// How a server has ended.
#[derive(Debug)]
pub enum Over {
    /// All requests at hand ended.
    Ended,
    /// One was cut off.
    CutOff,
    /// Nothing can be computed any more, by this process.
    Lost(EngineError),
}

/// A server that listens.
pub struct Server {
    models: Arc<Models>,
    queue: Arc<Queue>,
    http: std::thread::JoinHandle<()>,
}

impl Server {
    /// Begins to listen; requests for text are refused until the first model is there.
    ///
    /// # Errors
    /// If the system refuses threads or the listener.
    pub fn start(listener: std::net::TcpListener, models: Models, access: Access) -> std::io::Result<Server> {
        listener.set_nonblocking(true)?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(READERS).build()?;
        let limits = *models.limits();
        let queue = Arc::new(Queue::new(limits.queue, models.all().len(), limits.keep));
        let models = Arc::new(models);
        let app = routes::router(models.clone(), queue.clone(), access);
        let (connections, phase) = (limits.connections, queue.phase());
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let http = std::thread::Builder::new().name("http".into()).spawn(move || {
            runtime.block_on(connection::serve(listener, app, connections, phase, LAST_BYTES));
            runtime.shutdown_timeout(Duration::from_millis(100));
        })?;
        Ok(Server { models, queue, http })
    }

    /// The models.
    pub fn models(&self) -> &Arc<Models> {
        &self.models
    }

    /// Answers requests with the first model, and with those that requests ask for, until `asked` says to stop, or `now`
    /// says to stop at once. Then those that wait are refused, and those at hand have their grace. It stops by itself where
    /// nothing can be computed any more.
    pub fn serve(
        &self,
        first: Loaded,
        loader: &mut dyn Loader,
        asked: &dyn Fn() -> bool,
        now: &dyn Fn() -> bool,
    ) -> Over {
        let since = std::cell::Cell::new(None::<Instant>);
        let cut = std::cell::Cell::new(false);
        let grace = self.models.limits().grace;
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
        let mut next = Some((0, first));
        while let Some((model, loaded)) = next.take().or_else(|| self.next_loaded(loader, &stop)) {
            if let Err(e) = self.work(model, loaded, loader, &stop) {
                return Over::Lost(e);
            }
        }
        if cut.get() { Over::CutOff } else { Over::Ended }
    }

    /// The model that is asked for next, in memory; `None` once `stop` says so or the queue closes.
    fn next_loaded(&self, loader: &mut dyn Loader, stop: &dyn Fn() -> bool) -> Option<(usize, Loaded)> {
        loop {
            let model = self.queue.wanted(stop)?;
            let for_nobody = || stop() || self.queue.is_abandoned(model);
            match loader.load(model, &for_nobody) {
                Ok(loaded) => return Some((model, loaded)),
                Err(NotLoaded::Stopped) => self.queue.unloaded(),
                Err(NotLoaded::Failed(why)) => {
                    let name = self.models.all()[model].name();
                    tracing::warn!("{name:?} could not be loaded: {why}");
                    let why = format!("the model {name:?} could not be loaded: {why}");
                    self.queue.failed(model, &ApiError::unavailable(why));
                }
            }
        }
    }

    /// Answers requests with a model until another is to be loaded, or none.
    ///
    /// # Errors
    /// Why nothing can be computed any more.
    fn work(
        &self,
        model: usize,
        loaded: Loaded,
        loader: &mut dyn Loader,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), EngineError> {
        let served = &self.models.all()[model];
        let Loaded { mut session, slots, about } = loaded;
        served.set_session(about, session.gives_hidden());
        self.queue.carried(session.links());
        let (tokenizer, shelf) = (&served.opened.tokenizer, served.shelf.as_ref());
        let mut worker = worker::Worker::new(&mut session, tokenizer, &self.queue, stop, slots, shelf);
        worker.load();
        self.queue.loaded(model, slots);
        let worked = worker.work();
        if worked.is_ok() {
            worker.save();
        }
        drop(worker);
        self.queue.unloaded();
        loader.unload(model, session);
        worked
    }

    /// Ends all connections.
    pub fn end(self) {
        self.queue.end();
        let _ = self.http.join();
    }
}
