//! How a command fails: one sentence and an exit code of the contract.

use std::io::Write as _;
use std::process::ExitCode;

use super::streams::Stderr;
use crate::storage::bind::DeviceError;

impl From<DeviceError> for Failure {
    fn from(e: DeviceError) -> Failure {
        match e {
            DeviceError::Interrupted(_) => Failure::stopped(e),
            e if e.is_refusal() => Failure::refused(e),
            e => Failure::running(e),
        }
    }
}

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// 1: failed while running.
    pub fn running(message: impl ToString) -> Failure {
        Failure { code: 1, message: message.to_string() }
    }

    /// 2: wrong usage, or an unreadable or unsupported model.
    pub fn usage(message: impl ToString) -> Failure {
        Failure { code: 2, message: message.to_string() }
    }

    /// 3: refused by a safety rule of a drive.
    pub fn refused(message: impl ToString) -> Failure {
        Failure { code: 3, message: message.to_string() }
    }

    /// 4: does not fit the limits.
    pub fn limits(message: impl ToString) -> Failure {
        Failure { code: 4, message: message.to_string() }
    }

    /// 130: interrupted; what there was has been printed.
    pub fn interrupted() -> Failure {
        Failure { code: 130, message: String::new() }
    }

    /// 130, with what was done about it.
    pub fn stopped(message: impl ToString) -> Failure {
        Failure { code: 130, message: message.to_string() }
    }

    /// Writing results failed. A closed pipe ends the command in silence, as `head` expects.
    pub fn output(target: &str, e: &std::io::Error) -> Failure {
        let message = if e.kind() == std::io::ErrorKind::BrokenPipe {
            String::new()
        } else {
            format!("writing to {target} failed: {e}")
        };
        Failure { code: 1, message }
    }

    /// Says, where a model could not be opened, that the library does not know its name either.
    pub fn with_library_hint(mut self) -> Failure {
        let gone = ["No such file", "neither a file nor recorded"];
        if self.code == 2 && gone.iter().any(|words| self.message.contains(words)) {
            self.message.push_str("; the model library has none of that name either (`nt list` shows what it has)");
        }
        self
    }

    /// Says, where an address was given as a model, what fetches it.
    pub fn with_pull_hint(mut self) -> Failure {
        let address = ["hf:", "http://", "https://"].iter().any(|scheme| self.message.starts_with(scheme));
        if self.code == 2 && address && self.message.contains("No such file") {
            self.message.push_str("; `nt pull` fetches a model into the library first");
        }
        self
    }

    /// The same exit code without the sentence, which was printed before.
    pub fn silent(self) -> Failure {
        Failure { message: String::new(), ..self }
    }

    /// Prints the sentence and gives the exit code.
    pub fn report(&self) -> ExitCode {
        if !self.message.is_empty() {
            say(&format!("nt: {}", super::printable::sentence(&self.message)));
        }
        ExitCode::from(self.code)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// A line on stderr. A terminal or a pipe that is gone is no reason to stop: what undoes a half-done step
/// speaks too, and must get to its end.
pub(super) fn say(line: &str) {
    let _ = writeln!(Stderr, "{line}");
}
