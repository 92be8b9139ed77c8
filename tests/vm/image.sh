#!/bin/sh
# Makes the disk of a throwaway VM: image.sh RELEASE FOLDER
#
# FOLDER then holds `disk.raw` (ext4, sparse), `vmlinuz` and `initrd.img`: the kernel is booted directly, so the disk
# needs no boot loader and no partition. A stock Debian with systemd as its first process, the packages epagent needs,
# and the guest's half of the harness (agent.py) as a unit. What makes it differ from a machine that somebody
# installed is listed in `customize` and is about time alone: nothing waits for a network or writes to a slow disk
# what no test reads. Nothing of the harness is named epagent: what a purge leaves behind is looked for by that name.
#
# Needs root, mmdebstrap and mkfs.ext4.
set -eu

release=$1
out=$2
here=$(cd "$(dirname "$0")" && pwd)
# Sparse: what is not written takes no room. The loop file of the agent's pool has to fit beside the system.
size=${EPAGENT_VM_DISK:-16G}

packages=systemd,systemd-sysv,dbus,udev,kmod,linux-image-amd64,initramfs-tools,btrfs-progs,e2fsprogs,nftables
packages=$packages,mmdebstrap,python3,iproute2,iputils-ping,procps,curl,ca-certificates,zstd,xz-utils

root=$(mktemp -d "${TMPDIR:-/var/tmp}/epagent-vm-root.XXXXXX")
trap 'rm -rf --one-file-system "$root"' EXIT INT TERM

# The initial ramdisk holds what mounts the root and no more: unpacking a full one is a third of an emulated boot.
mmdebstrap --variant=minbase --mode=root --include="$packages" \
  --aptopt='APT::Install-Recommends "false"' --aptopt='Acquire::Check-Valid-Until "false"' \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"' \
  --essential-hook='printf "MODULES=list\nCOMPRESS=zstd\n" > "$1/etc/initramfs-tools/conf.d/vm-guest"' \
  --essential-hook='printf "virtio_pci\nvirtio_blk\next4\ncrc32c_generic\n" > "$1/etc/initramfs-tools/modules"' \
  "$release" "$root"

customize() {
  # The choices above are for the image; what a test installs comes whole, documentation included.
  rm -f "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$root/etc/apt/apt.conf.d/99mmdebstrap"
  echo vm > "$root/etc/hostname"
  printf '127.0.0.1 localhost vm\n::1 localhost\n' > "$root/etc/hosts"
  printf '/dev/vda / ext4 defaults 0 1\n' > "$root/etc/fstab"
  : > "$root/etc/machine-id"
  passwd --root "$root" -d root >/dev/null
  install -D -m 755 "$here/agent.py" "$root/usr/local/lib/vm-guest/agent.py"
  install -D -m 644 "$here/agent.service" "$root/etc/systemd/system/vm-guest.service"
  mkdir -p "$root/etc/systemd/system/multi-user.target.wants" "$root/etc/systemd/journald.conf.d"
  ln -sf ../vm-guest.service "$root/etc/systemd/system/multi-user.target.wants/"
  # The journal survives a power cut, and is bounded.
  mkdir -p "$root/var/log/journal"
  printf '[Journal]\nStorage=persistent\nSystemMaxUse=64M\nSyncIntervalSec=5s\n' \
    > "$root/etc/systemd/journald.conf.d/vm-guest.conf"
  # Timers would run in the middle of a test, on one fork and not on the other.
  for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer systemd-tmpfiles-clean.timer getty@tty1.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
  done
}
customize

mkdir -p "$out"
cp -L "$root/vmlinuz" "$root/initrd.img" "$out/"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/boot/initrd.img-*
truncate -s "$size" "$out/disk.raw.new"
mkfs.ext4 -q -F -L root -E lazy_itable_init=1,lazy_journal_init=1 -d "$root" "$out/disk.raw.new"
mv "$out/disk.raw.new" "$out/disk.raw"
