/* chain.c - the descriptors of one chain, in order, into a private copy; what both layouts share.
 * Must not know how a layout finds its next descriptor. */
#include <string.h>

#include "vhd.h"

void vhd_walk_begin(struct vhd_walk *walk)
{
    walk->id = 0;
    walk->slots = 0;
    walk->readable_count = 0;
    walk->writable_count = 0;
    walk->readable_size = 0;
    walk->writable_size = 0;
    walk->outside = UINT64_MAX;
}

static int outside(struct vhd_walk *walk, const struct vhd_ring *ring,
                   const struct vhd_descriptor *descriptor)
{
    (void)vhd_table_outside(ring->table, descriptor->addr, descriptor->size, &walk->outside);
    return -VHD_FAULT_ADDRESS;
}

int vhd_walk_add(struct vhd_walk *walk, const struct vhd_ring *ring,
                 const struct vhd_descriptor *descriptor, bool data_ranges)
{
    bool writable = descriptor->flags & VHD_DESC_WRITE;
    uint32_t at = (uint32_t)walk->readable_count + walk->writable_count;

    if (at == VHD_CHAIN_SEGMENTS_MAX)
        return -VHD_FAULT_CHAIN_LENGTH;
    if (descriptor->size == 0)
        return -VHD_FAULT_ZERO_LENGTH;
    if (!writable && walk->writable_count != 0)
        return -VHD_FAULT_ORDER;
    /* At most 1024 sizes of 32 bits: the sum of 64 bits cannot wrap. */
    if (data_ranges && walk->readable_size + walk->writable_size + descriptor->size > UINT32_MAX)
        return -VHD_FAULT_SIZE;
    if (data_ranges && !vhd_table_covers(ring->table, descriptor->addr, descriptor->size))
        return outside(walk, ring, descriptor);
    walk->segments[at] = (struct vhd_segment){descriptor->addr, descriptor->size};
    if (writable) {
        walk->writable_count++;
        walk->writable_size += descriptor->size;
    } else {
        walk->readable_count++;
        walk->readable_size += descriptor->size;
    }
    return 0;
}

static void unpack(const uint8_t *bytes, struct vhd_descriptor *descriptor)
{
    memcpy(&descriptor->addr, bytes, sizeof descriptor->addr);
    memcpy(&descriptor->size, bytes + 8, sizeof descriptor->size);
    /* flags and next stand the other way round in a packed descriptor; the caller knows. */
    memcpy(&descriptor->flags, bytes + 12, sizeof descriptor->flags);
    memcpy(&descriptor->next, bytes + 14, sizeof descriptor->next);
}

/* Packed tables have no next: their descriptors stand in order (virtio 1.x, 2.8.8). */
static int walk_packed_table(struct vhd_walk *walk, const struct vhd_ring *ring, uint32_t count,
                             bool data_ranges)
{
    for (uint32_t i = 0; i < count; i++) {
        struct vhd_descriptor entry;

        unpack(walk->indirect + (size_t)i * VHD_DESC_SIZE, &entry);
        entry.flags = entry.next; /* packed: le16 id at 12, le16 flags at 14 */
        if (entry.flags & VHD_DESC_INDIRECT)
            return -VHD_FAULT_INDIRECT;
        int rc = vhd_walk_add(walk, ring, &entry, data_ranges);
        if (rc != 0)
            return rc;
    }
    return 0;
}

static int walk_split_table(struct vhd_walk *walk, const struct vhd_ring *ring, uint32_t count,
                            bool data_ranges)
{
    uint32_t at = 0;

    for (uint32_t steps = 0; steps < count; steps++) {
        struct vhd_descriptor entry;

        unpack(walk->indirect + (size_t)at * VHD_DESC_SIZE, &entry);
        if (entry.flags & VHD_DESC_INDIRECT)
            return -VHD_FAULT_INDIRECT;
        int rc = vhd_walk_add(walk, ring, &entry, data_ranges);
        if (rc != 0)
            return rc;
        if (!(entry.flags & VHD_DESC_NEXT))
            return 0;
        if (entry.next >= count)
            return -VHD_FAULT_NEXT;
        at = entry.next;
    }
    return -VHD_FAULT_LOOP;
}

int vhd_walk_add_indirect(struct vhd_walk *walk, const struct vhd_ring *ring,
                          const struct vhd_descriptor *descriptor, bool data_ranges)
{
    uint32_t count = descriptor->size / VHD_DESC_SIZE;

    if (!(ring->features & VHD_RING_INDIRECT) || (descriptor->flags & VHD_DESC_NEXT) ||
        descriptor->size == 0 || descriptor->size % VHD_DESC_SIZE != 0)
        return -VHD_FAULT_INDIRECT;
    if (count > VHD_CHAIN_SEGMENTS_MAX)
        return -VHD_FAULT_CHAIN_LENGTH;
    /* The whole table at once, so that the guest cannot change an entry between two looks. */
    if (vhd_table_read(ring->table, descriptor->addr, walk->indirect, descriptor->size) != 0)
        return outside(walk, ring, descriptor);
    return ring->features & VHD_RING_PACKED ? walk_packed_table(walk, ring, count, data_ranges)
                                            : walk_split_table(walk, ring, count, data_ranges);
}
