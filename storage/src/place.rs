//! Where objects live below the pool's root, and what their staging entries and records are called.
//!
//! ```text
//! images/NAME/VERSION      sealed (read-only)
//! releases/APP/RELEASE     sealed
//! instances/INSTANCE       writable, throw-away
//! volumes/APP/NAME         writable
//! logs/INSTANCE            written by the instance's monitor
//! staging/SLOT             being built or being deleted
//! records/SLOT             the intent of whoever works on staging/SLOT
//! ```
//!
//! A [`Slot`] is `stage.ID` (a caller's), `new.PLACE` or `old.PLACE`. Names have no dots, so the spelling is
//! unambiguous, a slot can be parsed back, and each (operation, object) has exactly one slot: repeating an operation
//! finds what its predecessor left.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::name::{AppName, ImageId, ImageName, InstanceId, ReleaseId, StagingId, VolumeName, parse_version};

pub(crate) const STAGING: &str = "staging";
pub(crate) const RECORDS: &str = "records";
pub(crate) const FOLDERS: [&str; 7] =
    ["images", "releases", "instances", "volumes", "logs", STAGING, RECORDS];

/// The final home of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    Image(ImageId),
    Release(AppName, ReleaseId),
    Instance(InstanceId),
    Volume(AppName, VolumeName),
    Log(InstanceId),
}

impl Place {
    /// The folder that holds the object, relative to the root. Two levels for what is grouped by name or app.
    pub(crate) fn folder(&self) -> String {
        match self {
            Place::Image(id) => format!("images/{}", id.name),
            Place::Release(app, _) => format!("releases/{app}"),
            Place::Instance(_) => "instances".into(),
            Place::Volume(app, _) => format!("volumes/{app}"),
            Place::Log(_) => "logs".into(),
        }
    }

    pub(crate) fn file(&self) -> String {
        match self {
            Place::Image(id) => id.version.to_string(),
            Place::Release(_, release) => release.to_string(),
            Place::Instance(instance) | Place::Log(instance) => instance.to_string(),
            Place::Volume(_, name) => name.to_string(),
        }
    }

    pub(crate) fn path(&self) -> String {
        format!("{}/{}", self.folder(), self.file())
    }

    /// Whether the object is read-only once it is in place. An unsealed object in a sealed place is not there yet.
    pub(crate) fn is_sealed(&self) -> bool {
        matches!(self, Place::Image(_) | Place::Release(..))
    }

    fn key(&self) -> String {
        match self {
            Place::Image(id) => format!("image.{}.{}", id.name, id.version),
            Place::Release(app, release) => format!("release.{app}.{release}"),
            Place::Instance(instance) => format!("instance.{instance}"),
            Place::Volume(app, name) => format!("volume.{app}.{name}"),
            Place::Log(instance) => format!("log.{instance}"),
        }
    }

    fn parse_key(key: &str) -> Option<Self> {
        let parts: Vec<&str> = key.split('.').collect();
        match parts[..] {
            ["image", name, version] => {
                let (name, version) = (ImageName::new(name).ok()?, parse_version(version)?);
                Some(Place::Image(ImageId { name, version }))
            }
            ["release", app, id] => Some(Place::Release(AppName::new(app).ok()?, ReleaseId::new(id).ok()?)),
            ["instance", id] => Some(Place::Instance(InstanceId::new(id).ok()?)),
            ["volume", app, id] => Some(Place::Volume(AppName::new(app).ok()?, VolumeName::new(id).ok()?)),
            ["log", id] => Some(Place::Log(InstanceId::new(id).ok()?)),
            _ => None,
        }
    }
}

/// For messages: `image py@7`, `volume shop/data`.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Image(id) => write!(f, "image {id}"),
            Place::Release(app, release) => write!(f, "release {app}/{release}"),
            Place::Instance(instance) => write!(f, "instance root {instance}"),
            Place::Volume(app, name) => write!(f, "volume {app}/{name}"),
            Place::Log(instance) => write!(f, "log folder {instance}"),
        }
    }
}

/// One entry of `staging/` and its record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Made by a caller, lives across calls until published or aborted.
    Stage(StagingId),
    /// An object on its way in; lives within one call.
    New(Place),
    /// An object on its way out.
    Old(Place),
}

impl Slot {
    pub(crate) fn file(&self) -> String {
        match self {
            Slot::Stage(id) => format!("stage.{id}"),
            Slot::New(place) => format!("new.{}", place.key()),
            Slot::Old(place) => format!("old.{}", place.key()),
        }
    }

    pub(crate) fn path(&self) -> String {
        format!("{STAGING}/{}", self.file())
    }

    pub(crate) fn parse(file: &str) -> Option<Self> {
        match file.split_once('.')? {
            ("stage", id) => Some(Slot::Stage(StagingId::new(id).ok()?)),
            ("new", key) => Some(Slot::New(Place::parse_key(key)?)),
            ("old", key) => Some(Slot::Old(Place::parse_key(key)?)),
            _ => None,
        }
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Slot::Stage(id) => write!(f, "staging area {id}"),
            Slot::New(place) => write!(f, "new {place}"),
            Slot::Old(place) => write!(f, "old {place}"),
        }
    }
}

/// What a caller's staging area is to become. An image gets its version only when it is published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Target {
    Image { image: ImageName },
    Release { app: AppName, release: ReleaseId },
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Image { image } => write!(f, "image {image}"),
            Target::Release { app, release } => write!(f, "release {app}/{release}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_reads_back_from_its_file_name() {
        let app = AppName::new("shop").unwrap();
        let instance = InstanceId::new("i-1").unwrap();
        let places = [
            Place::Image("py@7".parse().unwrap()),
            Place::Release(app.clone(), ReleaseId::new("r1").unwrap()),
            Place::Instance(instance.clone()),
            Place::Volume(app, VolumeName::new("data").unwrap()),
            Place::Log(instance),
        ];
        for place in places {
            for slot in [Slot::New(place.clone()), Slot::Old(place.clone())] {
                assert_eq!(Slot::parse(&slot.file()), Some(slot));
            }
        }
        let slot = Slot::Stage(StagingId::new("s1").unwrap());
        assert_eq!(Slot::parse(&slot.file()), Some(slot));
    }

    #[test]
    fn foreign_files_are_no_slots() {
        for file in [
            "",
            "x",
            "stage.",
            "stage.a.b",
            "new.image.py",
            "new.image.py.07",
            "old.volume.a.b.c",
            "new.log.A",
        ] {
            assert_eq!(Slot::parse(file), None, "{file}");
        }
    }
}
