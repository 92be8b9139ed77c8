# make setup   install what is missing on a Debian machine (needs root)
# make build   all binaries, in target/dist
# make demo    deploy an app, redeploy it under load, stay up until Ctrl-C; ONCE=1 ends by itself
# make test    everything: formatting, lints, every test, some in throwaway VMs (needs root) [VM=none: without those]
# make soak    the end-to-end suites with long loads, an hour of churn, a million simulations [SEEDS=N]
# make vm-test  the suites in throwaway VMs [T=part of a name]; vm-shell, vm-pair: machines to look around in [R=release]
# make bench   every benchmark; bench-balancer: the balancer beside HAProxy, nginx and naive proxies
# make deb     the Debian packages, in target/deb
# make clean   what was built

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup root rust build lint test demo soak soak-balancer bench bench-balancer setup-deb deb test-deb clean

# One profile for everything: what is tested is what is shipped, and nothing is built twice.
PROFILE := release
TARGET  := $(abspath $(or $(CARGO_TARGET_DIR),target))
BUILT   := $(TARGET)/$(PROFILE)
# The set of binaries that belong together. The two that run inside jails are linked statically, and cargo would
# put dynamic ones over them in $(BUILT) whenever it builds for a test.
DIST    := $(abspath target/dist)

PARTS   := epagent epagentd epagent-runner epagent-balancer epagent-lease
STATIC  := epagent-jail epagent-unpack
ROOT_SUITES := EPAGENT_BIN_DIR=$(DIST)

# Program to look for, and the Debian package that has it.
NEEDS := mkfs.btrfs:btrfs-progs nft:nftables mmdebstrap:mmdebstrap python3:python3 node:nodejs npm:npm \
         zstd:zstd curl:curl ip:iproute2 ps:procps gcc:gcc systemd-analyze:systemd
# Packages without a program of their own.
NEEDS_PACKAGES := python3-venv libc6-dev ca-certificates

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

root:
	@[ "$$(id -u)" = 0 ] || { echo "error: this needs root: it makes namespaces, cgroups, mounts and a loop device." >&2; \
	  echo "  = help: run it as root, for example: sudo make $(MAKECMDGOALS)" >&2; exit 1; }

rust:
	@command -v cargo >/dev/null || { echo "error: cargo is missing." >&2; \
	  echo "  = help: install Rust $$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or newer, and have ~/.cargo/bin in PATH" >&2; exit 1; }

# Looked for where an app on the image `host` finds them: a version manager in somebody's home is of no use there.
# node comes with npm in some packages and without it in Debian's, so each is looked for by itself.
setup: root
	@missing=; system=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin; \
	for need in $(NEEDS); do PATH=$$system command -v "$${need%%:*}" >/dev/null || missing="$$missing $${need##*:}"; done; \
	if command -v dpkg >/dev/null; then \
	  for need in $(NEEDS_PACKAGES); do dpkg -s $$need >/dev/null 2>&1 || missing="$$missing $$need"; done; \
	fi; \
	if [ -n "$$missing" ]; then \
	  echo "installing:$$missing"; \
	  command -v apt-get >/dev/null || { echo "error: no apt-get here; install these yourself:$$missing" >&2; exit 1; }; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -q && apt-get install -q -y --no-install-recommends $$missing; \
	fi
	@for module in btrfs loop nf_tables; do modprobe -q $$module 2>/dev/null || true; done
	@grep -qw btrfs /proc/filesystems || { echo "error: this kernel has no btrfs." >&2; \
	  echo "  = help: use a kernel with CONFIG_BTRFS_FS, as Debian's are" >&2; exit 1; }

build: rust
	cargo build $(CARGO_FLAGS) --profile $(PROFILE) --workspace --bins
	@mkdir -p $(DIST)
	@for bin in $(PARTS) epagent-demo epagent-load; do cp --remove-destination $(BUILT)/$$bin $(DIST)/$$bin; done
	cargo rustc $(CARGO_FLAGS) --profile $(PROFILE) -p epagent-isolation --bin epagent-jail -- -C target-feature=+crt-static
	cargo rustc $(CARGO_FLAGS) --profile $(PROFILE) -p epagent-storage --bin epagent-unpack -- -C target-feature=+crt-static
	@for bin in $(STATIC); do cp --remove-destination $(BUILT)/$$bin $(DIST)/$$bin; done

# A toolchain without these components still builds and tests, and a newer one may warn of more: only CI fails for it.
lint: rust
	@if cargo fmt --version >/dev/null 2>&1; then cargo fmt --all --check; else echo "no rustfmt here: not checked"; fi
	@if cargo clippy --version >/dev/null 2>&1; then \
	  cargo clippy --profile $(PROFILE) --workspace --all-targets $(if $(CI),-- -D warnings); \
	else echo "no clippy here: not checked"; fi

# With the shorter ones of the tests in throwaway machines, some five minutes where they are emulated; VM=none is without.
VM := short
test: root setup build lint $(if $(filter none,$(VM)),,setup-vm test-deb)
	@cargo nextest --version >/dev/null 2>&1 || cargo install cargo-nextest --locked
	$(ROOT_SUITES) EPAGENT_TEST_VM=$(VM) EPAGENT_DEBS=$(abspath target/test-deb) \
	  cargo nextest run --cargo-profile $(PROFILE) --workspace

demo: root setup build
	@$(DIST)/epagent-demo $(if $(filter-out 0,$(ONCE)),--once)

# Loads of minutes where `make test` has seconds, and every cut repeated.
SEEDS := 1000000
soak: root setup build
	@cargo nextest --version >/dev/null 2>&1 || cargo install cargo-nextest --locked
	$(ROOT_SUITES) EPAGENT_TEST_LOAD_SECONDS=120 EPAGENT_TEST_ROUNDS=20 \
	  cargo nextest run --cargo-profile $(PROFILE) -p epagent-tests --profile soak
	$(MAKE) soak-balancer

# The balancer's part of it. An hour of churn by each door: half of its length before the memory is measured first.
soak-balancer: root setup build
	EPAGENT_TEST_LOAD_SECONDS=60 EPAGENT_TEST_CHURN_SECONDS=2400 EPAGENT_TEST_IDLE=9000 EPAGENT_TEST_BUSY=500 \
	EPAGENT_TEST_GIB=10 EPAGENT_TEST_SLOW_READERS=1000 SIMULATION_SEEDS=$(SEEDS) TLS_SIMULATION_SEEDS=$(SEEDS) \
	  cargo nextest run --cargo-profile $(PROFILE) -p epagent-balancer --profile soak --test-threads 4 \
	    -E 'binary(churn) | binary(handover) | binary(bytes) | binary(slow_readers) | binary(simulation) | binary(tls_simulation) | (binary(epoll) & test(/^(churn|handover|bytes|slow_readers)::/))'

bench: bench-balancer

# With the profile of the tests, so that nothing is built twice.
bench-balancer: root setup build
	@command -v haproxy >/dev/null && command -v nginx >/dev/null || { export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; \
	  apt-get update -q && apt-get install -q -y --no-install-recommends haproxy nginx libnginx-mod-stream; }
	$(ROOT_SUITES) cargo bench --profile $(PROFILE) -p epagent-tests --bench balancer

setup-deb:
	@command -v dh >/dev/null && command -v dpkg-buildpackage >/dev/null && command -v pkg-config >/dev/null || { \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -q && apt-get install -q -y --no-install-recommends debhelper dpkg-dev lintian pkgconf; }

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
# The packages, in target/deb, from a clean tree of the last commit. debhelper gives the build a HOME of its own, so
# the toolchain's places are named.
deb: rust setup-deb
	@[ "$$(dpkg-parsechangelog -S Version)" = "$(VERSION)" ] || { echo "error: debian/changelog and Cargo.toml differ in their version." >&2; exit 1; }
	rm -rf target/deb && mkdir -p target/deb/epagent-$(VERSION)
	git archive HEAD | tar -x -C target/deb/epagent-$(VERSION)
	cd target/deb/epagent-$(VERSION) && CARGO_TARGET_DIR=$(TARGET) CARGO_HOME=$${CARGO_HOME:-$$HOME/.cargo} \
	  RUSTUP_HOME=$${RUSTUP_HOME:-$$HOME/.rustup} dpkg-buildpackage -us -uc -b
	rm -rf target/deb/epagent-$(VERSION)
	@if command -v lintian >/dev/null; then lintian --pedantic --fail-on error,warning target/deb/*.changes; fi
	@ls -1 target/deb/*.deb

# The same packages of this tree as it is and of what is built: for the tests in machines.
test-deb: setup-deb build
	rm -rf target/test-deb && mkdir -p target/test-deb/epagent
	tar --exclude=./target --exclude=./.git -c . | tar -x -C target/test-deb/epagent
	cd target/test-deb/epagent && EPAGENT_DIST=$(DIST) DEB_BUILD_OPTIONS=noautodbgsym dpkg-buildpackage -us -uc -b
	rm -rf target/test-deb/epagent

clean:
	cargo clean
	rm -rf target/dist

# Throwaway machines (tests/src/vm). An image is made and booted once, then every machine is forked from that.
# T chooses tests by a part of their name, R the release of a shell or a pair: trixie, bookworm.
.PHONY: setup-vm vm-test vm-shell vm-pair

setup-vm: setup
	@command -v qemu-system-x86_64 >/dev/null || { export DEBIAN_FRONTEND=noninteractive; \
	  apt-get update -q && apt-get install -q -y --no-install-recommends qemu-system-x86; }

vm-test: root setup-vm build deb
	@cargo nextest --version >/dev/null 2>&1 || cargo install cargo-nextest --locked
	cargo nextest list --cargo-profile $(PROFILE) --workspace --list-type binaries-only --message-format json > $(BUILT)/tests.json
	$(ROOT_SUITES) EPAGENT_TEST_VM=whole EPAGENT_TEST_LIST=$(BUILT)/tests.json \
	  cargo nextest run --cargo-profile $(PROFILE) --workspace --profile vm \
	    -E 'package(epagent-tests) & (binary(vm) | binary(packages))$(if $(T), & test(/$(T)/))'

vm-shell vm-pair: vm-%: root setup-vm build
	@$(ROOT_SUITES) cargo run -q --profile $(PROFILE) -p epagent-tests --bin epagent-vm -- $* $(or $(R),trixie)
