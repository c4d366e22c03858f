//! Golden files: what a pure function yields, kept in `tests/golden/` and shown in review.
//! Compiled for tests only; `CASTRA_BLESS=1` rewrites the files.

use std::env;
use std::fs;
use std::path::Path;

/// Fails unless `text` is what `tests/golden/<name>` holds.
#[track_caller]
pub fn check(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if env::var_os("CASTRA_BLESS").is_some_and(|value| value == "1") {
        fs::create_dir_all(path.parent().expect("a golden file lies in a folder"))
            .expect("the folder can be made");
        fs::write(&path, text).expect("the golden file can be written");
        return;
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == text,
        "{} differs; review it after `CASTRA_BLESS=1 cargo test`\n--- kept\n{kept}\n--- now\n{text}",
        path.display()
    );
}
