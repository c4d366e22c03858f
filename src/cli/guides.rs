//! The pages of docs/ that castra carries with it, because its messages and its help cite them.
//!
//! Here: which they are, and under what names `castra man` and man(1) know them. Whoever has the
//! binary alone has no docs/, so nothing that castra prints names a file in there: it says `castra
//! man PAGE`, for a page of this table or of a command. A test reads all of the source for it.
//! Not here: what makes them roff (`roff`).

use std::fmt::Write;

use super::roff::{escape, of_markdown};

/// A page of docs/.
pub struct Guide {
    /// As man(1) knows it.
    pub name: &'static str,
    /// The section of the manual: 5 is file formats, 7 is what belongs to no command.
    pub section: u8,
    about: &'static str,
    file: &'static str,
    text: &'static str,
}

const fn guide(name: &'static str, file: &'static str, text: &'static str, about: &'static str) -> Guide {
    Guide {
        name,
        section: 7,
        about,
        file,
        text,
    }
}

/// All of them.
pub const GUIDES: [Guide; 6] = [
    Guide {
        name: "castra.toml",
        section: 5,
        about: "a castra project: its VMs, and how they are treated",
        file: "CONFIG.md",
        text: include_str!("../../docs/CONFIG.md"),
    },
    guide(
        "castra-doctor",
        "DOCTOR.md",
        include_str!("../../docs/DOCTOR.md"),
        "what castra doctor checks",
    ),
    guide(
        "castra-harness",
        "HARNESS.md",
        include_str!("../../docs/HARNESS.md"),
        "a coding agent's stream as castra events",
    ),
    guide(
        "castra-report",
        "REPORT.md",
        include_str!("../../docs/REPORT.md"),
        "reports of the last runs",
    ),
    guide(
        "castra-security",
        "SECURITY.md",
        include_str!("../../docs/SECURITY.md"),
        "what a hostile guest can and can't do",
    ),
    guide(
        "castra-status",
        "STATUS.md",
        include_str!("../../docs/STATUS.md"),
        "what castra status says, and how to poll it",
    ),
];

/// The page that these words name: `castra.toml`, `security`, `castra-security`, `7 status`.
pub fn guide_named(words: &str) -> Option<&'static Guide> {
    let (section, name) = match words.split_once(' ') {
        Some((section, name)) => (Some(section.parse::<u8>().ok()?), name),
        None => (None, words),
    };
    GUIDES.iter().find(|guide| {
        section.is_none_or(|section| section == guide.section)
            && (guide.name == name || guide.name.strip_prefix("castra-") == Some(name))
    })
}

impl Guide {
    /// As pages cite each other: `castra.toml(5)`.
    pub fn citation(&self) -> String {
        format!("{}({})", self.name, self.section)
    }

    pub fn page(&self) -> String {
        let mut page = format!(
            ".TH {} {} \"\" \"castra {}\" \"{}\"\n.SH NAME\n{} \\- {}\n.SH DESCRIPTION\n",
            escape(&self.name.to_uppercase()),
            self.section,
            env!("CARGO_PKG_VERSION"),
            if self.section == 5 {
                "File Formats"
            } else {
                "Castra"
            },
            escape(self.name),
            escape(self.about)
        );
        let cited = |file: &str| {
            GUIDES
                .iter()
                .find(|guide| guide.file == file)
                .map(Guide::citation)
        };
        page.push_str(&of_markdown(self.text, &cited));
        let _ = writeln!(page, ".SH SEE ALSO\n.BR castra (1)");
        page
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::cli::manpage;
    use crate::cli::table::by_words;

    /// Calls this with each line of the source that isn't a comment's or a test's.
    fn each_line(dir: &Path, look: &mut dyn FnMut(&Path, &str)) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                each_line(&path, look);
            } else if (name.ends_with(".rs") || name.ends_with(".toml"))
                && !name.contains("tests")
                && name != "docs.rs"
            {
                let text = fs::read_to_string(&path).unwrap();
                let product = text.split("\nmod tests {").next().unwrap();
                let lines = product
                    .lines()
                    .filter(|line| !line.trim_start().starts_with("//"));
                lines.for_each(|line| look(&path, line));
            }
        }
    }

    #[test]
    fn what_castra_prints_cites_pages_that_it_carries() {
        let mut cited = 0;
        each_line(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            &mut |path, line| {
                let is_built_in = line.contains("include_str!") || line.contains("reason = ");
                assert!(
                    is_built_in || !(line.contains("docs/") && line.contains(".md")),
                    "{}: whoever has the binary alone has no docs/: {line}",
                    path.display()
                );
                for rest in line.split("`castra man ").skip(1) {
                    let words = rest.split('`').next().unwrap();
                    assert!(manpage(words).is_ok(), "{}: no page {words}", path.display());
                    cited += 1;
                }
            },
        );
        assert!(cited >= 6, "{cited}");
    }

    #[test]
    fn a_guide_is_found_by_its_names_and_its_section() {
        let found = |words: &str| guide_named(words).map(Guide::citation);
        for words in ["castra.toml", "5 castra.toml"] {
            assert_eq!(found(words).as_deref(), Some("castra.toml(5)"));
        }
        for words in ["status", "castra-status", "7 status", "7 castra-status"] {
            assert_eq!(found(words).as_deref(), Some("castra-status(7)"));
        }
        for words in ["", "7", "5 status", "1 status", "x status", "toml", "stat"] {
            assert_eq!(found(words), None, "{words}");
        }
        // A command has its page by its own words.
        assert!(manpage("status").unwrap().starts_with(".TH CASTRA\\-STATUS 1 "));
        assert!(
            manpage("1 bus tail")
                .unwrap()
                .starts_with(".TH CASTRA\\-BUS\\-TAIL 1 ")
        );
        assert!(manpage("7 status").unwrap().starts_with(".TH CASTRA\\-STATUS 7 "));
        assert!(manpage("castra.toml").unwrap().starts_with(".TH CASTRA.TOML 5 "));
        let manual = by_words("man").unwrap().manual;
        for guide in &GUIDES {
            assert!(
                manual.contains(&guide.citation()),
                "`castra man --help` says nothing of {}",
                guide.name
            );
        }
    }

    /// docs/CONFIG.md holds every key of the schema, which a test of `core::config` looks at.
    #[test]
    fn castra_toml_has_every_key_and_example_of_its_document() {
        let guide = guide_named("castra.toml").unwrap();
        let page = guide.page();
        let mut keys = 0;
        for line in guide.text.lines() {
            if let Some((key, _)) = line.strip_prefix("| `").and_then(|rest| rest.split_once('`')) {
                assert!(page.contains(&format!(".TP\n\\fB{}\\fR\n", escape(key))), "{key}");
                keys += 1;
            }
        }
        assert!(keys > 60, "{keys}");
        assert_eq!(
            page.matches(".nf\n").count(),
            guide.text.matches("\n```").count() / 2
        );
        assert!(
            !page.contains("](") && !page.contains("**") && !page.contains("\n|"),
            "{page}"
        );
    }
}
