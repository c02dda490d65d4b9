//! NVMe from userspace through VFIO, for reading only.
//!
//! The driver's logic (queues, bring-up, retries, deadlines) is written against [`Registers`] and
//! [`Dma`], so that the software controller of the tests drives the same code as hardware does.
//! Commands come from one closed enum; there is none that writes.

// Queues are written and read by the drive's DMA, and ordered here by fences between processors alone. x86 keeps
// stores to memory in order before the store to a doorbell, and loads in order; other processors do not.
#[cfg(not(target_arch = "x86_64"))]
compile_error!("the VFIO driver orders DMA as x86-64 needs it; other processors need barriers of their own");

pub mod bringup;
pub mod command;
pub mod deadline;
pub mod device;
pub mod identify;
mod interrupt;
pub mod io;
#[cfg(test)]
mod model;
pub mod pace;
pub mod prp;
pub mod queue;
pub mod quirks;
pub mod reader;
pub mod regs;
mod removal;
pub mod status;

pub use bringup::{Controller, Fault};
pub use deadline::Limits;
pub use device::VfioNvme;
pub use queue::Dma;
pub use reader::VfioReader;
pub use regs::Registers;
