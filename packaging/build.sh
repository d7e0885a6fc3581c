#!/bin/sh
# Builds the .deb, its -dbgsym, the .rpm and the release tarball into target/package. BINARY= takes an executable that is there already;
# CARGO_BUILD_TARGET= (cargo's own variable, as aarch64-unknown-linux-gnu) builds for another machine. Nothing that was built is run.
set -eu

cd "$(dirname "$0")/.."
root=$PWD
name=nomad-driver-exec2-systemd
out=$root/target/package
triple=${CARGO_BUILD_TARGET:-$(rustc -vV | sed -n 's/^host: //p')}
arch=${triple%%-*}
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)

# What is built twice is the same: no clock but the commit's, or the changelog's outside of a checkout.
: "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct 2>/dev/null || dpkg-parsechangelog -l packaging/debian/changelog -S Timestamp)}"
export SOURCE_DATE_EPOCH LC_ALL=C TZ=UTC
umask 022

if [ -z "${BINARY:-}" ]; then
	# Paths of this machine would be in panic messages and line tables. Not in .cargo/config.toml, which knows no $PWD.
	RUSTFLAGS="${RUSTFLAGS:-} --remap-path-prefix=$root=. --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=cargo" \
		"${CARGO:-cargo}" build --locked --release --target "$triple"
	BINARY=$root/target/$triple/release/nomad-driver-exec2
fi
BINARY=$(realpath "$BINARY")
export BINARY

rm -rf "$out"
mkdir -p "$out/work/deb" "$out/work/rpm"
ln -s "$BINARY" "$out/work/executable"

# dpkg-buildpackage wants debian/ at the root of a tree, and writes beside that tree.
cp -R packaging/debian "$out/work/deb/"
deb_arch=$(dpkg-architecture -f -t "$(echo "$triple" | sed 's/-unknown-/-/')" -q DEB_HOST_ARCH)
(cd "$out/work/deb" && SOURCE=$root dpkg-buildpackage -b -us -uc -nc --host-arch="$deb_arch") >"$out/work/deb.log" 2>&1 ||
	{ cat "$out/work/deb.log" >&2; exit 1; }

# One executable for all: dh_strip has taken the debug symbols of this one, for the -dbgsym.
BINARY=$out/work/deb/debian/$name/usr/bin/nomad-driver-exec2
rpmbuild -bb --quiet --target "$arch-linux" --define "_topdir $out/work/rpm" --define "_sourcedir $root" --define "_rpmdir $out/work" \
	packaging/rpm/$name.spec >"$out/work/rpm.log" 2>&1 || { cat "$out/work/rpm.log" >&2; exit 1; }

# For a host of neither kind: the driver, for its plugin_dir.
tree=$out/work/nomad-driver-exec2-$version-linux-$deb_arch
mkdir "$tree"
cp "$BINARY" LICENSE "$tree"
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" --mode=u=rwX,go=rX -C "$out/work" -c "${tree##*/}" |
	gzip -9n >"$tree.tar.gz"

mv "$out"/work/*.deb "$out/work/$arch"/*.rpm "$out"/work/*.tar.gz "$out"
ls "$out"/*.*
