//! Jails: namespaces, private root, cgroups, seccomp, network; and epagent-jail, the monitor.
