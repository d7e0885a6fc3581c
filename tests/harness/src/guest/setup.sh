#!/bin/sh
# Runs once inside a new guest's root file system, as its last step. $1 is the public half of the runner's key.
set -eu

# Nothing may wake up in the middle of a test.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
	systemd-tmpfiles-clean.timer systemd-firstboot.service systemd-networkd-wait-online.service \
	systemd-hwdb-update.service systemd-random-seed.service \
	getty@tty1.service serial-getty@ttyS0.service console-getty.service; do
	systemctl mask --quiet "$unit"
done

systemctl enable --quiet systemd-networkd.service
cat >/etc/systemd/network/eth0.network <<-'EOF'
	[Match]
	Name=eth0
	[Network]
	DHCP=ipv4
	LinkLocalAddressing=no
EOF

mkdir -p /etc/systemd/journald.conf.d
cat >/etc/systemd/journald.conf.d/guest.conf <<-'EOF'
	[Journal]
	Storage=volatile
	RateLimitIntervalSec=0
EOF

# One cheap algorithm of each kind: every handshake is emulated.
rm -f /etc/ssh/ssh_host_*
ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key
cat >/etc/ssh/sshd_config.d/guest.conf <<-'EOF'
	HostKey /etc/ssh/ssh_host_ed25519_key
	KexAlgorithms curve25519-sha256
	Ciphers aes128-ctr
	PermitRootLogin prohibit-password
	UsePAM no
	MaxSessions 64
EOF
mkdir -p -m 700 /root/.ssh
echo "$1" >/root/.ssh/authorized_keys

echo guest >/etc/hostname
echo '127.0.0.1 localhost guest' >/etc/hosts
: >/etc/resolv.conf
mkdir -p /payload
