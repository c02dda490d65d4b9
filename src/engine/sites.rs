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
