/* backing.c - what kind of file a VMM named as memory. Must not map it, nor know what it is for.
 *
 * The answers come from the kernel's own shmem and hugetlbfs, or there is none: a file system that
 * a VMM runs itself (FUSE) may never answer, not even fstat(2), and who waits for it can't be
 * killed. F_GET_SEALS asks no file system. It succeeds for each file of shmem and of hugetlbfs,
 * tmpfs included, and fails for all others (mm/memfd.c, memfd_file_seals_ptr()). A file of
 * overlayfs can have pages of tmpfs, but not while it is open for writing unless its upper layer is
 * tmpfs itself; so the question for the access mode comes first. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include "vhd.h"

int vhd_backing_inspect(int fd, struct vhd_backing *backing)
{
    struct stat status;
    struct statfs filesystem;
    int flags = fcntl(fd, F_GETFL);

    if (flags < 0)
        return -errno;
    if (flags & O_PATH)
        return -EINVAL;
    if ((flags & O_ACCMODE) != O_RDWR)
        return -EACCES;
    if (fcntl(fd, F_GET_SEALS) < 0)
        return errno == EINVAL ? -EOPNOTSUPP : -errno;
    if (fstat(fd, &status) != 0 || fstatfs(fd, &filesystem) != 0)
        return -errno;
    if (!S_ISREG(status.st_mode) ||
        (filesystem.f_type != TMPFS_MAGIC && filesystem.f_type != HUGETLBFS_MAGIC))
        return -EOPNOTSUPP;
    if (status.st_size <= 0)
        return -ENODATA;
    backing->size = (uint64_t)status.st_size;
    backing->page_size = VHD_GUEST_PAGE_SIZE;
    if (filesystem.f_type == HUGETLBFS_MAGIC)
        backing->page_size = (uint64_t)filesystem.f_bsize;
    return 0;
}

int vhd_file_identify(int fd, struct vhd_file *file)
{
    struct statx status;

    if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO | STATX_SIZE,
              &status) != 0)
        return -errno;
    file->device = makedev(status.stx_dev_major, status.stx_dev_minor);
    file->inode = status.stx_ino;
    file->size = status.stx_size;
    file->mode = status.stx_mode;
    return 0;
}
