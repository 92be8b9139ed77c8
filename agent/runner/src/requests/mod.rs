//! The pure check: may this be done, and what exactly is to be done?
//!
//! [`check`] holds a request against the tables and the configuration and answers with a [`Plan`] or a refusal. It
//! touches nothing; whatever the plan needs that the request must not choose (ids, addresses, names of
//! jobs, trees, paths) is chosen here. [`crate::server`] then carries the plan out without further choices.

pub mod fields;
pub mod keys;
mod parse;
#[cfg(test)]
mod tests;

use epagent_storage::Quota;
use epagent_wire::name::{AppName, ImageName, JailId, ReleaseNumber, VolumeName};
use epagent_wire::runner::{PROTOCOL, Purpose, Refusal, RefusalCode, Request, Start, TerminalSize};

use crate::config::Config;
use crate::jobs::{self, HOST_IMAGE};
use crate::order::Order;
use crate::packet::Kind;
use crate::start;
use crate::tables::{
    AppRecord, EXECS_MAX, IMAGES_MAX, JAILS_MAX, JOBS_MAX, Jail, JailRecord, LOGS_MAX, Phase, RELEASES_MAX,
    ReleaseRecord, Tables, VOLUMES_MAX, image_job_id, is_jail_of,
};
use crate::work::{AppRemoval, Discard, Work};
use fields::refuse;
pub use parse::parse;

/// How much of a build command a jail's record repeats.
const COMMAND_SHOWN_CHARS: usize = 256;

/// What the check looks at beside the request.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub tables: &'a Tables,
    pub config: &'a Config,
    pub now_ms: u64,
    /// The kernel's boot id.
    pub boot: &'a str,
    /// Drawn at random, for the name of a new job.
    pub salt: u64,
}

/// What is to be done.
#[derive(Debug, Clone)]
pub enum Plan {
    Hello,
    Observe,
    /// It is as asked for already.
    Nothing,
    AlreadyStarted(JailId),
    /// Something on disk, and `Done` when it is.
    Work(Work),
    /// Something on disk, then a jail.
    Launch {
        work: Work,
        order: Box<Order>,
    },
    Stop {
        jail: JailId,
        signal: i32,
        grace_ms: u64,
    },
    Exec {
        jail: JailId,
        argv: Vec<String>,
        env: std::collections::BTreeMap<String, String>,
        terminal: Option<TerminalSize>,
    },
    ExecResize {
        jail: JailId,
        exec: u32,
        size: TerminalSize,
    },
    ExecKill {
        jail: JailId,
        exec: u32,
    },
    Inspect {
        jail: JailId,
        pid: i32,
    },
    LogOpen(JailId),
}

type Checked<T = Plan> = Result<T, Refusal>;

/// Decides. `descriptors` are what came with the packet.
pub fn check(request: &Request, descriptors: &[Kind], view: View<'_>) -> Checked {
    check_descriptors(request, descriptors)?;
    match request {
        Request::Hello { protocol } => view.hello(*protocol),
        Request::Observe => Ok(Plan::Observe),
        Request::AppEnsure { app } => view.app_ensure(app),
        Request::AppRemove { app } => view.app_remove(app),
        Request::ImageImport { image, format } => {
            let job = view.image_job(image, Purpose::ImageImport { image: image.clone() }, None)?;
            let order = jobs::import(job, *format, view.config.range_base(0), view.config);
            Ok(view.stage_image(image, order))
        }
        Request::ImageBootstrap { image, suite, include } => {
            fields::packages(suite, include)?;
            let slot = view.slot()?;
            let job = view.image_job(image, Purpose::ImageBootstrap { image: image.clone() }, Some(slot))?;
            let skeleton = view.skeleton()?;
            let order =
                jobs::bootstrap(job, skeleton, suite, include, view.config.range_base(0), view.config);
            Ok(view.stage_image(image, order))
        }
        Request::ImageRemove { image } => view.image_remove(image),
        Request::BuildUnpack { app, release, image, format } => {
            let record = view.new_release(app, *release, image)?;
            let job = view.job(app, *release, Purpose::BuildUnpack, None)?;
            let order = jobs::unpack(job.clone(), &record, *format, view.id_base(app)?, view.config);
            let work =
                Work::ReleaseStage { job, release: record, quota: Quota::bytes(view.config.build.disk.0) };
            Ok(Plan::Launch { work, order: Box::new(order) })
        }
        Request::BuildRun { app, release, command, env } => view.build_run(app, *release, command, env),
        Request::BuildSeal { app, release } => view.build_seal(app, *release),
        Request::BuildAbort { app, release } => view.build_abort(app, *release),
        Request::ReleaseRemove { app, release } => view.release_remove(app, *release),
        Request::VolumeEnsure { app, volume, quota_bytes } => view.volume_ensure(app, volume, *quota_bytes),
        Request::VolumeRemove { app, volume } => view.volume_remove(app, volume),
        Request::Start { jail, start } => view.start(jail, start),
        Request::Stop { jail, signal, grace_ms } => {
            let (signal, grace_ms) = (fields::signal(signal)?, (*grace_ms).min(fields::GRACE_MS_MAX));
            match view.jail(jail)?.is_active() {
                true => Ok(Plan::Stop { jail: jail.clone(), signal, grace_ms }),
                false => Ok(Plan::Nothing),
            }
        }
        Request::Forget { jail } => view.forget(jail),
        Request::Exec { jail, argv, env, terminal } => {
            fields::argv(argv)?;
            fields::env(env)?;
            terminal.map_or(Ok(()), fields::terminal)?;
            view.running(jail)?;
            if view.jail(jail)?.execs.len() >= EXECS_MAX {
                return refuse(
                    RefusalCode::Exhausted,
                    format!("jail {jail} runs {EXECS_MAX} commands already"),
                );
            }
            Ok(Plan::Exec { jail: jail.clone(), argv: argv.clone(), env: env.clone(), terminal: *terminal })
        }
        Request::ExecResize { jail, exec, size } => {
            fields::terminal(*size)?;
            view.exec(jail, *exec)?;
            Ok(Plan::ExecResize { jail: jail.clone(), exec: *exec, size: *size })
        }
        Request::ExecKill { jail, exec } => {
            view.exec(jail, *exec)?;
            Ok(Plan::ExecKill { jail: jail.clone(), exec: *exec })
        }
        Request::Inspect { jail } => {
            let pid = view.running(jail)?;
            Ok(Plan::Inspect { jail: jail.clone(), pid })
        }
        Request::LogOpen { jail } => match view.tables.logs.contains(jail) {
            true => Ok(Plan::LogOpen(jail.clone())),
            false => refuse(RefusalCode::NotFound, format!("no log of jail {jail} is kept")),
        },
        Request::LogRemove { jail } => match view.tables.jails.get(jail) {
            Some(_) => refuse(
                RefusalCode::Conflict,
                format!("jail {jail} exists; forget it before its log is removed"),
            ),
            None if !view.tables.logs.contains(jail) => Ok(Plan::Nothing),
            None => Ok(Plan::Work(Work::LogRemove { jail: jail.clone() })),
        },
    }
}

/// Each request takes a fixed number of descriptors of a fixed kind.
fn check_descriptors(request: &Request, given: &[Kind]) -> Checked<()> {
    let (takes, wanted): (&str, &[Kind]) = match request {
        Request::ImageImport { .. } | Request::BuildUnpack { .. } => ("the stream to read", &[Kind::Stream]),
        Request::Start { start, .. } if start.with_secrets => {
            ("a sealed memfd with the secrets", &[Kind::Sealed])
        }
        Request::Exec { terminal: None, .. } => ("stdin, stdout and stderr", &[Kind::Stream; 3]),
        _ => ("none", &[]),
    };
    // A sealed memfd is a file like others to who reads a stream.
    let fits =
        |wanted: &Kind, given: &Kind| given == wanted || (*wanted == Kind::Stream && *given == Kind::Sealed);
    if wanted.len() == given.len() && wanted.iter().zip(given).all(|(wanted, given)| fits(wanted, given)) {
        return Ok(());
    }
    let message = format!(
        "wrong descriptors: this request takes {} ({takes}) and came with {}; folders, block devices and \
         descriptors without access are never taken",
        wanted.len(),
        given.len()
    );
    refuse(RefusalCode::BadRequest, message)
}

impl View<'_> {
    fn hello(&self, protocol: u32) -> Checked {
        if protocol != PROTOCOL {
            let message =
                format!("this runner speaks protocol {PROTOCOL}, not {protocol}; update the older part");
            return refuse(RefusalCode::BadRequest, message);
        }
        Ok(Plan::Hello)
    }

    fn app_ensure(&self, app: &AppName) -> Checked {
        if self.tables.apps.contains_key(app) {
            return Ok(Plan::Nothing);
        }
        match self.tables.free_range(self.config.ranges()) {
            Some(range) => Ok(Plan::Work(Work::AppEnsure(AppRecord { app: app.clone(), range }))),
            None => refuse(
                RefusalCode::Exhausted,
                format!("all {} id ranges of this node are taken", self.config.ranges() - 1),
            ),
        }
    }

    fn app_remove(&self, app: &AppName) -> Checked {
        if !self.tables.apps.contains_key(app) {
            return Ok(Plan::Nothing);
        }
        if let Some(jail) = self.tables.jails_of(app).find(|jail| !is_over(jail)) {
            let message =
                format!("app {app} can't be removed: jail {} still runs; stop it first", jail.record.jail);
            return refuse(RefusalCode::Conflict, message);
        }
        let tables = self.tables;
        Ok(Plan::Work(Work::AppRemove(AppRemoval {
            app: app.clone(),
            jails: tables.jails_of(app).map(|jail| jail.record.jail.clone()).collect(),
            releases: tables.releases.values().filter(|record| record.app == *app).cloned().collect(),
            volumes: tables
                .volumes
                .keys()
                .filter(|(owner, _)| owner == app)
                .map(|(_, volume)| volume.clone())
                .collect(),
            logs: tables.logs.iter().filter(|jail| is_jail_of(jail, app)).cloned().collect(),
        })))
    }

    /// The record of a job on an image.
    fn image_job(&self, image: &ImageName, purpose: Purpose, slot: Option<u32>) -> Checked<JailRecord> {
        if image.as_str() == HOST_IMAGE {
            return refuse(
                RefusalCode::Conflict,
                "the image host is the host's own /usr; choose another name",
            );
        }
        if !self.tables.images.contains_key(image) && self.tables.images.len() >= IMAGES_MAX {
            return refuse(RefusalCode::Exhausted, format!("there are {IMAGES_MAX} images; remove some"));
        }
        let mut jails = self.tables.jails.values();
        if let Some(job) = jails.find(|jail| jail.record.makes_image() == Some(image) && !is_over(jail)) {
            let message =
                format!("image {image} is being made by job {}; wait for it or stop it", job.record.jail);
            return refuse(RefusalCode::Conflict, message);
        }
        self.room_for_jail(true)?;
        Ok(self.record(self.new_id(image_job_id)?, None, purpose, slot))
    }

    fn stage_image(&self, image: &ImageName, order: Order) -> Plan {
        let quota = Quota::bytes(self.config.build.disk.0);
        let work = Work::ImageStage { job: order.jail.clone(), image: image.clone(), quota };
        Plan::Launch { work, order: Box::new(order) }
    }

    fn image_remove(&self, image: &ImageName) -> Checked {
        if image.as_str() == HOST_IMAGE {
            return refuse(RefusalCode::Conflict, "the image host belongs to the runner");
        }
        let tables = self.tables;
        if let Some(release) =
            tables.releases.values().find(|release| release.image.name.as_str() == image.as_str())
        {
            let message = format!("image {image} is used by release {} of {}", release.release, release.app);
            return refuse(RefusalCode::Conflict, message);
        }
        if let Some(job) =
            tables.jails.values().find(|jail| jail.record.makes_image() == Some(image) && !is_over(jail))
        {
            return refuse(
                RefusalCode::Conflict,
                format!("image {image} is being made by job {}", job.record.jail),
            );
        }
        match tables.images.contains_key(image) {
            true => {
                Ok(Plan::Work(Work::ImageRemove { image: image.clone(), in_use: tables.images_in_use() }))
            }
            false => Ok(Plan::Nothing),
        }
    }

    /// The record of a release whose tree is to be made, from the current version of the image.
    fn new_release(
        &self,
        app: &AppName,
        release: ReleaseNumber,
        image: &ImageName,
    ) -> Checked<ReleaseRecord> {
        self.app(app)?;
        let key = (app.clone(), release);
        match self.tables.releases.get(&key) {
            Some(record) if record.sealed => {
                return refuse(
                    RefusalCode::Conflict,
                    format!("release {release} of {app} is sealed and can't be built again"),
                );
            }
            Some(_) => self.no_job_in(app, release)?,
            None if self.tables.releases.len() >= RELEASES_MAX => {
                return refuse(
                    RefusalCode::Exhausted,
                    format!("there are {RELEASES_MAX} releases; remove old ones"),
                );
            }
            None => {}
        }
        let image = self.image(image)?;
        Ok(ReleaseRecord { app: app.clone(), release, image, sealed: false })
    }

    fn build_run(
        &self,
        app: &AppName,
        release: ReleaseNumber,
        command: &str,
        env: &std::collections::BTreeMap<String, String>,
    ) -> Checked {
        fields::shell(command)?;
        fields::env(env)?;
        let record = self.unsealed(app, release)?;
        let purpose = Purpose::BuildRun { command: command.chars().take(COMMAND_SHOWN_CHARS).collect() };
        let mut jobs = self.tables.jails_of_release(app, release);
        if let Some(job) = jobs.find(|job| job.is_active() && job.record.purpose == purpose) {
            return Ok(Plan::AlreadyStarted(job.record.jail.clone()));
        }
        self.no_job_in(app, release)?;
        let job = self.job(app, release, purpose, Some(self.slot()?))?;
        let order = jobs::run(job.clone(), record, command, env, self.id_base(app)?, self.config);
        Ok(Plan::Launch { work: Work::JobPrepare { job, release: record.clone() }, order: Box::new(order) })
    }

    fn build_seal(&self, app: &AppName, release: ReleaseNumber) -> Checked {
        if self.release(app, release)?.sealed {
            return Ok(Plan::Nothing);
        }
        self.no_job_in(app, release)?;
        let record = ReleaseRecord { sealed: true, ..self.unsealed(app, release)?.clone() };
        Ok(Plan::Work(Work::ReleaseSeal(record)))
    }

    fn build_abort(&self, app: &AppName, release: ReleaseNumber) -> Checked {
        self.app(app)?;
        match self.tables.releases.get(&(app.clone(), release)) {
            None => Ok(Plan::Nothing),
            Some(record) if record.sealed => refuse(
                RefusalCode::Conflict,
                format!("release {release} of {app} is sealed; it is removed, not aborted"),
            ),
            Some(record) => {
                self.no_job_in(app, release)?;
                Ok(Plan::Work(Work::ReleaseAbort(record.clone())))
            }
        }
    }

    fn release_remove(&self, app: &AppName, release: ReleaseNumber) -> Checked {
        self.app(app)?;
        let Some(record) = self.tables.releases.get(&(app.clone(), release)) else {
            return Ok(Plan::Nothing);
        };
        if !record.sealed {
            return refuse(
                RefusalCode::Conflict,
                format!("release {release} of {app} is being built; abort it instead"),
            );
        }
        if let Some(jail) = self.tables.jails_of_release(app, release).find(|jail| !jail.record.is_job()) {
            let message = format!("release {release} of {app} is used by jail {}", jail.record.jail);
            return refuse(RefusalCode::Conflict, message);
        }
        Ok(Plan::Work(Work::ReleaseRemove { app: app.clone(), release }))
    }

    fn volume_ensure(&self, app: &AppName, volume: &VolumeName, quota_bytes: u64) -> Checked {
        self.app(app)?;
        let quota_bytes = quota_bytes.clamp(1 << 20, self.config.limits.volume.0.max(1 << 20));
        match self.tables.volumes.get(&(app.clone(), volume.clone())) {
            Some(present) if *present == quota_bytes => Ok(Plan::Nothing),
            None if self.tables.volumes.len() >= VOLUMES_MAX => {
                refuse(RefusalCode::Exhausted, format!("there are {VOLUMES_MAX} volumes on this node"))
            }
            _ => {
                let quota = Quota::bytes(quota_bytes);
                Ok(Plan::Work(Work::VolumeEnsure { app: app.clone(), volume: volume.clone(), quota }))
            }
        }
    }

    fn volume_remove(&self, app: &AppName, volume: &VolumeName) -> Checked {
        self.app(app)?;
        if !self.tables.volumes.contains_key(&(app.clone(), volume.clone())) {
            return Ok(Plan::Nothing);
        }
        let mut jails = self.tables.jails_of(app);
        if let Some(jail) = jails.find(|jail| jail.record.volumes.contains(volume) && !is_over(jail)) {
            let message = format!("volume {volume} of {app} is mounted in jail {}", jail.record.jail);
            return refuse(RefusalCode::Conflict, message);
        }
        Ok(Plan::Work(Work::VolumeRemove { app: app.clone(), volume: volume.clone() }))
    }

    fn start(&self, jail: &JailId, start: &Start) -> Checked {
        self.app(&start.app)?;
        if !is_jail_of(jail, &start.app) {
            let message = format!(
                "jail {jail} is not one of app {}: its jails are named {}-XXXXXXXX",
                start.app, start.app
            );
            return refuse(RefusalCode::NotYours, message);
        }
        fields::command(&start.command)?;
        fields::env(&start.env)?;
        fields::mount_paths(&start.volumes)?;
        if let Some(present) = self.tables.jails.get(jail) {
            return self.started_before(present, start);
        }
        let release = self.release(&start.app, start.release)?;
        if !release.sealed {
            return refuse(
                RefusalCode::Conflict,
                format!("release {} of {} is still being built", start.release, start.app),
            );
        }
        if let Some(volume) = start
            .volumes
            .keys()
            .find(|volume| !self.tables.volumes.contains_key(&(start.app.clone(), (*volume).clone())))
        {
            return refuse(RefusalCode::NotFound, format!("app {} has no volume {volume}", start.app));
        }
        self.room_for_jail(false)?;
        let limits = fields::clamp(&start.limits, &self.config.limits);
        let mut record =
            self.record(jail.clone(), Some((&start.app, start.release)), Purpose::Start, Some(self.slot()?));
        record.volumes = start.volumes.keys().cloned().collect();
        let order = start::order(start, &limits, record.clone(), release, self.id_base(&start.app)?);
        let quota = Quota::bytes(limits.disk_bytes);
        let work =
            Work::InstancePrepare { jail: record, app: start.app.clone(), release: start.release, quota };
        Ok(Plan::Launch { work, order: Box::new(order) })
    }

    fn started_before(&self, present: &Jail, start: &Start) -> Checked {
        let record = &present.record;
        let same = record.app.as_ref() == Some(&start.app)
            && record.release == Some(start.release)
            && record.purpose == Purpose::Start
            && record.volumes.iter().eq(start.volumes.keys());
        match same {
            true => Ok(Plan::AlreadyStarted(record.jail.clone())),
            false => refuse(RefusalCode::Conflict, format!("jail {} exists and is another one", record.jail)),
        }
    }

    fn forget(&self, jail: &JailId) -> Checked {
        let Some(present) = self.tables.jails.get(jail) else { return Ok(Plan::Nothing) };
        if !is_over(present) {
            return refuse(RefusalCode::Conflict, format!("jail {jail} has not ended; stop it first"));
        }
        Ok(Plan::Work(Work::Discard(Discard::of(&present.record))))
    }

    // What has to exist, and what has to be free.

    fn app(&self, app: &AppName) -> Checked<&AppRecord> {
        let known = self.tables.apps.get(app);
        known.map_or_else(|| refuse(RefusalCode::NotFound, format!("there is no app {app}")), Ok)
    }

    fn id_base(&self, app: &AppName) -> Checked<u32> {
        Ok(self.config.range_base(self.app(app)?.range))
    }

    fn release(&self, app: &AppName, release: ReleaseNumber) -> Checked<&ReleaseRecord> {
        self.app(app)?;
        let known = self.tables.releases.get(&(app.clone(), release));
        known.map_or_else(|| refuse(RefusalCode::NotFound, format!("app {app} has no release {release}")), Ok)
    }

    fn unsealed(&self, app: &AppName, release: ReleaseNumber) -> Checked<&ReleaseRecord> {
        let record = self.release(app, release)?;
        match record.sealed {
            true => refuse(RefusalCode::Conflict, format!("release {release} of {app} is sealed")),
            false => Ok(record),
        }
    }

    fn image(&self, image: &ImageName) -> Checked<epagent_storage::ImageId> {
        let hidden = image.as_str() == HOST_IMAGE && !self.config.host_image;
        match self.tables.images.get(image) {
            Some(id) if !hidden => Ok(id.clone()),
            _ => refuse(RefusalCode::NotFound, format!("there is no image {image}")),
        }
    }

    /// The runner's own image with the folders of a root and nothing in them.
    fn skeleton(&self) -> Checked<epagent_storage::ImageId> {
        let mut images = self.tables.images.values();
        let known = images.find(|id| id.name.as_str() == HOST_IMAGE).cloned();
        known.map_or_else(|| refuse(RefusalCode::NotFound, "the runner's own skeleton image is missing"), Ok)
    }

    fn jail(&self, jail: &JailId) -> Checked<&Jail> {
        let known = self.tables.jails.get(jail);
        known.map_or_else(|| refuse(RefusalCode::NotFound, format!("there is no jail {jail}")), Ok)
    }

    fn running(&self, jail: &JailId) -> Checked<i32> {
        match self.jail(jail)?.phase {
            Phase::Running { pid, .. } => Ok(pid),
            _ => refuse(RefusalCode::Conflict, format!("jail {jail} does not run")),
        }
    }

    fn exec(&self, jail: &JailId, exec: u32) -> Checked<()> {
        match self.jail(jail)?.execs.contains(&exec) {
            true => Ok(()),
            false => refuse(RefusalCode::NotFound, format!("jail {jail} runs no command {exec}")),
        }
    }

    fn no_job_in(&self, app: &AppName, release: ReleaseNumber) -> Checked<()> {
        match self.tables.jails_of_release(app, release).find(|jail| jail.record.is_job() && !is_over(jail)) {
            Some(job) => {
                let message = format!(
                    "job {} works in release {release} of {app}; wait for it or stop it",
                    job.record.jail
                );
                refuse(RefusalCode::Conflict, message)
            }
            None => Ok(()),
        }
    }

    fn room_for_jail(&self, is_job: bool) -> Checked<()> {
        let tables = self.tables;
        if tables.jails.len() >= JAILS_MAX {
            return refuse(
                RefusalCode::Exhausted,
                format!("there are {JAILS_MAX} jails; forget those that ended"),
            );
        }
        if tables.logs.len() >= LOGS_MAX {
            return refuse(RefusalCode::Exhausted, format!("{LOGS_MAX} logs are kept; remove some"));
        }
        if is_job && tables.jobs_running() >= JOBS_MAX {
            return refuse(
                RefusalCode::Exhausted,
                format!("{JOBS_MAX} jobs run at once; try again when one has ended"),
            );
        }
        Ok(())
    }

    fn slot(&self) -> Checked<u32> {
        match self.tables.free_slot(self.config.slots()) {
            Some(slot) => Ok(slot),
            None => refuse(RefusalCode::Exhausted, "all addresses of this node's block are taken"),
        }
    }

    fn job(
        &self,
        app: &AppName,
        release: ReleaseNumber,
        purpose: Purpose,
        slot: Option<u32>,
    ) -> Checked<JailRecord> {
        self.room_for_jail(true)?;
        let id = self.new_id(|salt| JailId::new(app, salt))?;
        Ok(self.record(id, Some((app, release)), purpose, slot))
    }

    /// An id that nothing has, not even a log.
    fn new_id(&self, make: impl Fn(u64) -> JailId) -> Checked<JailId> {
        let id = make(self.salt);
        match self.tables.jails.contains_key(&id) || self.tables.logs.contains(&id) {
            true => refuse(RefusalCode::Conflict, "the drawn name is taken; try again"),
            false => Ok(id),
        }
    }

    fn record(
        &self,
        jail: JailId,
        release: Option<(&AppName, ReleaseNumber)>,
        purpose: Purpose,
        slot: Option<u32>,
    ) -> JailRecord {
        JailRecord {
            jail,
            app: release.map(|(app, _)| app.clone()),
            release: release.map(|(_, release)| release),
            purpose,
            slot,
            volumes: Default::default(),
            created_at_ms: self.now_ms,
            boot: self.boot.to_owned(),
            concluded: None,
        }
    }
}

/// Ended for good, so that nothing of it runs or is about to.
fn is_over(jail: &Jail) -> bool {
    matches!(jail.phase, Phase::Exited { .. })
}
