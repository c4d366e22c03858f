//! Paths written in a config file, made absolute.
//!
//! Here: relative paths start at the file's directory, `~/` at the user's home. Not here: whether
//! anything is there (the preflight of `up` looks), or the paths of the state root (`core::root::paths`).

use std::path::{Component, Path, PathBuf};

use super::reader::Located;
use super::source::Source;

/// Where relative paths start.
#[derive(Clone, Debug)]
pub(super) struct PathBases {
    /// The directory of the file, absolute.
    pub(super) dir: PathBuf,
    /// The user's home.
    pub(super) home: Option<PathBuf>,
}

impl PathBases {
    /// The absolute form of a path, with `.` and `..` resolved by the text alone, because the path
    /// may not exist yet.
    pub(super) fn resolve(&self, source: &Source, path: Located<String>) -> Option<PathBuf> {
        let (text, path_at) = (path.value.as_str(), path.at);
        let expanded = match text.strip_prefix("~/").or((text == "~").then_some("")) {
            None => self.dir.join(text),
            Some(rest) => match &self.home {
                Some(home) => home.join(rest),
                None => {
                    source.error(
                        path.at,
                        format!("`{text}` starts at the home directory, and HOME isn't set"),
                        "set HOME or write the whole path",
                    );
                    return None;
                }
            },
        };
        let path = tidy(&expanded);
        if path.to_str().is_none() {
            source.error(
                path_at,
                format!("`{text}` leads to {}, which is no UTF-8", path.display()),
                "use a place whose whole path is UTF-8",
            );
            return None;
        }
        Some(path)
    }
}

/// Removes `.` and `..` where the text suffices. After a symbolic link, the kernel takes `..` for
/// another directory than the text does, so an existing path keeps its `..`.
pub(super) fn tidy(path: &Path) -> PathBuf {
    let mut tidy = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if !tidy.is_symlink() && !tidy.ends_with("..") => {
                tidy.pop();
            }
            other => tidy.push(other),
        }
    }
    tidy
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_start_where_they_should() {
        let bases = PathBases {
            dir: "/project/sub".into(),
            home: Some("/home/somebody".into()),
        };
        let source = Source::new("castra.toml", "");
        for (text, path) in [
            ("images/a.qcow2", "/project/sub/images/a.qcow2"),
            ("./a", "/project/sub/a"),
            ("../a", "/project/a"),
            ("../../../../a", "/a"),
            ("/abs/./a", "/abs/a"),
            ("~/a", "/home/somebody/a"),
            ("~", "/home/somebody"),
            ("~user/a", "/project/sub/~user/a"),
            (".", "/project/sub"),
        ] {
            let at = Located {
                value: text.to_owned(),
                at: 0,
            };
            assert_eq!(bases.resolve(&source, at), Some(PathBuf::from(path)), "{text}");
        }
        assert!(source.check().is_ok());
        let homeless = PathBases { home: None, ..bases };
        let at = Located {
            value: "~/a".to_owned(),
            at: 0,
        };
        assert_eq!(homeless.resolve(&source, at), None);
        assert!(source.check().is_err());
    }
}
