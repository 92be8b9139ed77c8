//! The agent's state in SQLite, with sealed secrets.
//!
//! What the operator wants, what was deployed and how far a deploy is: all of it is in one file next to the brain,
//! on this host only. Whatever belongs together is written in one transaction, together with the event that tells
//! of it, so that a brain killed between any two instructions finds the old state or the new one.
//!
//! ```text
//!   epagentd ──▶ Store ──▶ writer, 1 connection ──▶ state.db (WAL, synchronous=FULL)
//!                  │  └──▶ readers, 4 connections, read-only ──▶ state.db
//!                  └─────▶ Key (0600 file beside it): seals and opens the column `secrets.sealed`
//! ```
//!
//! Conventions: the time is an argument, in milliseconds since the epoch; what is not found is `Ok(None)`; every
//! error names the operation. One process opens the file; SQLite's own locks would keep a second one from harm.
//!
//! | module | tables |
//! |---|---|
//! | [`app`] | apps, scale, volumes |
//! | [`release`] | releases: what serves, what served before |
//! | [`config`] | config |
//! | [`secret`] | secrets; [`key`] seals them |
//! | [`deploy`] | deploys, deploy_steps |
//! | [`instance`] | instances |
//! | [`route`] | route_words, route_drains, routes_taken: what operators say, what the balancer took |
//! | `sleep` | asleep |
//! | [`event`] | events |
//! | [`trouble`] | errors |
//! | `counter` | settings |
//!
//! Everything that grows is pruned in the transaction that lets it grow; the bounds are constants beside the
//! functions: [`event::EVENTS_MAX`], [`trouble::ERRORS_MAX`], [`instance::ENDED_KEPT`], [`deploy::DEPLOYS_KEPT`],
//! [`deploy::STEPS_MAX`], [`config::CONFIG_BYTES_MAX`], [`config::CONFIG_NAMES_MAX`], [`secret::SECRETS_MAX`], [`secret::SECRET_BYTES_MAX`],
//! [`route::WORDS_MAX`], [`route::DRAINS_MAX`], [`route::WHY_BYTES_MAX`].

#![forbid(unsafe_code)]

pub mod app;
pub mod config;
mod counter;
pub mod deploy;
mod error;
pub mod event;
pub mod instance;
pub mod key;
mod open;
pub mod release;
pub mod route;
mod row;
pub mod secret;
mod sleep;
pub mod trouble;
mod write;

pub use app::{App, Volume, Wanted};
pub use config::{Config, ConfigChanges};
pub use deploy::{Deploy, DeployKind, DeployStep, NewDeploy, Target};
pub use error::{Result, StoreError};
pub use event::Event;
pub use instance::{Instance, NewInstance};
pub use key::KeyFile;
pub use open::Schema;
pub use release::{Release, ReleaseState};
pub use route::{RouteDrain, RouteWord, Said};
pub use secret::{Secret, SecretChanges, SecretValue};
pub use trouble::Trouble;

use std::sync::Arc;

use sqlx::SqlitePool;
use tokio::sync::watch;

/// The agent's state. Clones share it.
#[derive(Clone)]
pub struct Store {
    writer: SqlitePool,
    readers: SqlitePool,
    key: Arc<key::Key>,
    newest_event: watch::Sender<i64>,
    schema: Schema,
}
