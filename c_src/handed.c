/* handed.c - chains on their way through Python: taken in ring order, given back in that order.
 *
 * Order makes a stop simple: what was not completed is one stretch of the ring, from its oldest
 * chain on, and comes again when the ring starts there. Only the worker touches guest memory here;
 * the lock guards counters and entries, and is never held over guest memory, because a SIGBUS there
 * leaves by a long jump. Must not know what Python does with a chain. */
#include <string.h>
#include <sys/mman.h>

#include "vhd.h"

static struct vhd_handed_chain *entry_of(struct vhd_queue *queue, uint32_t token)
{
    return &queue->handed[token % VHD_CONTROL_CHAINS_MAX];
}

bool vhd_handed_full(const struct vhd_queue *queue)
{
    return queue->handed == NULL || queue->popped - queue->oldest == VHD_CONTROL_CHAINS_MAX;
}

static int copy_readable(const struct vhd_table *table, const struct vhd_walk *walk,
                         struct vhd_handed_chain *entry)
{
    uint32_t room = VHD_CONTROL_READABLE_MAX;
    uint8_t *to = entry->bytes;

    for (uint32_t i = 0; i < walk->readable_count && room != 0; i++) {
        const struct vhd_segment *segment = &walk->segments[i];
        uint32_t size = segment->size < room ? segment->size : room;

        if (vhd_table_read(table, segment->guest_addr, to, size) != 0)
            return -VHD_FAULT_ADDRESS;
        to += size;
        room -= size;
    }
    entry->chain.copied_size = VHD_CONTROL_READABLE_MAX - room;
    return 0;
}

static void describe_writable(const struct vhd_walk *walk, struct vhd_handed_chain *entry)
{
    const struct vhd_segment *first = &walk->segments[walk->readable_count];
    uint32_t kept = walk->writable_count;

    if (kept > VHD_CONTROL_WRITABLE_MAX)
        kept = VHD_CONTROL_WRITABLE_MAX; /* no descriptor is empty, so these hold an answer */
    memcpy(entry->segments, first, kept * sizeof *first);
    entry->segment_count = (uint16_t)kept;
    entry->chain.writable_count = walk->writable_count;
    entry->chain.writable_size = walk->writable_size;
    entry->chain.writable_addr = walk->writable_count != 0 ? first->guest_addr : 0;
}

int vhd_handed_put(struct vhd_device *device, struct vhd_queue *queue, const struct vhd_walk *walk,
                   struct vhd_ring_position before)
{
    struct vhd_handed_chain *entry = entry_of(queue, queue->popped);
    int rc = copy_readable(&device->tables[device->table], walk, entry);

    if (rc != 0)
        return rc;
    describe_writable(walk, entry);
    entry->chain.token = queue->popped;
    entry->chain.readable_size =
        walk->readable_size > UINT32_MAX ? UINT32_MAX : (uint32_t)walk->readable_size;
    entry->before = before;
    entry->chain.position = before.number | (uint32_t)before.next_avail << 16;
    if (queue->ring.features & VHD_RING_PACKED)
        entry->chain.position |= (uint32_t)before.avail_wrap << 31;
    entry->id = walk->id;
    entry->slots = walk->slots;
    entry->completed = false;
    entry->answer_size = 0;
    pthread_mutex_lock(&device->lock);
    queue->popped++;
    pthread_mutex_unlock(&device->lock);
    return 1;
}

int vhd_chain_take(vhd_device *device, uint32_t index, struct vhd_chain *chain, uint8_t *bytes)
{
    struct vhd_queue *queue = &device->queues[index];
    int found = 0;

    assert(index < device->queue_count);
    pthread_mutex_lock(&device->lock);
    if (queue->started && queue->handler != VHD_HANDLER_FLUSH && queue->taken != queue->popped) {
        const struct vhd_handed_chain *entry = entry_of(queue, queue->taken);

        *chain = entry->chain;
        memcpy(bytes, entry->bytes, entry->chain.copied_size);
        queue->taken++;
        found = 1;
    }
    pthread_mutex_unlock(&device->lock);
    return found;
}

int vhd_chain_complete(vhd_device *device, uint32_t index, uint32_t token, const uint8_t *bytes,
                       uint32_t size)
{
    struct vhd_queue *queue = &device->queues[index];
    int rc = -ESTALE;

    assert(index < device->queue_count);
    if (size > VHD_CONTROL_WRITABLE_MAX)
        return -EINVAL;
    pthread_mutex_lock(&device->lock);
    if (queue->started && token - queue->oldest < queue->taken - queue->oldest &&
        !entry_of(queue, token)->completed) {
        struct vhd_handed_chain *entry = entry_of(queue, token);

        memcpy(entry->answer, bytes, size);
        entry->answer_size = size;
        entry->completed = true;
        rc = 0;
    }
    pthread_mutex_unlock(&device->lock);
    if (rc == 0 && device->worker != NULL) {
        atomic_store(&device->mail, true);
        vhd_worker_wake(device->worker);
    }
    return rc;
}

/* Write the answer into the chain's writable part; returns the bytes that found room, or
 * -VHD_FAULT_ADDRESS: the memory table may have changed since the chain was taken. */
static int64_t write_answer(struct vhd_device *device, const struct vhd_handed_chain *entry)
{
    const struct vhd_table *table = &device->tables[device->table];
    const uint8_t *from = entry->answer;
    uint32_t left = entry->answer_size;

    for (uint32_t i = 0; i < entry->segment_count && left != 0; i++) {
        const struct vhd_segment *segment = &entry->segments[i];
        uint32_t size = segment->size < left ? segment->size : left;

        if (vhd_table_write(table, segment->guest_addr, from, size) != 0)
            return -VHD_FAULT_ADDRESS;
        if (device->balloon.log != NULL)
            (void)vhd_log_mark(device->balloon.log, segment->guest_addr, size);
        from += size;
        left -= size;
    }
    return entry->answer_size - left;
}

int vhd_handed_deliver_one(struct vhd_device *device, struct vhd_queue *queue)
{
    struct vhd_handed_chain *entry = entry_of(queue, queue->oldest);
    bool completed;
    int64_t written;

    pthread_mutex_lock(&device->lock);
    completed = queue->oldest != queue->taken && entry->completed;
    pthread_mutex_unlock(&device->lock);
    if (!completed)
        return 0;
    written = write_answer(device, entry);
    if (written < 0)
        return (int)written;
    vhd_queue_give_back(queue, entry->id, entry->slots, (uint32_t)written);
    pthread_mutex_lock(&device->lock);
    queue->oldest++;
    pthread_mutex_unlock(&device->lock);
    vhd_queue_publish_position(queue);
    return 1;
}

static size_t handed_size(void)
{
    return VHD_CONTROL_CHAINS_MAX * sizeof(struct vhd_handed_chain);
}

int vhd_handed_open(struct vhd_queue *queue)
{
    /* Whether Python serves this ring is known only later; untouched pages cost nothing. Not
     * calloc(), which clears, and so touches, what was freed before. */
    void *at = mmap(NULL, handed_size(), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (at == MAP_FAILED)
        return -errno;
    queue->handed = at;
    return 0;
}

void vhd_handed_close(struct vhd_queue *queue)
{
    munmap(queue->handed, handed_size());
    queue->handed = NULL;
    /* Counted on, not from 0: a token of before the stop must never fit a chain of after it. */
    queue->oldest = queue->taken = queue->popped;
}
