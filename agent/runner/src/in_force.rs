//! The configuration that the running node goes by, kept where its teardown finds it.
//!
//! What stands in /etc may have been changed since, for the next start, or be mistaken: the orderly end of what runs is
//! no occasion to find that out. The copy lies in the run folder, which a boot empties.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// In the run folder.
const FOLDER: &str = "in-force";
const FILE: &str = "runner.toml";
/// What changes the file beside it (crate `epagent-conf`).
const ADDITIONS: &str = "conf.d";

/// Where the copy is.
pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join(FOLDER).join(FILE)
}

/// Copies a configuration that was just read. It may hold passwords: root alone may read it.
pub fn keep(main: &Path, run_dir: &Path) -> io::Result<()> {
    let folder = run_dir.join(FOLDER);
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let additions = folder.join(ADDITIONS);
    DirBuilder::new().recursive(true).mode(0o700).create(&additions)?;
    let from = main.parent().unwrap_or(Path::new("")).join(ADDITIONS);
    if from.is_dir() {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            // An editor's own, which nobody reads.
            let is_hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !is_hidden && entry.path().extension().is_some_and(|ending| ending == "toml") {
                fs::copy(entry.path(), additions.join(entry.file_name()))?;
            }
        }
    }
    // Last: without it there is no copy.
    fs::copy(main, folder.join(FILE)).map(drop)
}

/// The node is gone: the next one may go by another configuration, and fail before it has kept that.
pub fn forget(run_dir: &Path) {
    let _ = fs::remove_dir_all(run_dir.join(FOLDER));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_is_whole_and_a_later_one_takes_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let (main, run) = (folder.path().join("runner.toml"), folder.path().join("run"));
        fs::create_dir_all(folder.path().join(ADDITIONS)).unwrap();
        fs::write(&main, "node = 1\n").unwrap();
        fs::write(folder.path().join("conf.d/10-a.toml"), "[runner]\nnode = 2\n").unwrap();
        fs::write(folder.path().join("conf.d/README"), "no configuration").unwrap();
        std::os::unix::fs::symlink("nowhere", folder.path().join("conf.d/.#10-a.toml")).unwrap();
        keep(&main, &run).unwrap();
        let names = |folder: PathBuf| {
            let entries = fs::read_dir(folder).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(names(run.join("in-force/conf.d")), ["10-a.toml"]);
        fs::remove_file(folder.path().join("conf.d/10-a.toml")).unwrap();
        fs::write(&main, "node = 3\n").unwrap();
        keep(&main, &run).unwrap();
        assert!(names(run.join("in-force/conf.d")).is_empty());
        assert_eq!(fs::read_to_string(file(&run)).unwrap(), "node = 3\n");
    }
}
