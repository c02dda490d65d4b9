//! Memory, loading, limits of the machine, error paths of a run.
