//! Recorded sequences of launches (CUDA graphs): repeated, they take the host one call, and the GPU less
//! time from kernel to kernel.

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

/// The recording of a session's stream, if there is one.
pub(super) struct Recorder {
    graph: Option<Graph>,
    /// The stream takes launches and runs none.
    recording: bool,
    /// Recording works here, as far as is known.
    works: bool,
}

// SAFETY: graphs may be launched and destroyed from any thread with the context bound.
unsafe impl Send for Recorder {}

impl Recorder {
    /// Whether recordings are wanted: the environment has no `NT_NO_CUDA_GRAPHS`.
    pub fn wanted() -> bool {
        std::env::var_os("NT_NO_CUDA_GRAPHS").is_none()
    }

    pub fn new() -> Recorder {
        Recorder { graph: None, recording: false, works: Recorder::wanted() }
    }

    /// Whether the stream takes launches and runs none.
    pub fn records(&self) -> bool {
        self.recording
    }

    /// Launches the recording if there is one (`true`), or starts it, if that works here.
    pub fn begin(&mut self, stream: &Stream) -> Result<bool> {
        if let Some(graph) = &self.graph {
            launch(graph, stream)?;
            return Ok(true);
        }
        if self.works {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
            // SAFETY: the stream is live.
            let begun = check(unsafe { sys::cuStreamBeginCapture_v2(stream.raw(), mode) }, "recording cannot begin");
            match begun {
                Ok(()) => self.recording = true,
                Err(e) => self.refuse(&e),
            }
        }
        Ok(false)
    }

    /// Ends what `begin` started, and launches it if it is `complete`. `false`: it could not be recorded, and
    /// nothing has run.
    pub fn end(&mut self, stream: &Stream, complete: bool) -> Result<bool> {
        if !std::mem::take(&mut self.recording) {
            return Ok(true);
        }
        match finish(stream, complete) {
            Ok(Some(graph)) => {
                launch(&graph, stream)?;
                self.graph = Some(graph);
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
        tracing::info!("passes are launched kernel by kernel, since they cannot be recorded as CUDA graphs: {why}");
        self.works = false;
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
