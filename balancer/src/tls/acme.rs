//! The files of ACME's http-01 challenges: the seam to an ACME client, which is certbot or any other.
//!
//! ```text
//! certbot certonly --webroot -w DIR -d shop.example --deploy-hook 'epagent-balancer reload-certificates ...'
//!     writes DIR/.well-known/acme-challenge/TOKEN        answered on every plain HTTP listener, for any host
//!     writes /etc/letsencrypt/live/shop.example/         the folder that --tls-dir names is .../live
//! ```
//!
//! Whoever writes to DIR decides what is said; who asks decides nothing: a token is letters, digits, `-` and
//! `_`, its file is opened beneath DIR without following any link, and has to be a small plain file. A
//! thread of its own reads them, so that a slow disk delays challenges and nothing else.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, SyncSender};

use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};

/// Where below the folder they lie, as `--webroot` has it.
const BELOW: &str = ".well-known/acme-challenge";
/// Largest file. A key authorization has some ninety bytes.
const FILE_BYTES_MAX: u64 = 4 * 1024;
/// Most questions that wait for the thread; more go on to their routes.
const QUESTIONS_MAX: usize = 256;

/// A question for the contents of a token's file, and where to say them.
pub struct Question {
    pub token: String,
    pub answer: Box<dyn FnOnce(Option<Vec<u8>>) + Send>,
}

/// Why there are no challenges.
#[derive(Debug, thiserror::Error)]
pub enum AcmeError {
    #[error("cannot use {path} as the folder of ACME challenges")]
    Open {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot start the thread that reads ACME challenges")]
    Thread(#[source] std::io::Error),
}

/// Starts the thread; it ends when nobody can ask any more.
pub fn start(path: &Path) -> Result<SyncSender<Question>, AcmeError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let failed = |source: rustix::io::Errno| AcmeError::Open { path: path.to_owned(), source: source.into() };
    let root = open(path, flags, Mode::empty()).map_err(failed)?;
    let (questions, asked) = mpsc::sync_channel::<Question>(QUESTIONS_MAX);
    let answer = move || asked.iter().for_each(|Question { token, answer }| answer(read(&root, &token)));
    std::thread::Builder::new().name("acme".to_owned()).spawn(answer).map_err(AcmeError::Thread)?;
    Ok(questions)
}

/// The contents of a token's file. A reason why there are none is for nobody: whoever asks is a stranger.
fn read(root: &OwnedFd, token: &str) -> Option<Vec<u8>> {
    // The core lets none through; the folder has other files, and this says which are meant.
    if token.contains('/') {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(openat2(root, format!("{BELOW}/{token}"), flags, Mode::empty(), beneath).ok()?);
    let kind = file.metadata().ok()?;
    if !kind.is_file() || kind.len() > FILE_BYTES_MAX {
        return None;
    }
    let mut contents = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut contents).ok()?;
    Some(contents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_small_plain_files_beneath_the_folder_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join(BELOW);
        std::fs::create_dir_all(&below).unwrap();
        std::fs::write(below.join("token"), "token.key").unwrap();
        std::fs::write(below.join("large"), vec![0; FILE_BYTES_MAX as usize + 1]).unwrap();
        std::fs::write(dir.path().join("secret"), "secret").unwrap();
        std::os::unix::fs::symlink("../../secret", below.join("link")).unwrap();
        std::fs::create_dir(below.join("folder")).unwrap();
        nix::unistd::mkfifo(&below.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let root = open(dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        assert_eq!(read(&root, "token").as_deref(), Some(&b"token.key"[..]));
        for token in ["large", "link", "folder", "fifo", "absent", "../../secret"] {
            assert_eq!(read(&root, token), None, "{token}");
        }
    }
}
