//! The pages of a process that waits for months.

use std::fs;
use std::io;

/// Gives back the program's own pages that were only needed to get here; the few that the process goes on using
/// come back from the page cache, and are locked again if the process has locked its memory on fault.
///
/// A start runs once through most of the program, its wait through little. Only mappings of the executable are
/// touched, and of these only those that were never written to.
pub(crate) fn forget_program() -> io::Result<()> {
    let executable = fs::read_link("/proc/self/exe")?;
    let maps = fs::read_to_string("/proc/self/maps")?;
    for range in maps.lines().filter_map(|line| unwritten(line, executable.to_str()?)) {
        // SAFETY: the range is a file mapping that was never writable, so every page of it can be read again from
        // the file, which is a sealed memfd or a program that cannot be written while it runs.
        super::checked(unsafe {
            libc::madvise(range.0 as *mut libc::c_void, range.1 - range.0, libc::MADV_DONTNEED_LOCKED).into()
        })?;
    }
    Ok(())
}

/// The range of a `maps` line that is a private file mapping of `executable` without write permission. Relocated
/// data is read-only as well but differs from the file: it is told by following the text, and left alone.
fn unwritten(line: &str, executable: &str) -> Option<(usize, usize)> {
    let mut fields = line.splitn(6, ' ');
    let (range, permissions) = (fields.next()?, fields.next()?);
    let name = fields.nth(3)?.trim_start();
    if name != executable || permissions != "r-xp" {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}
