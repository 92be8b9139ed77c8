//! The system calls an instance may make, as data, each group with who needs it.
//!
//! What is in no list here is answered ENOSYS, as if the kernel were older: C libraries then fall back. What is
//! known and refused is in [`REFUSED`] and answered EPERM. `clone3` is deliberately in neither list: its flags are
//! behind a pointer that a filter cannot read, and ENOSYS makes every C library fall back to `clone`.

use libc::*;

// Calls of Linux 6.5 to 6.7 that libc does not name everywhere. Numbers above 423 are the same on every architecture.
const CACHESTAT: c_long = 451;
const FCHMODAT2: c_long = 452;
const FUTEX_WAKE: c_long = 454;
const FUTEX_WAIT: c_long = 455;
const FUTEX_REQUEUE: c_long = 456;

/// A named group of calls.
pub(super) struct Group {
    /// Who needs it.
    #[cfg_attr(not(test), allow(dead_code))]
    pub why: &'static str,
    pub calls: &'static [c_long],
}

/// Allowed to every profile.
pub(super) const ALLOWED: &[Group] = &[
    Group {
        why: "every program: memory",
        calls: &[
            SYS_brk, SYS_mmap, SYS_munmap, SYS_mremap, SYS_mprotect, SYS_madvise, SYS_msync, SYS_mincore,
            SYS_mlock, SYS_mlock2, SYS_mlockall, SYS_munlock, SYS_munlockall, SYS_membarrier,
            SYS_memfd_create, SYS_pkey_alloc, SYS_pkey_free, SYS_pkey_mprotect, SYS_remap_file_pages,
            SYS_process_madvise, SYS_process_mrelease, SYS_mseal,
        ],
    },
    Group {
        why: "databases and JITs on machines with several memory nodes",
        calls: &[SYS_get_mempolicy, SYS_set_mempolicy, SYS_mbind, SYS_set_mempolicy_home_node],
    },
    Group {
        why: "every program: descriptors",
        calls: &[
            SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_pread64, SYS_pwrite64, SYS_preadv, SYS_pwritev,
            SYS_preadv2, SYS_pwritev2, SYS_close, SYS_close_range, SYS_dup, SYS_dup3, SYS_fcntl, SYS_flock,
            SYS_lseek, SYS_fsync, SYS_fdatasync, SYS_sync_file_range, SYS_syncfs, SYS_ftruncate,
            SYS_fallocate, SYS_fadvise64, SYS_readahead, SYS_copy_file_range, SYS_sendfile, SYS_splice,
            SYS_tee, SYS_vmsplice, SYS_pipe2, SYS_ioctl, CACHESTAT,
        ],
    },
    Group {
        why: "every program: files by name",
        calls: &[
            SYS_openat, SYS_openat2, SYS_newfstatat, SYS_fstat, SYS_statx, SYS_statfs, SYS_fstatfs,
            SYS_faccessat, SYS_faccessat2, SYS_getdents64, SYS_getcwd, SYS_chdir, SYS_fchdir, SYS_mkdirat,
            SYS_mknodat, SYS_unlinkat, SYS_renameat2, SYS_linkat, SYS_symlinkat, SYS_readlinkat, SYS_fchmod,
            SYS_fchmodat, FCHMODAT2, SYS_fchown, SYS_fchownat, SYS_utimensat, SYS_truncate, SYS_umask,
            SYS_sync, SYS_getxattr, SYS_lgetxattr, SYS_fgetxattr, SYS_listxattr, SYS_llistxattr,
            SYS_flistxattr, SYS_setxattr, SYS_lsetxattr, SYS_fsetxattr, SYS_removexattr, SYS_lremovexattr,
            SYS_fremovexattr, SYS_renameat,
        ],
    },
    Group {
        why: "file watchers of development servers",
        calls: &[SYS_inotify_init1, SYS_inotify_add_watch, SYS_inotify_rm_watch],
    },
    Group {
        why: "event loops",
        calls: &[
            SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_ppoll, SYS_pselect6,
            SYS_eventfd2, SYS_signalfd4, SYS_timerfd_create, SYS_timerfd_settime, SYS_timerfd_gettime,
        ],
    },
    Group {
        why: "servers; families and protocols are narrowed in SOCKET_FAMILIES",
        calls: &[
            SYS_socket, SYS_socketpair, SYS_bind, SYS_listen, SYS_accept, SYS_accept4, SYS_connect,
            SYS_shutdown, SYS_getsockname, SYS_getpeername, SYS_getsockopt, SYS_setsockopt, SYS_sendto,
            SYS_recvfrom, SYS_sendmsg, SYS_recvmsg, SYS_sendmmsg, SYS_recvmmsg,
        ],
    },
    Group {
        why: "every program: processes and threads; clone is narrowed in NEW_NAMESPACES",
        calls: &[
            SYS_clone, SYS_execve, SYS_execveat, SYS_exit, SYS_exit_group, SYS_wait4, SYS_waitid,
            SYS_getpid, SYS_getppid, SYS_gettid, SYS_setsid, SYS_getsid, SYS_setpgid, SYS_getpgid,
            SYS_prctl, SYS_set_tid_address, SYS_set_robust_list, SYS_get_robust_list, SYS_futex,
            SYS_futex_waitv, FUTEX_WAKE, FUTEX_WAIT, FUTEX_REQUEUE, SYS_rseq, SYS_pidfd_open, SYS_pidfd_send_signal, SYS_restart_syscall,
        ],
    },
    Group {
        why: "every program: signals",
        calls: &[
            SYS_kill, SYS_tkill, SYS_tgkill, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigpending,
            SYS_rt_sigqueueinfo, SYS_rt_tgsigqueueinfo, SYS_rt_sigreturn, SYS_rt_sigsuspend,
            SYS_rt_sigtimedwait, SYS_sigaltstack,
        ],
    },
    Group {
        why: "servers that drop to another user; what it may do is bounded by capabilities",
        calls: &[
            SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid, SYS_getresuid, SYS_getresgid, SYS_getgroups,
            SYS_setuid, SYS_setgid, SYS_setreuid, SYS_setregid, SYS_setresuid, SYS_setresgid, SYS_setgroups,
            SYS_setfsuid, SYS_setfsgid, SYS_capget, SYS_capset,
        ],
    },
    Group {
        why: "schedulers of language runtimes",
        calls: &[
            SYS_sched_yield, SYS_sched_getaffinity, SYS_sched_setaffinity, SYS_sched_getparam,
            SYS_sched_setparam, SYS_sched_getscheduler, SYS_sched_setscheduler, SYS_sched_get_priority_max,
            SYS_sched_get_priority_min, SYS_sched_rr_get_interval, SYS_sched_getattr, SYS_sched_setattr,
            SYS_getpriority, SYS_setpriority, SYS_ioprio_get, SYS_ioprio_set, SYS_getcpu,
        ],
    },
    Group {
        why: "every program: time",
        calls: &[
            SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday,
            SYS_getitimer, SYS_setitimer, SYS_timer_create, SYS_timer_settime, SYS_timer_gettime,
            SYS_timer_getoverrun, SYS_timer_delete, SYS_times,
        ],
    },
    Group {
        why: "every program: what it runs on and its limits; personality is narrowed in the filter",
        calls: &[
            SYS_uname, SYS_sysinfo, SYS_getrandom, SYS_personality, SYS_getrlimit, SYS_setrlimit,
            SYS_prlimit64, SYS_getrusage,
        ],
    },
    Group {
        why: "PostgreSQL, Apache, Python multiprocessing: shared memory, semaphores, queues of this ipc namespace",
        calls: &[
            SYS_shmget, SYS_shmat, SYS_shmdt, SYS_shmctl, SYS_semget, SYS_semop, SYS_semtimedop, SYS_semctl,
            SYS_msgget, SYS_msgsnd, SYS_msgrcv, SYS_msgctl, SYS_mq_open, SYS_mq_unlink, SYS_mq_timedsend,
            SYS_mq_timedreceive, SYS_mq_notify, SYS_mq_getsetattr,
        ],
    },
    Group {
        why: "libaio users (MariaDB, nginx); the old interface, not io_uring",
        calls: &[SYS_io_setup, SYS_io_destroy, SYS_io_submit, SYS_io_cancel, SYS_io_getevents],
    },
    Group {
        why: "programs that sandbox themselves further",
        calls: &[SYS_seccomp, SYS_landlock_create_ruleset, SYS_landlock_add_rule, SYS_landlock_restrict_self],
    },
];

/// Calls that only exist on x86-64, older shapes of ones above: older C libraries, Go, static binaries.
#[cfg(target_arch = "x86_64")]
pub(super) const ALLOWED_OF_ARCH: &[Group] = &[
    Group {
        why: "programs built against old C libraries, and run-times that call the kernel themselves",
        calls: &[
            SYS_open, SYS_creat, SYS_stat, SYS_lstat, SYS_access, SYS_getdents, SYS_mkdir, SYS_rmdir,
            SYS_mknod, SYS_unlink, SYS_rename, SYS_link, SYS_symlink, SYS_readlink, SYS_chmod, SYS_chown,
            SYS_lchown, SYS_utime, SYS_utimes, SYS_futimesat, SYS_dup2, SYS_pipe, SYS_poll, SYS_select,
            SYS_epoll_create, SYS_epoll_wait, SYS_eventfd, SYS_signalfd, SYS_inotify_init, SYS_fork,
            SYS_vfork, SYS_getpgrp, SYS_alarm, SYS_pause, SYS_time,
        ],
    },
    Group { why: "C libraries: thread-local storage", calls: &[SYS_arch_prctl] },
];

#[cfg(not(target_arch = "x86_64"))]
pub(super) const ALLOWED_OF_ARCH: &[Group] = &[];

/// Added for [`crate::spec::Profile::Build`]: package managers run maintainer scripts under chroot.
pub(super) const BUILD: &[Group] =
    &[Group { why: "dpkg --root, apt, debootstrap stages", calls: &[SYS_chroot] }];

/// Added for [`crate::spec::Profile::Bootstrap`], whose process is in a nested user namespace.
pub(super) const BOOTSTRAP: &[Group] = &[Group {
    why: "mmdebstrap mounts /proc, /sys and /dev into the tree it makes, in a mount namespace of its own",
    calls: &[SYS_mount, SYS_umount2, SYS_pivot_root, SYS_unshare, SYS_sethostname],
}];

/// Known and refused with EPERM, unless a profile above lists it. Anything not named anywhere gets ENOSYS.
pub(super) const REFUSED: &[Group] = &[
    Group {
        why: "new namespaces: the usual first step of a kernel exploit",
        calls: &[SYS_unshare, SYS_setns],
    },
    Group {
        why: "the mount tree",
        calls: &[
            SYS_mount, SYS_umount2, SYS_pivot_root, SYS_chroot, SYS_open_tree, SYS_move_mount, SYS_fsopen,
            SYS_fsconfig, SYS_fsmount, SYS_fspick, SYS_mount_setattr, SYS_quotactl, SYS_quotactl_fd,
            SYS_swapon, SYS_swapoff,
        ],
    },
    Group {
        why: "io_uring: a kernel of its own behind one call",
        calls: &[SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register],
    },
    Group {
        why: "programs in the kernel, profiling, fault handling",
        calls: &[SYS_bpf, SYS_perf_event_open, SYS_userfaultfd],
    },
    Group { why: "keyrings are shared between users", calls: &[SYS_add_key, SYS_request_key, SYS_keyctl] },
    Group {
        why: "other processes' memory and descriptors",
        calls: &[
            SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_pidfd_getfd, SYS_kcmp,
            SYS_move_pages, SYS_migrate_pages,
        ],
    },
    Group {
        why: "files by handle, past every mount",
        calls: &[SYS_open_by_handle_at, SYS_name_to_handle_at],
    },
    Group {
        why: "the machine",
        calls: &[
            SYS_reboot, SYS_kexec_load, SYS_init_module, SYS_finit_module, SYS_delete_module, SYS_acct,
            SYS_syslog, SYS_settimeofday, SYS_clock_settime, SYS_adjtimex, SYS_clock_adjtime,
            SYS_sethostname, SYS_setdomainname, SYS_vhangup, SYS_lookup_dcookie, SYS_nfsservctl,
            SYS_fanotify_init, SYS_fanotify_mark, SYS_memfd_secret,
        ],
    },
];

#[cfg(target_arch = "x86_64")]
pub(super) const REFUSED_OF_ARCH: &[Group] = &[Group {
    why: "the machine, x86 only",
    calls: &[
            SYS_iopl, SYS_ioperm, SYS_modify_ldt, SYS_kexec_file_load, SYS_uselib, SYS_ustat, SYS_sysfs,
            SYS__sysctl,
        ],
}];

#[cfg(not(target_arch = "x86_64"))]
pub(super) const REFUSED_OF_ARCH: &[Group] = &[];

/// Socket families and, for netlink, the one protocol, that may be opened. AF_ALG, AF_VSOCK, AF_PACKET and the rest
/// are kernel code no tenant needs.
pub(super) const SOCKET_FAMILIES: [c_int; 4] = [AF_UNIX, AF_INET, AF_INET6, AF_NETLINK];

/// Flags of clone that make namespaces. CLONE_NEWTIME has no bit in clone's argument.
pub(super) const NEW_NAMESPACES: [c_int; 7] =
    [CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET];

/// ioctls that put input into a terminal or drive the console, and those that make btrfs subvolumes, which escape a
/// quota on kernels with ordinary quota groups only. Compared as 32 bits: the kernel ignores the rest of the register,
/// and a filter comparing 64 lets `TIOCSTI | 1 << 32` through.
pub(super) const REFUSED_IOCTLS: [u64; 6] = [
    TIOCSTI,
    TIOCLINUX,
    BTRFS_IOC_SNAP_CREATE,
    BTRFS_IOC_SUBVOL_CREATE,
    BTRFS_IOC_SNAP_CREATE_V2,
    BTRFS_IOC_SUBVOL_CREATE_V2,
];

/// linux/btrfs.h: `_IOW(0x94, number, struct)`, both structs of 4096 bytes.
const BTRFS_IOC_SNAP_CREATE: u64 = 0x5000_9401;
const BTRFS_IOC_SUBVOL_CREATE: u64 = 0x5000_940e;
const BTRFS_IOC_SNAP_CREATE_V2: u64 = 0x5000_9417;
const BTRFS_IOC_SUBVOL_CREATE_V2: u64 = 0x5000_9418;
