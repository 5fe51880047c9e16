# Makes the files of a Debian, and of these a disk, a kernel and its initrd, in the current directory.
set -e
debootstrap=$0 release=$1 archive=$2 packages=$3
rm -rf root
trap 'rm -rf root' EXIT
"$debootstrap" --variant=minbase --include="$packages" "$release" root "$archive" >log 2>&1 || {
    tail -n 1 log >&2
    exit 1
}
cp play.service root/etc/systemd/system/
echo debian >root/etc/hostname
echo '127.0.0.1 localhost debian' >root/etc/hosts
rm -f root/etc/resolv.conf
chroot root systemctl --quiet enable play.service
# The console is for the report, and nothing else may hold the lock of dpkg.
chroot root systemctl --quiet mask serial-getty@ttyS0.service apt-daily.timer apt-daily-upgrade.timer
rm -rf root/var/cache/apt/archives/*.deb root/var/lib/apt/lists/*
mv root/boot/vmlinuz-* kernel
mv root/boot/initrd.img-* initrd
rm -f disk
mke2fs -q -t ext4 -d root disk 4G
