//! The operator's terminal: its size, raw mode that always ends, and the two questions that are ever asked.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;

use nix::sys::termios::{
    LocalFlags, SetArg, SpecialCharacterIndices, Termios, cfmakeraw, tcgetattr, tcsetattr,
};
use rustix::termios::tcgetwinsize;
use zeroize::Zeroizing;

use crate::failure::{Failure, status};

/// The longest line a terminal gives (N_TTY_BUF_SIZE).
const LINE_BYTES_MAX: usize = 4096;

/// Whether somebody sits at both ends, as an interactive command wants it.
pub fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Rows and columns; what cannot be asked is the size of old.
pub fn size() -> (u16, u16) {
    match tcgetwinsize(io::stdout().as_fd()) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => (size.ws_row, size.ws_col),
        _ => (24, 80),
    }
}

/// Raw mode, until it is dropped. A panic unwinds through it.
pub struct Raw {
    before: Termios,
}

impl Raw {
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin.as_fd(), SetArg::TCSADRAIN, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &self.before);
    }
}

/// Has the name of what is to be destroyed typed back, or `--yes`.
pub fn confirm(what: &str, name: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        let message = format!("{what}, and there is no terminal to ask on");
        return Err(Failure::usage(message, "say so with --yes"));
    }
    let typed = ask(&format!("{what}. Type {name:?} to go on: "), true)?;
    if typed.trim() == name {
        return Ok(());
    }
    Err(Failure::new(status::FAILED, "not_confirmed", "nothing was changed", ""))
}

/// Has a secret typed, unseen.
pub fn ask_secret(name: &str) -> Result<Zeroizing<String>, Failure> {
    ask(&format!("value of {name}: "), false)
}

/// Asks on the terminal itself, whatever the standard streams are.
fn ask(question: &str, shown: bool) -> Result<Zeroizing<String>, Failure> {
    let asked = try_asking(question, shown);
    let typed = asked.map_err(|error| {
        Failure::new(status::FAILED, "no_terminal", format!("asking on the terminal: {error}"), "")
    })?;
    match typed.ends_with(CTRL_C) {
        true => Err(Failure::new(status::INTERRUPTED, "interrupted", "nothing was changed", "")),
        false => Ok(typed),
    }
}

const CTRL_C: char = '\x03';

fn try_asking(question: &str, shown: bool) -> io::Result<Zeroizing<String>> {
    let mut terminal = OpenOptions::new().read(true).write(true).open("/dev/tty")?;
    terminal.write_all(question.as_bytes())?;
    if shown {
        return read_line(&terminal);
    }
    // Ctrl-C ends the line in place of the process, which would leave the terminal silent.
    let before = tcgetattr(&terminal)?;
    let mut silent = before.clone();
    silent.local_flags.remove(LocalFlags::ECHO | LocalFlags::ISIG);
    silent.control_chars[SpecialCharacterIndices::VEOL as usize] = CTRL_C as u8;
    tcsetattr(&terminal, SetArg::TCSADRAIN, &silent)?;
    let typed = read_line(&terminal);
    tcsetattr(&terminal, SetArg::TCSADRAIN, &before)?;
    terminal.write_all(b"\n")?;
    typed
}

/// One read: a terminal gives one line at a time.
fn read_line(mut terminal: &File) -> io::Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(vec![0; LINE_BYTES_MAX]);
    let length = terminal.read(&mut bytes)?;
    let text = std::str::from_utf8(&bytes[..length]).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(Zeroizing::new(text.trim_end_matches(['\r', '\n']).to_owned()))
}
