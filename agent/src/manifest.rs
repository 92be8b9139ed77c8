//! The manifest of an app: `epagent.toml` or `Procfile` in, [`AppSpec`] or one precise complaint out.
//!
//! Pure functions on text. The manifest is the first thing of ours a newcomer writes, so a mistake in it is answered
//! as a compiler would answer it: the place, the line, a caret, and what was probably meant. Nothing is ignored:
//! a key that has no meaning here is an error, unless it begins with `x-`, which is left to other tools.
//!
//! ```text
//!   epagent.toml ─▶ toml::de (spans) ─▶ table: typed, strict access ─▶ document, process, route, volume ─┐
//!   Procfile ────▶ procfile ──────────────────────────────────────────────────────────────────────────────┴▶ AppSpec
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`error`] | [`ManifestError`]: place, source line, caret, help |
//! | `table` | a table of the document that knows where each of its values stands |
//! | `units` | durations, sizes, shares of a processor |
//! | [`variable`] | names of environment variables |
//! | `document` | the whole of `epagent.toml`; `process`, `route` and `volume` are its parts |
//! | `procfile` | the other spelling |

pub mod error;
pub mod variable;

mod document;
mod process;
mod procfile;
mod route;
mod table;
#[cfg(test)]
mod tests;
pub mod units;
mod volume;

pub use document::parse_toml;
pub use error::ManifestError;
pub use procfile::{DEPENDENCY_FILES, parse_procfile};

use epagent_core::name::{AppName, ImageName};
#[cfg(doc)]
use epagent_core::spec::AppSpec;

/// The longest manifest that is read, in bytes.
pub const MANIFEST_BYTES_MAX: usize = 256 << 10;
/// The longest command, in bytes.
pub const COMMAND_BYTES_MAX: usize = 8 << 10;

/// What the command line says and the manifest need not.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    pub app: Option<AppName>,
    pub image: Option<ImageName>,
}
