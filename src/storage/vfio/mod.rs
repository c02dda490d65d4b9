//! NVMe from userspace through VFIO, for reading only.
//!
//! The driver's logic (queues, bring-up, retries, deadlines) is written against [`Registers`] and
//! [`Dma`], so that the software controller of the tests drives the same code as hardware does.
//! Commands come from one closed enum; there is none that writes.

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
