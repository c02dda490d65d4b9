//! The `nt` command: parse, dispatch, exit codes.

fn main() -> std::process::ExitCode {
    nt::cli::main()
}
