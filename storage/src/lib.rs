//! Images, releases, volumes and snapshots on btrfs; and epagent-unpack.
