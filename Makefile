# castra: `make demo` shows it at work, `make test` passes every test.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
# A shell that starts `make test` in the background leaves Ctrl-C ignored, and tests send it.
TEST = env --default-signal=INT,QUIT,HUP $(CARGO) test --locked
RELEASE := target/release/castra
# What `make install` installs; one that is named isn't built.
BINARY ?= $(RELEASE)
# Tests and demo keep guest images here, apart from anybody's home directory.
export CASTRA_TEST_HOME ?= $(CURDIR)/target/castra-home
# The events of all tests' castras, for the validator.
EVENTS := $(CURDIR)/target/events

.PHONY: build check test lint bless demo bench install uninstall clean

# One file that needs nothing but a kernel; where there is no C library to link in, the usual kind.
LIBC := $(shell $(CC) -print-file-name=libc.a 2>/dev/null)
STATIC := $(if $(findstring /,$(LIBC)),-- -C target-feature=+crt-static)

build:
	scripts/compile.sh $(RELEASE) $(CARGO) rustc --release --locked --bin castra $(STATIC)

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
	$(CARGO) clippy --locked --test guests --test debian --test harness_codex -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --quiet
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --no-default-features --lib --quiet
	$(CARGO) clippy --locked --no-default-features --lib -- -D warnings

# Rewrites the golden files; review the diff.
bless:
	CASTRA_BLESS=1 $(CARGO) test --locked

demo:
	scripts/install-deps.sh run
	$(MAKE) build
	scripts/demo.sh $(RELEASE)

bench:
	scripts/install-deps.sh bench
	$(CARGO) build --release --locked --examples
	$(MAKE) build
	scripts/bench.sh $(RELEASE)

INSTALLED_BINARY = $(DESTDIR)$(PREFIX)/bin/castra
INSTALLED_MAN = $(DESTDIR)$(PREFIX)/share/man
# One for each command; a test holds that none is missing.
COMMANDS = bootstrap broker bus-bench bus-publish bus-request bus-subscribe bus-tail clean completions console cp doctor \
    down events exec harness-list harness-relay harness-run harness-show harness-usage image-build \
    image-list image-path init logs man ports report restart ssh ssh-config status up wait workspaces
PAGES = castra.1 $(COMMANDS:%=castra-%.1) castra.toml.5 \
    castra-doctor.7 castra-harness.7 castra-report.7 castra-security.7 castra-status.7
INSTALLED_PAGES = $(foreach page,$(PAGES),$(INSTALLED_MAN)/man$(subst .,,$(suffix $(page)))/$(page))
# docs/ as it is, for its pages link to each other, to the schema and to the examples.
INSTALLED_DOCS = $(DESTDIR)$(PREFIX)/share/doc/castra
DOCS := $(shell cd docs && find . -type f)
INSTALLED_BASH = $(DESTDIR)$(PREFIX)/share/bash-completion/completions/castra
INSTALLED_ZSH = $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_castra
INSTALLED_FISH = $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/castra.fish
INSTALLED = $(INSTALLED_BINARY) $(INSTALLED_PAGES) $(DOCS:./%=$(INSTALLED_DOCS)/%) \
    $(INSTALLED_BASH) $(INSTALLED_ZSH) $(INSTALLED_FISH)

ifeq ($(BINARY),$(RELEASE))
install: build
endif
install:
	install -d $(sort $(dir $(INSTALLED)))
	install -m 755 $(BINARY) $(INSTALLED_BINARY)
	pages=$$(mktemp -d) && trap 'rm -rf "$$pages"' EXIT && $(BINARY) --quiet man --dir "$$pages" && \
	    for page in $(PAGES); do \
	        install -m 644 "$$pages/$$page" "$(INSTALLED_MAN)/man$${page##*.}/$$page" || exit 1; \
	    done
	for file in $(DOCS:./%=%); do \
	    mode=644; [ ! -x "docs/$$file" ] || mode=755; \
	    install -m "$$mode" "docs/$$file" "$(INSTALLED_DOCS)/$$file" || exit 1; \
	done
	$(BINARY) completions bash > $(INSTALLED_BASH)
	$(BINARY) completions zsh > $(INSTALLED_ZSH)
	$(BINARY) completions fish > $(INSTALLED_FISH)
	chmod 644 $(INSTALLED_BASH) $(INSTALLED_ZSH) $(INSTALLED_FISH)

# What `install` has put there, and nothing else; of the directories castra's own, if nothing else is in them.
uninstall:
	rm -f $(INSTALLED)
	[ ! -d $(INSTALLED_DOCS) ] || find $(INSTALLED_DOCS) -depth -type d -empty -delete

clean:
	$(CARGO) clean
