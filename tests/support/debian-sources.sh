#!/bin/sh
# Where apt itself takes this Debian's packages from, as lines of sources.list: of the release, its
# updates and its security updates, whatever file of apt's they stand in, with the options that
# say which key they are signed with. Nothing where apt's lists are not there or hold no Debian:
# Debian's own mirror is as good then.
#
# usage: debian-sources.sh CODENAME
set -eu

[ $# -eq 1 ] || { echo "usage: debian-sources.sh CODENAME" >&2; exit 64; }
codename=$1

# The options of entry NUMBER of FILE that decide whether a signature is believed.
options_of() {
    file=$1 number=$2
    case $file in
    *.sources)
        # A Signed-By may also hold the key itself; then apt's own keyrings have to do.
        awk -v number="$number" '
            /^[[:space:]]*$/ { blank = 1; next }
            /^#/ { next }
            { if (blank || !stanza) { stanza++; blank = 0 } }
            stanza == number && tolower($1) == "signed-by:" && $2 ~ /^\// { print "signed-by=" $2 }
            stanza == number && tolower($1) == "trusted:" { print "trusted=" $2 }' "$file"
        ;;
    *)
        sed -n "${number}p" "$file" | sed -n 's/^deb *\[\([^]]*\)\].*/\1/p' | tr -s ' ' '\n' | grep -E '^(signed-by|trusted)=' || :
        ;;
    esac | tr '\n' ' '
}

apt-get indextargets --format '$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SOURCESENTRY)' \
    'Identifier: Packages' 2>/dev/null | sort -u |
    while IFS='|' read -r origin suite uri release component entry; do
        [ "$origin" = Debian ] || continue
        case $suite in
        "$codename" | "$codename-updates" | "$codename-security") ;;
        *) continue ;;
        esac
        options=$(options_of "${entry%:*}" "${entry##*:}")
        echo "deb ${options:+[${options% }] }$uri $release $component"
    done
