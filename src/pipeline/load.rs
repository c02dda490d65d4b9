//! Resident units: read once, before streaming starts.

use std::sync::Arc;

use super::streamer::{POLL, StreamError};
use super::unit::UnitLayout;
use crate::backend::{BackendError, CopyEngine};
use crate::memory::Region;
use crate::storage::{Completion, ReadRequest, Reader};

/// Reads whole units into regions, several at a time, before streaming starts. `progress` gets the
/// bytes read so far.
pub fn load(
    reader: &mut dyn Reader,
    units: &[(&UnitLayout, Region, &str)],
    progress: &mut dyn FnMut(u64),
) -> Result<(), StreamError> {
    const AT_ONCE: usize = 4;
    let (mut next, mut bytes) = (0, 0);
    let mut done: Vec<Completion> = Vec::new();
    while next < units.len() || reader.outstanding() > 0 {
        while next < units.len() && reader.outstanding() < AT_ONCE {
            let (layout, region, name) = &units[next];
            let request = ReadRequest {
                tag: next as u64,
                extents: &layout.extents,
                dst: region.addr,
                urgent: false,
                dst_len: region.len,
            };
            // SAFETY: the region belongs to this unit alone, lives as long as the arena, which the
            // reader does not outlive, and is not looked at before `load` has returned.
            unsafe { reader.submit(&request) }
                .map_err(|source| StreamError::Unit { unit: (*name).to_owned(), source })?;
            next += 1;
        }
        let fail = |source| StreamError::Unit { unit: "loading".into(), source };
        reader.poll(&mut done, Some(POLL)).map_err(fail)?;
        for c in done.drain(..) {
            let name = units[c.tag as usize].2;
            bytes += c.result.map_err(|source| StreamError::Unit { unit: name.to_owned(), source })?;
            progress(bytes);
        }
    }
    Ok(())
}

/// A unit that is to lie in device memory.
#[derive(Clone, Copy, Debug)]
pub struct DeviceUnit<'a> {
    /// Its reads.
    pub layout: &'a UnitLayout,
    /// Its address on the device.
    pub addr: u64,
    /// Its name, for errors.
    pub name: &'a str,
}

/// Reads units into staging regions, one after the other through each, and copies them to the
/// device. Slot `i` of `engine` goes with `staging[i]`. `progress` gets the bytes copied so far.
pub fn load_to_device(
    reader: &mut dyn Reader,
    units: &[DeviceUnit],
    staging: &[Region],
    engine: &dyn CopyEngine,
    progress: &mut dyn FnMut(u64),
) -> Result<(), StreamError> {
    let device = |e: BackendError| StreamError::Device(Arc::new(e));
    let mut waiting = units.iter();
    let mut in_slot: Vec<Option<DeviceUnit>> = vec![None; staging.len()];
    let mut free: Vec<usize> = (0..staging.len()).rev().collect();
    let mut done: Vec<Completion> = Vec::new();
    let mut bytes = 0;
    loop {
        while let Some(&slot) = free.last()
            && let Some(unit) = waiting.next()
        {
            free.pop();
            in_slot[slot] = Some(*unit);
            let Region { addr, len } = staging[slot];
            let extents = &unit.layout.extents;
            let request = ReadRequest { tag: slot as u64, extents, dst: addr, urgent: false, dst_len: len };
            // SAFETY: the region is in `free` only when neither a read nor a copy uses it; it lives
            // as long as the arena, which the reader does not outlive.
            unsafe { reader.submit(&request) }
                .map_err(|source| StreamError::Unit { unit: unit.name.to_owned(), source })?;
        }
        if free.len() == staging.len() {
            return Ok(());
        }
        let fail = |source| StreamError::Unit { unit: "loading".into(), source };
        reader.poll(&mut done, Some(POLL)).map_err(fail)?;
        for c in done.drain(..) {
            let slot = c.tag as usize;
            let Some(unit) = in_slot[slot].take() else { continue };
            let named = |source| StreamError::Unit { unit: unit.name.to_owned(), source };
            bytes += c.result.map_err(named)?;
            // SAFETY: the read has ended, and the wait below keeps the region as it is; the unit's
            // place on the device is its own.
            unsafe { engine.upload(slot, staging[slot].addr, unit.addr, unit.layout.slot_bytes as usize) }
                .map_err(device)?;
            engine.wait_copied(slot).map_err(device)?;
            free.push(slot);
            progress(bytes);
        }
    }
}
