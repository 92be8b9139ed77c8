//! The answer to [`Observe`](epagent_wire::runner::Request::Observe): the tables, with figures from the pool.
//!
//! What exists is in the tables and always current. How much it uses has to be looked up on the pool, by a child, and is
//! at most [`FIGURES_AGE_MAX`] old; all who ask meanwhile wait for the same look.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use epagent_isolation::cgroup::{CgroupRoot, DiskLimits};
use epagent_storage::{Pool as StoragePool, QuotaMode};
use epagent_wire::runner::{
    FEATURE_APP_SOCKETS, Feature, Image, Jail, Pool, Refusal, RefusalCode, Release, Reply, Volume, World,
};

use crate::app_sockets::AppSockets;
use crate::jobs::HOST_IMAGE;
use crate::launch::disks;
use crate::peers::To;
use crate::server::{Server, Task};
use crate::tables::address;
use crate::work::{Outcome, Survey, Work, chain};

pub const FIGURES_AGE_MAX: Duration = Duration::from_secs(2);
/// How long a look is waited for.
const LOOK_TIME_MAX: Duration = Duration::from_secs(3);
/// Calls that wait for one look.
const WAITING_MAX: usize = 64;

/// What was last seen on the pool, and who waits for the next look.
#[derive(Debug)]
pub struct Figures {
    survey: Survey,
    seen: Option<Instant>,
    looking_since: Option<Instant>,
    waiting: Vec<To>,
    features: Vec<Feature>,
}

/// Limits of disk traffic, as they are in force here.
fn disk_limits(pool: &StoragePool, cgroups: &CgroupRoot) -> Feature {
    let found = disks(pool)
        .map_or_else(|error| DiskLimits::Absent { why: chain(&error) }, |disks| cgroups.disk_limits(&disks));
    let fallback = match &found {
        DiskLimits::All => String::new(),
        DiskLimits::Awaited => {
            "v1 blkio, which does not limit what the kernel writes from the page cache by itself".to_owned()
        }
        DiskLimits::Absent { why } => format!("nothing, `io` is not in force: {why}"),
    };
    Feature {
        name: "limits of disk traffic (io.max)".to_owned(),
        present: found == DiskLimits::All,
        fallback,
        advice: "it takes cgroup v2 alone, with its io controller".to_owned(),
    }
}

impl Figures {
    pub fn new(pool: &StoragePool, cgroups: &CgroupRoot, sockets: &AppSockets) -> Figures {
        let facts = pool.facts();
        let features = vec![
            Feature {
                name: "simple quotas (Linux 6.7)".to_owned(),
                present: facts.quota_mode == QuotaMode::Simple,
                fallback: "ordinary quota groups".to_owned(),
                advice: String::new(),
            },
            Feature {
                name: "cgroup v2 with controllers".to_owned(),
                present: cgroups.layout() == "v2",
                fallback: "limits by v1 controllers, everything else by v2".to_owned(),
                advice: String::new(),
            },
            disk_limits(pool, cgroups),
            Feature {
                name: FEATURE_APP_SOCKETS.to_owned(),
                present: sockets.is_possible(),
                fallback: "apps listen on TCP".to_owned(),
                advice: String::new(),
            },
        ];
        Figures { survey: Survey::default(), seen: None, looking_since: None, waiting: Vec::new(), features }
    }
}

impl Figures {
    /// Whether the pool has not answered for so long that the old figures have to do.
    fn is_late(&self, now: Instant) -> bool {
        self.looking_since.is_some_and(|since| now.saturating_duration_since(since) > LOOK_TIME_MAX)
    }
}

impl Server {
    pub fn observe(&mut self, to: To) {
        let surveyed = |id| self.figures.survey.images.iter().any(|(seen, ..)| seen == id);
        // An image that was just made has figures as well.
        let fresh = self.figures.seen.is_some_and(|seen| seen.elapsed() < FIGURES_AGE_MAX)
            && self.tables.images.values().all(surveyed);
        if fresh || self.figures.is_late(Instant::now()) {
            return self.answer_world(to);
        }
        if self.figures.waiting.len() >= WAITING_MAX {
            let message = format!("{WAITING_MAX} calls wait for the figures of the pool already");
            return self.answer(to, Err(Refusal { code: RefusalCode::Exhausted, message }));
        }
        self.figures.waiting.push(to);
        if self.figures.looking_since.is_none() {
            self.figures.looking_since = Some(Instant::now());
            self.admit(Task::Own { work: Work::Survey, keys: Vec::new() });
        }
    }

    /// A failed look leaves the old figures: the world is worth more than they.
    pub fn surveyed(&mut self, result: Result<Outcome, Refusal>) {
        match result {
            Ok(Outcome::Survey(survey)) => {
                self.figures.survey = *survey;
                self.figures.seen = Some(Instant::now());
            }
            Ok(_) => {}
            Err(refusal) => tracing::warn!("{}", refusal.message),
        }
        self.figures.looking_since = None;
        self.answer_observers();
    }

    /// A pool that does not answer must not hide what runs.
    pub fn answer_late_observers(&mut self, now: Instant) {
        if self.figures.is_late(now) {
            self.answer_observers();
        }
    }

    fn answer_observers(&mut self) {
        for to in std::mem::take(&mut self.figures.waiting) {
            self.answer_world(to);
        }
    }

    fn answer_world(&mut self, to: To) {
        let world = self.world();
        self.answer(to, Ok(Reply::World(Box::new(world))));
    }

    fn world(&self) -> World {
        let (tables, survey) = (&self.tables, &self.figures.survey);
        let images: BTreeMap<_, _> =
            survey.images.iter().map(|(id, used, made)| (id, (*used, *made))).collect();
        let releases: BTreeMap<_, u64> = survey
            .releases
            .iter()
            .map(|(app, release, used)| ((app.as_str(), release.as_str()), *used))
            .collect();
        let volumes: BTreeMap<_, u64> = survey
            .volumes
            .iter()
            .map(|(app, volume, used)| ((app.as_str(), volume.as_str()), *used))
            .collect();
        World {
            apps: tables.apps.keys().cloned().collect(),
            jails: tables.jails.values().map(|jail| self.show(jail)).collect(),
            images: (tables.images.iter())
                .filter(|(name, _)| self.config.host_image || name.as_str() != HOST_IMAGE)
                .map(|(name, id)| {
                    let (bytes, created_at_ms) = images.get(id).copied().unwrap_or_default();
                    Image { name: name.clone(), id: id.to_string(), bytes, created_at_ms }
                })
                .collect(),
            releases: (tables.releases.values())
                .map(|record| {
                    let number = record.release.to_string();
                    let bytes = releases.get(&(record.app.as_str(), number.as_str())).copied().unwrap_or(0);
                    Release { app: record.app.clone(), release: record.release, sealed: record.sealed, bytes }
                })
                .collect(),
            volumes: (tables.volumes.iter())
                .map(|((app, volume), quota_bytes)| Volume {
                    app: app.clone(),
                    volume: volume.clone(),
                    quota_bytes: *quota_bytes,
                    used_bytes: volumes.get(&(app.as_str(), volume.as_str())).copied().unwrap_or(0),
                })
                .collect(),
            pool: Pool {
                total_bytes: survey.pool_total_bytes,
                used_bytes: survey.pool_used_bytes,
                reserve_bytes: survey.pool_reserve_bytes,
            },
            logs: tables.logs.clone(),
            features: self.figures.features.clone(),
        }
    }

    fn show(&self, jail: &crate::tables::Jail) -> Jail {
        let record = &jail.record;
        Jail {
            id: record.jail.clone(),
            app: record.app.clone(),
            release: record.release,
            purpose: record.purpose.clone(),
            state: jail.state(),
            pid: jail.pid(),
            address: address(&self.config, record),
            started_at_ms: jail.started_at_ms(),
        }
    }
}
