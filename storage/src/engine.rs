//! Doing: performs the steps a plan lists, one by one, with no choices left.
//!
//! Every step may be performed again after it was cut short. When a step fails, the operation is ended by the same
//! judgement a sweep would make ([`crate::plan::recover`]), and the first error is returned.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;

use crate::backend::{Backend, Fence};
use crate::dirs;
use crate::error::{Error, Result};
use crate::place::{Place, STAGING, Slot, Target};
use crate::plan::{self, Intent, Mark, Seen, Step, Verdict};
use crate::record::{Held, Records};

/// The attribute that carries an object's [`Mark`].
const MARK: &str = "trusted.epagent";
/// A mark is a few short names.
const MARK_BYTES_MAX: usize = 4096;

const MOVE_ATTEMPTS_MAX: u32 = 3;

/// Called with each step before it is performed.
pub type StepObserver = Box<dyn Fn(&str) + Send + Sync>;

pub(crate) struct Engine {
    root: OwnedFd,
    pub(crate) records: Records,
    pub(crate) backend: Box<dyn Backend + Send + Sync>,
    pub(crate) observer: Option<StepObserver>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("root", &self.root).field("backend", &self.backend).finish()
    }
}

impl Engine {
    pub(crate) fn new(root: OwnedFd, records: Records, backend: Box<dyn Backend + Send + Sync>) -> Self {
        Self { root, records, backend, observer: None }
    }

    /// Performs `steps` under the record `held`; when one fails, ends the operation as a sweep would.
    pub(crate) fn run(&self, held: &mut Held, steps: &[Step]) -> Result<()> {
        let result = self.perform(held, steps);
        if result.is_err() {
            // The first error is the one worth reporting; what cannot be ended now, the next sweep ends.
            let _ = self.recover(held);
        }
        result
    }

    /// Ends whatever an earlier holder of this record left. The record is closed afterwards.
    pub(crate) fn recover(&self, held: &mut Held) -> Result<Option<Verdict>> {
        let Some(intent) = held.intent.clone() else {
            self.records.close(held)?;
            return Ok(None);
        };
        let seen = self.look(&held.slot, &intent)?;
        let (verdict, steps) = plan::recover(&held.slot, &intent, &seen);
        self.perform(held, &steps)?;
        Ok(Some(verdict))
    }

    fn look(&self, slot: &Slot, intent: &Intent) -> Result<Seen> {
        let place = match (slot, intent) {
            (Slot::New(place) | Slot::Old(place), _) => self.exists(&place.path())?.then(|| place.clone()),
            (Slot::Stage(id), Intent::Stage { target }) => {
                self.find_published(target, id)?.map(|found| found.0)
            }
            (Slot::Stage(_), _) => None,
        };
        Ok(Seen { slot: self.exists(&slot.path())?, place })
    }

    /// The place that holds what was published from the staging area `staging`, and whether it is sealed.
    pub(crate) fn find_published(
        &self,
        target: &Target,
        staging: &crate::StagingId,
    ) -> Result<Option<(Place, bool)>> {
        let candidates = match target {
            Target::Release { app, release } => vec![Place::Release(app.clone(), release.clone())],
            Target::Image { image } => self.image_versions(image)?.into_iter().map(Place::Image).collect(),
        };
        for place in candidates {
            let Some(tree) = dirs::open(&self.root, &place.path())? else { continue };
            if read_mark(&tree, &place)?.staging.as_ref() == Some(staging) {
                return Ok(Some((place, self.backend.is_sealed(tree.as_fd())?)));
            }
        }
        Ok(None)
    }

    /// All versions of an image in place, sealed or not, lowest first.
    pub(crate) fn image_versions(&self, image: &crate::ImageName) -> Result<Vec<crate::ImageId>> {
        let Some(folder) = dirs::open(&self.root, &format!("images/{image}"))? else { return Ok(Vec::new()) };
        let mut versions: Vec<u64> =
            dirs::names(&folder)?.iter().filter_map(|name| crate::name::parse_version(name)).collect();
        versions.sort_unstable();
        Ok(versions.into_iter().map(|version| crate::ImageId { name: image.clone(), version }).collect())
    }

    /// Performs `steps`; when one fails, what was done stays, for [`Engine::recover`] or another attempt.
    pub(crate) fn perform(&self, held: &mut Held, steps: &[Step]) -> Result<()> {
        let mut fence = None;
        for step in steps {
            if let Some(observer) = &self.observer {
                observer(&step.to_string());
            }
            self.step(held, &mut fence, step)?;
        }
        Ok(())
    }

    fn step(&self, held: &mut Held, fence: &mut Option<Fence>, step: &Step) -> Result<()> {
        match step {
            Step::Record(intent) => self.records.write(held, intent),
            Step::Fence(quota) => {
                *fence = Some(self.backend.fence(*quota)?);
                Ok(())
            }
            Step::Create(slot) => {
                let fence = fence.take().ok_or_else(|| unfenced(slot))?;
                let staging = dirs::require(&self.root, STAGING)?;
                self.backend.create(staging.as_fd(), &slot.file(), &fence)?;
                // The modes of new trees must not hang on whatever umask our caller has.
                let tree = dirs::require(&staging, &slot.file())?;
                rustix::fs::fchmod(&tree, Mode::from(0o755))
                    .map_err(|e| Error::io("set the mode of", slot, e))
            }
            Step::Clone { from, to } => {
                let fence = fence.take().ok_or_else(|| unfenced(to))?;
                let source = self.open_place(from)?;
                let staging = dirs::require(&self.root, STAGING)?;
                self.backend.clone_tree(source.as_fd(), staging.as_fd(), &to.file(), &fence)
            }
            Step::Mark(slot, mark) => write_mark(&dirs::require(&self.root, &slot.path())?, slot, mark),
            Step::Flush => self.backend.flush(),
            Step::MoveIn(slot, place) => self.move_in(slot, place),
            Step::MoveOut(place, slot) => {
                self.rename((&place.folder(), &place.file()), (STAGING, &slot.file()), place)
            }
            Step::Seal(place) => self.set_sealed(place, true),
            Step::Unseal(place) => self.set_sealed(place, false),
            Step::Destroy(slot) => match dirs::open(&self.root, &slot.path())? {
                Some(tree) => self.backend.destroy(tree, &slot.to_string()),
                None => Ok(()),
            },
            Step::Commit => self.backend.commit(),
            Step::Close => self.records.close(held),
        }
    }

    /// The folder may be tidied away by somebody removing its last object just before we move in; made again then.
    fn move_in(&self, slot: &Slot, place: &Place) -> Result<()> {
        let mut attempt = 1;
        loop {
            if let Some((parent, name)) = place.folder().split_once('/') {
                dirs::ensure(dirs::require(&self.root, parent)?, name)?;
            }
            match self.rename((STAGING, &slot.file()), (&place.folder(), &place.file()), slot) {
                Err(Error::NotFound { .. }) if attempt < MOVE_ATTEMPTS_MAX => attempt += 1,
                other => return other,
            }
        }
    }

    /// Removes a folder that grouped objects by name or app, if it is empty now.
    pub(crate) fn tidy_folder(&self, place: &Place) -> Result<()> {
        let folder = place.folder();
        if !folder.contains('/') {
            return Ok(());
        }
        match rustix::fs::unlinkat(&self.root, &folder, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT) => Ok(()),
            Err(e) => Err(Error::io("tidy away", folder, e)),
        }
    }

    /// Never replaces: what is in the way belongs to somebody.
    fn rename(&self, from: (&str, &str), to: (&str, &str), what: &dyn fmt::Display) -> Result<()> {
        let (from_dir, to_dir) = (dirs::require(&self.root, from.0)?, dirs::require(&self.root, to.0)?);
        match rustix::fs::renameat_with(&from_dir, from.1, &to_dir, to.1, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => Err(Error::Conflict {
                what: format!("{}/{}", to.0, to.1),
                detail: "another object is in its place".into(),
            }),
            Err(Errno::NOENT) => Err(Error::NotFound { what: format!("{what} to move") }),
            other => other.map_err(|e| Error::io("move", what, e)),
        }
    }

    fn set_sealed(&self, place: &Place, sealed: bool) -> Result<()> {
        let tree = self.open_place(place)?;
        self.backend.set_sealed(tree.as_fd(), sealed)
    }

    /// Opens an object wherever it is in its life.
    pub(crate) fn open_place(&self, place: &Place) -> Result<OwnedFd> {
        dirs::open(&self.root, &place.path())?.ok_or_else(|| Error::NotFound { what: place.to_string() })
    }

    pub(crate) fn exists(&self, path: &str) -> Result<bool> {
        match rustix::fs::statat(&self.root, path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            Err(e) => Err(Error::io("stat", path, e)),
        }
    }

    pub(crate) fn root(&self) -> &OwnedFd {
        &self.root
    }
}

fn unfenced(slot: &Slot) -> Error {
    Error::io("fence", slot, std::io::Error::from(std::io::ErrorKind::InvalidInput))
}

fn write_mark(tree: &OwnedFd, slot: &Slot, mark: &Mark) -> Result<()> {
    let text = serde_json::to_vec(mark).map_err(|e| Error::io("write the mark of", slot, e))?;
    rustix::fs::fsetxattr(tree, MARK, &text, XattrFlags::empty())
        .map_err(|e| Error::io("write the mark of", slot, e))
}

/// The mark of an object; an object without one (or with one we cannot read) has the empty mark.
pub(crate) fn read_mark(tree: &OwnedFd, what: &dyn fmt::Display) -> Result<Mark> {
    let mut text = vec![0u8; MARK_BYTES_MAX];
    match rustix::fs::fgetxattr(tree, MARK, text.as_mut_slice()) {
        Ok(len) => Ok(serde_json::from_slice(&text[..len]).unwrap_or_default()),
        Err(Errno::NODATA) => Ok(Mark::default()),
        Err(e) => Err(Error::io("read the mark of", what, e)),
    }
}

/// Whether the root directory of the pool can be opened at all as a plain directory.
pub(crate) fn open_root(path: &std::path::Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|e| Error::NoSuchPool { path: path.to_owned(), source: e.into() })
}
