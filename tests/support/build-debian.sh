#!/bin/sh
# Builds a stock guest of the tests: a Debian with sshd, as a disk and the kernel and initrd to boot
# it with, which spares a bootloader; without cloud-init, which takes longer under emulation than all
# the rest. Its users `root`, `op` (sudo asks nothing), `plain` (no sudo) and `linger` (likewise, with
# a systemd of its own that stays, where there is one) all take the key `id_ed25519` beside it.
# `systemd` boots as Debian does. `others` has no systemd, with which OpenRC can't be installed since
# Debian 13; the kernel's `init=` chooses OpenRC (/sbin/openrc-init) or runit (/sbin/runit).
# A minute or two; the packages come from apt's own mirrors.
# Needs mmdebstrap, mkfs.ext4, ssh-keygen, and root, also by a sudo that asks nothing: the files of
# the disk have their true owners.
#
# usage: build-debian.sh systemd|others DIRECTORY    (made, or taken as it is if it is complete)
set -eu

usage() {
    echo "usage: build-debian.sh systemd|others DIRECTORY" >&2
    exit 64
}
[ $# -eq 2 ] || usage
init=$1 out=$2
case $init in
systemd) packages=systemd-sysv,dbus,libpam-systemd ;;
others) packages=openrc,runit ;;
*) usage ;;
esac
[ ! -e "$out/disk.raw" ] || exit 0
PATH=$PATH:/usr/sbin:/sbin
if [ "$(id -u)" -ne 0 ]; then
    # The key has to be this user's, or ssh refuses it.
    sudo -n "$0" "$@"
    exec sudo -n chown -R "$(id -u)" "$out"
fi
mkdir -p "$(dirname "$out")"
work=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
# mmdebstrap's sandboxed apt is another user.
chmod 755 "$work"

# A Debian host's own suite comes from where its apt takes it; elsewhere it is Debian 12 from Debian's
# own mirror, as is one that apt's lists say nothing of.
suite=bookworm
: >"$work/sources.list"
if [ "$(. /etc/os-release && echo "$ID")" = debian ]; then
    suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
    "$(dirname "$0")/debian-sources.sh" "$suite" >"$work/sources.list"
fi
set --
sources=
if [ -s "$work/sources.list" ]; then
    sources=$work/sources.list
elif [ -e /usr/share/keyrings/debian-archive-keyring.gpg ]; then
    # mmdebstrap would find out itself with gpg, which not every system has.
    set -- --keyring=/usr/share/keyrings/debian-archive-keyring.gpg
fi

ssh-keygen -q -t ed25519 -N '' -C castra-test -f "$work/id_ed25519"
mkdir "$work/skeleton"
cat >"$work/skeleton/any.network" <<'EOF'
[Match]
Name=en* eth*

[Network]
DHCP=ipv4
LinkLocalAddressing=no
EOF

# What every init but systemd runs at boot; the initramfs has mounted the rest.
cat >"$work/skeleton/boot" <<'EOF'
#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /dev/pts /run/sshd
mount -t devpts devpts /dev/pts
modprobe virtio_net
ip link set lo up
for device in /sys/class/net/e*; do
    ip link set "${device##*/}" up
    ip address add 10.0.2.15/24 dev "${device##*/}"
done
ip route add default via 10.0.2.2
EOF
cat >"$work/skeleton/guest-boot" <<'EOF'
#!/sbin/openrc-run
start() { /usr/local/sbin/guest-boot; }
EOF

# Runs in the tree: what a stock image has and this one not yet.
cat >"$work/finish" <<'EOF'
set -eu
tree=$1 work=$2 init=$3
echo '/dev/vda / ext4 defaults 0 0' >"$tree/etc/fstab"
echo debian >"$tree/etc/hostname"
echo '127.0.0.1 localhost debian' >"$tree/etc/hosts"
for user in op plain linger; do
    chroot "$tree" useradd -m -s /bin/bash "$user"
done
echo 'op ALL=(ALL) NOPASSWD: ALL' >"$tree/etc/sudoers.d/op"
for home in root home/op home/plain home/linger; do
    mkdir -p "$tree/$home/.ssh"
    cp "$work/id_ed25519.pub" "$tree/$home/.ssh/authorized_keys"
done
for user in op plain linger; do
    chroot "$tree" chown -R "$user:$user" "/home/$user/.ssh"
done
chmod -R go= "$tree"/root/.ssh "$tree"/home/*/.ssh
if [ "$init" = systemd ]; then
    cp "$work/skeleton/any.network" "$tree/etc/systemd/network/any.network"
    chroot "$tree" systemctl -q enable systemd-networkd ssh
    # A systemd for each user, as desktops and most servers have it; root's would only cost time.
    mkdir -p "$tree/var/lib/systemd/linger"
    touch "$tree/var/lib/systemd/linger/linger"
    sed -i '/pam_systemd.so/i session [success=ignore default=1] pam_succeed_if.so quiet uid >= 1000' \
        "$tree/etc/pam.d/common-session"
    # Nothing of these is worth its time in a guest that lives for minutes.
    chroot "$tree" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
        e2scrub_all.timer e2scrub_reap.service fstrim.timer systemd-networkd-wait-online.service
else
    install -m 755 "$work/skeleton/boot" "$tree/usr/local/sbin/guest-boot"
    install -m 755 "$work/skeleton/guest-boot" "$tree/etc/init.d/guest-boot"
    mkdir -p "$tree/etc/runlevels/boot" "$tree/etc/runit/boot-run"
    ln -s /etc/init.d/guest-boot "$tree/etc/runlevels/boot/guest-boot"
    printf '%s\n' /usr/local/sbin/guest-boot /usr/sbin/sshd >"$tree/etc/runit/boot-run/guest.sh"
    touch "$tree/etc/runit/native.boot.run" "$tree/etc/runit/no.emulate.sysv"
fi
EOF

# Nothing of the recommended, no documents, no locales.
mmdebstrap --quiet --variant=minbase --format=directory "$@" \
    --include=linux-image-cloud-amd64,$packages,openssh-server,iproute2,kmod,netcat-openbsd,sudo \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook="sh '$work/finish' \"\$1\" '$work' $init" \
    "$suite" "$work/tree" ${sources:+"$sources"} </dev/null >&2

cat "$work"/tree/boot/vmlinuz-* >"$work/vmlinuz"
cat "$work"/tree/boot/initrd.img-* >"$work/initrd"
truncate -s 2G "$work/disk.raw"
mkfs.ext4 -q -F -L root -d "$work/tree" "$work/disk.raw"

# All of it in one step, so that nobody ever has one build's key beside another's disk. Who comes
# second takes what is there.
rm -rf "$work/tree" "$work/skeleton" "$work/finish" "$work/sources.list"
chmod 644 "$work/vmlinuz" "$work/initrd" "$work/disk.raw"
mv -T "$work" "$out" 2>/dev/null || [ -e "$out/disk.raw" ]
