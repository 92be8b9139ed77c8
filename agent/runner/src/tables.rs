//! What the runner knows to exist: its own tables, against which every request is checked.
//!
//! The agent is not believed. Which app has which id range, which release and which jail belong to whom, who has
//! an address: that is only what stands here. Records ([`AppRecord`], [`ReleaseRecord`], [`JailRecord`]) are written to
//! disk before the object they describe is made and removed after the object is gone ([`crate::disk`]), so that
//! a runner that was killed in between finds the intent and finishes or undoes it ([`crate::recover`]).
//!
//! One jail:
//!
//! ```text
//!  Preparing ─▶ Starting ─▶ Running ─┬─▶ Concluding ─▶ Exited ─▶ (gone)
//!      │            └────────────────┴───────────────────▲
//!      └─▶ (gone, when it could not be made)
//! ```
//!
//! Concluding: a job on an image has ended; the tree is published or dropped before its end is told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};

use epagent_storage::{ImageId, StagingId};
use epagent_wire::runner::{Exit, JailState, Purpose};
use serde::{Deserialize, Serialize};

use crate::config::{Block, Config};
use epagent_wire::name::{AppName, ImageName, JailId, ReleaseNumber, VolumeName};

/// Jails at once, ended ones that nobody forgot included.
pub const JAILS_MAX: usize = 512;
/// Jobs (unpacking, building, making images) that run at once.
pub const JOBS_MAX: usize = 8;
/// Releases of all apps together.
pub const RELEASES_MAX: usize = 4_096;
pub const VOLUMES_MAX: usize = 1_024;
pub const IMAGES_MAX: usize = 256;
/// Commands beside the app of one jail.
pub const EXECS_MAX: usize = 32;
/// Log folders that are kept.
pub const LOGS_MAX: usize = 4_096;

/// An app and the number of its id range. Range 0 belongs to no app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppRecord {
    pub app: AppName,
    pub range: u16,
}

/// A release whose tree is being built or, once sealed, is there for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRecord {
    pub app: AppName,
    pub release: ReleaseNumber,
    /// The exact version it was cloned from.
    pub image: ImageId,
    pub sealed: bool,
}

impl ReleaseRecord {
    /// The staging area in which the tree is built. No staging area of an image job can have this name, since
    /// those ([`image_job_id`]) have two hyphens where an app's name would have to end.
    pub fn staging(&self) -> StagingId {
        staging_name(&format!("{}-{}", self.app, self.release))
    }
}

/// A jail, from before anything of it is made until after everything of it is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailRecord {
    pub jail: JailId,
    /// None for jobs on images.
    pub app: Option<AppName>,
    pub release: Option<ReleaseNumber>,
    pub purpose: Purpose,
    /// Which pair of addresses of the node's block is its own.
    pub slot: Option<u32>,
    pub volumes: BTreeSet<VolumeName>,
    pub created_at_ms: u64,
    /// The kernel's boot id. No cgroup of this boot: the jail was never launched.
    pub boot: String,
    /// How it ended, once no monitor can tell: of a jail whose monitor was lost; and of a job on an image, once what
    /// it made was published or dropped.
    #[serde(default)]
    pub concluded: Option<Exit>,
}

impl JailRecord {
    /// The image that a job makes.
    pub fn makes_image(&self) -> Option<&ImageName> {
        match &self.purpose {
            Purpose::ImageImport { image } | Purpose::ImageBootstrap { image } => Some(image),
            Purpose::Start | Purpose::BuildUnpack | Purpose::BuildRun { .. } => None,
        }
    }

    pub fn is_job(&self) -> bool {
        !matches!(self.purpose, Purpose::Start)
    }

    /// The staging area of a job on an image: named like the job.
    pub fn image_staging(&self) -> StagingId {
        staging_name(self.jail.as_str())
    }
}

/// Both kinds of staging names are of the storage crate's alphabet and shorter than its limit.
fn staging_name(text: &str) -> StagingId {
    #[expect(
        clippy::expect_used,
        reason = "the names it is made of are a subset: checked in this module's tests"
    )]
    StagingId::new(text).expect("a staging name")
}

/// The id of a job on an image. With two hyphens, so that it can't be the id of an app's jail.
pub fn image_job_id(salt: u64) -> JailId {
    #[expect(clippy::expect_used, reason = "checked in this module's tests")]
    let parse = |text: String| text.parse::<JailId>().expect("a jail id");
    #[expect(clippy::expect_used, reason = "a literal")]
    let stem: AppName = "image".parse().expect("an app name");
    parse(JailId::new(&stem, salt).as_str().replacen('-', "--", 1))
}

/// Whether the id is one that a jail of this app may have: the app's name, a hyphen and eight letters.
pub fn is_jail_of(jail: &JailId, app: &AppName) -> bool {
    let rest = jail.as_str().strip_prefix(app.as_str()).and_then(|rest| rest.strip_prefix('-'));
    rest.is_some_and(|rest| rest.len() == 8 && rest.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7')))
}

/// A jail and where it stands.
#[derive(Debug, Clone)]
pub struct Jail {
    pub record: JailRecord,
    pub phase: Phase,
    /// Commands run beside the app whose end was not told yet, by the monitor's numbers.
    pub execs: BTreeSet<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Its record and its root are being made.
    Preparing,
    /// The monitor was launched.
    Starting,
    Running {
        pid: i32,
        started_at_ms: u64,
    },
    Concluding(Exit),
    Exited {
        exit: Exit,
        started_at_ms: Option<u64>,
    },
}

impl Jail {
    pub fn new(record: JailRecord, phase: Phase) -> Jail {
        Jail { record, phase, execs: BTreeSet::new() }
    }

    /// Whether processes of it may exist.
    pub fn is_active(&self) -> bool {
        matches!(self.phase, Phase::Preparing | Phase::Starting | Phase::Running { .. })
    }

    pub fn state(&self) -> JailState {
        match &self.phase {
            Phase::Preparing | Phase::Starting => JailState::Starting,
            Phase::Running { .. } | Phase::Concluding(_) => JailState::Running,
            Phase::Exited { exit, .. } => JailState::Exited(exit.clone()),
        }
    }

    pub fn pid(&self) -> Option<i32> {
        match self.phase {
            Phase::Running { pid, .. } => Some(pid),
            _ => None,
        }
    }

    pub fn started_at_ms(&self) -> Option<u64> {
        match self.phase {
            Phase::Running { started_at_ms, .. } => Some(started_at_ms),
            Phase::Exited { started_at_ms, .. } => started_at_ms,
            _ => None,
        }
    }
}

/// Everything that exists, in memory.
#[derive(Debug, Clone, Default)]
pub struct Tables {
    pub apps: BTreeMap<AppName, AppRecord>,
    pub releases: BTreeMap<(AppName, ReleaseNumber), ReleaseRecord>,
    pub jails: BTreeMap<JailId, Jail>,
    /// The current version of each image.
    pub images: BTreeMap<ImageName, ImageId>,
    /// Volumes and their quotas in bytes.
    pub volumes: BTreeMap<(AppName, VolumeName), u64>,
    pub logs: BTreeSet<JailId>,
    /// Where the search for a free slot and a free range begins, so that neither is used again at once.
    next_slot: u32,
    next_range: u16,
}

impl Tables {
    /// The search for a free slot goes on from this one.
    pub fn give_slots_from(&mut self, first_slot: u32) {
        self.next_slot = first_slot;
    }

    /// A pair of addresses that no jail has.
    pub fn free_slot(&self, slots: u32) -> Option<u32> {
        let taken: BTreeSet<u32> = self.jails.values().filter_map(|jail| jail.record.slot).collect();
        (0..slots).map(|step| (self.next_slot + step) % slots).find(|slot| !taken.contains(slot))
    }

    /// An id range that no app has; never range 0.
    pub fn free_range(&self, ranges: u16) -> Option<u16> {
        let taken: BTreeSet<u16> = self.apps.values().map(|app| app.range).collect();
        let apps = ranges - 1;
        (0..apps).map(|step| 1 + (self.next_range + step) % apps).find(|range| !taken.contains(range))
    }

    pub fn insert_app(&mut self, record: AppRecord) {
        self.next_range = record.range;
        self.apps.insert(record.app.clone(), record);
    }

    pub fn insert_jail(&mut self, jail: Jail) {
        if let Some(slot) = jail.record.slot {
            self.next_slot = slot + 1;
        }
        self.jails.insert(jail.record.jail.clone(), jail);
    }

    pub fn insert_release(&mut self, record: ReleaseRecord) {
        self.releases.insert((record.app.clone(), record.release), record);
    }

    pub fn jails_of<'a>(&'a self, app: &'a AppName) -> impl Iterator<Item = &'a Jail> {
        self.jails.values().filter(move |jail| jail.record.app.as_ref() == Some(app))
    }

    pub fn jails_of_release<'a>(
        &'a self,
        app: &'a AppName,
        release: ReleaseNumber,
    ) -> impl Iterator<Item = &'a Jail> {
        self.jails_of(app).filter(move |jail| jail.record.release == Some(release))
    }

    pub fn jobs_running(&self) -> usize {
        self.jails.values().filter(|jail| jail.record.is_job() && jail.is_active()).count()
    }

    /// Image versions that must stay because a release was made from them.
    pub fn images_in_use(&self) -> BTreeSet<ImageId> {
        self.releases.values().map(|release| release.image.clone()).collect()
    }
}

/// The addresses of one slot: the host's end and the jail's.
pub fn address_v4(block: &Block<Ipv4Addr>, slot: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(block.base) + slot * 2 + 1)
}

/// Where a jail is reached from this host.
pub fn address(config: &Config, record: &JailRecord) -> Option<String> {
    record.slot.map(|slot| address_v4(&config.network.v4, slot).to_string())
}

/// The bases of the node's blocks, as the isolation crate counts slots from them.
pub fn address_bases(config: &Config) -> (Ipv4Addr, Option<Ipv6Addr>) {
    (config.network.v4.base, config.network.v6.map(|block| block.base))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn jail(id: &str, slot: Option<u32>) -> Jail {
        let record = JailRecord {
            jail: id.parse().unwrap(),
            app: None,
            release: None,
            purpose: Purpose::Start,
            slot,
            volumes: BTreeSet::new(),
            created_at_ms: 0,
            boot: String::new(),
            concluded: None,
        };
        Jail::new(record, Phase::Starting)
    }

    #[test]
    fn slots_are_not_used_again_at_once_and_run_out() {
        let mut tables = Tables::default();
        for slot in 0..4 {
            assert_eq!(tables.free_slot(4), Some(slot));
            tables.insert_jail(jail(&format!("a-{slot}"), Some(slot)));
        }
        assert_eq!(tables.free_slot(4), None);
        tables.jails.remove(&"a-1".parse::<JailId>().unwrap());
        tables.jails.remove(&"a-0".parse::<JailId>().unwrap());
        assert_eq!(tables.free_slot(4), Some(0));
        tables.insert_jail(jail("a-9", Some(0)));
        assert_eq!(tables.free_slot(4), Some(1));
    }

    #[test]
    fn range_0_is_nobodys() {
        let mut tables = Tables::default();
        for name in ["a", "b", "c"] {
            let range = tables.free_range(4).unwrap();
            assert_ne!(range, 0);
            tables.insert_app(AppRecord { app: name.parse().unwrap(), range });
        }
        assert_eq!(tables.free_range(4), None);
    }

    #[test]
    fn staging_names_of_releases_and_image_jobs_never_meet() {
        let longest = ReleaseRecord {
            app: "a".repeat(AppName::LEN_MAX).parse().unwrap(),
            release: ReleaseNumber(u32::MAX),
            image: "py@1".parse().unwrap(),
            sealed: false,
        };
        assert!(longest.staging().as_str().len() <= 48);
        for salt in [0, u64::MAX, 0x5555_5555_5555_5555] {
            let id = image_job_id(salt);
            staging_name(id.as_str());
            assert!(id.as_str().starts_with("image--"));
            assert!("image-".parse::<AppName>().is_err());
            assert!(!is_jail_of(&id, &"image".parse().unwrap()));
        }
    }

    #[test]
    fn a_jail_id_tells_its_app() {
        let app: AppName = "shop".parse().unwrap();
        assert!(is_jail_of(&JailId::new(&app, 7), &app));
        assert!(!is_jail_of(&JailId::new(&"shop-web".parse().unwrap(), 7), &app));
        assert!(!is_jail_of(&"shop-0000000a".parse().unwrap(), &app));
        assert!(!is_jail_of(&"shop".parse().unwrap(), &app));
    }

    #[test]
    fn the_jails_end_of_a_slot_is_the_odd_address() {
        let config = config::tests::example();
        let record = jail("a-1", Some(2)).record;
        assert_eq!(address(&config, &record).as_deref(), Some("100.96.48.5"));
    }
}
