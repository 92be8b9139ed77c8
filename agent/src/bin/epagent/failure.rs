//! How a command fails: one shape for every error, whoever found it.
//!
//! What the agent refuses and what the command finds out by itself look the same to the operator and to a script:
//!
//! ```text
//! error[no_such_app]: there is no app "shpo"
//!   = help: `epagent apps` lists them
//! ```
//!
//! and end with a status of [`status`].

use std::fmt;

use epagent_wire::api::ApiError;

/// Exit statuses. `epagent help exit-codes` prints this list.
pub mod status {
    /// The command did what it was asked.
    pub const OK: u8 = 0;
    /// It failed; stderr says why.
    pub const FAILED: u8 = 1;
    /// The command line was wrong.
    pub const USAGE: u8 = 2;
    /// The deploy failed; the verdict was printed.
    pub const DEPLOY_FAILED: u8 = 3;
    /// The app, release, instance, volume, image or deploy that was named does not exist.
    pub const NOT_FOUND: u8 = 4;
    /// The agent can't be reached (EX_UNAVAILABLE of sysexits.h).
    pub const UNREACHABLE: u8 = 69;
    /// Watching was ended by Ctrl-C; what was watched goes on.
    pub const INTERRUPTED: u8 = 130;
}

/// What [`status`] says, for people.
pub const EXIT_CODES: &str = "\
Exit codes:
    0  done
    1  failed; stderr says why
    2  the command line was wrong
    3  the deploy failed; the verdict was printed
    4  what was named does not exist
   69  the agent can't be reached
  130  watching was ended by Ctrl-C; what was watched goes on

`epagent exec` and `epagent run` end with the command's own status, or with 128 and the number of the signal that
killed it; 126 and 127 when it could not be started.";

/// Why the command ends with something else than 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub status: u8,
    /// Stable; `epagent explain CODE` tells more.
    pub code: String,
    /// What was attempted, on what, why it failed. May have several lines.
    pub message: String,
    /// What to do next; may be empty.
    pub hint: String,
}

impl Failure {
    pub fn new(
        status: u8,
        code: impl Into<String>,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { status, code: code.into(), message: message.into(), hint: hint.into() }
    }

    /// A command line that parses and still makes no sense.
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(status::USAGE, "usage", message, hint)
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Failure {
        let not_found =
            matches!(error.code.as_str(), "no_such_app" | "not_found" | "no_release" | "missing_image");
        let status = if not_found { status::NOT_FOUND } else { status::FAILED };
        Failure::new(status, error.code, error.message, error.hint)
    }
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A manifest's error comes rendered, with its own first line.
        match self.message.strip_prefix("error: ") {
            Some(rendered) => write!(f, "error[{}]: {}", self.code, rendered.trim_end())?,
            None => write!(f, "error[{}]: {}", self.code, self.message.trim_end())?,
        }
        for (number, line) in self.hint.lines().enumerate() {
            let lead = if number == 0 { "  = help: " } else { "          " };
            write!(f, "\n{lead}{line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_shows_code_message_and_help() {
        let error = ApiError {
            code: "no_such_app".to_owned(),
            message: "there is no app \"shpo\"".to_owned(),
            hint: "`epagent apps` lists them\nor deploy it".to_owned(),
        };
        let failure = Failure::from(error);
        assert_eq!(failure.status, status::NOT_FOUND);
        assert_eq!(
            failure.to_string(),
            "error[no_such_app]: there is no app \"shpo\"\n  = help: `epagent apps` lists them\n          or deploy it"
        );
    }

    #[test]
    fn a_manifest_error_keeps_its_caret() {
        let failure = Failure::new(
            status::FAILED,
            "bad_manifest",
            "error: unknown key `imge`\n --> epagent.toml:3:1\n  |\n3 | imge = \"py\"\n  | ^^^^\n",
            "",
        );
        assert!(
            failure.to_string().starts_with("error[bad_manifest]: unknown key `imge`\n --> epagent.toml")
        );
        assert!(failure.to_string().ends_with("^^^^"));
    }
}
