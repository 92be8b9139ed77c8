//! Names of environment variables, for `[env]`, `secrets`, `epagent config` and `epagent secrets`.

/// The longest name, in bytes.
pub const VARIABLE_LEN_MAX: usize = 128;

/// Why a text can't name a variable of an app's environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VariableError {
    #[error("it is empty")]
    Empty,
    #[error("it is longer than {VARIABLE_LEN_MAX} bytes")]
    TooLong,
    /// POSIX.1-2017, 8.1: what a shell can name.
    #[error("only letters, digits and `_` are allowed, and no digit at its beginning")]
    Letters,
    #[error("the agent sets it itself")]
    Reserved,
}

/// Whether an app, its config or its secrets may set this variable.
pub fn check_variable(name: &str) -> Result<(), VariableError> {
    if name.is_empty() {
        return Err(VariableError::Empty);
    }
    if name.len() > VARIABLE_LEN_MAX {
        return Err(VariableError::TooLong);
    }
    if name.starts_with(|c: char| c.is_ascii_digit())
        || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    {
        return Err(VariableError::Letters);
    }
    if name == "PORT" || name.starts_with("EPAGENT_") {
        return Err(VariableError::Reserved);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_shell_can_name_is_accepted() {
        for name in ["A", "_", "DATABASE_URL", "path2", "PORT_2", "EPAGENT"] {
            assert_eq!(check_variable(name), Ok(()), "{name}");
        }
        for name in ["2A", "A-B", "A B", "A=B", "A\0", "Ä", "A.B", "$A"] {
            assert_eq!(check_variable(name), Err(VariableError::Letters), "{name}");
        }
        assert_eq!(check_variable(""), Err(VariableError::Empty));
        assert_eq!(check_variable(&"A".repeat(129)), Err(VariableError::TooLong));
    }

    #[test]
    fn what_the_agent_sets_is_reserved() {
        for name in ["PORT", "EPAGENT_APP", "EPAGENT_"] {
            assert_eq!(check_variable(name), Err(VariableError::Reserved), "{name}");
        }
    }
}
