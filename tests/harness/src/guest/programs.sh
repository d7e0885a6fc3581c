#!/bin/sh
# Runs once inside the root file system of a guest that has real programs. $1 is the mirror, $2 the release.
set -eu

# They run as jobs only.
systemctl mask --quiet nginx.service postgresql.service redis-server.service

# The release's own Go knows nothing of cgroup limits; that of its backports does. It compiles one program and goes: it would
# be a fourth of the disk.
echo "deb $1 $2-backports main" >/etc/apt/sources.list.d/backports.list
apt-get -qq update
apt-get -qq install --no-install-recommends --target-release "$2-backports" golang-go >/dev/null
mkdir /tmp/limits
cat >/tmp/limits/limits.go <<-'EOG'
	// Prints how many processors Go's runtime gives to this program.
	package main

	import "runtime"

	func main() { println("GOMAXPROCS", runtime.GOMAXPROCS(0), "of", runtime.NumCPU(), runtime.Version()) }
EOG
(
	cd /tmp/limits
	export CGO_ENABLED=0 GOCACHE=/tmp/limits/cache GOTOOLCHAIN=local
	go build -trimpath -ldflags=-s -o /usr/local/bin/go-limits limits.go
)
rm -rf /tmp/limits
apt-get -qq purge 'golang-*' >/dev/null
rm /etc/apt/sources.list.d/backports.list
apt-get -qq clean
rm -rf /var/lib/apt/lists/*
