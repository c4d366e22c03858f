#!/bin/sh
# Serves the payload over HTTP. Runs in the guest, in `remote_dir`, as root.
set -eu

root=/var/www
page=$root/index.html
mkdir -p "$root"
sed "s/@VM@/$CASTRA_VM/" "$CASTRA_PAYLOAD_DIR/index.html" >page.new
if [ -f "$page" ] && cmp -s page.new "$page"; then
    rm page.new
    echo "Castra:noop"
    exit 0
fi
mv page.new "$page"
httpd -h "$root"
echo "serving $page"
