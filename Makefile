# The few commands a person needs; `make help` lists them. Each installs nothing outside of
# this folder: what the machine lacks goes to .tools (or $PGSILO_TOOLS), see scripts/tools.py.

TOOLS  := $(or $(PGSILO_TOOLS),.tools)
TARGET := $(or $(CARGO_TARGET_DIR),target)
# `make sandbox PROFILE=release` builds what is shipped, which takes twice as long.
PROFILE ?= quick
PROGRAMS := $(TARGET)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))

.DEFAULT_GOAL := help
.PHONY: help tools clients sandbox test test-all bench plots soak fmt lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

tools: ## find or install PostgreSQL 16 or newer and OpenBAO
	@python3 scripts/tools.py >/dev/null

clients: ## the tools, and the clients that the tests drive
	@python3 scripts/tools.py --clients >/dev/null

sandbox: tools ## run a whole pgsilo on this machine; ARGS="--help" says how
	@cargo build --profile $(PROFILE) -p pgsilo -p pgsiloctl -p pgsilo-sandbox
	@. "$(TOOLS)/env" && exec "$(PROGRAMS)/pgsilo-sandbox" $(if $(TENANTS),--tenants $(TENANTS)) $(ARGS)

test: clients ## every test, against real servers; ARGS go to cargo test
	@. "$(TOOLS)/env" && exec cargo test $(ARGS)

test-all: clients ## what needs more than a fresh machine; installs Debian, npm and pip packages
	@. "$(TOOLS)/env" && exec bash scripts/test-all.sh $(ARGS)

bench: clients ## beside a direct connection and peers; QUICK=1 for less; installs Debian and npm packages
	@. "$(TOOLS)/env" && exec bash scripts/bench.sh

plots: ## docs/benchmarks/*.svg, drawn from RUN=benches/runs/DATE-bench.txt
	@[ -n "$(RUN)" ] || { echo "make plots RUN=benches/runs/DATE-bench.txt" >&2; exit 2; }
	@[ -e "$(TOOLS)/pygal" ] || python3 -m pip install --quiet --root-user-action=ignore --target "$(TOOLS)/pygal" pygal==3.0.5
	@PYTHONPATH="$(TOOLS)/pygal" python3 scripts/plots.py "$(RUN)" docs/benchmarks

soak: clients ## many short sessions, and nothing left of them; SESSIONS=10000 AT_ONCE=50, ATTACK=grants MINUTES=10
	@. "$(TOOLS)/env" && exec bash scripts/measure.sh soak

fmt: ## format the code
	@cargo fmt --all

lint: ## what must be clean: formatting, clippy
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets -- -D warnings
	@cargo clippy --test more -- -D warnings
	@cargo clippy -p pgsilo -- -D warnings
	@cargo clippy -p pgsiloctl -- -D warnings

clean: ## remove what was built (not the tools)
	@cargo clean
