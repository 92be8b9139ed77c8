//! Volumes: what an app keeps. Removed only when asked for by name, never by a sweep.

use std::os::fd::OwnedFd;

use crate::Pool;
use crate::error::Result;
use crate::name::{AppName, VolumeName};
use crate::place::Place;
use crate::plan::Mark;
use crate::types::{Quota, VolumeInfo};

fn place(app: &AppName, name: &VolumeName) -> Place {
    Place::Volume(app.clone(), name.clone())
}

impl Pool {
    /// Makes (or finds) a volume and sets its quota. Its root directory starts as 0:0 0755.
    pub fn volume_ensure(&self, app: &AppName, name: &VolumeName, quota: Quota) -> Result<OwnedFd> {
        let id: String = crate::random_bytes::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        self.create(&place(app, name), None, quota, Mark { volume_id: Some(id), ..Mark::default() })
    }

    pub fn volume_open(&self, app: &AppName, name: &VolumeName) -> Result<OwnedFd> {
        self.open_ready(&place(app, name))
    }

    pub fn volume_remove(&self, app: &AppName, name: &VolumeName) -> Result<()> {
        self.remove(&place(app, name))
    }

    pub fn volume_list(&self) -> Result<Vec<VolumeInfo>> {
        let mut volumes = Vec::new();
        for app in self.listed::<AppName>("volumes")? {
            for name in self.listed::<VolumeName>(&format!("volumes/{app}"))? {
                if let Some(found) = self.find(&place(&app, &name))? {
                    volumes.push(VolumeInfo {
                        app: app.clone(),
                        name,
                        volume_id: found.mark.volume_id.unwrap_or_default(),
                        created_ms: found.mark.created_ms,
                        usage: found.usage,
                    });
                }
            }
        }
        Ok(volumes)
    }
}
