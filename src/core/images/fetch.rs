//! Base images named by an https URL: fetched once with `curl` into the shared cache.
//!
//! Here: the cache's names, one download at a time per file, resuming, verifying. Not here:
//! whether the file is a disk image (`images::base`).
//!
//! ```text
//! $CASTRA_HOME/images/download/<id>-<name>        a whole image; never changes under its name
//!                              <id>-<name>.part   what has come so far; the next try goes on there
//!                              <id>-<name>.etag   the server's name for the version it is part of
//!                              <id>-<name>.lock   held by whoever fetches it
//! ```
//!
//! The id is a hash of URL and pinned digest, so a config that pins another digest gets another
//! file, and overlays over the earlier file keep their base.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::core::cancel::Cancel;
use crate::core::config::ImageDigest;
use crate::core::events::Severity;
use crate::core::events::stage::Stage;
use crate::core::failure::{Exit, Failure, Result};
use crate::core::host;
use crate::core::images::digest::{Algorithm, DigestCache, sha256_hex};
use crate::core::images::download_progress::{DownloadProgress, emit_progress, megabytes};
use crate::core::images::{image_message, images_dir, lock_or_wait};
use crate::core::process::{Job, JobError};
use crate::core::reporter::Emitter;
use crate::core::threads::{self, CancelOnDrop, is_out_of_resources};

/// A download fails when nothing has come for this long; the whole download may take any time.
const STALLED_SECS: &str = "60";
/// For a `curl` that doesn't observe that limit.
const DEADLINE: Duration = Duration::from_secs(24 * 3600);

/// The cache file of a URL's image, whether it exists yet or not.
pub fn cache_path(url: &str, digest: Option<&ImageDigest>, home: &Path) -> PathBuf {
    let pinned = digest.map_or("", |digest| Algorithm::of(digest).1);
    let id = &sha256_hex(format!("{url}\n{pinned}").as_bytes())[..12];
    let name: String = last_part(url)
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "._-".contains(*c))
        .take(64)
        .collect();
    images_dir(home).join("download").join(format!("{id}-{name}"))
}

fn last_part(url: &str) -> &str {
    without_query(url).rsplit('/').next().unwrap_or_default()
}

fn without_query(url: &str) -> &str {
    url.split(['?', '#']).next().unwrap_or(url)
}

/// A URL as it may be shown: user, password and query can be secrets.
pub fn shown(url: &str) -> String {
    let plain = without_query(url);
    match plain.split_once("://") {
        Some((scheme, rest)) => {
            let (host, path) = rest
                .split_once('/')
                .map_or((rest, None), |(host, path)| (host, Some(path)));
            let host = host.rsplit('@').next().unwrap_or(host);
            match path {
                Some(path) => format!("{scheme}://{host}/{path}"),
                None => format!("{scheme}://{host}"),
            }
        }
        None => plain.to_owned(),
    }
}

/// The image of a URL; fetches and verifies it if it isn't in the cache. A cached file whose digest
/// is not the pinned one is fetched again. Waits if another process is fetching the same file.
pub fn ensure_fetched(
    url: &str,
    digest: Option<&ImageDigest>,
    home: &Path,
    digests: &DigestCache,
    emitter: &Emitter<'_>,
    cancel: &Cancel,
) -> Result<PathBuf> {
    let download = Download {
        curl: "curl".into(),
        url,
        digest,
        path: cache_path(url, digest, home),
        digests,
        emitter,
        cancel,
    };
    download.ensure()
}

struct Download<'a, 'e> {
    curl: OsString,
    url: &'a str,
    digest: Option<&'a ImageDigest>,
    path: PathBuf,
    digests: &'a DigestCache,
    emitter: &'a Emitter<'e>,
    cancel: &'a Cancel,
}

/// The result of one run of `curl`.
enum Attempt {
    Complete,
    /// The earlier part can't be resumed.
    StartOver(String),
}

impl Download<'_, '_> {
    fn beside(&self, extension: &str) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_os_string();
        name.push(extension);
        self.path.with_file_name(name)
    }

    fn failed(&self, exit: Exit) -> Failure {
        Failure::new(exit, format!("can't fetch base image {}", shown(self.url)))
    }

    fn ensure(&self) -> Result<PathBuf> {
        if !self.url.starts_with("https://") {
            return Err(self
                .failed(Exit::Config)
                .because("it isn't an https URL, and anybody on the way could replace what another protocol fetches")
                .advice("use https, or fetch it yourself and name the file in `base_image`"));
        }
        if self.is_cached(false)? {
            return Ok(self.path.clone());
        }
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        host::ensure_private_dir(dir).map_err(|error| Failure::io("create", dir, &error))?;
        let doing = format!("fetches {}", shown(self.url));
        let _lock = lock_or_wait(&self.beside(".lock"), &doing, self.emitter, self.cancel)?;
        if !self.is_cached(true)? {
            self.fetch()?;
        }
        Ok(self.path.clone())
    }

    /// Whether the cache has the file with the pinned digest.
    fn is_cached(&self, tell: bool) -> Result<bool> {
        if !self.path.is_file() {
            return Ok(false);
        }
        let Some((algorithm, wanted)) = self.digest.map(Algorithm::of) else {
            return Ok(true);
        };
        let found = self.digests.digest(&self.path, algorithm, self.cancel)?;
        if found != wanted && tell {
            self.emitter.emit(image_message(
                Severity::Warn,
                format!(
                    "{} no longer has the {algorithm} it was fetched with: fetching it again",
                    self.path.display()
                ),
            ));
        }
        Ok(found == wanted)
    }

    /// Fetches into the `.part` file, verifies it, and renames it to its final name. The caller
    /// holds the lock.
    fn fetch(&self) -> Result<()> {
        let part = self.beside(".part");
        let began = Instant::now();
        let mut resume = self.resume_point(&part);
        loop {
            if resume.is_none() {
                self.forget(&part)?;
            }
            let outcome = match self.run_curl(&part, resume.as_ref())? {
                Attempt::Complete => self.verify(&part)?,
                over => over,
            };
            match outcome {
                Attempt::Complete => return self.publish(&part, began.elapsed()),
                // A version that changed on the server between two tries ends here too.
                Attempt::StartOver(why) if resume.take().is_some() => self.emitter.emit(image_message(
                    Severity::Warn,
                    format!(
                        "the partial download of {} can't be used ({why}): starting over",
                        shown(self.url)
                    ),
                )),
                Attempt::StartOver(why) => {
                    self.forget(&part)?;
                    return Err(self.failed(Exit::Config).because(why).advice(
                        "check the URL and the digest in castra.toml: one of the two is not what you mean",
                    ));
                }
            }
        }
    }

    fn forget(&self, part: &Path) -> Result<()> {
        for path in [part, &self.beside(".etag")] {
            host::remove_if_there(path).map_err(|error| Failure::io("remove", path, &error))?;
        }
        Ok(())
    }

    /// The offset to resume at. Without the server's tag of that version, only a pinned digest
    /// would detect a file joined from two versions.
    fn resume_point(&self, part: &Path) -> Option<Resume> {
        let offset = fs::metadata(part).ok()?.len();
        let etag = fs::read_to_string(self.beside(".etag")).ok();
        (offset > 0 && (etag.is_some() || self.digest.is_some())).then_some(Resume { offset, etag })
    }

    fn run_curl(&self, part: &Path, resume: Option<&Resume>) -> Result<Attempt> {
        let headers = self.beside(".headers");
        let done = Cancel::new();
        let ended = thread::scope(|scope| {
            let _end = CancelOnDrop(&done);
            // If no thread can be started, no progress is reported, and the fetch goes on.
            let _ = threads::spawn_scoped(scope, "progress", || {
                self.tell_progress(part, &headers, resume, &done);
            });
            Job::new(&self.curl)
                .args(curl_args(part, &headers, resume))
                // The URL and the tag go by stdin: a URL may hold a password, and argv is public.
                .stdin(curl_config(self.url, resume))
                .env("LC_ALL", "C")
                .deadline(DEADLINE)
                .cancel(self.cancel)
                .run()
        });
        let answer = Headers::load(&headers);
        let _ = host::remove_if_there(&headers);
        if let Some(etag) = &answer.strong_etag
            && part.exists()
        {
            let _ = host::replace_file(&self.beside(".etag"), etag.as_bytes());
        }
        let ended = match ended {
            Ok(_) => return Ok(Attempt::Complete),
            Err(JobError::Failed(ended)) => ended,
            Err(JobError::NotStarted { error, program }) if !is_out_of_resources(&error) => {
                let error = JobError::NotStarted { error, program };
                return Err(self.failed(Exit::Unavailable).because(error).advice(
                    "install it: `apt-get install curl`; or fetch the image yourself and name the file in `base_image`",
                ));
            }
            Err(error) => return Err(error.into_failure(self.failed(Exit::Io).what, Exit::Io)),
        };
        let words = match ended.stderr_tail.trim() {
            "" => format!(
                "curl ended with {}",
                crate::core::process::show_status(ended.status)
            ),
            text => text.to_owned(),
        };
        // 22: an HTTP error, such as 416 for a range beyond the end; 33 and 36: no ranges there.
        if resume.is_some() && matches!(ended.status.code(), Some(22 | 33 | 36)) {
            return Ok(Attempt::StartOver(words));
        }
        let next = match ended.status.code() {
            Some(1 | 3) => "every address on the way must be https",
            Some(22) => "check the URL in castra.toml",
            Some(23) => "free some space under CASTRA_HOME, then run it again: it goes on where it stopped",
            Some(60 | 77) => {
                "check the clock and the CA certificates of this host (`apt-get install ca-certificates`)"
            }
            _ => "check the network, then run it again: it goes on where it stopped",
        };
        Err(self.failed(Exit::Io).because(words).advice(next))
    }

    /// Reports the progress until `done`.
    fn tell_progress(&self, part: &Path, headers: &Path, resume: Option<&Resume>, done: &Cancel) {
        let before = resume.map_or(0, |resume| resume.offset);
        emit_progress(self.emitter, done, || {
            Some(DownloadProgress {
                what: format!("fetching {}", shown(self.url)),
                label: format!("fetching {}", last_part(self.url)),
                bytes: fs::metadata(part).map_or(0, |meta| meta.len()),
                total: Headers::load(headers).length.map(|length| length + before),
            })
        });
    }

    fn verify(&self, part: &Path) -> Result<Attempt> {
        let Some((algorithm, wanted)) = self.digest.map(Algorithm::of) else {
            return Ok(Attempt::Complete);
        };
        self.emitter.emit(image_message(
            Severity::Progress,
            format!("verifying the {algorithm} of {}", shown(self.url)),
        ));
        let found = self.digests.digest(part, algorithm, self.cancel)?;
        if found == wanted {
            return Ok(Attempt::Complete);
        }
        Ok(Attempt::StartOver(format!(
            "its {algorithm} is {found}, but castra.toml pins {wanted}"
        )))
    }

    fn publish(&self, part: &Path, took: Duration) -> Result<()> {
        fs::set_permissions(part, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(part, &self.path))
            .map_err(|error| Failure::io("create", &self.path, &error))?;
        self.digests.renamed(part, &self.path);
        self.forget(part)?;
        let bytes = fs::metadata(&self.path).map_or(0, |meta| meta.len());
        let text = format!("fetched {} ({})", shown(self.url), megabytes(bytes));
        self.emitter
            .emit(Stage::ImageFetch.end(took, image_message(Severity::Info, text)));
        Ok(())
    }
}

/// Where an earlier attempt stopped.
#[derive(Clone, Debug)]
struct Resume {
    offset: u64,
    etag: Option<String>,
}

/// The part of `curl`'s command line that other users may see.
fn curl_args(part: &Path, headers: &Path, resume: Option<&Resume>) -> Vec<OsString> {
    let mut args: Vec<OsString> = [
        "--fail",
        "--location",
        "--max-redirs",
        "10",
        "--proto",
        "=https",
        "--proto-redir",
        "=https",
        "--globoff",
        "--silent",
        "--show-error",
        "--connect-timeout",
        "30",
        "--speed-limit",
        "1",
        "--speed-time",
        STALLED_SECS,
    ]
    .map(OsString::from)
    .to_vec();
    args.extend([
        "--dump-header".into(),
        headers.into(),
        "--output".into(),
        part.into(),
    ]);
    if let Some(resume) = resume {
        args.extend(["--continue-at".into(), resume.offset.to_string().into()]);
    }
    args.extend(["--config".into(), "-".into()]);
    args
}

/// The rest, in the syntax of a curl config file.
fn curl_config(url: &str, resume: Option<&Resume>) -> String {
    let quoted = |text: &str| {
        text.replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace(['\n', '\r'], "")
    };
    let mut config = format!("url = \"{}\"\n", quoted(url));
    if let Some(etag) = resume.and_then(|resume| resume.etag.as_ref()) {
        // The server then sends the rest of that version, or else all of the new one.
        config.push_str(&format!("header = \"If-Range: {}\"\n", quoted(etag)));
    }
    config
}

/// The headers that castra reads of the last HTTP response, after redirects.
#[derive(Debug, Default, PartialEq, Eq)]
struct Headers {
    length: Option<u64>,
    strong_etag: Option<String>,
}

impl Headers {
    fn load(path: &Path) -> Headers {
        Headers::parse(&host::tail_of(path, 65536))
    }

    fn parse(text: &str) -> Headers {
        let mut headers = Headers::default();
        for line in text.lines() {
            if line.starts_with("HTTP/") {
                headers = Headers::default();
            }
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "content-length" => headers.length = value.parse().ok(),
                // A weak tag (`W/"…"`) promises the same meaning, not the same bytes.
                "etag" if value.starts_with('"') && value.len() <= 256 => {
                    headers.strong_etag = Some(value.to_owned())
                }
                _ => {}
            }
        }
        headers
    }
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
mod tests;
