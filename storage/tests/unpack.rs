//! `epagent-unpack` unpacks what is honest, and refuses each known attack by its own exit code, writing nothing outside.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};

/// A tar made block by block, so that it can say things no tool would write.
#[derive(Default, Clone)]
struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    fn entry(mut self, kind: u8, name: &[u8], link: &[u8], data: &[u8]) -> Self {
        self.header(kind, name, link, data.len() as u64, 0o644, 0);
        self.data(data);
        self
    }

    fn header(&mut self, kind: u8, name: &[u8], link: &[u8], size: u64, mode: u32, uid: u64) {
        let mut block = [0u8; 512];
        block[..name.len()].copy_from_slice(name);
        block[100..108].copy_from_slice(format!("{mode:07o}\0").as_bytes());
        block[108..116].copy_from_slice(format!("{uid:07o}\0").as_bytes());
        block[116..124].copy_from_slice(format!("{uid:07o}\0").as_bytes());
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        block[136..148].copy_from_slice(format!("{:011o}\0", 1_000_000_000).as_bytes());
        block[148..156].copy_from_slice(b"        ");
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link);
        block[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend(block);
    }

    fn data(&mut self, data: &[u8]) {
        self.bytes.extend(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(b'0', name.as_bytes(), b"", data)
    }

    fn dir(self, name: &str) -> Self {
        let mut tar = self;
        tar.header(b'5', name.as_bytes(), b"", 0, 0o755, 0);
        tar
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name.as_bytes(), target.as_bytes(), b"")
    }

    fn hardlink(self, name: &str, target: &str) -> Self {
        self.entry(b'1', name.as_bytes(), target.as_bytes(), b"")
    }

    fn pax(self, key: &str, value: &str) -> Self {
        let rest = format!(" {key}={value}\n");
        let mut length = rest.len();
        while format!("{length}{rest}").len() != length {
            length += 1;
        }
        self.entry(b'x', b"pax", b"", format!("{length}{rest}").as_bytes())
    }

    fn end(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }
}

fn unpack_with(into: &Path, args: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_epagent-unpack"))
        .arg("--into")
        .arg(into)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A refused archive may not be read to its end.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn unpack(into: &Path, policy: &str, input: &[u8]) -> Output {
    unpack_with(into, &["--policy", policy, "--max-bytes", "1000000", "--max-entries", "1000"], input)
}

/// Unpacks into `x/into` of a folder that holds nothing else but a file no archive may touch.
fn check(policy: &str, input: &[u8], expected: i32, says: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("outside"), "untouched").unwrap();
    let into = dir.path().join("into");
    let output = unpack(&into, policy, input);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(expected), "{text}");
    assert!(text.contains(says), "{text:?} does not say {says:?}");
    assert!(text.lines().count() <= 1, "{text:?} is more than a line");
    assert_eq!(fs::read_to_string(dir.path().join("outside")).unwrap(), "untouched");
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    dir
}

fn refused(tar: Tar, expected: i32, says: &str) {
    for policy in ["app", "image"] {
        check(policy, &tar.clone().end(), expected, says);
    }
}

#[test]
fn an_honest_upload_is_unpacked_as_roots_with_tame_modes() {
    let mut tar = Tar::default().dir("./").dir("bin").file("bin/run", b"#!").symlink("bin/alias", "run");
    tar.header(b'0', b"suid", b"", 2, 0o6755, 1000);
    tar.data(b"hi");
    let tar = tar.symlink("bin/up", "../suid").hardlink("hard", "bin/run").file("deep/er/file", b"x");
    let dir = check("app", &tar.end(), 0, "");
    let into = dir.path().join("into");
    let suid = fs::metadata(into.join("suid")).unwrap();
    assert_eq!((suid.uid(), suid.permissions().mode() & 0o7777, suid.mtime()), (0, 0o755, 1_000_000_000));
    assert_eq!(fs::read_to_string(into.join("bin/alias")).unwrap(), "#!");
    assert_eq!(fs::read_to_string(into.join("bin/up")).unwrap(), "hi");
    assert_eq!(fs::read_to_string(into.join("deep/er/file")).unwrap(), "x");
    assert_eq!(fs::metadata(into.join("hard")).unwrap().nlink(), 2);
}

#[test]
fn every_compression_is_known_by_its_first_bytes() {
    let tar = Tar::default().file("a", b"one").end();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
    for packed in [tar, gzip.finish().unwrap(), zstd] {
        let dir = check("app", &packed, 0, "");
        assert_eq!(fs::read_to_string(dir.path().join("into/a")).unwrap(), "one");
    }
    check("app", b"PK\x03\x04rest", 25, "zip");
    check("app", b"hello", 21, "not a valid archive");
    check("app", b"", 19, "ends early");
}

#[test]
fn names_that_lead_out_are_refused() {
    refused(Tar::default().file("../outside", b"x"), 10, "..");
    refused(Tar::default().file("a/../../outside", b"x"), 10, "..");
    refused(Tar::default().dir("a/.."), 10, "..");
    refused(Tar::default().file("/outside", b"x"), 11, "absolute");
    refused(Tar::default().pax("path", "../outside").file("a", b"x"), 10, "..");
    refused(Tar::default().pax("path", "/outside").file("a", b"x"), 11, "absolute");
    refused(Tar::default().entry(b'L', b"long", b"", b"../outside\0").file("a", b"x"), 10, "..");
    refused(Tar::default().pax("path", "a\0b").file("a", b"x"), 22, "NUL");
}

#[test]
fn a_link_then_a_file_through_it_writes_nothing_outside() {
    let through = |target: &str| Tar::default().symlink("link", target).file("link/outside", b"x");
    // An upload is refused at the link already, when it leads out …
    check("app", &through("..").end(), 13, "leads out");
    check("app", &through("/").end(), 13, "leads out");
    // … and at the file when the link stays inside.
    check(
        "app",
        &Tar::default().dir("d").symlink("link", "d").file("link/x", b"x").end(),
        12,
        "symbolic link",
    );
    // An image's links are followed inside the image.
    let dir = check("image", &through("..").end(), 0, "");
    assert_eq!(fs::read_to_string(dir.path().join("into/outside")).unwrap(), "x");
    let dir = check("image", &through("/").end(), 0, "");
    assert_eq!(fs::read_to_string(dir.path().join("into/outside")).unwrap(), "x");
    // A link in the way of a file is replaced, not followed.
    let dir = check("image", &Tar::default().symlink("f", "../outside").file("f", b"new").end(), 0, "");
    assert_eq!(fs::read_to_string(dir.path().join("into/f")).unwrap(), "new");
}

#[test]
fn links_of_an_upload_stay_inside_also_in_two_steps() {
    check("app", &Tar::default().symlink("a/b/c", "../../../outside").end(), 13, "leads out");
    // Each looks harmless alone: together they would lead out.
    let two =
        Tar::default().dir("x").dir("a/b").symlink("a/b/s", "../../x").symlink("a/b/t", "s/../../outside");
    check("app", &two.end(), 13, "leads out");
    check("app", &Tar::default().symlink("a", "/etc/passwd").end(), 13, "/etc/passwd");
    check("image", &Tar::default().symlink("a", "/etc/passwd").end(), 0, "");
}

#[test]
fn hard_links_lead_to_files_of_the_archive_only() {
    refused(Tar::default().hardlink("a", "../outside"), 14, "leads out");
    refused(Tar::default().hardlink("a", "/etc/passwd"), 14, "leads out");
    refused(Tar::default().hardlink("a", "missing"), 14, "leads to nothing");
    refused(Tar::default().dir("d").hardlink("a", "d"), 14, "not to a file");
    check("app", &Tar::default().dir("d").symlink("l", "d").hardlink("a", "l/x").end(), 12, "symbolic link");
    check(
        "image",
        &Tar::default().symlink("l", "..").hardlink("a", "l/outside").end(),
        14,
        "leads to nothing",
    );
    // To itself: stays what it is.
    let dir = check("app", &Tar::default().file("a", b"x").hardlink("a", "./a").end(), 0, "");
    assert_eq!(fs::read_to_string(dir.path().join("into/a")).unwrap(), "x");
}

#[test]
fn devices_and_pipes_are_refused_except_where_jails_put_their_own() {
    for (kind, name) in [(b'3', "character device"), (b'4', "block device"), (b'6', "pipe")] {
        refused(Tar::default().entry(kind, b"x", b"", b""), 15, name);
        let dir = check("image", &Tar::default().dir("dev").entry(kind, b"dev/x", b"", b"").end(), 0, "");
        assert_eq!(fs::read_dir(dir.path().join("into/dev")).unwrap().count(), 0);
        check("app", &Tar::default().entry(kind, b"dev/x", b"", b"").end(), 15, name);
    }
    refused(Tar::default().entry(b'S', b"sparse", b"", b""), 25, "sparse");
    refused(Tar::default().pax("GNU.sparse.major", "1").file("a", b"x"), 25, "sparse");
    refused(Tar::default().entry(b'V', b"label", b"", b""), 25, "type");
}

#[test]
fn headers_that_disagree_are_refused() {
    refused(Tar::default().pax("size", "1024").file("a", &[b'x'; 512]), 16, "1024");
    refused(Tar::default().pax("size", "0").file("a", b"x"), 16, "size");
    refused(Tar::default().pax("path", "b").pax("path", "c").file("a", b"x"), 21, "two extension headers");
    refused(Tar::default().entry(b'5', b"d", b"", b"hidden"), 16, "size");
    refused(Tar::default().entry(b'g', b"g", b"", b"10 size=1\n").file("a", b"x"), 21, "global header");
    refused(Tar::default().entry(b'x', b"pax", b"", b"99 broken"), 21, "extension header");
    check("app", &Tar::default().entry(b'g', b"g", b"", b"13 comment=x\n").file("a", b"x").end(), 0, "");
    check("app", &Tar::default().pax("size", "1").file("a", b"x").end(), 0, "");
}

#[test]
fn bombs_stop_at_the_budget() {
    let zeros = vec![0; 8 << 20];
    let big = Tar::default().file("big", &zeros).end();
    check("app", &big, 17, "bytes");
    let packed = zstd::encode_all(big.as_slice(), 19).unwrap();
    assert!(packed.len() < 10_000);
    check("app", &packed, 17, "bytes");
    // A header alone claims the size; nothing is written for it.
    let mut claim = Tar::default();
    claim.header(b'0', b"claim", b"", 0o777_7777_7777, 0o644, 0);
    check("app", &claim.end(), 17, "bytes");
    // Many small ones.
    let many = (0..1001).fold(Tar::default(), |tar, n| tar.file(&format!("f{n}"), b""));
    check("app", &many.end(), 18, "entries");
    // Headers without entries, and padding without end.
    let headers = (0..1001).fold(Tar::default(), |tar, _| tar.entry(b'g', b"g", b"", b"13 comment=x\n"));
    check("app", &headers.end(), 18, "entries");
    let padding = [Tar::default().file("a", b"x").end(), vec![0; 64 << 20]].concat();
    check("app", &zstd::encode_all(padding.as_slice(), 1).unwrap(), 17, "bytes");
    // A long name is refused before it is read.
    let mut long = Tar::default();
    long.header(b'L', b"long", b"", 1 << 30, 0o644, 0);
    check("app", &long.end(), 21, "extension header");
}

#[test]
fn a_cut_archive_is_refused_wherever_it_is_cut() {
    let tar = Tar::default().dir("d").file("d/a", &[b'x'; 3000]).file("b", b"y").end();
    for cut in [512, 700, 1024, 1500, 4000, 4608, 5200, tar.len() - 1024] {
        check("app", &tar[..cut], 19, "ends early");
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
    for packed in [gzip, zstd] {
        check("app", &packed[..packed.len() / 2], 19, "ends early");
        let mut broken = packed.clone();
        let middle = broken.len() / 2;
        broken[middle] ^= 0xff;
        let dir = tempfile::tempdir().unwrap();
        let code = unpack(&dir.path().join("into"), "app", &broken).status.code().unwrap();
        assert!([19, 21].contains(&code), "{code}");
    }
    let trailing = [Tar::default().file("a", b"x").end(), Tar::default().file("hidden", b"x").end()].concat();
    check("app", &trailing, 21, "behind the end");
}

#[test]
fn an_image_keeps_owners_within_a_jails_range() {
    let mut tar = Tar::default().dir("usr/lib").symlink("lib", "usr/lib").file("lib/libc.so", b"elf");
    tar.header(b'0', b"usr/bin-su", b"", 0, 0o4755, 33);
    let dir = check("image", &tar.end(), 0, "");
    let su = fs::metadata(dir.path().join("into/usr/bin-su")).unwrap();
    assert_eq!((su.uid(), su.permissions().mode() & 0o7777), (33, 0o4755));
    assert_eq!(fs::read_to_string(dir.path().join("into/usr/lib/libc.so")).unwrap(), "elf");
    let mut high = Tar::default();
    high.header(b'0', b"x", b"", 0, 0o644, 65_536);
    check("image", &high.end(), 24, "65536");
    check("image", &Tar::default().pax("uid", "4294967295").file("x", b"").end(), 24, "4294967295");
}

#[test]
fn a_folder_to_unpack_into_is_not_followed_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("elsewhere")).unwrap();
    symlink("elsewhere", dir.path().join("into")).unwrap();
    let output = unpack(&dir.path().join("into"), "app", &Tar::default().file("a", b"x").end());
    assert_eq!(output.status.code(), Some(30));
    assert_eq!(fs::read_dir(dir.path().join("elsewhere")).unwrap().count(), 0);
}

#[test]
fn a_wrong_command_line_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for args in [&["--max-bytes", "1"][..], &["--policy", "x"], &["--max-bytes"], &["--nonsense", "1"]] {
        assert_eq!(unpack_with(dir.path(), args, b"").status.code(), Some(2), "{args:?}");
    }
}

fn sha256(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn frame(media: &str, blob: &[u8], digest: &str, diff_id: &str) -> Vec<u8> {
    let header = format!(
        r#"{{"media_type":"application/vnd.oci.image.layer.v1.tar{media}","length":{},"digest":"{digest}","diff_id":"{diff_id}"}}"#,
        blob.len()
    );
    [&(header.len() as u32).to_le_bytes()[..], header.as_bytes(), blob].concat()
}

fn layers(tars: &[Tar]) -> Vec<u8> {
    let mut stream = b"EPLAYER1".to_vec();
    for (n, tar) in tars.iter().enumerate() {
        let plain = tar.clone().end();
        let (media, blob) = match n % 3 {
            0 => ("", plain.clone()),
            1 => ("+zstd", zstd::encode_all(plain.as_slice(), 1).unwrap()),
            _ => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(&plain).unwrap();
                ("+gzip", gzip.finish().unwrap())
            }
        };
        stream.extend(frame(media, &blob, &sha256(&blob), &sha256(&plain)));
    }
    stream.extend([0; 4]);
    stream
}

fn listing(into: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut todo = vec![into.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            names.push(entry.path().strip_prefix(into).unwrap().to_str().unwrap().to_owned());
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            }
        }
    }
    names.sort();
    names
}

#[test]
fn layers_lie_upon_one_another_with_their_whiteouts() {
    let base = Tar::default()
        .dir("d")
        .file("d/low", b"1")
        .file("d/sub/low", b"1")
        .file("gone", b"1")
        .file("tree/a/b", b"1")
        .symlink("lib", "d");
    let middle = Tar::default()
        .file(".wh.gone", b"")
        .file(".wh.tree", b"")
        // Opaque after its siblings: what this layer put there stays.
        .file("d/new", b"2")
        .file("d/sub/new", b"2")
        .file("d/.wh..wh..opq", b"");
    let top = Tar::default().file("gone", b"3").file("lib/through", b"3").file("x/.wh.missing", b"");
    let dir = check("image", &layers(&[base, middle, top]), 0, "");
    let into = dir.path().join("into");
    assert_eq!(listing(&into), ["d", "d/new", "d/sub", "d/sub/new", "d/through", "gone", "lib"]);
    assert_eq!(fs::read_to_string(into.join("gone")).unwrap(), "3");
}

#[test]
fn whiteouts_lead_nowhere_else() {
    let base = Tar::default().symlink("up", "..").symlink("root", "/");
    for whiteout in ["up/.wh.outside", "root/.wh.outside", "up/.wh..wh..opq"] {
        check("image", &layers(&[base.clone(), Tar::default().file(whiteout, b"")]), 0, "");
    }
    for whiteout in [".wh...", "d/.wh..", ".wh."] {
        check("image", &layers(&[Tar::default().file(whiteout, b"")]), 22, "whiteout");
    }
}

#[test]
fn layers_that_are_not_what_they_claim_are_refused() {
    let tar = Tar::default().file("a", b"x").end();
    let (good, bad) = (sha256(&tar), sha256(b"other"));
    let stream = |digest: &str, diff_id: &str| {
        [b"EPLAYER1".to_vec(), frame("", &tar, digest, diff_id), vec![0; 4]].concat()
    };
    check("image", &stream(&good, &good), 0, "");
    check("image", &stream(&bad, &good), 20, "digest");
    check("image", &stream(&good, &bad), 20, "diff_id");
    check("image", &stream("md5:x", &good), 20, "digest");
    let whole = stream(&good, &good);
    for cut in [10, 100, 500, whole.len() - 200, whole.len() - 4, whole.len() - 1] {
        check("image", &whole[..cut], 19, "ends early");
    }
    check("image", &[whole.clone(), vec![0]].concat(), 21, "behind the last layer");
    check("app", &whole, 25, "upload");
    let unknown = [b"EPLAYER1".to_vec(), frame("+enc", &tar, &good, &good), vec![0; 4]].concat();
    check("image", &unknown, 25, "+enc");
    let escaping = layers(&[Tar::default().file("../outside", b"x")]);
    check("image", &escaping, 10, "..");
}

#[test]
fn what_system_tar_writes_is_unpacked_the_same() {
    let from = tempfile::tempdir().unwrap();
    let long = "long-".repeat(30);
    fs::create_dir_all(from.path().join(&long).join(&long)).unwrap();
    fs::write(from.path().join(&long).join(&long).join("file"), "deep").unwrap();
    fs::write(from.path().join("ünï"), "name").unwrap();
    symlink(format!("{long}/{long}/file"), from.path().join("link")).unwrap();
    for format in ["gnu", "pax", "ustar"] {
        let packed = Command::new("tar")
            .args(["--format", format, "-cf", "-", "-C"])
            .arg(from.path())
            .arg(if format == "ustar" { "ünï" } else { "." })
            .output()
            .unwrap();
        assert!(packed.status.success());
        let dir = check("app", &packed.stdout, 0, "");
        assert_eq!(fs::read_to_string(dir.path().join("into/ünï")).unwrap(), "name");
        if format != "ustar" {
            assert_eq!(fs::read_to_string(dir.path().join("into/link")).unwrap(), "deep");
        }
    }
}

/// Runs the unpacker at a root that has mounts, as a jail's has; they vanish with the namespace.
fn unpack_among_mounts(policy: &str, input: &[u8]) -> (tempfile::TempDir, Output) {
    let dir = tempfile::tempdir().unwrap();
    let script = "cd \"$1\" && mkdir -p into/etc into/run into/cover && touch into/etc/hosts jails && \
        mount -t tmpfs tmpfs into/run && mount -t tmpfs tmpfs into/cover && mount --bind jails into/etc/hosts && \
        exec \"$2\" --into into --policy \"$3\" --max-bytes 1000000 --max-entries 1000";
    let mut child = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "-"])
        .arg(dir.path())
        .args([env!("CARGO_BIN_EXE_epagent-unpack"), policy])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    (dir, output)
}

#[test]
fn what_the_jail_covers_is_ignored_in_an_image_and_refused_in_an_upload() {
    let tar = Tar::default()
        .dir("etc")
        .file("etc/hosts", b"of the image")
        .file("etc/passwd", b"root")
        .dir("run")
        .entry(b'6', b"run/initctl", b"", b"")
        .dir("cover")
        .file("cover/deep/file", b"x")
        .symlink("link", "cover")
        .file("link/file", b"x");
    let whiteouts = Tar::default().file("etc/.wh..wh..opq", b"").file("etc/new", b"n").file(".wh.cover", b"");
    let (dir, output) = unpack_among_mounts("image", &layers(&[tar.clone(), whiteouts]));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let into = dir.path().join("into");
    assert_eq!(listing(&into), ["cover", "etc", "etc/hosts", "etc/new", "link", "run"]);
    assert_eq!(fs::read_to_string(dir.path().join("jails")).unwrap(), "", "the jail's own file is as it was");
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"ignored\":6"), "{output:?}");
    let (_dir, output) = unpack_among_mounts("app", &Tar::default().file("cover/x", b"x").end());
    assert_eq!(output.status.code(), Some(22), "{output:?}");
    let (_dir, output) = unpack_among_mounts("app", &Tar::default().file("etc/hosts", b"x").end());
    assert_eq!(output.status.code(), Some(30), "{output:?}");
}
