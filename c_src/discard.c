/* discard.c - the one place that gives memory back to the host. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <linux/falloc.h>

#include "vhd.h"

/* Punches a hole rather than calling madvise(MADV_DONTNEED): the file is mapped by the VMM too, and
 * DONTNEED would only drop our own view of pages the VMM keeps alive. The kernel takes the range
 * out of every page table that maps it. */
int vhd_discard(const struct vhd_mapping *mapping, uint64_t offset, uint64_t size)
{
    int rc;

    assert(size != 0 && (offset | size) % mapping->page_size == 0);
    assert(offset <= mapping->size && size <= mapping->size - offset);
    do {
        rc = fallocate(mapping->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                       (off_t)size);
    } while (rc != 0 && errno == EINTR);
    return rc == 0 ? 0 : -errno;
}
