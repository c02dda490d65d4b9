//! Units, slots, the N-buffer ring, its state machine and its timeline.
