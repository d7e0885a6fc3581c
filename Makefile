# What people type. The guests are built once and kept under $XDG_CACHE_HOME/nomad-driver-exec2.

.DEFAULT_GOAL := help
CARGO ?= cargo
TEST := $(CARGO) test --locked

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: test
test: host packages ## every test: units and protocol here, the rest in Debian 13 and 12 guests (root; about an hour on a new machine)
	@echo '== unit, protocol and helper tests on this machine'
	@status=0; \
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(TEST) --workspace --no-fail-fast || status=1; \
	$(TEST) --test package || status=1; \
	echo '== tests inside the guests'; \
	$(TEST) --test guests || status=1; \
	exit $$status

# Of each target.
FUZZ_SECONDS ?= 30
.PHONY: fuzz
fuzz: ## every parser with inputs near to real ones: make fuzz FUZZ_SECONDS=600
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(TEST) --test fuzz

.PHONY: test-matrix
test-matrix: host ## every guest test in every guest, Debian sid too, and with every agent in NOMAD=a:b:c
	$(TEST) --test guests -- --matrix

ROUNDS ?= 10
SEQUENCES ?= 500
.PHONY: soak
soak: host ## longer fuzzing, many random lives of tasks, then the guest tests again and again: make soak SEQUENCES=500 ROUNDS=10
	FUZZ_SECONDS=300 $(TEST) --test fuzz
	$(TEST) --test guests -- --sequences $(SEQUENCES) life_cycle::
	@for round in $$(seq $(ROUNDS)); do \
		echo "== round $$round of $(ROUNDS)"; \
		$(TEST) --test guests || exit 1; \
	done

.PHONY: packages
packages: ## the .deb, the .rpm and a tarball into target/package
	@tests/harness/host-setup packages
	packaging/build.sh

.PHONY: reproduce
reproduce: packages ## builds the packages once more, executable and all, from another directory, and compares
	packaging/reproduce.sh

GUESTS ?= trixie-nspawn trixie-qemu
SIZE ?= full
# Apart from the harness, so that the driver is built with the features of a release and no others.
.PHONY: bench
bench: host ## measure starts and tasks, and write BENCHMARKS.md: make bench GUESTS=trixie-nspawn SIZE=quick EXEC2=/path
	$(CARGO) build --release --locked --package nomad-driver-exec2 --bin nomad-driver-exec2
	$(CARGO) build --profile client --locked --package harness --bin harness
	target/client/harness bench run $(SIZE) target/release/nomad-driver-exec2 $(GUESTS)
	target/client/harness bench report

GUEST ?= trixie-qemu
.PHONY: demo
demo: host build ## two jobs in a guest, and what systemd and the kernel make of it
	$(CARGO) run --quiet --locked --package harness -- demo $(GUEST)

.PHONY: hack
hack: host build ## a guest with a shell; the agent's API at a port of this host
	$(CARGO) run --quiet --locked --package harness -- hack $(GUEST)

.PHONY: build
build: ## driver and harness, unoptimised
	$(CARGO) build --locked --workspace

.PHONY: pages
pages: ## manual pages and shell completions anew, after a change of the command line or of README.md
	$(CARGO) run --quiet --locked --package harness -- pages

.PHONY: lint
lint: ## formatting and clippy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- --deny warnings
	$(CARGO) clippy --locked --test guests --test package -- --deny warnings

.PHONY: audit
audit: ## licences, sources, duplicates and known holes of what we are built from, by deny.toml (needs cargo-deny and a network)
	@cargo-deny --version >/dev/null 2>&1 || { echo 'cargo-deny is missing: cargo install --locked cargo-deny' >&2; exit 1; }
	cargo-deny --locked check --allow unnecessary-skip

.PHONY: host
host:
	@tests/harness/host-setup
