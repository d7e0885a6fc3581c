#!/bin/sh
# For guests, which have no rpm: this machine's, with its libraries and their loader, so that those of the guest do not matter, and
# the package once more as a later version. $1 is where `make packages` leaves what it builds, $2 a new directory.
set -eu

built=$1 to=$2
mkdir -p "$to/lib" "$to/config/platform"
rpm=$(command -v rpm) || { echo "rpm is not installed: tests/harness/host-setup packages" >&2; exit 1; }
cp -L "$rpm" "$to/lib/rpm"
ldd "$rpm" | sed -n 's/^.*=> \(\/[^ ]*\) .*$/\1/p; s/^[[:space:]]*\(\/[^ ]*\) .*$/\1/p' | while read -r library; do
	cp -L "$library" "$to/lib/"
done
set -- "$to"/lib/ld-*.so.*
loader=${1##*/}
cp -L /usr/lib/rpm/macros /usr/lib/rpm/rpmrc /usr/lib/rpm/rpmpopt-* "$to/config/"
cp -RL "/usr/lib/rpm/platform/$(uname -m)-linux" "$to/config/platform/"
cat >"$to/rpm" <<EOF
#!/bin/sh
here=\$(dirname "\$0")
export RPM_CONFIGDIR="\$here/config"
exec "\$here/lib/$loader" --library-path "\$here/lib" "\$here/lib/rpm" --dbpath /var/tmp/rpmdb "\$@"
EOF
chmod 755 "$to/rpm"

cp "$built"/*.rpm "$to/now.rpm"
# Kept beside the packages, which a later `make packages` removes with it.
next=$built/work/next
if [ ! -e "$next/next.rpm" ]; then
	root=$(cd "$built/../.." && pwd)
	mkdir -p "$next"
	sed 's/^Version:.*/Version: 99.0.0/' "$root/packaging/rpm/nomad-driver-exec2-systemd.spec" >"$next/next.spec"
	BINARY=$(echo "$built"/work/deb/debian/*/usr/bin/nomad-driver-exec2) rpmbuild -bb --quiet --define "_topdir $next/rpm" \
		--define "_sourcedir $root" --define "_rpmdir $next" --define '_binary_payload w0.gzdio' "$next/next.spec" >"$next/log" 2>&1 ||
		{ cat "$next/log" >&2; exit 1; }
	mv "$next"/*/*.rpm "$next/next.rpm"
fi
cp "$next/next.rpm" "$to/next.rpm"
