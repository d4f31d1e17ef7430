/* window.c - ranges of a guest memory file that a virtio-mem device plugs and unplugs: give them
 * back, fill them ahead, see what lies in them. Must not know which of them are plugged. */
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vhd.h"

static bool whole_pages(const struct vhd_mapping *mapping, uint64_t offset, uint64_t size)
{
    return size != 0 && (offset | size) % mapping->page_size == 0 && offset <= mapping->size &&
           size <= mapping->size - offset;
}

int vhd_mapping_discard(vhd_mapping *mapping, uint64_t offset, uint64_t size)
{
    if (!whole_pages(mapping, offset, size))
        return -EINVAL;
    return vhd_discard(mapping, offset, size);
}

/* Through the file and not through our mapping: no page table of ours grows, and want of memory is
 * an error here instead of a signal. */
int vhd_mapping_populate(vhd_mapping *mapping, uint64_t offset, uint64_t size)
{
    int rc;

    if (!whole_pages(mapping, offset, size))
        return -EINVAL;
    do {
        rc = fallocate(mapping->fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size);
    } while (rc != 0 && errno == EINTR);
    return rc == 0 ? 0 : -errno;
}

/* The file position that lseek(2) moves is shared with the VMM's descriptor. Nobody uses it: guest
 * memory is mapped, and what is found is the return value. */
int vhd_mapping_next_data(const vhd_mapping *mapping, uint64_t offset, uint64_t size,
                          uint64_t *begin, uint64_t *end)
{
    off_t data, hole;

    if (!whole_pages(mapping, offset, size))
        return -EINVAL;
    /* hugetlbfs calls the whole file data (mm/hugetlb.c has no llseek of its own). */
    if (mapping->page_size != VHD_GUEST_PAGE_SIZE)
        return -EOPNOTSUPP;
    data = lseek(mapping->fd, (off_t)offset, SEEK_DATA);
    if (data < 0)
        return errno == ENXIO ? 0 : -errno;
    if ((uint64_t)data >= offset + size)
        return 0;
    hole = lseek(mapping->fd, data, SEEK_HOLE);
    if (hole < 0)
        return errno == ENXIO ? 0 : -errno; /* given back meanwhile */
    *begin = (uint64_t)data;
    *end = (uint64_t)hole < offset + size ? (uint64_t)hole : offset + size;
    return *end > *begin;
}

int64_t vhd_mapping_resident_size(const vhd_mapping *mapping)
{
    struct stat status;

    if (fstat(mapping->fd, &status) != 0)
        return -errno;
    return (int64_t)status.st_blocks * 512;
}

/* The policy of a shared mapping is kept with the file (shmem, hugetlbfs), so the VMM's page faults
 * and our population obey it as well. */
int vhd_mapping_bind(vhd_mapping *mapping, uint64_t offset, uint64_t size, uint32_t node)
{
    unsigned long nodes[1024 / (8 * sizeof(unsigned long))] = {0};
    const uint32_t bits = 8 * sizeof nodes[0];

    if (!whole_pages(mapping, offset, size) || node >= 8 * sizeof nodes)
        return -EINVAL;
    nodes[node / bits] = 1ul << (node % bits);
    /* The kernel takes one bit less than it is told. */
    if (syscall(SYS_mbind, mapping->host + offset, size, MPOL_BIND, nodes, 8 * sizeof nodes + 1,
                0) != 0)
        return -errno;
    return 0;
}
