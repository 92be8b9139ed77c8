//! Tar archives no packer would make: written byte by byte, since libraries refuse to.
//!
//! POSIX.1-1988 ustar headers, one per entry, 512 bytes each.

const BLOCK: usize = 512;

/// An archive that is being written.
#[derive(Debug, Clone, Default)]
pub struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    /// An archive that begins with an ordinary app: a manifest and a file.
    pub fn of_app(manifest: &str) -> Self {
        Self::default().file("epagent.toml", manifest.as_bytes()).file("hello.txt", b"hello\n")
    }

    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(name, b'0', "", content.len() as u64).content(content)
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(name, b'2', target, 0)
    }

    pub fn hardlink(self, name: &str, target: &str) -> Self {
        self.entry(name, b'1', target, 0)
    }

    /// A character device; the numbers are those of /dev/mem.
    pub fn device(mut self, name: &str) -> Self {
        self = self.entry(name, b'3', "", 0);
        let start = self.bytes.len() - BLOCK;
        let header = &mut self.bytes[start..];
        octal(&mut header[329..337], 1);
        octal(&mut header[337..345], 1);
        sum(header);
        self
    }

    pub fn fifo(self, name: &str) -> Self {
        self.entry(name, b'6', "", 0)
    }

    /// A header alone: `size` bytes are announced, and whoever writes the archive lets them follow.
    pub fn entry(mut self, name: &str, kind: u8, target: &str, size: u64) -> Self {
        let mut header = [0u8; BLOCK];
        put(&mut header[0..100], name.as_bytes());
        octal(&mut header[100..108], 0o755);
        octal(&mut header[108..116], 0);
        octal(&mut header[116..124], 0);
        octal(&mut header[124..136], size);
        octal(&mut header[136..148], 1_700_000_000);
        header[156] = kind;
        put(&mut header[157..257], target.as_bytes());
        put(&mut header[257..265], b"ustar\x0000");
        sum(&mut header);
        self.bytes.extend_from_slice(&header);
        self
    }

    fn content(mut self, content: &[u8]) -> Self {
        self.bytes.extend_from_slice(content);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        self
    }

    /// The archive with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend_from_slice(&[0; 2 * BLOCK]);
        self.bytes
    }

    /// The archive without its end mark, as far as it was written.
    pub fn unfinished(self) -> Vec<u8> {
        self.bytes
    }
}

fn put(field: &mut [u8], bytes: &[u8]) {
    assert!(bytes.len() <= field.len(), "too long for a ustar header");
    field[..bytes.len()].copy_from_slice(bytes);
}

/// Octal digits and a NUL; numbers that do not fit are written in base 256, as GNU tar does.
fn octal(field: &mut [u8], number: u64) {
    let digits = field.len() - 1;
    let text = format!("{number:0digits$o}");
    if text.len() <= digits {
        put(field, text.as_bytes());
        field[digits] = 0;
    } else {
        field.fill(0);
        field[0] = 0x80;
        let end = field.len();
        field[end - 8..].copy_from_slice(&number.to_be_bytes());
    }
}

fn sum(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let total: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    put(&mut header[148..156], format!("{total:06o}\0 ").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    #[test]
    fn tar_itself_reads_what_is_written() {
        let bytes =
            Tar::of_app("app = 'x'").symlink("link", "/etc/passwd").device("mem").fifo("pipe").finish();
        let mut tar = Command::new("tar")
            .args(["-tvf", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&bytes).unwrap();
        let out = tar.wait_with_output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success(), "{text}");
        for word in ["epagent.toml", "link -> /etc/passwd", "1,1", "prwx"] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }
}
