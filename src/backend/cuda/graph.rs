//! Recorded sequences of launches (CUDA graphs): repeated, they take the host one call, and the GPU less
//! time from kernel to kernel.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Device, Stream, check};
use crate::backend::BackendError;

type Result<T = ()> = std::result::Result<T, BackendError>;

/// A recording, ready to be launched.
struct Graph {
    exec: sys::CUgraphExec,
    device: Arc<Device>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made in `finish`, destroyed once; the driver lets its work finish.
            unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}

/// The recordings of a session's stream, by number.
#[derive(Default)]
pub(super) struct Recorder {
    graphs: HashMap<usize, Graph>,
    /// What is being recorded: the stream takes launches and runs none.
    recording: Option<usize>,
    /// Why nothing is recorded any more.
    refused: Option<String>,
}

// SAFETY: graphs may be launched and destroyed from any thread with the context bound.
unsafe impl Send for Recorder {}

impl Recorder {
    /// Nothing is ever recorded if the environment has `NT_NO_CUDA_GRAPHS`.
    pub fn new() -> Recorder {
        let refused = std::env::var_os("NT_NO_CUDA_GRAPHS").map(|_| "NT_NO_CUDA_GRAPHS is set".to_owned());
        Recorder { refused, ..Recorder::default() }
    }

    /// Launches recording `number` if there is one (`true`), or starts it, if recording works here.
    pub fn begin(&mut self, stream: &Stream, number: usize) -> Result<bool> {
        if let Some(graph) = self.graphs.get(&number) {
            launch(graph, stream)?;
            return Ok(true);
        }
        if self.refused.is_none() {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            // SAFETY: the stream is live.
            let begun = check(unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) }, "recording cannot begin");
            match begun {
                Ok(()) => self.recording = Some(number),
                Err(e) => self.refuse(&e),
            }
        }
        Ok(false)
    }

    /// Ends what `begin` started, and launches it if it is `complete`. `false`: it could not be recorded, and
    /// nothing has run.
    pub fn end(&mut self, stream: &Stream, complete: bool) -> Result<bool> {
        let Some(number) = self.recording.take() else {
            return Ok(true);
        };
        match finish(stream, complete) {
            Ok(Some(graph)) => {
                launch(&graph, stream)?;
                self.graphs.insert(number, graph);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(e) => {
                self.refuse(&e);
                Ok(false)
            }
        }
    }

    fn refuse(&mut self, why: &BackendError) {
        tracing::debug!("CUDA graphs are not used: {why}");
        self.refused = Some(why.to_string());
    }
}

fn launch(graph: &Graph, stream: &Stream) -> Result {
    // SAFETY: both handles are live.
    check(unsafe { sys::cuGraphLaunch(graph.exec, stream.raw()) }, "a recorded pass could not be launched")
}

/// Ends the recording; `None` if it is not `wanted`.
fn finish(stream: &Stream, wanted: bool) -> Result<Option<Graph>> {
    let mut graph = std::ptr::null_mut();
    // SAFETY: the stream is live and records; graph receives the handle.
    let ended = check(unsafe { sys::cuStreamEndCapture(stream.raw(), &mut graph) }, "recording failed");
    if graph.is_null() {
        return ended.map(|()| None);
    }
    let mut exec = std::ptr::null_mut();
    let made = match (&ended, wanted) {
        // SAFETY: graph is live; exec receives the handle.
        (Ok(()), true) => check(unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }, "recording failed"),
        _ => ended,
    };
    // SAFETY: made above, destroyed once; what was instantiated from it stays.
    unsafe { sys::cuGraphDestroy(graph) };
    made?;
    Ok(wanted.then(|| Graph { exec, device: Arc::clone(stream.device()) }))
}
