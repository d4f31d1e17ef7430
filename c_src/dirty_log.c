/* dirty_log.c - the migration log of LOG_SHMFD: one bit per 4 KiB guest page, set atomically,
 * because the VMM reads and clears it at the same time. Must not know who writes what. */
#include <stdlib.h>
#include <sys/mman.h>

#include "vhd.h"

/* Whole pages of the file around the window: mmap(2) and munmap(2) of hugetlbfs take no less. */
static int map(struct vhd_log *log, int fd, uint64_t page_size, uint64_t offset)
{
    uint64_t skip = offset % page_size;

    log->map_size = (skip + log->size + page_size - 1) / page_size * page_size;
    log->map =
        mmap(NULL, log->map_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(offset - skip));
    if (log->map == MAP_FAILED)
        return -errno;
    log->bits = (_Atomic uint8_t *)((uint8_t *)log->map + skip);
    return 0;
}

vhd_log *vhd_log_create(int fd, uint64_t size, uint64_t offset, int *error)
{
    struct vhd_backing backing;
    struct vhd_log *log;

    *error = vhd_backing_inspect(fd, &backing);
    if (*error == 0 && (size == 0 || size > backing.size || offset > backing.size - size))
        *error = -EINVAL;
    if (*error != 0)
        return NULL;
    log = calloc(1, sizeof *log);
    if (log == NULL) {
        *error = -ENOMEM;
        return NULL;
    }
    log->size = size;
    *error = map(log, fd, backing.page_size, offset);
    if (*error != 0) {
        free(log);
        return NULL;
    }
    return log;
}

void vhd_log_destroy(vhd_log *log)
{
    if (log == NULL)
        return;
    int rc = munmap(log->map, log->map_size);
    assert(rc == 0);
    (void)rc;
    free(log);
}

bool vhd_log_mark(struct vhd_log *log, uint64_t guest_addr, uint64_t size)
{
    if (size == 0)
        return true;
    uint64_t first = guest_addr / VHD_GUEST_PAGE_SIZE;
    uint64_t last = size - 1 > UINT64_MAX - guest_addr
                        ? UINT64_MAX / VHD_GUEST_PAGE_SIZE
                        : (guest_addr + size - 1) / VHD_GUEST_PAGE_SIZE;
    uint64_t pages = log->size * 8;
    bool whole = last < pages;

    if (first >= pages)
        return false;
    if (!whole)
        last = pages - 1;
    for (uint64_t byte = first / 8; byte <= last / 8; byte++) {
        uint64_t low = byte == first / 8 ? first % 8 : 0;
        uint64_t high = byte == last / 8 ? last % 8 : 7;

        atomic_fetch_or_explicit(&log->bits[byte], (uint8_t)(0xffu << low & 0xffu >> (7 - high)),
                                 memory_order_release);
    }
    return whole;
}
