# The project's commands, for people and CI alike. `make demo` and `make test` install what they lack.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
CARGO ?= cargo
# Where it builds, should that not be ./target.
BUILT := $(or $(CARGO_TARGET_DIR),$(CARGO_BUILD_TARGET_DIR),target)
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

# Program or file needed, Debian package that has it.
TOOLS := nft:nftables ip:iproute2 setpriv:util-linux cc:gcc
# What it takes to build the programs of other projects.
TOOLS_TOOLS := curl:curl unzip:unzip /usr/share/keyrings/debian-archive-keyring.gpg:debian-archive-keyring
TEST_TOOLS := bwrap:bubblewrap chromium:chromium chromedriver:chromium-driver openssl:openssl iptables:iptables \
  containerd:containerd runc:runc busybox:busybox-static /usr/lib/cni/ptp:containernetworking-plugins
BENCH_TOOLS := haproxy:haproxy

.PHONY: help demo test test-oldest tools lint check bench bench-change prerequisites test-prerequisites bench-prerequisites toolchain

help: ## What there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16

demo: prerequisites ## The main job on this machine: a cluster of network namespaces under policy
	@echo "==> Building"
	@$(CARGO) build --release --locked --workspace --bins
	@$(BUILT)/release/portreeve demo

test: prerequisites test-prerequisites tools ## Every test: pure ones, the demo, real packets in network namespaces
	@echo "==> Building (about 4 minutes from nothing on 2 cores)"
	@$(CARGO) build --locked --workspace --bins
	@$(CARGO) test --locked --workspace --no-run --lib --bins --tests
	@echo "==> The demo"
	@$(BUILT)/debug/portreeve demo --headless
	@echo "==> All tests: pure ones first, then those with network namespaces"
	@$(CARGO) test --locked --workspace --lib --bins --tests --no-fail-fast

test-oldest: prerequisites test-prerequisites tools ## The tests that have an API server, against the oldest supported release
	@lab/tools/build kubernetes-oldest
	@$(CARGO) build --locked --workspace --bins
	@LAB_KUBERNETES=oldest $(CARGO) test --locked -p proxy --test kube --test node

tools: ## Other projects' programs that tests need, at pinned versions, built once into ~/.cache/portreeve
	@$(call install,$(TOOLS_TOOLS))
	@lab/tools/promtool --fetch
	@lab/tools/nft --fetch
	@lab/tools/build $(filter-out kubernetes-oldest,$(notdir $(patsubst %/go.mod,%,$(wildcard lab/tools/*/go.mod))))

lint: toolchain ## Format and lints
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	@$(CARGO) clippy --locked --workspace --lib --bins -- -D warnings -D clippy::too_many_lines

check: lint ## The quick round: format, lints, pure tests
	@$(call install,$(TOOLS_TOOLS))
	@lab/tools/promtool --fetch
	@$(CARGO) test --locked -q --workspace --lib --bins
	@$(CARGO) test --locked -q -p policy --tests
	@$(CARGO) test --locked -q -p tidy

bench: prerequisites bench-prerequisites ## Against the bare network and HAProxy, and the cost of a verdict
	@$(CARGO) build --release --locked --workspace --bins
	@$(CARGO) bench --locked -p policy --bench verdict
	@$(CARGO) bench --locked -p proxy --bench compare

bench-change: prerequisites tools ## How soon a change of the cluster takes effect, what is lost meanwhile, and what large clusters cost; takes half an hour
	@$(CARGO) build --release --locked --workspace --bins
	@$(CARGO) bench --locked -p proxy --bench change

toolchain:
	@command -v $(CARGO) >/dev/null || { echo "Rust is missing; get it from https://rustup.rs" >&2; exit 1; }

define install
	missing=""; for tool in $(1); do \
	  PATH="$$PATH:/usr/sbin:/sbin" command -v "$${tool%%:*}" >/dev/null || [ -e "$${tool%%:*}" ] || missing="$$missing $${tool##*:}"; done; \
	if [ -n "$$missing" ]; then \
	  echo "==> Installing with apt:$$missing"; \
	  command -v apt-get >/dev/null || { echo "this is no Debian or Ubuntu; install by hand:$$missing" >&2; exit 1; }; \
	  $(SUDO) apt-get update -qq && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi
endef

prerequisites: toolchain
	@$(call install,$(TOOLS))

test-prerequisites: toolchain
	@$(call install,$(TEST_TOOLS))

bench-prerequisites:
	@$(call install,$(BENCH_TOOLS))
