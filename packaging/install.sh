#!/bin/sh
# Lays out what every package has: install.sh DESTDIR, from any directory. BINARY= is what cargo built, ZSH_DIR= where this distribution's zsh looks.
set -eu

destdir=${1:?usage: install.sh DESTDIR}
source=$(cd "$(dirname "$0")/.." && pwd)
binary=${BINARY:-$source/target/release/nomad-driver-exec2}
share=$destdir/usr/share
doc=$share/doc/nomad-driver-exec2-systemd

install -D -m 755 "$binary" "$destdir/usr/bin/nomad-driver-exec2"
# data_dir of HashiCorp's Nomad package; the link's name is the label of the plugin block.
mkdir -p "$destdir/opt/nomad/data/plugins"
ln -s /usr/bin/nomad-driver-exec2 "$destdir/opt/nomad/data/plugins/nomad-driver-exec2"
# As `run` makes them, traversable and listed to root alone. Packaged, they go with the package.
run=$destdir/var/lib/nomad-driver-exec2
install -d -m 711 "$run" "$run/run" "$run/run/alloc" "$run/run/alloc_mounts"
for slice in "$source"/packaging/systemd/*.slice; do
	install -D -m 644 -t "$destdir/usr/lib/systemd/system" "$slice"
done
for page in "$source"/packaging/man/*.8; do
	install -D -m 644 -t "$share/man/man8" "$page"
done
for job in "$source"/packaging/examples/*.hcl "$source"/tests/nomad/*.nomad.hcl; do
	install -D -m 644 -t "$doc/examples" "$job"
done
install -D -m 644 "$source/packaging/completion/nomad-driver-exec2.bash" "$share/bash-completion/completions/nomad-driver-exec2"
install -D -m 644 "$source/packaging/completion/nomad-driver-exec2.zsh" "$share/zsh/${ZSH_DIR:-site-functions}/_nomad-driver-exec2"
install -D -m 644 -t "$share/fish/vendor_completions.d" "$source/packaging/completion/nomad-driver-exec2.fish"
install -D -m 644 -t "$doc" "$source/README.md" "$source/SECURITY.md"
install -D -m 644 "$source/CHANGELOG.md" "$doc/changelog"
# -n: a name and a time in the header would differ from build to build.
gzip -9n "$share"/man/man8/* "$doc"/*.md "$doc/changelog"
