#!/bin/bash
# boot_pid1.sh FOLDER TREE CGROUP: systemd as PID 1 in namespaces of its own.
#
# TREE is the tree of files it boots from; nothing in it is changed, an overlay takes the changes.
# FOLDER has "files" (a tree that is copied over it), "binds" (lines "SOURCE TARGET ro|rw") and "shared"
# (the directory /shared inside). CGROUP is an empty cgroup2 directory. READY=1 comes to
# FOLDER/shared/ready when the boot is done.
set -e
echo $$ >"$3/cgroup.procs"
exec unshare --kill-child=KILL -m -p -f -C -i -u -n --propagation private /bin/bash -e -c '
FOLDER=$0 TREE=$1
mkdir "$FOLDER/rw" "$FOLDER/root"
mount -t tmpfs -o mode=755 tmpfs "$FOLDER/rw"
mkdir "$FOLDER/rw/upper" "$FOLDER/rw/work"
mount -t overlay -o "lowerdir=$TREE,upperdir=$FOLDER/rw/upper,workdir=$FOLDER/rw/work" overlay "$FOLDER/root"
cd "$FOLDER/root"
mkdir -p proc sys run dev tmp old shared
rm -rf etc/systemd/system etc/fstab
cp -a "$FOLDER/files/." .
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
mount -t tmpfs -o mode=1777 tmpfs tmp
while read -r name minor; do
  mknod -m 666 "dev/$name" c 1 "$minor"
done <<END
null 3
zero 5
full 7
random 8
urandom 9
END
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs dev/shm
mount --bind "$FOLDER/shared" shared
while read -r source target mode; do
  if [ -d "$source" ]; then mkdir -p ".$target"; else mkdir -p "$(dirname ".$target")"; touch ".$target"; fi
  mount --bind "$source" ".$target"
  mount -o "remount,bind,$mode" ".$target"
done <"$FOLDER/binds"
chroot . /sbin/ldconfig 2>"$FOLDER/ldconfig.log"
pivot_root . old
umount -l /old
exec env -i container=other NOTIFY_SOCKET=/shared/ready PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb \
  /lib/systemd/systemd --system --log-target=console --unit=multi-user.target
' "$1" "$2"
