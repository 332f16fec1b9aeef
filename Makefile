# Short names for cargo commands, which also work without them.
#
# wasmtime and s2-lite take minutes to build. `demo` and `test` therefore use the same profile
# (dev) and the same features, so that both are built once; Cargo.toml says how the features of
# their dependencies are kept alike. Only `bench` needs optimised code and builds them again.
#
# ARGS goes to the command: make demo ARGS=--exit, make test ARGS='--test it restart'.
ARGS ?=

.PHONY: demo test test-transforms sim torture soak provocations bench bench-peers fmt lint fuzz setup

# The whole story on this machine; it ends with Ctrl-C, or by itself with ARGS=--exit.
demo: setup
	cargo run --locked -- demo $(ARGS)

test: setup
	cargo test --locked $(ARGS)

# The transforms and their SDK, on this machine itself and without WebAssembly.
test-transforms: setup
	cargo test --locked --workspace --exclude sluicebox --exclude sluicebox-chaos $(ARGS)

# The simulation for longer than a test run: ARGS='seeds=100000', or ARGS=seed=4711 for one seed with
# all of its events. Of everything that is compiled, only this crate is compiled again, optimised.
sim: setup
	SLUICEBOX_SIM="$(ARGS)" CARGO_PROFILE_DEV_OPT_LEVEL=1 cargo test --locked --lib simulation::tests::long -- --ignored --nocapture

# Faults on real processes, for ten minutes: ARGS='--seed N --minutes M'. `make test` has a short form.
torture: setup
	SLUICEBOX_TORTURE='$(ARGS)' cargo test --locked --test it -- torture:: --nocapture

# Ten million messages through three modules, which leave memory where it was: ARGS=N for another number.
# `make test` has a hundred thousand.
soak: setup
	SLUICEBOX_SOAK_CALLS=$(or $(ARGS),10000000) CARGO_PROFILE_DEV_OPT_LEVEL=1 cargo test --locked --lib soak_alone -- --ignored --nocapture

# What breaks pipelines that read Postgres, also in the forms that take minutes and gigabytes.
provocations: setup
	cargo test --locked --test it -- provocations:: --include-ignored --nocapture $(ARGS)

bench: setup
	cargo bench --locked --bench pipeline -- $(ARGS)

# The same edit by serde_json, Extism, VRL and this host. A crate of its own, of which the product knows
# nothing: its first build takes about as long as the product's.
bench-peers: setup
	cd benches/peers && cargo run --locked --release

# Feeds bytes to the loader, to what a guest may answer, or to the decoder, until Ctrl-C or for so long:
# TARGET=loader, answers or decode, ARGS=-max_total_time=300. The first build takes a quarter of an hour,
# in fuzz/target. What it finds goes to fuzz/target/corpus; the small ones in fuzz/corpus are replayed
# by the ordinary tests.
TARGET ?= answers
fuzz: setup
	@.ci/setup fuzz
	mkdir -p fuzz/target/corpus/$(TARGET)
	cargo fuzz run --sanitizer none $(TARGET) fuzz/target/corpus/$(TARGET) fuzz/corpus/$(TARGET) -- $(ARGS)

fmt:
	cargo fmt

lint: setup
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

# Installs what is missing: Rust and its wasm target by rustup, Postgres and a C compiler by apt-get.
setup:
	@.ci/setup
