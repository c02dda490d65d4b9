//! What a caller asks of the sites that compute.

/// Which sites compute where a device has memory of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sites {
    /// The device, and processors beside it where that is faster.
    Auto,
    /// The device alone: a text does not depend on where weights rest.
    One,
    /// Both: processors compute whatever they can of what rests in RAM, if that is faster or not.
    Both,
}

/// Whether feed-forward parts are cut, so that a device and processors beside it compute each at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slices {
    /// They are whole.
    Off,
    /// They are cut where that is faster by what is known of the rates.
    Auto,
    /// Processors have so many of [`crate::model::SLICE_PARTS`] parts of each, where it can be cut and all rests in memory.
    Of(u32),
}

/// What the room that a device has for experts is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertSlots {
    /// As many as fit live there.
    Off,
    /// All live in RAM, where they fit, and those are there that were chosen last.
    On,
    /// What is faster by what is known of the model's choices; off where nothing is.
    Auto,
}
