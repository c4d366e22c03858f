#!/bin/sh
# build-guest.sh: makes castra's default guest from the packages of the Debian or Ubuntu it runs on.
#
# Here: finding, fetching and unpacking packages, choosing kernel modules and libraries, packing the initramfs.
# Not here: what the guest does once it runs; that is in the files beside this script, in `guest/`.
#
# castra carries this script and those files inside its binary and runs them from a temporary directory, so it
# depends on nothing else of the source tree. It needs no root and reaches nothing but the package mirror. The
# same packages give the same bytes: sorted archive, one fixed time, owner 0:0, no trace of when or where.

# Backticks in messages and programs for awk are meant as they stand.
# shellcheck disable=SC2016

set -eu
umask 022
LC_ALL=C
export LC_ALL

usage() {
    cat <<'EOF'
usage: build-guest.sh --output DIR [--source DIR] [--arch NAME] [--mounts] [--built-by TEXT]

Makes castra's default guest: a kernel, DIR/initramfs.cpio and DIR/manifest.json. DIR appears complete or
not at all; a guest that is there already is replaced.

  --output DIR     where the guest goes
  --source DIR     the files that become part of the guest; default: guest/ beside this script
  --arch NAME      x86_64 (kernel: DIR/vmlinux) or aarch64 (DIR/Image); default: this host's
  --mounts         use a kernel that can mount folders of the host (9p). Debian's small one for virtual machines
                   can't: with it a guest is up 0.2 s sooner and takes 35 MB less, so it is the default.
                   "mounts" in the manifest says whether this guest can, "plain" whether it is also as good as
                   the one made without --mounts
  --built-by TEXT  what the manifest says in "built_by"; default: castra
  --help           this text

Needs a Debian or Ubuntu (or a distribution made from one) with its package mirror in reach; no root. What
runs at the build is the host's own, so the host may be of another architecture than the guest.
Progress goes to stderr, one line a step.

exit codes: 0 done; 64 wrong usage; 69 a host tool or the distribution is not there; 74 a download or a file
failed; 129, 130, 143 ended by that signal (128 + its number)
EOF
}

say() { printf '%s\n' "guest: $*" >&2; }
# A failure in castra's form: what, why, what next.
fail() {
    code=$1
    printf 'error: %s\n' "$2" >&2
    [ -z "${3:-}" ] || printf '  because: %s\n' "$3" >&2
    [ -z "${4:-}" ] || printf '  try: %s\n' "$4" >&2
    exit "$code"
}
have() { command -v "$1" >/dev/null 2>&1; }

output='' built_by=castra mounts=no arch=$(uname -m)
source=$(dirname "$0")/guest
while [ $# -gt 0 ]; do
    case $1 in
    --output | --source | --arch | --built-by)
        [ $# -ge 2 ] || fail 64 "$1 needs a value" '' 'build-guest.sh --help'
        case $1 in
        --output) output=$2 ;;
        --source) source=$2 ;;
        --arch) arch=$2 ;;
        --built-by) built_by=$2 ;;
        esac
        shift
        ;;
    --mounts) mounts=yes ;;
    --help | -h)
        usage
        exit 0
        ;;
    *) fail 64 "unknown argument: $1" '' 'build-guest.sh --help' ;;
    esac
    shift
done
[ -n "$output" ] || fail 64 'no --output DIR was given' '' 'build-guest.sh --help'
case $built_by in *[!A-Za-z0-9\ ._+~:-]*) fail 64 "--built-by holds more than letters, digits and spaces: $built_by" ;; esac
case $output in /*) ;; *) output=$PWD/$output ;; esac
output=${output%/}
case $source in /*) ;; *) source=$PWD/$source ;; esac

# From the repository these are all files of guest/; castra writes the same set.
guest_files='acpid castra-bus castra-hello castra-port-aarch64 castra-port-x86_64 hello inittab late power profile rcS sshd sshd_config template'
for file in $guest_files; do
    [ -f "$source/$file" ] || fail 64 "$source/$file is missing" 'the guest is made from it' 'give --source a complete directory'
done
if [ -e "$output" ] && [ ! -e "$output/manifest.json" ] && [ -n "$(ls -A "$output" 2>/dev/null || echo file)" ]; then
    fail 64 "$output exists and holds no guest" 'it would have to be deleted' 'name another directory'
fi

# --- can it work here at all? -------------------------------------------------------------------

elsewhere='set `base_image` in castra.toml to a disk image of yours; then no guest has to be built'
# What depends on the architecture; castra's own table is src/core/arch.rs. In the command line, panic=-1: a panic ends
# the guest at once, after its message. The others only make it quicker under emulation: nr_uarts: no probing for serial
# ports that aren't there. notests (0.35 s): the kernel doesn't test its ciphers at each boot. noreplace-smp (0.2 s): with
# one CPU, lock prefixes stay in the code instead of being patched out. init_on_alloc=0 (0.2 s): the kernel doesn't also
# clear the memory that it is about to fill.
case $arch in
x86_64)
    debian=amd64 console=ttyS0 kernel_file=vmlinux loader_path=lib64/ld-linux-x86-64.so.2 power_button=yes
    cmdline="console=$console quiet panic=-1 8250.nr_uarts=1 cryptomgr.notests noreplace-smp init_on_alloc=0"
    ;;
aarch64)
    debian=arm64 console=ttyAMA0 kernel_file=Image loader_path=lib/ld-linux-aarch64.so.1 power_button=''
    cmdline="console=$console quiet panic=-1 cryptomgr.notests init_on_alloc=0"
    [ "$mounts" = no ] || fail 69 "the default guest for aarch64 can't mount directories of the host" \
        "its kernel, Debian's for cloud images, has no 9p" 'build it without --mounts'
    ;;
*) fail 69 "the default guest can't be built for $arch" 'it is made for x86_64 and aarch64' "$elsewhere" ;;
esac
triplet=$arch-linux-gnu

if ! have apt-get || ! have apt-cache || ! have dpkg-deb; then
    fail 69 "the default guest can't be built on this system" \
        'it is put together from Debian or Ubuntu packages, and apt-get, apt-cache and dpkg-deb are not all here' "$elsewhere"
fi
missing_tools='' missing_packages=''
need() {
    have "$1" && return
    missing_tools="$missing_tools $1"
    case " $missing_packages " in *" $2 "*) ;; *) missing_packages="$missing_packages $2" ;; esac
}
for tool in cat chmod cp dirname head ln ls mkdir mktemp mv od rm sort tail tr wc; do need "$tool" coreutils; done
need find findutils
need sed sed
need grep grep
need gzip gzip
need tar tar
[ -z "$missing_tools" ] || fail 69 "the default guest can't be built: not found:$missing_tools" \
    'the build uses them' "apt-get install$missing_packages"

# --- a place to work ----------------------------------------------------------------------------

parent=$(dirname "$output")
mkdir -p "$parent" 2>/dev/null || fail 74 "$parent can't be made" '' 'check its permissions, or give another --output'
# Left behind by a build that was killed outright; the number in the name is its process id.
for old in "$parent"/.castra-guest.*; do
    pid=${old##*/.castra-guest.}
    pid=${pid%%.*}
    case $pid in *[!0-9]* | '') continue ;; esac
    [ -d "/proc/$pid" ] || rm -rf "$old"
done
work=$(mktemp -d "$parent/.castra-guest.$$.XXXXXX" 2>/dev/null) ||
    fail 74 "no temporary directory can be made in $parent" '' 'check its permissions and free space, or give another --output'
clean_up() { rm -rf "$work"; }
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
log=$work/log
pkg=$work/pkg   # packages, unpacked
root=$work/root # what becomes the initramfs
out=$work/out   # what becomes $output
# Tools are for the build alone: only what lies in debs is part of the guest and of its manifest.
mkdir "$pkg" "$root" "$out" "$work/debs" "$work/tools"

# Runs a step whose failure means disk or download; its last words are shown.
must() {
    what=$1
    shift
    if ! "$@" >>"$log" 2>&1; then
        fail 74 "$what failed" "$(tail -n 3 "$log" | tr '\n' ' ')" 'check the network, the package mirror and free disk space, then run it again'
    fi
}

# --- packages -----------------------------------------------------------------------------------
# The host's own package state decides nothing: installed versions are hidden behind an empty status file, and apt's
# cache is private. The host's package lists are used as they are as long as they serve; where there are none,
# or they name files that the mirror has dropped, fresh ones are fetched into the work directory.

mkdir -p "$work/apt/state/lists/partial" "$work/apt/cache/archives/partial"
: >"$work/apt/status"
lists=host
host_debian=$(dpkg --print-architecture)
apt() {
    program=$1
    shift
    if [ "$lists" = private ]; then
        set -- -o "Dir::State=$work/apt/state" -o "Dir::State::lists=$work/apt/state/lists" "$@"
    fi
    # A guest of another architecture: apt takes that for the host's, whose own comes second, by names with a suffix.
    # APT::Sandbox::User: root's apt would switch to a user who can't write here, and warn.
    "$program" -o "APT::Architecture=$debian" -o "APT::Architectures=$debian,$host_debian" -o "Dir::State::status=$work/apt/status" -o "Dir::Cache=$work/apt/cache" \
        -o Dir::Cache::pkgcache=pkgcache.bin -o Dir::Cache::srcpkgcache=srcpkgcache.bin -o "APT::Sandbox::User=root" \
        -o Debug::NoLocking=1 -o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o Acquire::https::Timeout=30 "$@"
}

fetch_lists() {
    say 'fetching fresh package lists'
    lists=private
    # Only the package indexes: no translations, no Contents, no icons. A third-party source that fails is none of
    # our business, so the exit code says nothing; what counts is whether the packages are found afterwards.
    apt apt-get -o Acquire::Languages=none \
        -o Acquire::IndexTargets::deb-src::Sources::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::CNF::DefaultEnabled=false \
        update >>"$log" 2>&1 || :
}

# Names that $@ depend on, candidates of the lists, alternatives included, virtual packages left out.
depends_of() {
    apt apt-cache depends --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances "$@" 2>/dev/null |
        sed -n 's/^[ |]*\(Pre\)\{0,1\}Depends: \([^<:]*\).*/\2/p' | sort -u
}

# What $@ reach over dependencies whose names match the pattern $1, themselves not included.
closure() {
    pattern=$1
    shift
    known=' '
    while [ $# -gt 0 ]; do
        next=''
        for name in $(depends_of "$@"); do
            printf '%s\n' "$name" | grep -Eq "$pattern" || continue
            case $known in *" $name "*) continue ;; esac
            known="$known$name "
            next="$next $name"
        done
        # Split on purpose: package names.
        # shellcheck disable=SC2086
        set -- $next
    done
    printf '%s\n' "$known"
}

# Small kernels for virtual machines first, then the distribution's usual one.
kernel_candidates="linux-image-cloud-$debian linux-image-virtual linux-image-$debian linux-image-generic"
[ "$mounts" = no ] || kernel_candidates="linux-image-$debian linux-image-virtual linux-image-generic"
programs='busybox-static openssh-server e2fsprogs'
# Of this only scp, which clients before OpenSSH 9 expect in a guest, and ssh-keygen are taken; they need no library that
# the server doesn't.
client_package=openssh-client

# Sets `packages` to everything to be fetched.
resolve() {
    for candidate in $kernel_candidates; do
        # The metapackage names the kernel of today; newer distributions keep modules in a package of their own.
        kernel_packages=$(closure '^linux-(image|modules|binary)-[0-9]' "$candidate")
        [ "$kernel_packages" = ' ' ] || break
    done
    [ "$kernel_packages" != ' ' ] || return 1
    # Not all libraries that packages depend on are needed by the programs we take; that is seen later.
    # shellcheck disable=SC2086
    libraries=$(closure '^(lib|zlib1g)' $programs)
    # The guest's SSH server asks no PAM module: it lets in who has the key.
    libraries=$(for name in $libraries; do case $name in libpam-*) ;; *) echo "$name" ;; esac done)
    # Where there is no smaller kernel without 9p, the guest with mounts is the only one there is.
    plain=true
    [ "$mounts" = no ] || [ "$(closure '^linux-image-[0-9]' "linux-image-cloud-$debian")" = ' ' ] || plain=false
    printf '%s\n' "$libraries" | grep -qx libc6 || return 1
    kernel_packages=$(for name in $kernel_packages; do case $name in linux-modules-extra-*) ;; *) echo "$name" ;; esac done)
    packages="$kernel_packages $programs $client_package $libraries"
}

# Fetches package $1 into the directory $2 of $work.
fetch() {
    say "fetching $1"
    (cd "$work/$2" && apt apt-get download "$1") >>"$log" 2>&1
}
# All at once: apt takes a while to start. castra reads from this line what to show a bar of.
fetch_all() {
    # shellcheck disable=SC2086
    set -- $packages
    bytes=$(cd "$work/debs" && apt apt-get download --print-uris "$@" 2>/dev/null | {
        sum=0
        while read -r _ _ size _; do
            case $size in *[!0-9]* | '') ;; *) sum=$((sum + size)) ;; esac
        done
        [ "$sum" -eq 0 ] || echo ", $sum bytes"
    })
    say "fetching $# packages$bytes, into $work/debs"
    (cd "$work/debs" && apt apt-get download "$@") >>"$log" 2>&1
}

if ! { resolve && fetch_all; }; then
    fetch_lists
    if [ -z "$(find "$work/apt/state/lists" -name '*_Packages*' | head -n 1)" ]; then
        fail 74 "no package lists could be fetched" "$(tail -n 2 "$log" | tr '\n' ' ')" \
            "check the network and /etc/apt/sources.list, then run it again"
    fi
    resolve || fail 69 "the packages of the default guest aren't in this system's package sources" \
        "looked for one of: $kernel_candidates; and for: $programs. $(tail -n 2 "$log" | tr '\n' ' ')" \
        "check /etc/apt/sources.list and the network; or $elsewhere"
    rm -f "$work"/debs/*.deb
    fetch_all || fail 74 "fetching the packages failed" "$(tail -n 2 "$log" | tr '\n' ' ')" \
        'check the network and the package mirror, then run it again'
fi

# Big directories that hold no driver of a virtual machine stay packed.
unpack() {
    dpkg-deb --fsys-tarfile "$1" | tar -x -C "$pkg" -f - \
        --exclude='*/kernel/drivers/gpu' --exclude='*/kernel/drivers/media' --exclude='*/kernel/sound' \
        --exclude='*/kernel/drivers/net/wireless' --exclude='*/kernel/drivers/net/ethernet' \
        --exclude='*/kernel/drivers/infiniband' --exclude='*/kernel/drivers/scsi' --exclude='*/kernel/drivers/staging' \
        --exclude='*/usr/share/doc' --exclude='*/usr/share/man' --exclude='*/usr/share/locale'
}
say 'unpacking'
for deb in "$work"/debs/*.deb; do must "unpacking ${deb##*/}" unpack "$deb"; done

# Newer packages have everything below /usr, older ones don't; look in both.
first_of() {
    for found in "$@"; do
        [ ! -f "$found" ] || {
            printf '%s\n' "$found"
            return
        }
    done
    return 1
}
unexpected() {
    fail 69 "the default guest can't be built from this system's packages" "$1" "$elsewhere; and please report it"
}

busybox=$(first_of "$pkg/bin/busybox" "$pkg/usr/bin/busybox") || unexpected 'busybox-static holds no busybox'
sshd=$(first_of "$pkg/usr/sbin/sshd") || unexpected 'openssh-server holds no sshd'
scp=$(first_of "$pkg/usr/bin/scp") || unexpected 'openssh-client holds no scp'
ssh_keygen=$(first_of "$pkg/usr/bin/ssh-keygen") || unexpected 'openssh-client holds no ssh-keygen'
mke2fs=$(first_of "$pkg/sbin/mke2fs" "$pkg/usr/sbin/mke2fs") || unexpected 'e2fsprogs holds no mke2fs'
resize2fs=$(first_of "$pkg/sbin/resize2fs" "$pkg/usr/sbin/resize2fs") || unexpected 'e2fsprogs holds no resize2fs'
# Not by /lib64: that may be an absolute link, which would lead to the host's own.
loader=$(first_of "$pkg/lib/$triplet/${loader_path##*/}" "$pkg/usr/lib/$triplet/${loader_path##*/}") ||
    unexpected "libc6 holds no ${loader_path##*/}"
# Runs the loader with $1 and what follows. Beside $pkg, because a library path is a list with colons and semicolons, and `$`
# means something in it: the place where the guest is built may have such characters in its name.
load() (
    cd "$work" || exit 1
    exec "$loader" --inhibit-cache --library-path "pkg/lib/$triplet:pkg/usr/lib/$triplet" "$@"
)
# The guest's BusyBox tells what it can do, and helps in the build. Where this host can't run it, the same version for
# this host does: Debian builds it with the same applets.
tool_busybox=$busybox
if [ "$debian" != "$host_debian" ]; then
    mkdir "$work/host"
    { fetch "busybox-static:$host_debian" tools && dpkg-deb -x "$work"/tools/busybox-static_*.deb "$work/host"; } ||
        fail 74 'fetching busybox-static for this host failed' "$(tail -n 2 "$log" | tr '\n' ' ')" 'check the network, then run it again'
    tool_busybox=$(first_of "$work/host/bin/busybox" "$work/host/usr/bin/busybox") || unexpected 'busybox-static holds no busybox'
fi
for applet in acpid ash dd ifconfig init mkfifo mktemp modprobe mount nc od poweroff renice route timeout tr umount usleep wc; do
    "$tool_busybox" --list | grep -qx "$applet" || unexpected "its busybox has no $applet"
done

# --- kernel -------------------------------------------------------------------------------------

vmlinuz=$(first_of "$pkg"/boot/vmlinuz-* "$pkg"/usr/lib/modules/*/vmlinuz "$pkg"/lib/modules/*/vmlinuz) ||
    unexpected "no kernel in: $kernel_packages"
for modules in "$pkg"/lib/modules/* "$pkg"/usr/lib/modules/*; do [ ! -d "$modules/kernel" ] || break; done
[ -d "$modules/kernel" ] || unexpected "no kernel modules in: $kernel_packages"
kernel_version=${modules##*/}

number_at() { # $1: file, $2: offset in it, $3: bytes; little-endian like the host
    od -An -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '
}
magic_of() { od -An -t x1 -N 6 "$1" | tr -d ' \n'; }

# Decompressors the host lacks come from the package mirror too: nobody has to install one for our sake.
provide() { # $1: program, $2: package
    ! have "$1" || return 0
    [ "$debian" = "$host_debian" ] || fail 69 "the kernel can't be unpacked: not found: $1" 'this kernel is packed with it' "apt-get install $2"
    for name in "$2" $(closure '^(lib|zlib1g)' "$2"); do
        [ -z "$(find "$work/debs" "$work/tools" -name "${name}_*.deb")" ] || continue
        { fetch "$name" tools && unpack "$work/tools/${name}"_*.deb; } ||
            fail 69 "the kernel can't be unpacked: not found: $1" 'this kernel is packed with it' "apt-get install $2"
    done
}
run() { # $1: program; further: its arguments
    program=$1
    shift
    if have "$program"; then
        "$program" "$@"
    else
        load "$pkg/usr/bin/$program" "$@"
    fi
}

# Unpacks the file $1 to stdout, whatever it is packed with; `provide_for` must have seen it before.
provide_for() {
    case $(magic_of "$1") in
    02214c18*) provide lz4 lz4 ;;
    28b52ffd*) provide zstd zstd ;;
    # Not BusyBox's xzcat: it lacks the filter for x86 code that kernels are packed with.
    fd377a585a00) provide xz xz-utils ;;
    esac
}
unpacked() {
    case $(magic_of "$1") in
    02214c18*) run lz4 -dc - <"$1" ;;
    28b52ffd*) run zstd -dc <"$1" ;;
    1f8b*) gzip -dc <"$1" ;;
    fd377a585a00) run xz -dc <"$1" ;;
    5d0000*) "$tool_busybox" lzcat <"$1" ;;
    425a68*) "$tool_busybox" bzcat <"$1" ;;
    7f454c46*) cat "$1" ;;
    *) return 1 ;;
    esac
}

# A bzImage is a small loader around a compressed ELF kernel; QEMU starts the latter by itself (PVH), without
# running the loader. The fields are those of Documentation/arch/x86/boot.rst: setup_sects at 0x1f1,
# payload_offset at 0x248, payload_length at 0x24c.
extract_vmlinux() {
    setup_sectors=$(number_at "$vmlinuz" 497 1)
    [ "$setup_sectors" != 0 ] || setup_sectors=4
    start=$(((setup_sectors + 1) * 512 + $(number_at "$vmlinuz" 584 4)))
    length=$(number_at "$vmlinuz" 588 4)
    tail -c "+$((start + 1))" "$vmlinuz" | head -c "$length" >"$work/payload"
    # The payload's last four bytes are the kernel's size: gzip's own trailer, or appended by the kernel's build. In the
    # latter case decompressors grumble about trailing bytes, so the size is the judge and not the exit code.
    size=$(tail -c 4 "$work/payload" | od -An -t u4 | tr -d ' ')
    provide_for "$work/payload"
    unpacked "$work/payload" >"$out/vmlinux" 2>>"$log" || :
    [ "$(magic_of "$out/vmlinux")" = 7f454c460201 ] && [ "$(wc -c <"$out/vmlinux")" = "$size" ]
}
# An Image is booted as it is; "ARM\144" at 56 marks it.
extract_image() {
    cp "$vmlinuz" "$work/payload"
    provide_for "$work/payload"
    case $(magic_of "$work/payload") in 4d5a*) cat "$work/payload" ;; *) unpacked "$work/payload" ;; esac >"$out/Image" 2>>"$log" || :
    [ "$(number_at "$out/Image" 56 4)" = 1682788929 ]
}
say "extracting the kernel $kernel_version"
case $kernel_file in
vmlinux) extract_vmlinux ;;
*) extract_image ;;
esac || unexpected "${vmlinuz##*/} isn't packed in a way this script knows (payload begins with $(magic_of "$work/payload")). $(tail -n 2 "$log" | tr '\n' ' ')"

# --- modules ------------------------------------------------------------------------------------
# By when they are needed. A ! marks those without which the guest is no guest; the others may be built in or absent.

modules_for() {
    case $1 in
    boot) echo "virtio_pci! virtio_net! qemu_fw_cfg!${power_button:+ button!}" ;;
    late) echo 'virtio_rng virtio_blk! crc32c_generic ext4! overlay! pvpanic_pci virtio_console' ;;
    acpi) echo "${power_button:+evdev!}" ;;
    mounts) [ "$mounts" = no ] && echo '9pnet_virtio 9p' || echo '9pnet_virtio! 9p!' ;;
    esac
}

module_root=$root/lib/modules/$kernel_version
mkdir -p "$module_root" "$work/depends"

# The packed file of module $1 under either spelling, - or _.
module_file() {
    find "$modules/kernel" -name "$(printf '%s' "$1" | sed 's/[-_]/[-_]/g').ko*" | sort | head -n 1
}
built_in() {
    grep -q "/$(printf '%s' "$1" | sed 's/[-_]/[-_]/g')\.ko\$" "$modules/modules.builtin"
}

# Takes module $1 and what it depends on into the guest; $work/depends/NAME lists the latter. A subshell, so that the
# recursion has variables of its own.
take_module() (
    name=$(printf '%s' "$1" | tr - _)
    [ ! -e "$work/depends/$name" ] || return 0
    file=$(module_file "$name")
    [ -n "$file" ] || {
        built_in "$name"
        return
    }
    provide_for "$file"
    unpacked "$file" >"$module_root/$name.ko" || return 1
    # .modinfo is a list of NUL-terminated KEY=VALUE.
    depends=$(tr '\000' '\n' <"$module_root/$name.ko" | sed -n 's/^depends=//p' | head -n 1 | tr ',-' ' _')
    printf '%s\n' "$depends" >"$work/depends/$name"
    for dependency in $depends; do take_module "$dependency" || return 1; done
)

# Sets `taken` to those of $@ that have become module files; built-in ones need no loading.
take_modules() {
    taken=''
    for wanted in "$@"; do
        name=${wanted%!}
        if take_module "$name"; then
            [ ! -e "$work/depends/$name" ] || taken="$taken $name"
        elif [ "$name" != "$wanted" ]; then
            extra=linux-modules-extra-$kernel_version
            if [ ! -e "$work/extra" ] && : >"$work/extra" && fetch "$extra" debs; then
                # Ubuntu keeps rarer drivers in a package of their own, fetched only when it is needed.
                must "unpacking $extra" unpack "$work/debs/$extra"_*.deb
                take_module "$name" || unexpected "the kernel $kernel_version has no driver $name"
                [ ! -e "$work/depends/$name" ] || taken="$taken $name"
            else
                unexpected "the kernel $kernel_version has no driver $name"
            fi
        else
            absent="$absent$name "
        fi
    done
    taken=${taken# }
}

# What must be loaded for module $1, deepest first, itself last.
load_order() (
    # Split on purpose: one line of names.
    # shellcheck disable=SC2013
    for dependency in $(cat "$work/depends/$1" 2>/dev/null); do load_order "$dependency"; done
    [ ! -e "$work/depends/$1" ] || printf '%s\n' "$1"
)

say 'choosing kernel modules'
mkdir -p "$root/etc/castra"
absent=' '
for stage in boot late acpi mounts; do
    # Split on purpose: a list of names.
    # shellcheck disable=SC2046
    take_modules $(modules_for "$stage")
    printf '%s\n' "$taken" >"$root/etc/castra/modules.$stage"
done
mounts=true
case $absent in *' 9p'*) mounts=false ;; esac
# modprobe's own format: everything a module needs, the deepest last.
for file in "$work"/depends/*; do
    name=${file##*/}
    printf '%s.ko:' "$name"
    load_order "$name" | "$tool_busybox" awk -v self="$name" '!seen[$0]++ && $0 != self { line = " " $0 ".ko" line } END { print line }'
done >"$module_root/modules.dep"

# --- programs and libraries ---------------------------------------------------------------------

say 'putting the guest together'
cd "$root"
mkdir -p bin sbin usr/bin usr/sbin usr/lib/openssh usr/local/bin usr/local/sbin "lib/$triplet" "${loader_path%/*}" dev proc sys run/lock \
    tmp root/.ssh etc/init.d etc/acpi/PWRF mnt opt home srv \
    etc/ssh var/cache var/lib var/log var/spool var/tmp run/castra
chmod 1777 tmp var/tmp
chmod 700 root root/.ssh
ln -s /run var/run
ln -s /run/lock var/lock

cp "$busybox" bin/busybox
"$tool_busybox" --list-full | sort | while read -r link; do
    case $link in bin/busybox | linuxrc | */init) continue ;; esac
    mkdir -p "${link%/*}"
    ln -s /bin/busybox "$link"
done
ln -s /bin/busybox init
ln -s /bin/busybox sbin/init
# Since 9.8 a connection is served by a program of its own, since 10.0 its login by another.
ssh_programs='usr/sbin/sshd usr/bin/ssh-keygen usr/bin/scp'
cp "$sshd" usr/sbin/sshd
cp "$ssh_keygen" usr/bin/ssh-keygen
cp "$scp" usr/bin/scp
for helper in sshd-session sshd-auth; do
    [ -f "$pkg/usr/lib/openssh/$helper" ] || continue
    cp "$pkg/usr/lib/openssh/$helper" "usr/lib/openssh/$helper"
    ssh_programs="$ssh_programs usr/lib/openssh/$helper"
done
cp "$mke2fs" usr/sbin/mke2fs
cp "$resize2fs" usr/sbin/resize2fs
rm -f sbin/mke2fs
ln -s /usr/sbin/mke2fs sbin/mkfs.ext4

# The names of the libraries that the ELF file $1 asks its loader for: DT_NEEDED in its dynamic section. Its strings lie in
# its first segment, where address and offset are the same.
needed_by() {
    header=$(number_at "$1" 32 8)
    left=$(number_at "$1" 56 2)
    while [ "$left" -gt 0 ] && [ "$(number_at "$1" "$header" 4)" != 2 ]; do header=$((header + 56)) left=$((left - 1)); done
    [ "$left" -gt 0 ] || return 0
    od -An -v -w16 -t u8 -j "$(number_at "$1" $((header + 8)) 8)" -N "$(number_at "$1" $((header + 32)) 8)" "$1" |
        "$tool_busybox" awk '$1 == 1 { name[n++] = $2 } $1 == 5 { strings = $2 } END { for (i = 0; i < n; i++) print strings + name[i] + 1 }' |
        while read -r at; do tail -c "+$at" "$1" | head -c 256 | tr '\000' '\n' | head -n 1; done
}
# Takes the libraries that the file $1 needs, and those that they need, from the unpacked packages.
take_libraries() (
    for library in $(needed_by "$1"); do
        [ "$library" != "${loader_path##*/}" ] || continue # it goes to its own place below
        [ ! -e "lib/$triplet/$library" ] || continue
        found=$(first_of "$pkg/lib/$triplet/$library" "$pkg/usr/lib/$triplet/$library") ||
            unexpected "${1##*/} needs $library, which its packages don't bring"
        cp "$found" "lib/$triplet/"
        take_libraries "$found" || exit
    done
)
# Split on purpose: a list of names.
# shellcheck disable=SC2086
for program in $ssh_programs usr/sbin/mke2fs usr/sbin/resize2fs; do take_libraries "$program" || exit; done
cp "$loader" "$loader_path"
# Before glibc 2.34 names of users and hosts were looked up by separate libraries.
for library in libnss_files.so.2 libnss_dns.so.2; do
    found=$(first_of "$pkg/lib/$triplet/$library" "$pkg/usr/lib/$triplet/$library") &&
        [ "$(wc -c <"$found")" -gt 16384 ] && cp "$found" "lib/$triplet/"
done

# --- configuration ------------------------------------------------------------------------------

for file in rcS late hello sshd acpid; do
    cp "$source/$file" "etc/init.d/$file"
    chmod 755 "etc/init.d/$file"
done
# Without a power button nobody waits for it.
# Split on purpose: nothing, or two words.
# shellcheck disable=SC2046
sed -e "s/^ttyS0:/$console:/" $([ -n "$power_button" ] || echo '-e /acpid/d') "$source/inittab" >etc/inittab
cp "$source/profile" etc/profile
cp "$source/template" etc/init.d/template
# What castra tells the guest; a guest from a snapshot has a directory in its place.
ln -s /sys/firmware/qemu_fw_cfg/by_name/opt/castra run/castra/given
# Two hexadecimal digits a byte, up to the bar; printf takes octal ones.
# Its format is the program.
# shellcheck disable=SC2059
printf "$(sed '/^#/d; s/|.*//' "$source/castra-port-$arch" | tr -d ' \n' | "$tool_busybox" awk '
    function digit(at) { return index("0123456789abcdef", substr($0, at, 1)) - 1 }
    { for (at = 1; at < length($0); at += 2) printf "\\%03o", digit(at) * 16 + digit(at + 1) }')" >sbin/castra-port
chmod 755 sbin/castra-port
cp "$source/castra-hello" usr/sbin/castra-hello
cp "$source/castra-bus" usr/bin/castra-bus
chmod 755 usr/sbin/castra-hello usr/bin/castra-bus
rm -f sbin/poweroff sbin/reboot sbin/halt
cp "$source/power" sbin/poweroff
chmod 755 sbin/poweroff
for how in reboot halt; do ln -s poweroff "sbin/$how"; done
# The event that BusyBox acpid reports for the power button.
printf '#!/bin/sh\nexec /sbin/poweroff\n' >etc/acpi/PWRF/00000080
chmod 755 etc/acpi/PWRF/00000080
cp "$source/sshd_config" etc/ssh/sshd_config
# All connections come from one address, 10.0.2.2, and castra's own look for a banner is one: nobody may be punished for
# another's. The option is as old as the punishment, 9.8, which also brought the helper.
[ ! -e usr/lib/openssh/sshd-session ] || echo 'PerSourcePenalties no' >>etc/ssh/sshd_config
# Clients prefer key exchanges that withstand quantum computers. sntrup761 doubles the time of a login under emulation;
# ML-KEM is quick, but only newer servers know it.
kex=curve25519-sha256,curve25519-sha256@libssh.org
! grep -aq mlkem768x25519-sha256 usr/sbin/sshd usr/lib/openssh/sshd-session 2>/dev/null || kex=mlkem768x25519-sha256,$kex
echo "KexAlgorithms $kex" >>etc/ssh/sshd_config

cat >etc/fstab <<'EOF'
proc     /proc    proc     defaults                       0 0
sysfs    /sys     sysfs    defaults                       0 0
devtmpfs /dev     devtmpfs defaults                       0 0
devpts   /dev/pts devpts   noauto,gid=5,mode=620,ptmxmode=666 0 0
tmpfs    /dev/shm tmpfs    noauto,mode=1777,nosuid,nodev  0 0
EOF
printf 'root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534:sshd:/run/sshd:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n' >etc/passwd
printf 'root:x:0:\ntty:x:5:\nnogroup:x:65534:\n' >etc/group
printf 'root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\nnobody:*:19000:0:99999:7:::\n' >etc/shadow
chmod 600 etc/shadow
printf '/bin/sh\n/bin/ash\n' >etc/shells
printf 'passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n' >etc/nsswitch.conf
printf 'nameserver 10.0.2.3\n' >etc/resolv.conf
printf '127.0.0.1\tlocalhost\n' >etc/hosts
printf 'castra\n' >etc/hostname
cat >etc/os-release <<EOF
NAME="castra default guest"
PRETTY_NAME="castra default guest (Linux $kernel_version)"
ID=castra
EOF
find . -type f \( -path './lib/*' -o -path './lib64/*' \) -exec chmod 644 {} +
# shellcheck disable=SC2086
chmod 755 "$loader_path" bin/busybox usr/sbin/mke2fs usr/sbin/resize2fs $ssh_programs

# --- the archive --------------------------------------------------------------------------------
# Written here rather than by cpio, which may be absent, would store our user id, and can't make device nodes
# without root. Format: Documentation/driver-api/early-userspace/buffer-format.rst, "newc".

mtime=1577836800 # 2020-01-01: fixed, and not so old that programs wonder
inode=0
entry() { # $1: name, $2: mode with its type, $3: size, $4 $5: device numbers
    inode=$((inode + 1))
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\000' \
        "$inode" "$2" 0 0 1 "$mtime" "$3" 0 0 "${4:-0}" "${5:-0}" $((${#1} + 1)) 0 "$1"
    pad $((110 + ${#1} + 1))
}
pad() { # to the next multiple of four
    case $(($1 % 4)) in 1) printf '\000\000\000' ;; 2) printf '\000\000' ;; 3) printf '\000' ;; esac
}
pack() {
    # The root directory itself, which everybody could write to otherwise. sshd takes no keys from below such a one.
    entry . $((040755)) 0
    # Without it the kernel can't open a console for init.
    find . -mindepth 1 -printf '%y\t%m\t%s\t%P\t%l\n' | sort -t "$tab" -k 4,4 >"$work/list"
    while IFS=$tab read -r type mode size name target; do
        case $type in
        d) entry "$name" $((040000 | 0$mode)) 0 ;;
        l)
            entry "$name" $((0120777)) ${#target}
            printf '%s' "$target"
            pad ${#target}
            ;;
        f)
            entry "$name" $((0100000 | 0$mode)) "$size"
            cat "$name"
            pad "$size"
            ;;
        esac
    done <"$work/list"
    entry dev/console $((020600)) 0 5 1
    entry 'TRAILER!!!' 0 0
}
tab=$(printf '\t')
say 'packing the initramfs'
pack >"$out/initramfs.cpio" 2>>"$log" || fail 74 "writing $output failed" "$(tail -n 1 "$log")" 'check free disk space'

# --- manifest -----------------------------------------------------------------------------------

{
    printf '{\n  "kernel_version": "%s",\n  "packages": {' "$kernel_version"
    for deb in "$work"/debs/*.deb; do
        dpkg-deb -W --showformat '${Package}\t${Version}\n' "$deb"
    done | sort | {
        separator=''
        while IFS=$tab read -r name version; do
            printf '%s\n    "%s": "%s"' "$separator" "$name" "$version"
            separator=,
        done
    }
    printf '\n  },\n  "mounts": %s,\n  "plain": %s,\n  "cmdline": "%s",\n  "built_by": "%s"\n}\n' "$mounts" "$plain" "$cmdline" "$built_by"
} >"$out/manifest.json"

# --- done ---------------------------------------------------------------------------------------

cd /
if [ -e "$output" ]; then
    # Two renames: a reader may find nothing for an instant, but never half a guest.
    must "replacing $output" mv "$output" "$work/replaced"
fi
must "moving the guest to $output" mv "$out" "$output"
say "done: $output (Linux $kernel_version)"
