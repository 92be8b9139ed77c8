//! Which objects a request works on, so that work on one object is done one piece after another.
//!
//! Two requests that share no object go side by side. Two that do go in the order in which they came, unless both
//! only look at it ([`Hold::Shared`]), as two starts of one release do.

use std::collections::BTreeMap;

use epagent_wire::name::{AppName, ImageName, JailId, ReleaseNumber, VolumeName};
use epagent_wire::runner::Request;

use crate::tables::Tables;

/// One object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    App(AppName),
    Image(ImageName),
    Release(AppName, ReleaseNumber),
    Volume(AppName, VolumeName),
    Jail(JailId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    Shared,
    Exclusive,
}

pub type Keys = Vec<(Key, Hold)>;

/// The objects that are being worked on.
#[derive(Debug, Default, Clone)]
pub struct Busy {
    /// How many hold it; `None` one alone.
    held: BTreeMap<Key, Option<u32>>,
}

impl Busy {
    pub fn conflicts(&self, keys: &Keys) -> bool {
        keys.iter().any(|(key, hold)| match (self.held.get(key), hold) {
            (None, _) | (Some(Some(_)), Hold::Shared) => false,
            (Some(None), _) | (Some(Some(_)), Hold::Exclusive) => true,
        })
    }

    /// Marks them. What is held alone already stays so: a waiting request counts like one at work.
    pub fn take(&mut self, keys: &Keys) {
        for (key, hold) in keys {
            let held = self.held.entry(key.clone()).or_insert(Some(0));
            *held = match (*held, hold) {
                (Some(holders), Hold::Shared) => Some(holders + 1),
                _ => None,
            };
        }
    }

    /// Lets go of what was taken by the same keys, when they did not conflict.
    pub fn release(&mut self, keys: &Keys) {
        for (key, _) in keys {
            match self.held.get_mut(key) {
                Some(Some(holders)) if *holders > 1 => *holders -= 1,
                _ => drop(self.held.remove(key)),
            }
        }
    }
}

/// The objects of a request.
pub fn keys(request: &Request, tables: &Tables) -> Keys {
    use Hold::{Exclusive, Shared};
    let release = |app: &AppName, release: &ReleaseNumber, hold| {
        vec![(Key::App(app.clone()), Shared), (Key::Release(app.clone(), *release), hold)]
    };
    match request {
        Request::Hello { .. } | Request::Observe | Request::Said { .. } => Vec::new(),
        Request::AppEnsure { app } | Request::AppRemove { app } => vec![(Key::App(app.clone()), Exclusive)],
        Request::ImageImport { image, .. }
        | Request::ImageBootstrap { image, .. }
        | Request::ImageRemove { image } => {
            vec![(Key::Image(image.clone()), Exclusive)]
        }
        Request::BuildUnpack { app, release: number, image, .. } => {
            let mut keys = release(app, number, Exclusive);
            keys.push((Key::Image(image.clone()), Shared));
            keys
        }
        Request::BuildRun { app, release: number, .. }
        | Request::BuildSeal { app, release: number }
        | Request::BuildAbort { app, release: number }
        | Request::ReleaseRemove { app, release: number } => release(app, number, Exclusive),
        Request::VolumeEnsure { app, volume, .. } | Request::VolumeRemove { app, volume } => {
            vec![(Key::App(app.clone()), Shared), (Key::Volume(app.clone(), volume.clone()), Exclusive)]
        }
        Request::Start { jail, start } => {
            let mut keys = release(&start.app, &start.release, Shared);
            keys.push((Key::Jail(jail.clone()), Exclusive));
            let volumes = start.volumes.keys();
            keys.extend(volumes.map(|volume| (Key::Volume(start.app.clone(), volume.clone()), Shared)));
            keys
        }
        Request::Forget { jail } | Request::LogRemove { jail } => {
            let app = tables.jails.get(jail).and_then(|jail| jail.record.app.clone());
            let app = app.map(|app| (Key::App(app), Shared));
            [(Key::Jail(jail.clone()), Exclusive)].into_iter().chain(app).collect()
        }
        Request::Stop { jail, .. }
        | Request::Exec { jail, .. }
        | Request::ExecResize { jail, .. }
        | Request::ExecKill { jail, .. }
        | Request::Inspect { jail }
        | Request::LogOpen { jail }
        | Request::SocketOpen { jail } => vec![(Key::Jail(jail.clone()), Shared)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(hold: Hold) -> Keys {
        vec![(Key::App("shop".parse().unwrap()), hold)]
    }

    #[test]
    fn many_may_look_and_one_may_work() {
        let mut busy = Busy::default();
        assert!(!busy.conflicts(&app(Hold::Exclusive)));
        busy.take(&app(Hold::Shared));
        busy.take(&app(Hold::Shared));
        assert!(!busy.conflicts(&app(Hold::Shared)));
        assert!(busy.conflicts(&app(Hold::Exclusive)));
        busy.release(&app(Hold::Shared));
        assert!(busy.conflicts(&app(Hold::Exclusive)));
        busy.release(&app(Hold::Shared));
        busy.take(&app(Hold::Exclusive));
        assert!(busy.conflicts(&app(Hold::Shared)));
        busy.release(&app(Hold::Exclusive));
        assert!(!busy.conflicts(&app(Hold::Exclusive)));
    }

    #[test]
    fn requests_on_different_objects_go_side_by_side() {
        let tables = Tables::default();
        let ensure = |app: &str| keys(&Request::AppEnsure { app: app.parse().unwrap() }, &tables);
        let mut busy = Busy::default();
        busy.take(&ensure("shop"));
        assert!(busy.conflicts(&ensure("shop")));
        assert!(!busy.conflicts(&ensure("blog")));
    }
}
