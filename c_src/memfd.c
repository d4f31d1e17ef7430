/* memfd.c - memory that outlives the process: memfds of a fixed size, made or taken over. Must not
 * know what lies in them. */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vhd.h"

enum { PAGE_SIZE_MAX = 65536 }; /* of any Linux on which this could run */

/* So that a mapping of it never faults, whoever else has the descriptor. */
enum { SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL };

static int create(const char *name, size_t size)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    int error;

    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)size) == 0 && fcntl(fd, F_ADD_SEALS, SEALS) == 0)
        return fd;
    error = -errno;
    close(fd);
    return error;
}

static int adopt(int fd, size_t size)
{
    struct stat status;
    int seals = fcntl(fd, F_GET_SEALS);
    int own;

    if (seals < 0)
        return errno == EINVAL ? -EPROTO : -errno;
    if (fstat(fd, &status) != 0)
        return -errno;
    /* Sealed against writing it would be of no use to us. */
    if (seals != SEALS || status.st_size < 0 || (uint64_t)status.st_size != size)
        return -EPROTO;
    own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return own < 0 ? -errno : own;
}

int vhd_memfd_open(const char *name, int inherited, size_t size, void **at)
{
    int fd = inherited < 0 ? create(name, size) : adopt(inherited, size);
    int error;

    if (fd < 0)
        return fd;
    *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (*at != MAP_FAILED)
        return fd;
    error = -errno;
    close(fd);
    return error;
}

void vhd_memfd_close(int fd, void *at, size_t size)
{
    munmap(at, size);
    close(fd);
}

int vhd_memfd_clear(int fd, size_t size)
{
    /* A page of which the end is left out is only zeroed, for all who still refer to it too. */
    size_t pages = (size + PAGE_SIZE_MAX - 1) / PAGE_SIZE_MAX * PAGE_SIZE_MAX;
    int rc;

    do {
        rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)pages);
    } while (rc != 0 && errno == EINTR);
    return rc == 0 ? 0 : -errno;
}
