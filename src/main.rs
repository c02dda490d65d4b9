//! The `nt` command: parse, dispatch, exit codes.

/// Counts what threads take that work on outside data, so that their limits hold; ends the process with a sentence where
/// memory runs out.
#[global_allocator]
static ALLOCATOR: nt::memory::bounded::Metered = nt::memory::bounded::Metered;

fn main() -> std::process::ExitCode {
    nt::memory::bounded::quiet_panics();
    nt::cli::main()
}
