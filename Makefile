# castra: `make demo` shows it at work, `make test` passes every test.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
# A shell that starts `make test` in the background leaves Ctrl-C ignored, and tests send it.
TEST = env --default-signal=INT,QUIT,HUP $(CARGO) test --locked
RELEASE := target/release/castra
# Tests and demo keep guest images here, apart from anybody's home directory.
export CASTRA_TEST_HOME ?= $(CURDIR)/target/castra-home
# The events of all tests' castras, for the validator.
EVENTS := $(CURDIR)/target/events

.PHONY: build check test lint bless demo bench install uninstall clean

build:
	$(CARGO) build --release --locked

# All that needs no hypervisor.
check:
	$(TEST)

# Everything, real guests included.
test:
	scripts/install-deps.sh test
	$(MAKE) lint
	$(CARGO) build --locked --no-default-features --lib
	rm -rf $(EVENTS)
	CASTRA_TEST_EVENTS=$(EVENTS) $(TEST)
	CASTRA_TEST_EVENTS=$(EVENTS) $(TEST) --test guests
	CASTRA_TEST_EVENTS=$(EVENTS) $(TEST) --test debian
	CASTRA_TEST_EVENTS=$(EVENTS) $(TEST) --test harness_codex
	scripts/check-events.sh $(EVENTS)

lint:
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --quiet
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --no-default-features --lib --quiet
	$(CARGO) clippy --locked --no-default-features --lib -- -D warnings

# Rewrites the golden files; review the diff.
bless:
	CASTRA_BLESS=1 $(CARGO) test --locked

demo:
	scripts/install-deps.sh run
	$(CARGO) build --release --locked
	scripts/demo.sh $(RELEASE)

bench:
	scripts/install-deps.sh bench
	$(CARGO) build --release --locked --bins --examples
	scripts/bench.sh $(RELEASE)

install: build
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/share/man/man1 \
	    $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
	    $(DESTDIR)$(PREFIX)/share/zsh/site-functions \
	    $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	install -m 755 $(RELEASE) $(DESTDIR)$(PREFIX)/bin/castra
	$(RELEASE) man > $(DESTDIR)$(PREFIX)/share/man/man1/castra.1
	$(RELEASE) completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/castra
	$(RELEASE) completions zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_castra
	$(RELEASE) completions fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/castra.fish

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/castra $(DESTDIR)$(PREFIX)/share/man/man1/castra.1 \
	    $(DESTDIR)$(PREFIX)/share/bash-completion/completions/castra \
	    $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_castra \
	    $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/castra.fish

clean:
	$(CARGO) clean
