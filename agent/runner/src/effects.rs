//! What a piece of work does to the tables: when it is begun, done, or has failed. Pure.
//!
//! The tables in memory follow the disk: an object appears when its making is begun (so that nothing else takes
//! its name or address) and leaves when it is gone. What failed while being removed stays, and can be removed again.

use epagent_wire::name::{AppName, ReleaseNumber};
use epagent_wire::runner::{Exit, Refusal};

use crate::order::Order;
use crate::tables::{Jail, JailRecord, Phase, Tables};
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
            conclude(tables, job);
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
        Work::Reap(record) => conclude(tables, record),
        Work::LogRemove { jail } => drop(tables.logs.remove(jail)),
        Work::ImageStage { .. }
        | Work::ReleaseStage { .. }
        | Work::JobPrepare { .. }
        | Work::InstancePrepare { .. }
        | Work::Survey
        | Work::KeepNetwork(_) => {}
    }
}

/// Only what leaves something behind that has to be seen.
pub fn failed(tables: &mut Tables, work: &Work, refusal: &Refusal, now_ms: u64) {
    let (jail, why) = match work {
        Work::ImageConclude { job, .. } => (&job.jail, format!("publish the image: {}", refusal.message)),
        Work::Discard(what) => (&what.jail, format!("remove what is left of it: {}", refusal.message)),
        // A reaping that failed is begun again at the next look at the monitors.
        _ => return,
    };
    if let Some(jail) = tables.jails.get_mut(jail)
        && !matches!(jail.phase, Phase::Exited { .. })
    {
        let exit = Exit { start_error: Some(why), at_ms: now_ms, ..Exit::default() };
        jail.phase = Phase::Exited { exit, started_at_ms: None };
    }
}

/// The end that the record tells is the jail's.
fn conclude(tables: &mut Tables, record: &JailRecord) {
    if let (Some(jail), Some(exit)) = (tables.jails.get_mut(&record.jail), &record.concluded) {
        jail.phase = Phase::Exited { exit: exit.clone(), started_at_ms: jail.started_at_ms() };
        jail.record = record.clone();
    }
}

fn remove_release(tables: &mut Tables, app: &AppName, release: ReleaseNumber) {
    tables.releases.remove(&(app.clone(), release));
}
