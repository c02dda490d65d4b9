//! Vectors that no unit holds: norms and biases that had to be widened.

use super::EngineError;
use crate::backend::{DeviceAlloc, DeviceMemory};
use crate::model::{Held, Model};

/// Vectors that are held apart from the units, as F32, in the backend's memory.
pub(super) struct Apart {
    /// Address of each of the model's held vectors.
    pub addresses: Vec<u64>,
    /// The same in RAM.
    pub in_ram: Vec<u64>,
    /// Where processors read them.
    _host: Vec<Vec<f32>>,
    _device: Option<DeviceAlloc>,
}

/// Vectors in device memory begin at multiples of this.
const APART_ALIGN: u64 = 256;

impl Apart {
    pub fn new(model: &Model, widened: Vec<Vec<f32>>, device: Option<&dyn DeviceMemory>) -> Result<Apart, EngineError> {
        let address = |bases: &[u64]| {
            let of = |h: &Held| bases[h.tensor] + 4 * h.first as u64;
            model.held.iter().map(of).collect::<Vec<_>>()
        };
        let in_ram = address(&widened.iter().map(|v| v.as_ptr() as u64).collect::<Vec<_>>());
        let Some(device) = device.filter(|_| !widened.is_empty()) else {
            return Ok(Apart { addresses: in_ram.clone(), in_ram, _host: widened, _device: None });
        };
        let mut all: Vec<f32> = Vec::new();
        let mut bases = Vec::with_capacity(widened.len());
        for v in &widened {
            bases.push(4 * all.len() as u64);
            all.extend(v);
            all.resize((4 * all.len()).next_multiple_of(APART_ALIGN as usize) / 4, 0.0);
        }
        let bytes = 4 * all.len();
        let memory = device.alloc(bytes as u64, "norms and biases")?;
        let engine = device.copy_engine(1)?;
        // SAFETY: both hold the bytes; the source is not changed before the wait returns, and the device memory
        // is nobody else's.
        unsafe { engine.upload(0, all.as_ptr().cast(), memory.addr, bytes)? };
        engine.wait_copied(0)?;
        engine.settle()?;
        bases.iter_mut().for_each(|b| *b += memory.addr);
        Ok(Apart { addresses: address(&bases), in_ram, _host: widened, _device: Some(memory) })
    }
}
