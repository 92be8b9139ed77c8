//! Which cgroup hierarchies are mounted where, from `/proc/self/mountinfo`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::Layout;
use super::hybrid::Hybrid;
use super::v2::V2;
use crate::error::Error;

/// v1 controllers that carry our limits and counters.
const V1_CONTROLLERS: [&str; 4] = ["memory", "cpu", "cpuacct", "pids"];
/// One without which instances run all the same.
const V1_OPTIONAL: &str = "blkio";

/// Mount points found.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mounted {
    v2: Option<PathBuf>,
    v1: BTreeMap<String, PathBuf>,
}

/// The layout of this host for the subtree `name`.
pub(super) fn probe(name: &str) -> Result<Box<dyn Layout>, Error> {
    let file = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(file).map_err(Error::path("read", file))?;
    choose(parse(&text), name)
}

fn choose(mounted: Mounted, name: &str) -> Result<Box<dyn Layout>, Error> {
    let refused = |reason: String| Error::Refused { operation: "find cgroups", reason };
    let Some(v2) = mounted.v2 else {
        return Err(refused("no cgroup2 file system is mounted; mount one at /sys/fs/cgroup".to_owned()));
    };
    let present = V1_CONTROLLERS.iter().filter(|controller| mounted.v1.contains_key(**controller)).count();
    match present {
        0 => Ok(Box::new(V2::new(&v2, name))),
        4 => Ok(Box::new(Hybrid::new(&v2, &mounted.v1, name))),
        _ => Err(refused(format!(
            "of memory, cpu, cpuacct and pids only some are on v1: {:?}",
            mounted.v1.keys()
        ))),
    }
}

/// Fields of a mountinfo line: `… mount-point options [optional…] - type source super-options` (proc(5)).
fn parse(text: &str) -> Mounted {
    let is_wanted = |option: &&str| V1_CONTROLLERS.contains(option) || *option == V1_OPTIONAL;
    let mut mounted = Mounted::default();
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(point) = left.split(' ').nth(4) else { continue };
        let mut right = right.split(' ');
        let (kind, options) = (right.next(), right.nth(1).unwrap_or_default());
        match kind {
            Some("cgroup2") => {
                mounted.v2.get_or_insert(PathBuf::from(point));
            }
            Some("cgroup") => {
                for controller in options.split(',').filter(is_wanted) {
                    mounted.v1.entry(controller.to_owned()).or_insert_with(|| PathBuf::from(point));
                }
            }
            _ => {}
        }
    }
    mounted
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN_V2: &str =
        "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn the_layout_follows_what_is_mounted() {
        let layout = |text: &str| choose(parse(text), "epagent-7").map(|layout| layout.name());
        assert_eq!(layout(DEBIAN_V2).ok(), Some("v2"));
        assert_eq!(layout(HYBRID).ok(), Some("hybrid"));
        assert!(layout("").is_err());
        let blkio = "33 31 0:30 / /sys/fs/cgroup/blkio rw,relatime - cgroup cgroup rw,blkio\n";
        assert_eq!(layout(&format!("{HYBRID}{blkio}")).ok(), Some("hybrid"));
        assert_eq!(layout(&format!("{DEBIAN_V2}{blkio}")).ok(), Some("v2"), "blkio alone makes no hybrid");
        let no_pids: String =
            HYBRID.lines().filter(|line| !line.contains("pids")).map(|line| format!("{line}\n")).collect();
        assert!(layout(&no_pids).is_err(), "half a hybrid is refused, not guessed at");
    }

    #[test]
    fn joint_controllers_are_found_once_each() {
        let mounted = parse(HYBRID);
        assert_eq!(mounted.v1["cpu"], mounted.v1["cpuacct"]);
        assert_eq!(mounted.v2, Some(PathBuf::from("/sys/fs/cgroup/unified")));
    }
}
