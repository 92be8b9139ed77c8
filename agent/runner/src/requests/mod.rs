//! The pure check: may this be done, and what exactly is to be done?
//!
//! [`check`] holds a request against the tables and the configuration and answers with a [`Plan`] or a refusal. It
//! touches nothing; whatever the plan needs that the request must not choose (ids, addresses, names of
//! jobs, trees, paths) is chosen here. [`crate::server`] then carries the plan out without further choices.

pub mod fields;
mod instances;
pub mod keys;
mod objects;
mod parse;
#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeMap;

use epagent_storage::Quota;
use epagent_wire::name::JailId;
use epagent_wire::runner::{PROTOCOL, Purpose, Refusal, RefusalCode, Request, TerminalSize};

use crate::jobs;
use crate::order::Order;
use crate::packet::Kind;
use crate::tables::EXECS_MAX;
use crate::work::Work;
use fields::refuse;
pub use parse::parse;
pub use view::View;

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
        env: BTreeMap<String, String>,
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
    Said {
        run: u64,
        after: u64,
    },
    LogOpen(JailId),
    SocketOpen(JailId),
}

type Checked<T = Plan> = Result<T, Refusal>;

/// Decides. `descriptors` are what came with the packet.
pub fn check(request: &Request, descriptors: &[Kind], view: View<'_>) -> Checked {
    check_descriptors(request, descriptors)?;
    match request {
        Request::Hello { protocol } => hello(*protocol),
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
        Request::Said { run, after } => Ok(Plan::Said { run: *run, after: *after }),
        Request::Inspect { jail } => {
            let pid = view.running(jail)?;
            Ok(Plan::Inspect { jail: jail.clone(), pid })
        }
        Request::SocketOpen { jail } => {
            view.running(jail)?;
            Ok(Plan::SocketOpen(jail.clone()))
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

fn hello(protocol: u32) -> Checked {
    if protocol != PROTOCOL {
        let message =
            format!("this runner speaks protocol {PROTOCOL}, not {protocol}; update the older part");
        return refuse(RefusalCode::BadRequest, message);
    }
    Ok(Plan::Hello)
}
