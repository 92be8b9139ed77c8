//! App folders to deploy.

use std::fs;
use std::path::{Path, PathBuf};

/// The server that most suites deploy; see its own header.
const SERVER: &str = include_str!("../apps/server.py");

/// A folder with an app in it, removed when dropped.
pub struct AppDir {
    folder: tempfile::TempDir,
}

impl AppDir {
    pub fn empty() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("epagent-app-")
            .tempdir()
            .unwrap_or_else(|error| panic!("making an app folder: {error}"));
        Self { folder }
    }

    /// A folder with a manifest alone.
    pub fn manifest(text: &str) -> Self {
        Self::empty().with("epagent.toml", text)
    }

    /// The web server of the suites under `APP.test`, answering `hello VERSION`, checked at `/healthz`.
    /// `more` is appended to the manifest, in the table `[process.web]`, so that it begins with keys of that.
    pub fn server(app: &str, version: &str, more: &str) -> Self {
        Self::empty().with("server.py", SERVER).with("epagent.toml", &server_manifest(app, version, more))
    }

    /// Writes a file, its folders included.
    pub fn with(self, name: &str, text: &str) -> Self {
        self.write(name, text);
        self
    }

    #[track_caller]
    pub fn write(&self, name: &str, text: &str) {
        let path = self.path().join(name);
        let written = path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, text));
        written.unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

/// The manifest of [`AppDir::server`].
pub fn server_manifest(app: &str, version: &str, more: &str) -> String {
    format!(
        r#"app = "{app}"
image = "host"

[env]
VERSION = "{version}"

[[route]]
host = "{app}.test"
process = "web"

[process.web]
command = "python3 server.py"
{more}

[process.web.health]
http = "/healthz"
interval = "200ms"
deadline = "20s"
"#
    )
}
