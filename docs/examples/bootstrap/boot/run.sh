#!/bin/sh
# Serves the payload. Runs in the guest, in `remote_dir`. It may run any number of times: if there is
# nothing to change, it changes nothing and reports that.
set -eu

sed -e "s|@VM@|$CASTRA_VM|" -e "s|@GREETING@|$GREETING|" "$CASTRA_PAYLOAD_DIR/index.html" >page.new
if cmp -s page.new "$ROOT/index.html" && pidof httpd >/dev/null; then
    echo Castra:noop
    exit 0
fi
mkdir -p "$ROOT"
mv page.new "$ROOT/index.html"
pidof httpd >/dev/null || httpd -h "$ROOT"
echo "serving $ROOT/index.html"
