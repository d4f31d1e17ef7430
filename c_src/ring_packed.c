/* ring_packed.c - packed virtqueues (virtio 1.x, 2.8).
 *
 *   descriptor: le64 addr, le32 len, le16 id, le16 flags
 *   driver and device event suppression: le16 off_wrap, le16 flags
 */
#include "barrier.h"
#include "vhd.h"

enum { DESC_AVAIL = 1 << 7, DESC_USED = 1 << 15 };
enum { EVENTS_ENABLE = 0, EVENTS_DISABLE = 1, EVENTS_DESC = 2 };

static uint8_t *descriptor_at(const struct vhd_ring *ring, uint16_t index)
{
    return ring->desc + (size_t)index * VHD_DESC_SIZE;
}

static bool flags_available(uint16_t flags, uint8_t wrap)
{
    bool avail = flags & DESC_AVAIL;
    bool used = flags & DESC_USED;

    return avail == (wrap != 0) && used != (wrap != 0);
}

static uint16_t load_next_flags(const struct vhd_ring *ring)
{
    return vhd_load16(descriptor_at(ring, ring->position.next_avail) + 14);
}

static void advance(const struct vhd_ring *ring, uint16_t *index, uint8_t *wrap, uint16_t slots)
{
    uint32_t next = (uint32_t)*index + slots;

    if (next >= ring->size) {
        next -= ring->size;
        *wrap ^= 1;
    }
    *index = (uint16_t)next;
}

int vhd_packed_pop(struct vhd_ring *ring, struct vhd_walk *walk, bool data_ranges)
{
    uint16_t index = ring->position.next_avail;
    uint8_t wrap = ring->position.avail_wrap;
    uint16_t first_flags = load_next_flags(ring);
    uint16_t slots = 0;
    struct vhd_descriptor descriptor;

    if (!flags_available(first_flags, wrap))
        return 0;
    vhd_fence_after_avail();
    do {
        const uint8_t *at = descriptor_at(ring, index);
        uint64_t tail = vhd_load64(at + 8); /* len, id and flags in one load */
        int rc;

        if (slots == ring->size)
            return -VHD_FAULT_LOOP;
        descriptor.addr = vhd_load64(at);
        descriptor.size = (uint32_t)tail;
        descriptor.next = (uint16_t)(tail >> 32);
        /* Those that made the chain available are not looked at twice. */
        descriptor.flags = slots == 0 ? first_flags : (uint16_t)(tail >> 48);
        rc = descriptor.flags & VHD_DESC_INDIRECT
                 ? vhd_walk_add_indirect(walk, ring, &descriptor, data_ranges)
                 : vhd_walk_add(walk, ring, &descriptor, data_ranges);
        if (rc != 0)
            return rc;
        advance(ring, &index, &wrap, 1);
        slots++;
    } while (descriptor.flags & VHD_DESC_NEXT);
    /* The id of a chain stands in its last descriptor (2.8.6). */
    if (descriptor.next >= ring->size)
        return -VHD_FAULT_PACKED_ID;
    if (vhd_ring_holds(ring, descriptor.next))
        return -VHD_FAULT_DUPLICATE;
    walk->id = descriptor.next;
    walk->slots = slots;
    ring->position.next_avail = index;
    ring->position.avail_wrap = wrap;
    return 1;
}

/* A packed ring gives back in its descriptor ring, but VMMs log "the used ring" at the address of
 * the device event suppression (QEMU's vq->used_phys), so log_addr says nothing about it. */
static void log_descriptor(const struct vhd_ring *ring, uint16_t index)
{
    if (ring->log != NULL && (ring->features & VHD_RING_LOG_USED))
        (void)vhd_log_mark(ring->log, ring->desc_addr + (uint64_t)index * VHD_DESC_SIZE,
                           VHD_DESC_SIZE);
}

void vhd_packed_push(struct vhd_ring *ring, uint16_t id, uint16_t slots, uint32_t written)
{
    uint8_t *at = descriptor_at(ring, ring->position.next_used);
    uint64_t flags = ring->position.used_wrap ? DESC_AVAIL | DESC_USED : 0;

    if (written != 0)
        flags |= VHD_DESC_WRITE;
    vhd_fence_before_used();
    /* len, id and flags in one store: they replace what the driver wrote, and who dies half-way
     * must leave either a used descriptor or one that a successor can read again. */
    vhd_store64(at + 8, written | (uint64_t)id << 32 | flags << 48);
    log_descriptor(ring, ring->position.next_used);
    advance(ring, &ring->position.next_used, &ring->position.used_wrap, slots);
}

struct vhd_ring_push vhd_packed_announce(const struct vhd_ring *ring, uint16_t slots)
{
    uint16_t wrap = ring->position.used_wrap ? 1u << 15 : 0;

    return (struct vhd_ring_push){ring->position.next_used | wrap, slots};
}

void vhd_packed_catch_up(struct vhd_ring *ring, struct vhd_ring_push push)
{
    struct vhd_ring_position *position = &ring->position;
    bool used = vhd_load16(descriptor_at(ring, position->next_used) + 14) & DESC_USED;

    if (push.slots == 0 || push.slots > ring->size ||
        push.at != vhd_packed_announce(ring, push.slots).at)
        return; /* the position was stored after that push */
    /* Its chain was taken, so its first descriptor was an available one, with the USED bit of the
     * round before. Now AVAIL says nothing: the driver may have found the chain used already, and
     * made the descriptor available again in the round after. Without a push of just this chain
     * USED would say nothing either: what was inside a chain a round ago looks the same. */
    if (used != (position->used_wrap != 0))
        return;
    advance(ring, &position->next_used, &position->used_wrap, push.slots);
    advance(ring, &position->next_avail, &position->avail_wrap, push.slots);
    position->number++;
}

bool vhd_packed_should_call(struct vhd_ring *ring)
{
    uint16_t now = ring->position.next_used;
    uint16_t before = ring->signalled_used;
    bool valid = ring->signalled_valid;
    uint32_t both;
    uint16_t flags, off_wrap, event;

    vhd_fence_store_load();
    both = vhd_load32(ring->avail); /* off_wrap and flags belong together: one load */
    off_wrap = (uint16_t)both;
    flags = (uint16_t)(both >> 16);
    ring->signalled_used = now;
    ring->signalled_valid = true;
    if (flags == EVENTS_DISABLE)
        return false;
    if (flags != EVENTS_DESC || !(ring->features & VHD_RING_EVENT_IDX) || !valid)
        return true;
    event = off_wrap & 0x7fff;
    if (event >= ring->size)
        return true; /* no such descriptor: better one interrupt more than none for ever */
    if ((off_wrap >> 15) != ring->position.used_wrap)
        event = (uint16_t)(event - ring->size);
    if (now <= before)
        before = (uint16_t)(before - ring->size);
    return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

void vhd_packed_kicks_off(struct vhd_ring *ring)
{
    vhd_store16(ring->used + 2, EVENTS_DISABLE);
    vhd_ring_log_used(ring, 0, 4);
}

bool vhd_packed_kicks_on(struct vhd_ring *ring)
{
    if (ring->features & VHD_RING_EVENT_IDX) {
        uint16_t wrap = ring->position.avail_wrap ? 1u << 15 : 0;

        vhd_store16(ring->used, ring->position.next_avail | wrap);
        vhd_fence_before_used(); /* off_wrap before the flags that give it meaning */
        vhd_store16(ring->used + 2, EVENTS_DESC);
    } else {
        vhd_store16(ring->used + 2, EVENTS_ENABLE);
    }
    vhd_ring_log_used(ring, 0, 4);
    vhd_fence_store_load();
    return flags_available(load_next_flags(ring), ring->position.avail_wrap);
}
