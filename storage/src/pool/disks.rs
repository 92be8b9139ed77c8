//! The disks under a pool, as limits of traffic name them.
//!
//! From sysfs: it needs neither the device's path, which may have changed, nor the file system, which may be stalled.

use std::fs;
use std::io;
use std::path::Path;

use crate::types::DiskNumber;

/// Where the kernel shows itself.
pub(super) const SYSFS: &str = "/sys";

/// Whole disks only, each once: a partition's disk stands for it.
pub(super) fn below(sysfs: &Path, fsid: &[u8; 16]) -> io::Result<Vec<DiskNumber>> {
    let mut disks = Vec::new();
    for device in fs::read_dir(sysfs.join("fs/btrfs").join(uuid(fsid)).join("devices"))? {
        let device = fs::canonicalize(device?.path())?;
        let whole = match fs::exists(device.join("partition"))? {
            true => device.parent().unwrap_or(&device),
            false => &device,
        };
        disks.push(number(&fs::read_to_string(whole.join("dev"))?)?);
    }
    disks.sort_unstable();
    disks.dedup();
    Ok(disks)
}

fn number(text: &str) -> io::Result<DiskNumber> {
    let parsed = text.trim().split_once(':').and_then(|(major, minor)| {
        Some(DiskNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
    });
    parsed.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is no device number")))
}

fn uuid(bytes: &[u8; 16]) -> String {
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..4], &hex[4..6], &hex[6..8], &hex[8..10], &hex[10..]].map(|part| part.concat()).join("-")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const FSID: [u8; 16] = [0xd1, 0x02, 0xc3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

    #[test]
    fn each_device_counts_as_its_whole_disk_once() {
        let sysfs = tempfile::tempdir().unwrap();
        let devices = sysfs.path().join("fs/btrfs/d102c304-0506-0708-090a-0b0c0d0e0f10/devices");
        fs::create_dir_all(&devices).unwrap();
        let add = |path: &str, number: &str, is_partition: bool| {
            let device = sysfs.path().join("devices").join(path);
            fs::create_dir_all(&device).unwrap();
            fs::write(device.join("dev"), format!("{number}\n")).unwrap();
            if is_partition {
                fs::write(device.join("partition"), "1\n").unwrap();
            }
            symlink(&device, devices.join(device.file_name().unwrap())).unwrap();
        };
        fs::create_dir_all(sysfs.path().join("devices/pci/nvme0n1")).unwrap();
        fs::write(sysfs.path().join("devices/pci/nvme0n1/dev"), "259:0\n").unwrap();
        add("pci/nvme0n1/nvme0n1p1", "259:1", true);
        add("pci/nvme0n1/nvme0n1p2", "259:2", true);
        add("virtual/loop3", "7:3", false);
        let disk = |major, minor| DiskNumber { major, minor };
        assert_eq!(below(sysfs.path(), &FSID).unwrap(), [disk(7, 3), disk(259, 0)]);
        assert!(below(sysfs.path(), &[0; 16]).is_err(), "another file system");
    }

    #[test]
    fn nonsense_is_no_number() {
        for text in ["", "7", "7:", ":3", "7:3:1", "a:b"] {
            assert!(number(text).is_err(), "{text:?}");
        }
    }
}
