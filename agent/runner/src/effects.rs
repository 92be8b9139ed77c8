//! What a piece of work does to the tables: when it is begun, done, or has failed. Pure.
//!
//! The tables in memory follow the disk: an object appears when its making is begun (so that nothing else takes
//! its name or address) and leaves when it is gone. What failed while being removed stays, and can be removed again.

use epagent_wire::name::{AppName, ReleaseNumber};
use epagent_wire::runner::{Exit, Refusal};

use crate::order::Order;
use crate::tables::{Jail, Phase, Tables};
use crate::work::{Outcome, Work};

/// A jail is about to be made.
pub fn begun(tables: &mut Tables, work: &Work, order: &Order) {
    if let Work::ReleaseStage { release, .. } = work {
        tables.insert_release(release.clone());
    }
    tables.logs.insert(order.jail.jail.clone());
    tables.insert_jail(Jail::new(order.jail.clone(), Phase::Preparing));
}

pub fn done(tables: &mut Tables, work: &Work, outcome: &Outcome) {
    match work {
        Work::AppEnsure(record) => tables.insert_app(record.clone()),
        Work::AppRemove(removal) => {
            let app = &removal.app;
            tables.jails.retain(|_, jail| jail.record.app.as_ref() != Some(app));
            tables.releases.retain(|(owner, _), _| owner != app);
            tables.volumes.retain(|(owner, _), _| owner != app);
            tables.logs.retain(|jail| !removal.logs.contains(jail));
            tables.apps.remove(app);
        }
        Work::ImageConclude { job, image, .. } => {
            if let Outcome::Image(id) = outcome {
                tables.images.insert(image.clone(), id.clone());
            }
            if let (Some(jail), Some(exit)) = (tables.jails.get_mut(&job.jail), &job.concluded) {
                jail.record = job.clone();
                jail.phase = Phase::Exited { exit: exit.clone(), started_at_ms: None };
            }
        }
        Work::ImageRemove { image, .. } => drop(tables.images.remove(image)),
        Work::ReleaseSeal(record) => tables.insert_release(record.clone()),
        Work::ReleaseAbort(record) => remove_release(tables, &record.app, record.release),
        Work::ReleaseRemove { app, release } => remove_release(tables, app, *release),
        Work::VolumeEnsure { app, volume, quota } => {
            tables.volumes.insert((app.clone(), volume.clone()), quota.limit_bytes);
        }
        Work::VolumeRemove { app, volume } => drop(tables.volumes.remove(&(app.clone(), volume.clone()))),
        Work::Discard(what) => {
            tables.jails.remove(&what.jail);
            if let Some(release) = &what.release {
                remove_release(tables, &release.app, release.release);
            }
        }
        Work::Reap { jail } => {
            if let Some(jail) = tables.jails.get_mut(jail) {
                let exit = Exit { monitor_lost: true, at_ms: crate::now_ms(), ..Exit::default() };
                jail.phase = Phase::Exited { exit, started_at_ms: jail.started_at_ms() };
            }
        }
        Work::LogRemove { jail } => drop(tables.logs.remove(jail)),
        Work::ImageStage { .. }
        | Work::ReleaseStage { .. }
        | Work::JobPrepare { .. }
        | Work::InstancePrepare { .. }
        | Work::Survey => {}
    }
}

/// Only what leaves something behind that has to be seen.
pub fn failed(tables: &mut Tables, work: &Work, refusal: &Refusal, now_ms: u64) {
    let (jail, why) = match work {
        Work::ImageConclude { job, .. } => (&job.jail, format!("publish the image: {}", refusal.message)),
        Work::Discard(what) => (&what.jail, format!("remove what is left of it: {}", refusal.message)),
        // Asked for again at the next look at the monitors.
        Work::Reap { .. } => return,
        _ => return,
    };
    if let Some(jail) = tables.jails.get_mut(jail)
        && !matches!(jail.phase, Phase::Exited { .. })
    {
        let exit = Exit { start_error: Some(why), at_ms: now_ms, ..Exit::default() };
        jail.phase = Phase::Exited { exit, started_at_ms: None };
    }
}

fn remove_release(tables: &mut Tables, app: &AppName, release: ReleaseNumber) {
    tables.releases.remove(&(app.clone(), release));
}
