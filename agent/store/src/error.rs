//! What can go wrong with the store, by the operation that failed.

use std::path::PathBuf;

use epagent_core::name::{AppName, DeployId, ReleaseNumber};
use epagent_core::phase::Phase;

pub type Result<T, E = StoreError> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite failed, or a row does not hold what this version writes.
    #[error("could not {operation}")]
    Sql {
        operation: &'static str,
        #[source]
        source: sqlx::Error,
    },
    #[error("could not {operation} {path}")]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("could not bring the schema of {path} up to date")]
    Migrate {
        path: PathBuf,
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    #[error(
        "the schema of {path} is version {found}; this epagent knows version {known} and can run on {} at most: \
         start the newer epagent, or restore a backup from before its upgrade", known + 1
    )]
    SchemaTooNew { path: PathBuf, found: i64, known: i64 },

    #[error("the key file {path} {reason}")]
    KeyFile { path: PathBuf, reason: &'static str },
    #[error(
        "the key file {path} is gone, but the state was sealed with it: put it back from its backup, or move the \
         state away to begin anew"
    )]
    KeyMissing { path: PathBuf },
    #[error(
        "the key file {path} is not the one the state was sealed with: put the right one back from its backup"
    )]
    KeyWrong { path: PathBuf },
    #[error("version {version} of the secret {name} of {app} does not open: its row was damaged or moved")]
    SecretDamaged { app: AppName, name: String, version: i64 },
    #[error("version {version} of the secret {name} of {app} does not exist any more")]
    SecretLost { app: AppName, name: String, version: i64 },
    #[error("could not seal a secret")]
    Seal,
    /// The operating system gave no random bytes.
    #[error("could not draw random bytes to {operation}")]
    Random { operation: &'static str },

    #[error("there is no app {0}")]
    NoApp(AppName),
    #[error("{0} is being removed")]
    AppRemoved(AppName),
    #[error("{deploy} of {app} is still under way")]
    DeployUnderWay { app: AppName, deploy: DeployId },
    #[error("{app} has no release {release} that can be deployed")]
    NoRelease { app: AppName, release: ReleaseNumber },
    #[error("no release of {0} has been deployed yet")]
    NothingServes(AppName),
    /// The deploy is not where the caller believes it is, or its phases don't allow the step.
    #[error("{deploy} can't go from {from} to {to}: it is in {is}")]
    WrongPhase { deploy: DeployId, from: Phase, to: Phase, is: Phase },
    #[error("there is no deploy {0}")]
    NoDeploy(DeployId),
    #[error("{what}: {found} are too many; the most is {limit}")]
    TooMuch { what: String, found: usize, limit: usize },
    #[error("the value of {name} contains a NUL byte, which an environment can't hold")]
    NulByte { name: String },
}

/// Names the operation in which SQLite failed.
pub(crate) trait During<T> {
    fn during(self, operation: &'static str) -> Result<T>;
}

impl<T> During<T> for Result<T, sqlx::Error> {
    fn during(self, operation: &'static str) -> Result<T> {
        self.map_err(|source| StoreError::Sql { operation, source })
    }
}
