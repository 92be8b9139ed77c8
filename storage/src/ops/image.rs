//! Images: versions of a name, each sealed; the highest is the current one.
//!
//! Publishing a new version is one move and one seal, so there is no pointer to update and no moment without a current
//! version. Old versions go when no release is built on them ([`Pool::image_gc`]).

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use super::now_ms;
use crate::error::{Error, Result};
use crate::name::{ImageId, ImageName, StagingId};
use crate::place::{Place, Target};
use crate::plan::Mark;
use crate::types::{ImageInfo, Quota};
use crate::{Pool, dirs};

impl Pool {
    /// Makes (or finds) the empty writable staging area `staging` for a new version of `image`.
    pub fn image_stage(&self, staging: &StagingId, image: &ImageName, quota: Quota) -> Result<OwnedFd> {
        let target = Target::Image { image: image.clone() };
        self.stage(staging, target, None, quota, Mark::default())
    }

    /// Seals the staging area as the new current version. Repeated: returns the version published before.
    pub fn image_publish(&self, staging: &StagingId, image: &ImageName) -> Result<ImageId> {
        let target = Target::Image { image: image.clone() };
        let place = self.publish(staging, target, || {
            let highest = self.engine.image_versions(image)?.last().map_or(0, |id| id.version);
            // The clock, so that a version removed is not used again; never below what is there, should it go back.
            let version = now_ms().max(highest + 1);
            Ok(Place::Image(ImageId { name: image.clone(), version }))
        })?;
        match place {
            Place::Image(id) => Ok(id),
            other => Err(Error::NotFound { what: format!("image behind {other}") }),
        }
    }

    /// All versions of all images, by name, then lowest first.
    pub fn image_list(&self) -> Result<Vec<ImageInfo>> {
        let mut images = Vec::new();
        for name in self.listed::<ImageName>("images")? {
            let mut versions = Vec::new();
            for id in self.engine.image_versions(&name)? {
                if let Some(found) = self.find(&Place::Image(id.clone()))? {
                    let created_ms = found.mark.created_ms;
                    versions.push(ImageInfo { id, current: false, created_ms, usage: found.usage });
                }
            }
            if let Some(last) = versions.last_mut() {
                last.current = true;
            }
            images.append(&mut versions);
        }
        Ok(images)
    }

    pub fn image_current(&self, image: &ImageName) -> Result<Option<ImageId>> {
        for id in self.engine.image_versions(image)?.into_iter().rev() {
            let Some(tree) = dirs::open(self.engine.root(), &Place::Image(id.clone()).path())? else {
                continue;
            };
            if self.engine.backend.is_sealed(tree.as_fd())? {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    pub fn image_open(&self, image: &ImageId) -> Result<OwnedFd> {
        self.open_ready(&Place::Image(image.clone()))
    }

    /// Removes all versions of `image`; refused with [`Error::ImageInUse`] when one of them is in `in_use`.
    pub fn image_remove(&self, image: &ImageName, in_use: &BTreeSet<ImageId>) -> Result<()> {
        let versions = self.engine.image_versions(image)?;
        if let Some(used) = versions.iter().find(|id| in_use.contains(id)) {
            return Err(Error::ImageInUse { image: used.to_string() });
        }
        // Lowest first: cut short, the current version is still the current one.
        versions.into_iter().try_for_each(|id| self.remove(&Place::Image(id)))
    }

    /// Removes versions that are neither current nor in `in_use`; returns them.
    pub fn image_gc(&self, in_use: &BTreeSet<ImageId>) -> Result<Vec<ImageId>> {
        let mut removed = Vec::new();
        for image in self.image_list()?.into_iter().filter(|image| !image.current) {
            if !in_use.contains(&image.id) {
                self.remove(&Place::Image(image.id.clone()))?;
                removed.push(image.id);
            }
        }
        Ok(removed)
    }
}
