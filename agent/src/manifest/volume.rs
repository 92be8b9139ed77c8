//! `[volume.NAME]`: where an app's lasting files are, and how many.

use std::collections::BTreeMap;

use epagent_core::name::{NameError, VolumeName};
use epagent_core::spec::VolumeSpec;

use super::ManifestError;
use super::error::quoted;
use super::process::SIZE_BYTES_MAX;
use super::table::{Item, Table};

/// Volumes of one app; each is a mount in each of its instances.
const VOLUMES_MAX: usize = 16;
const PATH_BYTES_MAX: usize = 255;
const QUOTA_BYTES_MIN: u64 = 1 << 20;
const QUOTA_BYTES_DEFAULT: u64 = 1 << 30;

/// Made anew for each instance: nothing may be mounted at or below them.
const OWN_MOUNTS: [&str; 5] = ["/proc", "/sys", "/dev", "/tmp", "/run"];
/// The image's system: nothing may be mounted at or below it, where some images are read-only.
const SYSTEM: [&str; 9] = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/boot"];
/// A volume at one of these would hide the app or what the image put there; below them is fine.
const NEEDED: [&str; 5] = ["/", "/app", "/root", "/home", "/var"];

pub(super) fn volumes(top: &Table<'_>) -> Result<BTreeMap<VolumeName, VolumeSpec>, ManifestError> {
    let mut volumes: BTreeMap<VolumeName, VolumeSpec> = BTreeMap::new();
    let Some(all) = top.get("volume") else { return Ok(volumes) };
    const EXAMPLE: &str = "name each volume: `[volume.data]`";
    for item in all.table().map_err(|error| error.with_help(EXAMPLE))?.named() {
        let table = item.table().map_err(|error| error.with_help(EXAMPLE))?;
        let name: VolumeName =
            item.key.parse().map_err(|error: NameError| item.error_at_key(error.to_string()))?;
        table.only(&["path", "quota"])?;
        let place = table.require("path", "path = \"/data\"")?;
        let path = path(&place)?;
        if let Some((other, spec)) = volumes.iter().find(|(_, spec)| overlap(&spec.path, &path)) {
            let message = format!(
                "{} overlaps the volume `{other}`, which is at {}",
                quoted(&path),
                quoted(&spec.path)
            );
            return Err(place.error(message));
        }
        let quota = table.get("quota");
        let quota_bytes = quota
            .map_or(Ok(QUOTA_BYTES_DEFAULT), |item| item.size_bytes(QUOTA_BYTES_MIN..=SIZE_BYTES_MAX))?;
        volumes.insert(name, VolumeSpec { path, quota_bytes });
    }
    if volumes.len() > VOLUMES_MAX {
        return Err(all.error(format!("there are {} volumes; the most is {VOLUMES_MAX}", volumes.len())));
    }
    Ok(volumes)
}

fn path(item: &Item<'_>) -> Result<String, ManifestError> {
    let path = item.string()?;
    const HELP: &str = "take a folder of its own, like `/data` or `/app/data`";
    let refused =
        |why: &str| Err(item.error(format!("a volume can't be at {}: {why}", quoted(path))).with_help(HELP));
    let Some(relative) = path.strip_prefix('/') else { return refused("the path is not absolute") };
    if path.len() > PATH_BYTES_MAX {
        return refused("the path is too long");
    }
    if path.chars().any(char::is_control) {
        return refused("the path contains a control character");
    }
    if !relative.is_empty() && relative.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return refused("the path has an empty part, `.` or `..`");
    }
    if let Some(taken) = OWN_MOUNTS.iter().find(|&&mount| is_in(path, mount)) {
        return refused(&format!("every instance has a {taken} of its own"));
    }
    if let Some(system) = SYSTEM.iter().find(|&&folder| is_in(path, folder)) {
        return refused(&format!("{system} is the image's"));
    }
    if NEEDED.contains(&path) {
        return refused("it would hide what is there");
    }
    Ok(path.to_owned())
}

fn overlap(one: &str, other: &str) -> bool {
    is_in(one, other) || is_in(other, one)
}

fn is_in(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}
