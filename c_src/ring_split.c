/* ring_split.c - split virtqueues (virtio 1.x, 2.7).
 *
 *   avail: le16 flags, le16 idx, le16 ring[size], le16 used_event
 *   used:  le16 flags, le16 idx, {le32 id, le32 len} ring[size], le16 avail_event
 */
#include "barrier.h"
#include "vhd.h"

enum { AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1 };

static uint16_t load_avail_idx(const struct vhd_ring *ring)
{
    return vhd_load16(ring->avail + 2);
}

static void load_descriptor(const struct vhd_ring *ring, uint16_t index,
                            struct vhd_descriptor *descriptor)
{
    const uint8_t *at = ring->desc + (size_t)index * VHD_DESC_SIZE;
    uint64_t tail = vhd_load64(at + 8); /* len, flags and next in one load */

    descriptor->addr = vhd_load64(at);
    descriptor->size = (uint32_t)tail;
    descriptor->flags = (uint16_t)(tail >> 32);
    descriptor->next = (uint16_t)(tail >> 48);
}

static int walk_chain(struct vhd_ring *ring, uint16_t head, struct vhd_walk *walk, bool data_ranges)
{
    uint16_t index = head;

    for (uint32_t steps = 0; steps < ring->size; steps++) {
        struct vhd_descriptor descriptor;
        int rc;

        load_descriptor(ring, index, &descriptor);
        if (descriptor.flags & VHD_DESC_INDIRECT)
            return vhd_walk_add_indirect(walk, ring, &descriptor, data_ranges);
        rc = vhd_walk_add(walk, ring, &descriptor, data_ranges);
        if (rc != 0)
            return rc;
        if (!(descriptor.flags & VHD_DESC_NEXT))
            return 0;
        if (descriptor.next >= ring->size)
            return -VHD_FAULT_NEXT;
        index = descriptor.next;
    }
    return -VHD_FAULT_LOOP;
}

int vhd_split_pop(struct vhd_ring *ring, struct vhd_walk *walk, bool data_ranges)
{
    uint16_t next = ring->position.next_avail;
    uint16_t pending = (uint16_t)(load_avail_idx(ring) - next);
    uint16_t head;
    int rc;

    if (pending == 0)
        return 0;
    if (pending > ring->size)
        return -VHD_FAULT_AVAIL_INDEX;
    vhd_fence_after_avail();
    head = vhd_load16(ring->avail + 4 + 2 * (size_t)(next & (ring->size - 1)));
    if (head >= ring->size)
        return -VHD_FAULT_HEAD;
    if (vhd_ring_holds(ring, head))
        return -VHD_FAULT_DUPLICATE;
    rc = walk_chain(ring, head, walk, data_ranges);
    if (rc != 0)
        return rc;
    walk->id = head;
    walk->slots = 1;
    ring->position.next_avail = (uint16_t)(next + 1);
    return 1;
}

void vhd_split_push(struct vhd_ring *ring, uint16_t id, uint32_t written)
{
    uint16_t next = ring->position.next_used;
    size_t offset = 4 + 8 * (size_t)(next & (ring->size - 1));

    vhd_store32(ring->used + offset, id);
    vhd_store32(ring->used + offset + 4, written);
    vhd_ring_log_used(ring, offset, 8);
    vhd_fence_before_used();
    ring->position.next_used = (uint16_t)(next + 1);
    vhd_store16(ring->used + 2, ring->position.next_used);
    vhd_ring_log_used(ring, 2, 2);
}

bool vhd_split_should_call(struct vhd_ring *ring)
{
    uint16_t now = ring->position.next_used;
    uint16_t before = ring->signalled_used;
    bool valid = ring->signalled_valid;
    uint16_t event;

    vhd_fence_store_load();
    if (!(ring->features & VHD_RING_EVENT_IDX))
        return !(vhd_load16(ring->avail) & AVAIL_NO_INTERRUPT);
    ring->signalled_used = now;
    ring->signalled_valid = true;
    if (!valid)
        return true;
    event = vhd_load16(ring->avail + 4 + 2 * (size_t)ring->size);
    /* vring_need_event() of virtio 1.x, 2.7.7.1: did used.idx pass event since last time? */
    return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

void vhd_split_kicks_off(struct vhd_ring *ring)
{
    /* With the event index a stale avail_event does the same: kicks come when it is passed. */
    if (!(ring->features & VHD_RING_EVENT_IDX)) {
        vhd_store16(ring->used, USED_NO_NOTIFY);
        vhd_ring_log_used(ring, 0, 2);
    }
}

bool vhd_split_kicks_on(struct vhd_ring *ring)
{
    if (ring->features & VHD_RING_EVENT_IDX) {
        size_t offset = 4 + 8 * (size_t)ring->size;

        vhd_store16(ring->used + offset, ring->position.next_avail);
        vhd_ring_log_used(ring, offset, 2);
    } else {
        vhd_store16(ring->used, 0);
        vhd_ring_log_used(ring, 0, 2);
    }
    vhd_fence_store_load();
    return load_avail_idx(ring) != ring->position.next_avail;
}
