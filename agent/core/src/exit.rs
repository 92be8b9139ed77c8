//! How a jail's main process ended, and how that is told to people.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a jail's main process ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub out_of_memory: bool,
    pub past_deadline: bool,
    /// The jail could not be set up: what was attempted and why it failed. With code 127: no such command.
    pub start_error: Option<String>,
    /// The monitor died, so that nothing is known but that the instance died with it.
    pub monitor_lost: bool,
    pub at_ms: u64,
}

impl Exit {
    /// Nothing is known of it: the runner had no record of it any more, so that it did not end by itself.
    pub fn is_unknown(&self) -> bool {
        *self == Self { at_ms: self.at_ms, ..Self::default() }
    }

    pub fn success(&self) -> bool {
        self.code == Some(0) && self.start_error.is_none() && !self.out_of_memory && !self.past_deadline
    }
}

impl fmt::Display for Exit {
    /// A phrase that follows "it": `ended with exit code 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(error) = &self.start_error {
            return write!(f, "could not be started: {error}");
        }
        if self.out_of_memory {
            return f.write_str("ran out of memory and was killed by the kernel");
        }
        if self.past_deadline {
            return f.write_str("was killed at its deadline");
        }
        match (self.signal, self.code) {
            (Some(signal), _) => write!(f, "was killed by {}", SignalName(signal)),
            (None, Some(code)) => write!(f, "ended with exit code {code}"),
            (None, None) if self.monitor_lost => f.write_str("ended together with its monitor"),
            (None, None) => f.write_str("was stopped together with the node"),
        }
    }
}

/// Shows a signal's number by its name, signal(7).
struct SignalName(i32);

impl fmt::Display for SignalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The numbers that x86-64 and arm64 share.
        let name = match self.0 {
            1 => "HUP",
            2 => "INT",
            3 => "QUIT",
            4 => "ILL",
            5 => "TRAP",
            6 => "ABRT",
            7 => "BUS",
            8 => "FPE",
            9 => "KILL",
            10 => "USR1",
            11 => "SEGV",
            12 => "USR2",
            13 => "PIPE",
            14 => "ALRM",
            15 => "TERM",
            31 => "SYS (a system call that is not allowed)",
            number => return write!(f, "signal {number}"),
        };
        write!(f, "SIG{name}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_that_explains_most_is_named() {
        let killed = Exit { signal: Some(9), out_of_memory: true, ..Exit::default() };
        assert_eq!(killed.to_string(), "ran out of memory and was killed by the kernel");
        assert_eq!(Exit { code: Some(3), ..Exit::default() }.to_string(), "ended with exit code 3");
        assert_eq!(Exit { signal: Some(11), ..Exit::default() }.to_string(), "was killed by SIGSEGV");
        assert_eq!(
            Exit { monitor_lost: true, ..Exit::default() }.to_string(),
            "ended together with its monitor"
        );
    }

    #[test]
    fn success_is_code_zero_and_nothing_else() {
        assert!(Exit { code: Some(0), ..Exit::default() }.success());
        assert!(!Exit { code: Some(0), out_of_memory: true, ..Exit::default() }.success());
        assert!(!Exit::default().success());
    }
}
