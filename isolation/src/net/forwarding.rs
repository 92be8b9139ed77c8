//! Letting the host forward, on uplinks only, and putting it back.
//!
//! IPv4 forwards per interface: the links' own setting and the uplink's suffice, `ip_forward` stays. IPv6 knows only
//! `all`; router advertisements are then ignored unless `accept_ra` is 2 (Documentation/networking/ip-sysctl).
//!
//! Several nodes may share one kernel. What was there before the first of them is kept in one file, written before
//! anything is changed; each node has a mark beside it. The last node to leave puts everything back. A mark whose
//! node has no packet filter any more belongs to a node that was killed, and does not count.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::firewall::is_installed;
use super::rtnl::Rtnl;
use crate::error::Error;

/// Gone after a boot, as the settings are.
const STATE_DIR: &str = "/run/epagent-forwarding";
const BEFORE: &str = "before.json";
const SYSCTL: &str = "/proc/sys/net";
/// Makes every interface a router's.
const ROUTER: &str = "ipv6/conf/all/forwarding";

/// Name below /proc/sys/net, and value.
type Setting = (String, String);
/// What was, in the order in which it was changed.
type Before = Vec<Setting>;

/// Lets the uplinks (interfaces with a default route) forward, remembering what was; the names of the settings that
/// it changed. To be called again now and then, since uplinks come late and change. After [`super::install_firewall`],
/// so that nothing is ever forwarded unfiltered.
pub fn enable_forwarding(node: u16) -> Result<Vec<String>, Error> {
    let _lock = lock()?;
    let file = Path::new(STATE_DIR).join(BEFORE);
    let mut before = read_before(&file)?;
    let mut changes = Vec::new();
    for (name, value) in wanted(&before)? {
        if let Some(now) = read_setting(&name)?.filter(|now| *now != value) {
            changes.push((name, value, now));
        }
    }
    if changes.is_empty() && mark(node).exists() {
        return Ok(Vec::new());
    }
    for (name, _, now) in &changes {
        if !before.iter().any(|(known, _)| known == name) {
            before.push((name.clone(), now.clone()));
        }
    }
    write_whole(
        &file,
        &serde_json::to_vec(&before).map_err(|e| Error::path("encode", &file)(io::Error::from(e)))?,
    )?;
    write_whole(&mark(node), b"")?;
    changes.iter().try_for_each(|(name, value, _)| write_setting(name, value))?;
    Ok(changes.into_iter().map(|(name, _, _)| name).collect())
}

/// Undoes [`enable_forwarding`] when no other node needs it.
pub fn disable_forwarding(node: u16) -> Result<(), Error> {
    let _lock = lock()?;
    remove_if_there(&mark(node))?;
    for other in marked()? {
        if is_installed(other) {
            return Ok(());
        }
        remove_if_there(&mark(other))?;
    }
    let file = Path::new(STATE_DIR).join(BEFORE);
    // Backwards: forwarding is off again before router advertisements are ignored again.
    for (name, value) in read_before(&file)?.iter().rev() {
        write_setting(name, value)?;
    }
    remove_if_there(&file)
}

/// `accept_ra` before `all/forwarding`: an interface that turns router with `accept_ra` 1 loses its default route, or
/// gets none when it comes up later. So it is set on every interface of the host's, where it was in force until we made
/// the host a router; on a host that is one anyway it is the uplinks' alone, since the others face strangers.
fn wanted(before: &Before) -> Result<Vec<Setting>, Error> {
    let list = || -> io::Result<_> {
        let mut rtnl = Rtnl::open()?;
        Ok((rtnl.links()?, rtnl.default_route_links()?))
    };
    let (links, uplinks) = list().map_err(Error::call("list uplinks"))?;
    let by_us = before.iter().any(|(name, value)| name == ROUTER && value == "0")
        || read_setting(ROUTER)?.is_some_and(|value| value == "0");
    let mut wanted = Vec::new();
    for link in links.iter().filter(|link| !is_a_jails(&link.name)) {
        let is_uplink = uplinks.contains(&link.index);
        if is_uplink {
            wanted.push((format!("ipv4/conf/{}/forwarding", link.name), "1".to_owned()));
        }
        let accept_ra = format!("ipv6/conf/{}/accept_ra", link.name);
        if (is_uplink || by_us) && read_setting(&accept_ra)?.is_some_and(|value| value == "1") {
            wanted.push((accept_ra, "2".to_owned()));
        }
    }
    wanted.push((ROUTER.to_owned(), "1".to_owned()));
    Ok(wanted)
}

/// `ep1-7`: a jail's link has settings of its own.
fn is_a_jails(link: &str) -> bool {
    let number = link.strip_prefix("ep").and_then(|rest| rest.split_once('-'));
    number.is_some_and(|(node, _)| node.parse::<u16>().is_ok())
}

/// Held until dropped; nodes take turns.
fn lock() -> Result<File, Error> {
    fs::create_dir_all(STATE_DIR).map_err(Error::path("create", STATE_DIR))?;
    let dir = File::open(STATE_DIR).map_err(Error::path("open", STATE_DIR))?;
    rustix::fs::flock(&dir, FlockOperation::LockExclusive)
        .map_err(|e| Error::path("lock", STATE_DIR)(io::Error::from(e)))?;
    Ok(dir)
}

fn mark(node: u16) -> PathBuf {
    Path::new(STATE_DIR).join(format!("node-{node}"))
}

fn marked() -> Result<Vec<u16>, Error> {
    let entries = fs::read_dir(STATE_DIR).map_err(Error::path("list", STATE_DIR))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.strip_prefix("node-")?.parse().ok()).collect())
}

fn read_before(file: &Path) -> Result<Before, Error> {
    match fs::read(file) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Before::new()),
        Err(e) => Err(Error::path("read", file)(e)),
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|e| Error::path("parse", file)(io::Error::from(e)))
        }
    }
}

/// The old content or the new, never a part. No sync: the folder does not outlive the kernel.
fn write_whole(file: &Path, bytes: &[u8]) -> Result<(), Error> {
    let new = file.with_extension("new");
    fs::write(&new, bytes).map_err(Error::path("write", &new))?;
    fs::rename(&new, file).map_err(Error::path("rename", &new))
}

fn remove_if_there(file: &Path) -> Result<(), Error> {
    match fs::remove_file(file) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::path("remove", file)(e)),
        _ => Ok(()),
    }
}

/// `None`: there is no such setting (no IPv6, or the interface is gone).
fn read_setting(name: &str) -> Result<Option<String>, Error> {
    let file = Path::new(SYSCTL).join(name);
    match fs::read_to_string(&file) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::path("read", file)(e)),
    }
}

fn write_setting(name: &str, value: &str) -> Result<(), Error> {
    let file = Path::new(SYSCTL).join(name);
    match fs::write(&file, value) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        result => result.map_err(Error::path("set", file)),
    }
}
