//! System-call filters, compiled from [`table`].
//!
//! Four filters are stacked, since one has a single answer for what it matches:
//!
//! ```text
//! x32 (x86-64 only)   number with the x32 bit → kill the process
//! allow               in the list → allow, else → ENOSYS; another architecture → kill the process
//! refuse              known bad, or bad arguments → EPERM, else → allow
//! sockets             a family or netlink protocol not in the list → EAFNOSUPPORT, else → allow
//! ```
//!
//! The kernel takes the strictest answer; between two errnos, that of the filter installed last. So `allow` comes
//! before the two that know better. Sockets have an answer of their own because programs that can do without ask
//! for it: to libaudit, and so to useradd, su and dbus's installation, EPERM is fatal and EAFNOSUPPORT is a kernel
//! without audit.

#[rustfmt::skip] // One call a line would hide the groups.
mod table;

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::spec::Profile;
use table::Group;

/// Compiled filters in the order in which they are installed.
#[derive(Debug)]
pub(crate) struct Filters(Vec<BpfProgram>);

impl Filters {
    /// Compiles the filters of a profile.
    pub(crate) fn compile(profile: Profile) -> Result<Filters, io::Error> {
        let mut programs = x32();
        programs.push(allow(profile).map_err(io::Error::other)?);
        programs.push(refuse(profile).map_err(io::Error::other)?);
        programs.push(sockets().map_err(io::Error::other)?);
        Ok(Filters(programs))
    }

    /// Installs them on this process, for good. Sets no_new_privs, which installing without privileges needs.
    pub(crate) fn install(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|program| seccompiler::apply_filter(program).map_err(io::Error::other))
    }
}

/// Groups that the profile adds to [`table::ALLOWED`].
fn added(profile: Profile) -> Vec<&'static Group> {
    match profile {
        Profile::App => Vec::new(),
        Profile::Build => table::BUILD.iter().collect(),
        Profile::Bootstrap => table::BUILD.iter().chain(table::BOOTSTRAP).collect(),
    }
}

fn numbers<'a>(groups: impl IntoIterator<Item = &'a Group>) -> Vec<i64> {
    groups.into_iter().flat_map(|group| group.calls).copied().collect()
}

fn allow(profile: Profile) -> Result<BpfProgram, seccompiler::BackendError> {
    let groups = table::ALLOWED.iter().chain(table::ALLOWED_OF_ARCH).chain(added(profile));
    let rules = numbers(groups).into_iter().map(|number| (number, Vec::new())).collect();
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(rules, unknown, SeccompAction::Allow, arch()?)?.try_into()
}

fn refuse(profile: Profile) -> Result<BpfProgram, seccompiler::BackendError> {
    let allowed = numbers(added(profile));
    let refused = numbers(table::REFUSED.iter().chain(table::REFUSED_OF_ARCH));
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = refused
        .into_iter()
        .filter(|number| !allowed.contains(number))
        .map(|number| (number, Vec::new()))
        .collect();
    rules.insert(libc::SYS_ioctl, bad_ioctls()?);
    rules.insert(libc::SYS_clone, bad_flags(&table::NEW_NAMESPACES)?);
    if profile == Profile::Bootstrap {
        rules.insert(libc::SYS_unshare, bad_flags(&[libc::CLONE_NEWUSER])?);
    }
    // The rest of the personalities changes how addresses are laid out; these are Linux, and "which is it?".
    let harmless = [0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];
    let strange = harmless.map(|value| argument(0, SeccompCmpOp::Ne, value));
    rules.insert(
        libc::SYS_personality,
        vec![SeccompRule::new(strange.into_iter().collect::<Result<_, _>>()?)?],
    );
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, denied, arch()?)?.try_into()
}

fn sockets() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = [(libc::SYS_socket, bad_sockets()?), (libc::SYS_socketpair, bad_sockets()?)].into();
    let absent = SeccompAction::Errno(libc::EAFNOSUPPORT as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, absent, arch()?)?.try_into()
}

/// All arguments looked at are C ints to the kernel: 32 bits.
fn argument(index: u8, is: SeccompCmpOp, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, is, value)
}

fn bad_sockets() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let other_family = table::SOCKET_FAMILIES
        .iter()
        .map(|family| argument(0, SeccompCmpOp::Ne, *family as u64))
        .collect::<Result<Vec<_>, _>>()?;
    let other_netlink = vec![
        argument(0, SeccompCmpOp::Eq, libc::AF_NETLINK as u64)?,
        argument(2, SeccompCmpOp::Ne, libc::NETLINK_ROUTE as u64)?,
    ];
    Ok(vec![SeccompRule::new(other_family)?, SeccompRule::new(other_netlink)?])
}

fn bad_ioctls() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |request: &u64| SeccompRule::new(vec![argument(1, SeccompCmpOp::Eq, *request)?]);
    table::REFUSED_IOCTLS.iter().map(rule).collect()
}

fn bad_flags(flags: &[libc::c_int]) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |flag: &libc::c_int| {
        let flag = *flag as u32 as u64;
        SeccompRule::new(vec![argument(0, SeccompCmpOp::MaskedEq(flag), flag)?])
    };
    flags.iter().map(rule).collect()
}

fn arch() -> Result<TargetArch, seccompiler::BackendError> {
    std::env::consts::ARCH.try_into()
}

/// x32 calls carry x86-64's architecture and a bit in the number: `ld nr; jge X32_BIT → kill; allow`.
#[cfg(target_arch = "x86_64")]
fn x32() -> Vec<BpfProgram> {
    use seccompiler::sock_filter;
    const X32_BIT: u32 = 0x4000_0000;
    let code = |class: u32| class as u16;
    let load_number =
        sock_filter { code: code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS), jt: 0, jf: 0, k: 0 };
    let is_x32 =
        sock_filter { code: code(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K), jt: 0, jf: 1, k: X32_BIT };
    let answer = |k| sock_filter { code: code(libc::BPF_RET | libc::BPF_K), jt: 0, jf: 0, k };
    vec![vec![load_number, is_x32, answer(libc::SECCOMP_RET_KILL_PROCESS), answer(libc::SECCOMP_RET_ALLOW)]]
}

#[cfg(not(target_arch = "x86_64"))]
fn x32() -> Vec<BpfProgram> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_compiles_within_the_kernels_size() {
        for profile in [Profile::App, Profile::Build, Profile::Bootstrap] {
            let filters = Filters::compile(profile).unwrap();
            // BPF_MAXINSNS of linux/bpf_common.h.
            assert!(filters.0.iter().all(|program| program.len() <= 4096));
        }
    }

    #[test]
    fn no_call_is_listed_twice_or_both_ways() {
        let allowed = numbers(table::ALLOWED.iter().chain(table::ALLOWED_OF_ARCH));
        let refused = numbers(table::REFUSED.iter().chain(table::REFUSED_OF_ARCH));
        let mut all: Vec<i64> = allowed.iter().chain(&refused).copied().collect();
        all.sort_unstable();
        let twice: Vec<_> = all.windows(2).filter(|pair| pair[0] == pair[1]).collect();
        assert!(twice.is_empty(), "{twice:?}");
        assert!(!all.contains(&libc::SYS_clone3), "clone3 must look absent");
    }

    #[test]
    fn every_group_says_who_needs_it() {
        let groups = table::ALLOWED.iter().chain(table::REFUSED).chain(table::BUILD).chain(table::BOOTSTRAP);
        assert!(groups.into_iter().all(|group| !group.why.is_empty() && !group.calls.is_empty()));
    }
}
