/* ring.c - a virtqueue's start, and the choice of its layout. Must not know devices or threads. */
#include <string.h>

#include "barrier.h"
#include "vhd.h"

struct part {
    uint64_t addr;
    uint64_t size;
    uint64_t alignment;
};

/* virtio 1.x, 2.7 "Split Virtqueues" and 2.8 "Packed Virtqueues". */
static void parts_of(const struct vhd_ring *ring, struct part parts[3])
{
    uint64_t size = ring->size;
    uint64_t event_size = ring->features & VHD_RING_EVENT_IDX ? 2 : 0;

    parts[0] = (struct part){ring->desc_addr, VHD_DESC_SIZE * size, 16};
    if (ring->features & VHD_RING_PACKED) {
        parts[1] = (struct part){ring->avail_addr, 4, 4};
        parts[2] = (struct part){ring->used_addr, 4, 4};
    } else {
        parts[1] = (struct part){ring->avail_addr, 4 + 2 * size + event_size, 2};
        parts[2] = (struct part){ring->used_addr, 4 + 8 * size + event_size, 4};
    }
}

static bool overlap(const struct part *a, const struct part *b)
{
    return a->addr < b->addr + b->size && b->addr < a->addr + a->size;
}

int vhd_ring_translate(struct vhd_ring *ring, const struct vhd_table *table)
{
    struct part parts[3];
    uint8_t *host[3];

    parts_of(ring, parts);
    for (int i = 0; i < 3; i++) {
        if (parts[i].addr % parts[i].alignment != 0)
            return -EFAULT;
        host[i] = vhd_table_contiguous(table, parts[i].addr, parts[i].size);
        /* A region may lie off its alignment in the file; atomic loads need it here too. */
        if (host[i] == NULL || (uintptr_t)host[i] % parts[i].alignment != 0)
            return -EFAULT;
    }
    /* They lie in guest memory, so no sum above can wrap. */
    if (overlap(&parts[0], &parts[1]) || overlap(&parts[0], &parts[2]) ||
        overlap(&parts[1], &parts[2]))
        return -EFAULT;
    ring->desc = host[0];
    ring->avail = host[1];
    ring->used = host[2];
    ring->table = table;
    return 0;
}

static bool size_is_legal(uint32_t size, bool packed)
{
    if (size == 0 || size > VHD_QUEUE_SIZE_MAX)
        return false;
    return packed || (size & (size - 1)) == 0;
}

int vhd_ring_init(struct vhd_ring *ring, const struct vhd_table *table,
                  const struct vhd_ring_setup *setup)
{
    bool packed = setup->features & VHD_RING_PACKED;
    struct vhd_ring_position position = setup->position;

    if (!size_is_legal(setup->size, packed))
        return -EINVAL;
    if (packed && (position.next_avail >= setup->size || position.next_used >= setup->size ||
                   position.avail_wrap > 1 || position.used_wrap > 1))
        return -EINVAL;
    memset(ring, 0, sizeof *ring);
    ring->size = setup->size;
    ring->features = setup->features;
    ring->desc_addr = setup->desc_addr;
    ring->avail_addr = setup->avail_addr;
    ring->used_addr = setup->used_addr;
    ring->log_addr = setup->log_addr;
    ring->position = position;
    return vhd_ring_translate(ring, table);
}

void vhd_ring_open(struct vhd_ring *ring)
{
    /* A split ring says itself what was given back (vhost-user, "Ring states"); the VMM's base is
     * only where to go on taking. */
    if (!(ring->features & VHD_RING_PACKED))
        ring->position.next_used = vhd_load16(ring->used + 2);
}

void vhd_ring_open_resumed(struct vhd_ring *ring, struct vhd_ring_push push)
{
    uint16_t ahead = (uint16_t)(ring->position.next_avail - ring->position.next_used);
    uint16_t stored = ring->position.next_avail;

    if (ring->features & VHD_RING_PACKED) {
        vhd_packed_catch_up(ring, push);
        return;
    }
    vhd_ring_open(ring);
    /* Chains are given back in ring order, so what is not in the used ring is owed. The two indexes
     * rise together; they differ if the VMM's base was not where the used ring ended. */
    ring->position.next_avail = (uint16_t)(ring->position.next_used + ahead);
    ring->position.number += (uint16_t)(ring->position.next_avail - stored);
}

int vhd_ring_pop(struct vhd_ring *ring, struct vhd_walk *walk, bool data_ranges)
{
    int rc;

    vhd_walk_begin(walk);
    rc = ring->features & VHD_RING_PACKED ? vhd_packed_pop(ring, walk, data_ranges)
                                          : vhd_split_pop(ring, walk, data_ranges);
    if (rc > 0) {
        ring->in_flight[walk->id / 64] |= 1ull << (walk->id % 64);
        ring->in_flight_count++;
        ring->position.number++;
    }
    return rc;
}

struct vhd_ring_push vhd_ring_announce(const struct vhd_ring *ring, uint16_t slots)
{
    if (ring->features & VHD_RING_PACKED)
        return vhd_packed_announce(ring, slots);
    return (struct vhd_ring_push){0, 0}; /* used.idx says it all */
}

void vhd_ring_push(struct vhd_ring *ring, uint16_t id, uint16_t slots, uint32_t written)
{
    assert(vhd_ring_holds(ring, id) && ring->in_flight_count > 0);
    ring->in_flight[id / 64] &= ~(1ull << (id % 64));
    ring->in_flight_count--;
    if (ring->features & VHD_RING_PACKED)
        vhd_packed_push(ring, id, slots, written);
    else
        vhd_split_push(ring, id, written);
}

bool vhd_ring_should_call(struct vhd_ring *ring)
{
    return ring->features & VHD_RING_PACKED ? vhd_packed_should_call(ring)
                                            : vhd_split_should_call(ring);
}

void vhd_ring_kicks_off(struct vhd_ring *ring)
{
    if (ring->features & VHD_RING_PACKED)
        vhd_packed_kicks_off(ring);
    else
        vhd_split_kicks_off(ring);
}

bool vhd_ring_kicks_on(struct vhd_ring *ring)
{
    return ring->features & VHD_RING_PACKED ? vhd_packed_kicks_on(ring) : vhd_split_kicks_on(ring);
}

void vhd_ring_log_used(struct vhd_ring *ring, uint64_t offset, uint64_t size)
{
    if (ring->log != NULL && (ring->features & VHD_RING_LOG_USED))
        (void)vhd_log_mark(ring->log, ring->log_addr + offset, size);
}

void vhd_ring_log_all_used(struct vhd_ring *ring)
{
    struct part parts[3];

    parts_of(ring, parts);
    vhd_ring_log_used(ring, 0, parts[2].size);
    if (ring->features & VHD_RING_PACKED && ring->log != NULL && ring->features & VHD_RING_LOG_USED)
        (void)vhd_log_mark(ring->log, parts[0].addr, parts[0].size);
}
