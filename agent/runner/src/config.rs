//! `runner.toml`: what the operator, and nobody else, decides.
//!
//! Everything a request must not be able to choose is here: where the pool is, which ids and addresses this node
//! has, whose uid may speak, how much one instance may ask for at most. Files in `conf.d` may change it
//! ([`epagent_conf`]).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use epagent_conf::{ConfError, Daemon, Loaded, Private};
use epagent_isolation::net::Cidr;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Ids in the range of one app, as the user namespaces of the instances have them.
pub const IDS_PER_RANGE: u32 = 65_536;
/// The largest node number: it is part of interface names and of the id block.
pub const NODE_MAX: u16 = 127;
/// No instance may be given more slots than this, however large the address block is.
const SLOTS_MAX: u32 = 2_048;
/// The slowest that anything may be made with a disk.
pub const IO_BYTES_PER_S_MIN: u64 = 1 << 20;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// 1 to [`NODE_MAX`]; every kernel object of this node carries it in its name.
    pub node: u16,
    /// The durable tables.
    pub state_dir: PathBuf,
    /// The folder with `jail/`, the control sockets of the monitors.
    pub run_dir: PathBuf,
    pub jail_binary: PathBuf,
    pub unpack_binary: PathBuf,
    /// The only uid beside 0 that may speak to the runner; its group has the same number and may read logs.
    pub brain_uid: u32,
    /// The balancer's group: apps may listen on unix sockets that it alone reaches. Without it they can't.
    #[serde(default)]
    pub balancer_gid: Option<u32>,
    /// Whether the image `host` exists: the host's own /usr, for `epagent dev`.
    #[serde(default)]
    pub host_image: bool,
    pub pool: Pool,
    pub cgroup: Cgroup,
    pub ids: Ids,
    pub network: Network,
    #[serde(default)]
    pub build: Build,
    #[serde(default)]
    pub limits: Maxima,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(
    untagged,
    deny_unknown_fields,
    expecting = "[pool] takes `mount`, `file` and `size`, or `path` alone"
)]
pub enum Pool {
    /// A fully allocated loop file that is made when it is missing.
    Loop { mount: PathBuf, file: PathBuf, size: Bytes },
    /// A folder on a btrfs that exists.
    Path { path: PathBuf },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cgroup {
    /// The subtree of all jails, below the mount of the cgroup file system.
    pub root: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ids {
    /// The first host id of this node's block. Range 0 of it is for jobs on images.
    pub base: u32,
    pub ranges: u16,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    pub v4: Block<Ipv4Addr>,
    pub v6: Option<Block<Ipv6Addr>>,
    /// Where name server queries of the instances go.
    pub resolvers: Vec<IpAddr>,
    /// Private destinations that instances may reach all the same: a company's proxy.
    #[serde(default, serialize_with = "texts", deserialize_with = "cidrs")]
    pub allow: Vec<Cidr>,
}

impl Network {
    /// The node's blocks, as base and length of the prefix.
    pub fn blocks(&self) -> impl Iterator<Item = (IpAddr, u8)> {
        let v6 = self.v6.map(|block| (IpAddr::V6(block.base), block.len));
        std::iter::once((IpAddr::V4(self.v4.base), self.v4.len)).chain(v6)
    }
}

/// What builds get beside what their manifest says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Build {
    /// Certificate authorities that builds trust in place of the image's.
    pub ca_bundle: Option<PathBuf>,
    /// Proxies and package indexes, whose addresses may hold passwords; `MIRROR` is the Debian mirror images are made
    /// from.
    pub env: BTreeMap<String, Private>,
    pub memory: Bytes,
    /// What may be written to the tree of one release or image.
    pub disk: Bytes,
    pub deadline: Duration,
    pub cpu: Percent,
    pub pids: u32,
    /// With each disk of the pool, each way.
    pub io: Rate,
}

impl Default for Build {
    fn default() -> Build {
        Build {
            ca_bundle: None,
            env: BTreeMap::new(),
            memory: Bytes(2 << 30),
            disk: Bytes(4 << 30),
            deadline: Duration { ms: 30 * 60 * 1000 },
            cpu: Percent(200),
            pids: 2_048,
            io: Rate { bytes_per_s: Some(200 << 20) },
        }
    }
}

/// The most one instance may be given, whatever a request says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Maxima {
    pub memory: Bytes,
    pub cpu: Percent,
    pub pids: u32,
    pub nofile: u32,
    pub disk: Bytes,
    /// What an app gets whose manifest says `io = "none"`, or more.
    pub io: Rate,
    /// The largest volume.
    pub volume: Bytes,
}

impl Default for Maxima {
    fn default() -> Maxima {
        Maxima {
            memory: Bytes(64 << 30),
            cpu: Percent(6_400),
            pids: 16_384,
            nofile: 262_144,
            disk: Bytes(64 << 30),
            io: Rate { bytes_per_s: None },
            volume: Bytes(4 << 40),
        }
    }
}

impl Config {
    /// Reads and checks the files.
    pub fn read(path: &Path) -> Result<Loaded<Config>, ConfError> {
        let loaded: Loaded<Config> = epagent_conf::load(Daemon::Runner, path)?;
        match loaded.config.fault() {
            None => Ok(loaded),
            Some((key, why)) => Err(loaded.fault(path, key, why)),
        }
    }

    fn fault(&self) -> Option<(&'static str, String)> {
        let root = &self.cgroup.root;
        if !(1..=NODE_MAX).contains(&self.node) {
            return Some(("node", format!("{} is not in 1..={NODE_MAX}", self.node)));
        }
        if root.is_empty()
            || root.starts_with('/')
            || root.split('/').any(|part| matches!(part, "" | "." | ".."))
        {
            return Some(("cgroup.root", format!("{root:?} is not a relative path without `..`")));
        }
        let last = u64::from(self.ids.base) + u64::from(self.ids.ranges) * u64::from(IDS_PER_RANGE);
        if self.ids.base == 0
            || !self.ids.base.is_multiple_of(IDS_PER_RANGE)
            || last > u64::from(u32::MAX) + 1
        {
            return Some((
                "ids.base",
                format!("{} is not a multiple of {IDS_PER_RANGE} with room above", self.ids.base),
            ));
        }
        if !(2..=1024).contains(&self.ids.ranges) {
            return Some(("ids.ranges", "there have to be 2 to 1024 of them".to_owned()));
        }
        if !(16..=30).contains(&self.network.v4.len) {
            return Some(("network.v4", "the block has to be a /16 to /30".to_owned()));
        }
        for (key, path) in [("state_dir", &self.state_dir), ("run_dir", &self.run_dir)] {
            if !path.is_absolute() {
                return Some((key, format!("{} is not an absolute path", path.display())));
            }
        }
        None
    }

    /// How many jails can have an address at once: each has a /31 of the block.
    pub fn slots(&self) -> u32 {
        (1u32 << (31 - u32::from(self.network.v4.len))).min(SLOTS_MAX)
    }

    /// How many id ranges there are. The highest id of all is nobody's (`(uid_t) -1`), nor is the range it lies in.
    pub fn ranges(&self) -> u16 {
        let last = self.ids.base.wrapping_add(u32::from(self.ids.ranges).wrapping_mul(IDS_PER_RANGE));
        if last == 0 { self.ids.ranges - 1 } else { self.ids.ranges }
    }

    /// The first host id of one range; `range` is below `ids.ranges`.
    pub fn range_base(&self, range: u16) -> u32 {
        self.ids.base + u32::from(range) * IDS_PER_RANGE
    }

    /// The folder of the monitors' control sockets.
    pub fn jail_sockets(&self) -> PathBuf {
        self.run_dir.join("jail")
    }
}

/// A block of addresses, `100.96.48.0/20`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block<A> {
    pub base: A,
    pub len: u8,
}

/// A size in bytes; in text a number with `K`, `M`, `G` or `T` (powers of 1024), or without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// Bytes per second; in text a size of these, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub bytes_per_s: Option<u64>,
}

/// A share of one processor; in text `150%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(pub u32);

/// A time span; in text a number with `ms`, `s`, `m` or `h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Duration {
    pub ms: u64,
}

const SIZES: [(&str, u64); 5] = [("", 1), ("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30), ("T", 1 << 40)];
const SPANS: [(&str, u64); 4] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let (_, scale) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*scale)
}

impl FromStr for Bytes {
    type Err = String;
    fn from_str(text: &str) -> Result<Bytes, String> {
        scaled(text, &SIZES)
            .map(Bytes)
            .ok_or_else(|| format!("{text:?} is not a size like \"512M\" or \"2G\""))
    }
}

impl FromStr for Rate {
    type Err = String;
    fn from_str(text: &str) -> Result<Rate, String> {
        let bytes_per_s = match text {
            "none" => None,
            _ => Some(scaled(text, &SIZES).filter(|rate| *rate >= IO_BYTES_PER_S_MIN).ok_or_else(|| {
                format!("{text:?} is not a rate of \"1M\" or more, like \"200M\", nor \"none\"")
            })?),
        };
        Ok(Rate { bytes_per_s })
    }
}

impl FromStr for Percent {
    type Err = String;
    fn from_str(text: &str) -> Result<Percent, String> {
        let share =
            scaled(text, &[("%", 1)]).and_then(|share| u32::try_from(share).ok()).filter(|share| *share > 0);
        share.map(Percent).ok_or_else(|| format!("{text:?} is not a share of a processor like \"150%\""))
    }
}

impl FromStr for Duration {
    type Err = String;
    fn from_str(text: &str) -> Result<Duration, String> {
        let ms = scaled(text, &SPANS).filter(|ms| *ms > 0);
        ms.map(|ms| Duration { ms })
            .ok_or_else(|| format!("{text:?} is not a time span like \"90s\" or \"30m\""))
    }
}

impl<A: FromStr> FromStr for Block<A> {
    type Err = String;
    fn from_str(text: &str) -> Result<Block<A>, String> {
        let parts =
            text.split_once('/').and_then(|(base, len)| Some((base.parse().ok()?, len.parse().ok()?)));
        parts
            .map(|(base, len)| Block { base, len })
            .ok_or_else(|| format!("{text:?} is not a block like ADDRESS/LENGTH"))
    }
}

/// The number in the largest unit that it is a multiple of.
fn in_units(number: u64, units: &[(&str, u64)]) -> String {
    let fitting = units.iter().rev().find(|(_, scale)| number.is_multiple_of(*scale));
    fitting.map_or_else(|| number.to_string(), |(unit, scale)| format!("{}{unit}", number / scale))
}

fn texts<S: Serializer>(values: &[Cidr], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().map(ToString::to_string))
}

fn cidrs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Cidr>, D::Error> {
    let texts = Vec::<String>::deserialize(deserializer)?;
    texts.iter().map(|text| text.parse().map_err(de::Error::custom)).collect()
}

macro_rules! deserialize_from_text {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )*};
}

deserialize_from_text!(Bytes, Rate, Percent, Duration, Block<Ipv4Addr>, Block<Ipv6Addr>);

macro_rules! serialize_as_text {
    ($($type:ty: $text:expr),*) => {$(
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                let text: fn(&$type) -> String = $text;
                serializer.serialize_str(&text(self))
            }
        }
    )*};
}

serialize_as_text!(
    Bytes: |bytes| in_units(bytes.0, &SIZES),
    Rate: |rate| rate.bytes_per_s.map_or_else(|| "none".to_owned(), |bytes| in_units(bytes, &SIZES)),
    Percent: |share| format!("{}%", share.0),
    Duration: |span| in_units(span.ms, &SPANS),
    Block<Ipv4Addr>: |block| format!("{}/{}", block.base, block.len),
    Block<Ipv6Addr>: |block| format!("{}/{}", block.base, block.len)
);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= 1 << 30 => write!(f, "{} GiB", bytes >> 30),
            bytes if bytes >= 1 << 20 => write!(f, "{} MiB", bytes >> 20),
            bytes => write!(f, "{bytes} bytes"),
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub const EXAMPLE: &str = r#"
node = 3
state_dir = "/d/runner"
run_dir = "/d/run"
jail_binary = "/d/epagent-jail"
unpack_binary = "/d/epagent-unpack"
brain_uid = 60612
host_image = true
[pool]
mount = "/d/pool"
file = "/d/pool.img"
size = "6G"
[cgroup]
root = "epagent-3"
[ids]
base = 2197815296
ranges = 256
[network]
v4 = "100.96.48.0/20"
v6 = "fd65:7061:6765:3::/64"
resolvers = ["10.0.0.53"]
allow = []
[build]
env = { PIP_INDEX_URL = "https://index.example/simple" }
memory = "2G"
disk = "4G"
deadline = "30m"
cpu = "200%"
"#;

    pub fn example() -> Config {
        toml::from_str(EXAMPLE).unwrap()
    }

    #[test]
    fn the_documented_file_is_valid() {
        let config = example();
        assert!(config.fault().is_none(), "{:?}", config.fault());
        assert_eq!(config.slots(), 2048);
        assert_eq!(config.build.deadline.ms, 1_800_000);
        assert!(matches!(config.pool, Pool::Loop { size: Bytes(size), .. } if size == 6 << 30));
        assert_eq!((config.ranges(), config.range_base(1)), (256, 2197815296 + 65536));
    }

    #[test]
    fn it_is_shown_as_it_is_written() {
        let shown = toml::to_string(&example()).unwrap();
        assert!(shown.contains("PIP_INDEX_URL = \"(not shown)\""), "{shown}");
        assert!(shown.contains("io = \"200M\"") && shown.contains("io = \"none\""), "{shown}");
        let again: Config = toml::from_str(&shown).unwrap();
        assert_eq!(toml::to_string(&again).unwrap(), shown);
        let (written, shown): (toml::Table, toml::Table) = (EXAMPLE.parse().unwrap(), shown.parse().unwrap());
        for (section, key) in [("pool", "size"), ("network", "v6"), ("build", "deadline"), ("build", "cpu")] {
            assert_eq!(shown[section][key], written[section][key]);
        }
    }

    #[test]
    fn the_last_nodes_last_range_is_nobodys() {
        let text = EXAMPLE.replace("base = 2197815296", "base = 4278190080");
        let config: Config = toml::from_str(&text).unwrap();
        assert!(config.fault().is_none());
        assert_eq!(config.ranges(), 255);
    }

    #[test]
    fn a_pool_is_a_loop_file_or_a_path() {
        let path = "path = \"/srv/pool\"";
        let both = "path = \"/srv/pool\"\nsize = \"1G\"";
        assert!(matches!(toml::from_str(path), Ok(Pool::Path { .. })));
        assert!(toml::from_str::<Pool>(both).is_err());
    }

    #[test]
    fn bad_values_and_unknown_keys_are_refused() {
        for (from, to) in [
            ("node = 3", "node = 0"),
            ("node = 3", "node = 128"),
            ("node = 3", "node = 3\nnodes = 4"),
            ("root = \"epagent-3\"", "root = \"../epagent-3\""),
            ("base = 2197815296", "base = 0"),
            ("base = 2197815296", "base = 65537"),
            ("ranges = 256", "ranges = 1"),
            ("memory = \"2G\"", "memory = \"2X\""),
            ("cpu = \"200%\"", "cpu = \"200\""),
            ("cpu = \"200%\"", "cpu = \"200%\"\nio = \"200K\""),
            ("cpu = \"200%\"", "cpu = \"200%\"\nio = \"no\""),
            ("deadline = \"30m\"", "deadline = \"soon\""),
            ("/20\"", "/8\""),
            ("allow = []", "allow = [\"proxy\"]"),
            ("state_dir = \"/d", "state_dir = \"d"),
        ] {
            let text = EXAMPLE.replacen(from, to, 1);
            assert_ne!(text, EXAMPLE);
            let fault = toml::from_str::<Config>(&text).map(|config| config.fault());
            assert!(!matches!(fault, Ok(None)), "{to:?} was accepted");
        }
    }
}
