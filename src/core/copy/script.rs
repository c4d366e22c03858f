//! What runs in the guest during a copy: two POSIX shell texts.
//!
//! Here: their wording. Not here: what is sent to them or comes from them (`send`, `receive`).
//!
//! Each line of an answer begins with a mark and has a line end before it, so that nothing that start-up files of a shell
//! print is taken for one.

use std::ffi::{OsStr, OsString};

/// What a single source is called until it is whole.
pub fn temporary(mark: &str) -> String {
    format!(".{mark}")
}

/// The command that unpacks what its stdin brings. It says `into` where the path is a folder, `as` where the one source
/// shall have the path as its name, then `end` and its exit code.
pub fn put(mark: &str, to: &OsStr, kind: &str) -> Vec<OsString> {
    let words = [
        OsStr::new("sh"),
        OsStr::new("-c"),
        OsStr::new(PUT),
        OsStr::new("sh"),
        OsStr::new(mark),
        to,
        OsStr::new(kind),
    ];
    words.map(OsStr::to_owned).to_vec()
}

/// The command that packs what the patterns mean: before each source `tar` or, where it is a folder without a name of
/// its own, `whole`, and the archive; then `end` and its exit code.
pub fn get(mark: &str, patterns: &[OsString]) -> Vec<OsString> {
    let mut words: Vec<OsString> = ["sh", "-c", GET, "sh", mark].map(OsString::from).to_vec();
    words.extend_from_slice(patterns);
    words
}

const PUT: &str = r#"
m=$1 d=$2 k=$3 t=.$1
say() { printf "\n%s\n" "$m $1"; }
no() { say no; printf "%s\n" "$1" >&2; exit 1; }
case $d in "~") d=$HOME;; "~/"*) d=$HOME/${d#"~/"};; "") d=.;; -*) d=./$d;; esac
command -v tar >/dev/null 2>&1 || no "the guest has no tar"
if [ -d "$d" ]; then
    say into
    (cd "$d" && exec tar -xpf -)
    c=$?
else
    case $k,$d in
        many,*) no "$d: several sources need an existing folder, and this isn't one in the guest";;
        *,*/) no "$d: no such folder in the guest";;
    esac
    [ ! -L "$d" ] || { r=$(readlink -f "$d") && d=$r; }
    [ "$k" = file ] || [ ! -e "$d" ] || no "$d: not a folder in the guest"
    case $d in */*) p=${d%/*};; *) p=.;; esac
    p=${p:-/}
    [ -d "$p" ] || no "$p: no such folder in the guest"
    trap 'rm -rf "$p/$t"' 0
    trap "exit 1" 1 2 13 15
    say as
    (cd "$p" && exec tar -xpf -) && mv -f "$p/$t" "$d"
    c=$?
fi
say "end $c"
exit $c
"#;

/// A word of which no file has the name may have had backslashes against wildcards.
const GET: &str = r#"
m=$1 rc=0 IFS=
shift
say() { printf "\n%s\n" "$m $1"; }
bad() { printf "%s\n" "$1" >&2; rc=1; }
there() { [ -e "$1" ] || [ -L "$1" ]; }
one() {
    f=$1
    while case $f in ?*/) ;; *) false;; esac; do f=${f%/}; done
    case $f in */*) d=${f%/*} b=${f##*/};; *) d=. b=$f;; esac
    d=${d:-/}
    if [ -d "$f" ]; then
        case $b in
            "" | . | ..)
                say whole
                (cd "$f" && exec tar -cf - .) || rc=1;;
            *)
                say tar
                (cd "$d" && exec tar -cf - "./$b/.") || rc=1;;
        esac
        [ -z "$(find "$f/" -type s 2>/dev/null | head -n 1)" ] || rc=1
    elif [ -f "$f" ]; then
        say tar
        (cd "$d" && exec tar -chf - "./$b") || rc=1
    elif [ -e "$f" ]; then
        bad "$f: neither file nor folder, left out"
    else
        bad "$f: no such file in the guest"
    fi
}
command -v tar >/dev/null 2>&1 || { say no; bad "the guest has no tar"; exit 1; }
for p; do
    case $p in "~") p=$HOME;; "~/"*) p=$HOME/${p#"~/"};; "") p=.;; -*) p=./$p;; esac
    for f in $p; do
        if ! there "$f"; then
            u=$(printf "%sx" "$f" | sed 's/\\\(.\)/\1/g')
            ! there "${u%x}" || f=${u%x}
        fi
        one "$f"
    done
done
say "end $rc"
exit $rc
"#;
