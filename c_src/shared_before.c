/* shared_before.c - what a release before this one left, made what this one has: an upgrade goes on
 * with it as with its own. Must not know how any of it is used. */
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "barrier.h"
#include "vhd.h"

struct ring_before {
    struct vhd_ring_position position; /* number: 0 */
    uint8_t started;
    uint8_t enabled;
    uint8_t fault;
    struct vhd_ring_push push;
    uint64_t start_number;
    uint64_t counters[7]; /* kicks and what follows it */
};

/* All that there was before driver_generation was as it is now. Then came so many words of struct
 * vhd_balloon_counters, which has grown since, the disk's counters, and the rings. */
static const struct layout {
    uint32_t version;
    uint32_t balloon_words;
} LAYOUTS[] = {{2, 13}, {3, 14}};

enum { SAME_SIZE = offsetof(struct vhd_shared, driver_generation) };

static size_t balloon_size(const struct layout *layout)
{
    return layout->balloon_words * sizeof(uint64_t);
}

static size_t size_of(const struct layout *layout)
{
    return SAME_SIZE + balloon_size(layout) + sizeof(struct vhd_pmem_counters) +
           sizeof(struct ring_before[VHD_QUEUES_MAX]);
}

_Static_assert(sizeof(struct vhd_ring_shared) - offsetof(struct vhd_ring_shared, kicks) ==
                   sizeof(uint64_t[7]),
               "the counters of a ring are as they were");

static void convert_ring(struct vhd_ring_shared *ring, const struct ring_before *before)
{
    ring->position = before->position;
    ring->fault = before->fault;
    ring->push = before->push;
    ring->start_number = before->start_number;
    ring->fault_addr = UINT64_MAX;
    memcpy(&ring->kicks, before->counters, sizeof before->counters);
    ring->taken = ring->chains != 0; /* since which start it does not say */
}

static void convert_shared(struct vhd_shared *shared, const uint8_t *before,
                           const struct layout *layout)
{
    struct ring_before ring;

    memcpy(shared, before, SAME_SIZE);
    before += SAME_SIZE;
    memcpy(&shared->balloon, before, balloon_size(layout));
    before += balloon_size(layout);
    memcpy(&shared->pmem, before, sizeof shared->pmem);
    before += sizeof shared->pmem;
    for (uint32_t i = 0; i < VHD_QUEUES_MAX; i++) {
        memcpy(&ring, before + i * sizeof ring, sizeof ring);
        convert_ring(&shared->rings[i], &ring);
    }
    shared->driver_generation = VHD_GENERATION_BEFORE;
    shared->version = VHD_SHARED_VERSION;
}

static int convert(int fd, const struct layout *layout)
{
    const struct vhd_shared *head;
    void *old, *at;
    int made = -EPROTO, opened = vhd_memfd_open("", fd, size_of(layout), &old);

    if (opened < 0)
        return opened;
    head = old;
    if (head->magic == VHD_SHARED_MAGIC && head->version == layout->version)
        made = vhd_memfd_open("vhostd-device", -1, sizeof(struct vhd_shared), &at);
    if (made >= 0) {
        convert_shared(at, old, layout);
        munmap(at, sizeof(struct vhd_shared));
    }
    vhd_memfd_close(opened, old, size_of(layout));
    return made;
}

int vhd_shared_convert(int fd)
{
    int rc = -EPROTO;

    for (size_t i = 0; rc == -EPROTO && i < sizeof LAYOUTS / sizeof *LAYOUTS; i++)
        rc = convert(fd, &LAYOUTS[i]);
    return rc;
}

int vhd_given_up_convert(int fd, uint64_t words)
{
    size_t size = (size_t)words * sizeof(uint64_t), begin;
    void *old, *at;
    off_t data = 0, hole;
    int made, opened = vhd_memfd_open("", fd, size, &old);

    if (opened < 0)
        return opened;
    made = vhd_memfd_open("vhostd-given-up", -1, size + sizeof(uint64_t), &at);
    if (made < 0)
        goto close_old;
    while ((data = lseek(opened, data, SEEK_DATA)) >= 0) {
        hole = lseek(opened, data, SEEK_HOLE);
        if (hole < 0)
            break;
        begin = (size_t)data;
        memcpy((uint8_t *)at + begin, (uint8_t *)old + begin, (size_t)hole - begin);
        ((uint64_t *)at)[words] = VHD_GENERATION_BEFORE;
        data = hole;
    }
    munmap(at, size + sizeof(uint64_t));
close_old:
    vhd_memfd_close(opened, old, size);
    return made;
}
