//! Downloads, with a stand-in `curl` that serves files of a directory and knows ranges.

use std::cell::Cell;

use super::*;
use crate::core::events::Event;
use crate::core::events::contract::Stamped;
use crate::core::scratch::Scratch;

/// Serves `$site/body`, with `$site/etag` as its tag. `$site/cut`: the connection breaks after that
/// many bytes, once. `$site/norange`: no ranges. Keeps argv and the config it was given.
const CURL: &str = r#"#!/bin/sh
site=@SITE@
echo x >>"$site/runs"
echo "$@" >"$site/argv"
cat >"$site/config"
offset=''
while [ $# -gt 0 ]; do
    case $1 in
    --dump-header) headers=$2 ;;
    --output) out=$2 ;;
    --continue-at) offset=$2 ;;
    esac
    shift
done
[ ! -e "$site/fail" ] || { echo "curl: (6) Could not resolve host" >&2; exit 6; }
[ -e "$site/body" ] || { echo "curl: (22) The requested URL returned error: 404" >&2; exit 22; }
etag=$(cat "$site/etag" 2>/dev/null)
if [ -n "$offset" ]; then
    asked=$(sed -n 's/^header = "If-Range: \(.*\)"$/\1/p' "$site/config" | tr -d '\\')
    if [ -e "$site/norange" ] || { [ -n "$asked" ] && [ "$asked" != "$etag" ]; }; then
        echo "curl: (33) HTTP server doesn't seem to support byte ranges. Cannot resume." >&2
        exit 33
    fi
    printf 'HTTP/2 206\r\nETag: %s\r\n\r\n' "$etag" >"$headers"
    tail -c +$((offset + 1)) "$site/body" >>"$out"
else
    printf 'HTTP/2 302\r\nETag: "moved"\r\n\r\nHTTP/2 200\r\nETag: %s\r\n\r\n' "$etag" >"$headers"
    if [ -e "$site/cut" ]; then
        head -c "$(cat "$site/cut")" "$site/body" >"$out"
        rm "$site/cut"
        echo "curl: (18) transfer closed with outstanding read data remaining" >&2
        exit 18
    fi
    cat "$site/body" >"$out"
fi
"#;

const URL: &str = "https://user:secret@images.example/debian 12.qcow2?key=secret";
const BODY: &str = "the whole image";

struct Site {
    scratch: Scratch,
    runs: Cell<usize>,
}

impl Site {
    fn new(label: &str) -> Site {
        let scratch = Scratch::new(label);
        let script = CURL.replace("@SITE@", scratch.dir().to_str().unwrap());
        fs::write(scratch.path("curl"), script).unwrap();
        fs::set_permissions(scratch.path("curl"), fs::Permissions::from_mode(0o755)).unwrap();
        let site = Site {
            scratch,
            runs: Cell::new(0),
        };
        site.put("body", BODY);
        site.put("etag", "\"one\"");
        site
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.scratch.path(name), text).unwrap();
    }

    fn get(&self, name: &str) -> String {
        fs::read_to_string(self.scratch.path(name)).unwrap()
    }

    fn fetch(&self, digest: Option<&ImageDigest>) -> (Result<PathBuf>, Vec<String>) {
        let mut seen: Vec<Stamped> = Vec::new();
        let emitter = Emitter::new(&mut seen);
        let result = Download {
            curl: self.scratch.path("curl").into(),
            url: URL,
            digest,
            path: cache_path(URL, digest, self.scratch.dir()),
            digests: &DigestCache::new(self.scratch.path("state/images")),
            emitter: &emitter,
            cancel: &Cancel::new(),
        }
        .ensure();
        drop(emitter);
        let texts = seen
            .into_iter()
            .filter_map(|stamped| match stamped.event {
                Event::Message { severity, text, .. } => Some(format!("{severity:?} {text}")),
                _ => None,
            })
            .collect();
        (result, texts)
    }

    /// Fetches, and says how often curl ran for it.
    fn fetched(&self, digest: Option<&ImageDigest>) -> (String, usize) {
        let path = self.fetch(digest).0.unwrap();
        (fs::read_to_string(path).unwrap(), self.new_runs())
    }

    fn refused(&self, digest: Option<&ImageDigest>, exit: Exit, why: &str) -> Failure {
        let failure = self.fetch(digest).0.unwrap_err();
        assert_eq!(failure.exit, exit, "{failure}");
        assert!(failure.why.clone().unwrap().contains(why), "{failure}");
        assert!(!failure.to_string().contains("secret"), "{failure}");
        failure
    }

    fn new_runs(&self) -> usize {
        let runs = fs::read_to_string(self.scratch.path("runs"))
            .unwrap_or_default()
            .lines()
            .count();
        runs - self.runs.replace(runs)
    }

    fn cached(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.scratch.path("images/download"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .map(|name| name[13..].to_owned())
            .collect();
        names.sort();
        names
    }
}

fn sha256(text: &str) -> ImageDigest {
    ImageDigest::Sha256(sha256_hex(text.as_bytes()))
}

#[test]
fn fetched_once_then_found() {
    let site = Site::new("fetch");
    let (result, said) = site.fetch(None);
    let path = result.unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), BODY);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        said,
        ["Info fetched https://images.example/debian 12.qcow2 (0.0 MB)"]
    );
    assert_eq!(site.new_runs(), 1);
    assert_eq!(site.fetched(None), (BODY.to_owned(), 0));
    assert_eq!(site.cached(), ["debian12.qcow2", "debian12.qcow2.lock"]);
    assert!(site.get("argv").contains("--proto =https --proto-redir =https"));
    assert!(!site.get("argv").contains("secret"), "argv is public");
    assert_eq!(site.get("config"), format!("url = \"{URL}\"\n"));
}

#[test]
fn a_pinned_digest_decides() {
    let site = Site::new("fetch-digest");
    let right = sha256(BODY);
    assert_eq!(site.fetched(Some(&right)), (BODY.to_owned(), 1));
    assert_eq!(site.fetched(Some(&right)), (BODY.to_owned(), 0));
    // Another pinned digest is another file: it is fetched, found wrong, and nothing of it stays.
    let wrong = sha256("something else");
    let failure = site.refused(Some(&wrong), Exit::Config, "but castra.toml pins");
    assert!(failure.why.unwrap().contains(Algorithm::of(&right).1));
    assert_eq!(site.new_runs(), 1);
    assert_eq!(site.fetched(Some(&right)), (BODY.to_owned(), 0));
    assert_eq!(
        site.cached(),
        ["debian12.qcow2", "debian12.qcow2.lock", "debian12.qcow2.lock"]
    );
    // The server has a new version and the config pins it: both lie in the cache.
    site.put("body", "something else");
    assert_eq!(site.fetched(Some(&wrong)), ("something else".to_owned(), 1));
    assert_eq!(site.fetched(Some(&right)), (BODY.to_owned(), 0));
}

#[test]
fn a_cached_file_that_changed_is_fetched_again() {
    let site = Site::new("fetch-rot");
    let pinned = sha256(BODY);
    let path = site.fetch(Some(&pinned)).0.unwrap();
    fs::write(&path, "rot").unwrap();
    let (result, said) = site.fetch(Some(&pinned));
    assert_eq!(fs::read_to_string(result.unwrap()).unwrap(), BODY);
    assert!(
        said[0].starts_with("Warn ") && said[0].contains("fetching it again"),
        "{said:?}"
    );
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let site = Site::new("fetch-resume");
    site.put("cut", "5");
    let failure = site.refused(None, Exit::Io, "(18)");
    assert!(failure.next.unwrap().contains("goes on where it stopped"));
    assert_eq!(
        site.cached(),
        [
            "debian12.qcow2.etag",
            "debian12.qcow2.lock",
            "debian12.qcow2.part"
        ]
    );
    assert_eq!(site.new_runs(), 1);
    assert_eq!(site.fetched(None), (BODY.to_owned(), 1));
    assert!(site.get("argv").contains("--continue-at 5"));
    assert!(
        site.get("config")
            .contains("header = \"If-Range: \\\"one\\\"\"\n"),
        "{}",
        site.get("config")
    );
    assert_eq!(site.cached(), ["debian12.qcow2", "debian12.qcow2.lock"]);
}

#[test]
fn a_new_version_on_the_server_starts_over() {
    let site = Site::new("fetch-version");
    site.put("cut", "5");
    site.refused(None, Exit::Io, "(18)");
    site.put("body", "another image");
    site.put("etag", "\"two\"");
    let (result, said) = site.fetch(None);
    assert_eq!(fs::read_to_string(result.unwrap()).unwrap(), "another image");
    assert!(
        said[0].starts_with("Warn ") && said[0].contains("starting over"),
        "{said:?}"
    );
    assert_eq!(site.new_runs(), 3);
}

#[test]
fn without_a_tag_only_a_digest_lets_it_go_on() {
    let site = Site::new("fetch-no-tag");
    // A weak tag promises the same meaning, not the same bytes.
    site.put("etag", "W/\"one\"");
    site.put("cut", "5");
    site.refused(None, Exit::Io, "(18)");
    assert_eq!(site.fetched(None).0, BODY);
    assert!(
        !site.get("argv").contains("--continue-at"),
        "nothing would tell two versions glued together"
    );

    let pinned = sha256(BODY);
    site.put("cut", "5");
    site.refused(Some(&pinned), Exit::Io, "(18)");
    site.new_runs();
    assert_eq!(site.fetched(Some(&pinned)), (BODY.to_owned(), 1));
    assert!(site.get("argv").contains("--continue-at 5"));
}

#[test]
fn glued_versions_are_found_out_and_fetched_whole() {
    let site = Site::new("fetch-glued");
    fs::remove_file(site.scratch.path("etag")).unwrap();
    let pinned = sha256("another image");
    site.put("cut", "5");
    site.refused(Some(&pinned), Exit::Io, "(18)");
    site.put("body", "another image");
    site.new_runs();
    assert_eq!(site.fetched(Some(&pinned)), ("another image".to_owned(), 2));
}

#[test]
fn failures_say_what_to_do() {
    let site = Site::new("fetch-fail");
    site.put("fail", "");
    assert!(
        site.refused(None, Exit::Io, "(6)")
            .next
            .unwrap()
            .contains("check the network")
    );
    fs::remove_file(site.scratch.path("fail")).unwrap();
    fs::remove_file(site.scratch.path("body")).unwrap();
    assert!(
        site.refused(None, Exit::Io, "404")
            .next
            .unwrap()
            .contains("check the URL")
    );
    fs::remove_file(site.scratch.path("curl")).unwrap();
    assert!(
        site.refused(None, Exit::Unavailable, "curl")
            .next
            .unwrap()
            .contains("apt-get install curl")
    );
}

#[test]
fn only_https_is_fetched() {
    let mut silent = crate::core::reporter::Silent;
    let scratch = Scratch::new("fetch-http");
    let failure = ensure_fetched(
        "http://images.example/a.qcow2",
        None,
        scratch.dir(),
        &DigestCache::new(scratch.path("state")),
        &Emitter::new(&mut silent),
        &Cancel::new(),
    )
    .unwrap_err();
    assert_eq!(failure.exit, Exit::Config);
}

#[test]
fn who_fetches_the_same_is_waited_for() {
    let site = Site::new("fetch-lock");
    let path = cache_path(URL, None, site.scratch.dir());
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut lock_path = path.clone().into_os_string();
    lock_path.push(".lock");
    let lock = host::FileLock::try_take(Path::new(&lock_path), "fetches it").unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut silent = crate::core::reporter::Silent;
            let (digests, cancel) = (DigestCache::new(site.scratch.path("state")), Cancel::new());
            ensure_fetched(
                URL,
                None,
                site.scratch.dir(),
                &digests,
                &Emitter::new(&mut silent),
                &cancel,
            )
        });
        fs::write(&path, "fetched by another").unwrap();
        drop(lock);
        assert_eq!(waiting.join().unwrap().unwrap(), path);
    });
    assert_eq!(site.new_runs(), 0);
}

#[test]
fn urls_are_shown_without_secrets() {
    for (url, said) in [
        (URL, "https://images.example/debian 12.qcow2"),
        ("https://a.example", "https://a.example"),
        ("https://a.example/@x/y#z", "https://a.example/@x/y"),
    ] {
        assert_eq!(shown(url), said);
    }
}

#[test]
fn headers_of_the_last_answer_count() {
    let text = "HTTP/1.1 302 Found\r\nContent-Length: 5\r\nETag: \"a\"\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 77\r\n\r\n";
    let expected = Headers {
        length: Some(77),
        strong_etag: None,
    };
    assert_eq!(Headers::parse(text), expected);
    assert_eq!(
        Headers::parse("etag: \"b\"\n").strong_etag.as_deref(),
        Some("\"b\"")
    );
    assert_eq!(Headers::parse("etag: W/\"b\"\n"), Headers::default());
}
