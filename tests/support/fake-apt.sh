#!/bin/sh
# A stand-in for apt, and for what install-deps.sh asks beside it, by the name it is called by. The
# machine lacks qemu-system-x86 and has a newer qemu-utils; how apt takes that is $FAKE_CASE:
#   plain      installs it                      nothing    says that it did, and did not
#   removes    only by removing qemu-utils      fails      fails in the middle
#   older      only by removing or downgrading  offline    can't read its sources
#   backports  by versions of the release that qemu-utils came from, which is no source any more
#   no-rights  as plain, but sudo refuses
# $FAKE_LOG: every call of apt-get. $FAKE_BIN: the machine's only directory of commands.
log() { printf '%s\n' "$*" >>"$FAKE_LOG"; }
codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
new='1:10.0.2~bpo12+1'

simulate() {
    case $FAKE_CASE,$* in
    backports,*"-t $codename-backports"*)
        echo 'Inst libcapstone4 (4.0.2-5 Debian:12.15/oldstable [amd64])'
        echo "Inst qemu-system-data [1:7.2] ($new Debian Backports:12/oldstable-backports [all]) []"
        echo "Inst qemu-system-x86 ($new Debian Backports:12/oldstable-backports [amd64])"
        ;;
    removes,*qemu-utils* | older,*"qemu-system-x86 qemu-utils" | backports,*"qemu-system-x86 qemu-utils")
        echo 'E: Unable to correct problems, you have held broken packages.'
        exit 100
        ;;
    older,*--allow-downgrades*)
        printf 'The following packages will be DOWNGRADED:\n  qemu-utils\n0 upgraded\n'
        echo "Inst qemu-utils [$new] (1:7.2 Debian:12/oldstable [amd64])"
        ;;
    backports,*"qemu-system-data=$new qemu-system-x86=$new qemu-utils") ;;
    removes,* | older,* | backports,*)
        echo "Remv qemu-utils [$new]"
        echo 'Inst qemu-system-x86 (1:7.2 Debian:12/oldstable [amd64])'
        ;;
    *) echo 'Inst qemu-system-x86 (1:7.2 Debian:12/oldstable [amd64])' ;;
    esac
}

install() {
    [ "$FAKE_CASE" != fails ] || { echo 'E: the archive is broken' && exit 100; }
    [ "$FAKE_CASE" != nothing ] || exit 0
    case $FAKE_CASE,$* in
    removes,*--no-remove*) exit 100 ;;
    removes,* | older,*-recommends\ --no-remove\ qemu*) rm "$FAKE_BIN/qemu-img" ;;
    esac
    ln -s "$(command -v true)" "$FAKE_BIN/qemu-system-x86_64"
}

case ${0##*/} in
id) echo 1000 ;;
sudo)
    shift
    [ "$FAKE_CASE" != no-rights ] || exit 1
    case $* in
    tee\ *policy-rc.d) cat >/dev/null ;;
    *policy-rc.d) ;;
    *) exec "$@" ;;
    esac
    ;;
apt-config) echo "parts='/etc/apt/sources.list.d'" ;;
dpkg-query)
    case $* in
    *qemu-utils) echo "$new" ;;
    *) echo 1.0 ;;
    esac
    ;;
apt-cache)
    [ "$2" = qemu-utils ] || exit 0
    printf 'qemu-utils:\n  Installed: %s\n  Version table:\n *** %s 100\n        100 /var/lib/dpkg/status\n' "$new" "$new"
    ;;
apt-get)
    log "$*"
    case " $* " in
    *" update "*)
        for option; do
            case $option in
            Dir::Etc::SourceParts=*) log "$(cat "${option#*=}/castra-once.list")" ;;
            esac
        done
        [ "$FAKE_CASE" != offline ] || { echo 'E: Could not resolve host' && exit 100; }
        ;;
    *SOURCESENTRY*) cat "$FAKE_BIN/targets" ;;
    *ORIGIN*) echo "Debian $codename http://mirror.example/debian/" ;;
    *" indextargets "*) echo "$codename $codename " ;;
    *" -s "*) simulate "$*" ;;
    *" install "*) install "$*" ;;
    esac
    ;;
esac
