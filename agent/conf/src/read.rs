//! The files: which there are, whose they are, what they say.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::{ConfError, FILE_BYTES_MAX, FILES_MAX, FOLDER};

/// One file's text, and where it would begin if all texts were one: so that a place in them is one number.
#[derive(Debug)]
pub struct Source {
    pub path: PathBuf,
    pub text: String,
    pub begin: usize,
}

/// The main file first, then the folder's in the order of their names.
pub fn read(main: &Path) -> Result<Vec<Source>, ConfError> {
    let mut sources: Vec<Source> = Vec::new();
    for path in std::iter::once(main.to_owned()).chain(additions(main)?) {
        // Never 0, which is no place at all; and the end of one is not the begin of the next.
        let begin = sources.last().map_or(1, |last| last.begin + last.text.len() + 1);
        sources.push(Source { text: text(&path)?, path, begin });
    }
    Ok(sources)
}

fn additions(main: &Path) -> Result<Vec<PathBuf>, ConfError> {
    let folder = main.parent().unwrap_or(Path::new("")).join(FOLDER);
    let failed = |source| ConfError::Read { path: folder.clone(), source };
    let opened = match File::open(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        opened => opened.map_err(failed)?,
    };
    // Who may write to the folder may choose what is in it.
    check_owner(&opened, &folder)?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|ending| ending == "toml") {
            found.push(path);
        }
        if found.len() > FILES_MAX {
            return Err(ConfError::TooMany { path: folder });
        }
    }
    found.sort();
    Ok(found)
}

fn text(path: &Path) -> Result<String, ConfError> {
    let failed = |source| ConfError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    check_owner(&file, path)?;
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    match text.len() as u64 > FILE_BYTES_MAX {
        true => Err(ConfError::TooLarge { path: path.to_owned() }),
        false => Ok(text),
    }
}

fn check_owner(file: &File, path: &Path) -> Result<(), ConfError> {
    let facts = file.metadata().map_err(|source| ConfError::Read { path: path.to_owned(), source })?;
    let own = rustix::process::geteuid().as_raw();
    match (facts.uid() == 0 || facts.uid() == own) && facts.mode() & 0o022 == 0 {
        true => Ok(()),
        false => {
            Err(ConfError::Owner { path: path.to_owned(), uid: facts.uid(), mode: facts.mode() & 0o7777 })
        }
    }
}
