/* flush.c - virtio-pmem requests: taken from the ring, answered after one sync for all of them.
 *
 * The worker itself syncs, since no other thread could answer sooner; meanwhile it counts as
 * parked, so that a VMM that stops the device need not wait for a disk. Chains wait in the entries
 * of handed.c, where those between taken and popped have not been answered. Must not know files. */
#include <string.h>

#include "vhd.h"

enum { REQUEST_FLUSH = 0, REQUEST_SIZE = 4, RESPONSE_SIZE = 4 }; /* virtio 1.x, 5.19.6 */

static void count(uint64_t *counter)
{
    __atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED);
}

static struct vhd_handed_chain *entry_of(struct vhd_queue *queue, uint32_t token)
{
    return &queue->handed[token % VHD_CONTROL_CHAINS_MAX];
}

static void answer(struct vhd_device *device, struct vhd_handed_chain *entry, bool failed)
{
    struct vhd_pmem_counters *counters = &device->shared->pmem;

    memset(entry->answer, failed ? 0xff : 0, RESPONSE_SIZE); /* 0 or -1, nothing else is legal */
    entry->answer_size = RESPONSE_SIZE;
    entry->completed = true;
    count(&counters->flushes);
    if (failed)
        count(&counters->flush_errors);
}

static bool is_flush(const struct vhd_handed_chain *entry)
{
    uint32_t type = UINT32_MAX;

    if (entry->chain.copied_size >= REQUEST_SIZE)
        memcpy(&type, entry->bytes, REQUEST_SIZE);
    return type == REQUEST_FLUSH;
}

int vhd_flush_put(struct vhd_device *device, struct vhd_queue *queue, const struct vhd_walk *walk,
                  struct vhd_ring_position before)
{
    struct vhd_handed_chain *entry = entry_of(queue, queue->popped);
    int rc = vhd_handed_put(device, queue, walk, before);

    if (rc < 0)
        return rc;
    if (entry->chain.writable_size < RESPONSE_SIZE) {
        entry->completed = true; /* there is nowhere to say anything */
        count(&queue->shared->rejected);
        count(&device->shared->pmem.malformed);
    } else if (!is_flush(entry)) {
        answer(device, entry, true);
        count(&device->shared->pmem.malformed);
    }
    if (entry->completed && queue->taken + 1 == queue->popped) {
        queue->taken = queue->popped; /* nothing before it waits for a sync */
        atomic_store(&device->mail, true);
        vhd_worker_wake(device->worker);
    }
    return 1;
}

bool vhd_flush_due(const struct vhd_queue *queue)
{
    return queue->started && queue->handler == VHD_HANDLER_FLUSH && queue->taken != queue->popped &&
           queue->shared->fault == VHD_FAULT_NONE;
}

/* The chains before `end` that are still there have waited for a sync that is over. */
static void answer_until(struct vhd_device *device, struct vhd_queue *queue, uint32_t end,
                         bool failed)
{
    uint32_t waiting = queue->popped - queue->taken;
    uint32_t over = end - queue->taken;

    /* A ring that was stopped meanwhile counts on, so that its old chains lie behind it. */
    if (!queue->started || queue->handler != VHD_HANDLER_FLUSH || over > waiting)
        return;
    for (uint32_t token = queue->taken; token != end; token++)
        if (!entry_of(queue, token)->completed)
            answer(device, entry_of(queue, token), failed);
    queue->taken = end;
    vhd_queue_deliver(device, queue);
}

void vhd_flush(struct vhd_worker *worker, struct vhd_device *device, uint32_t index)
{
    struct vhd_image *image = device->image;
    uint32_t end = device->queues[index].popped;
    uint32_t slot = device->slot;
    bool failed = true;

    if (image != NULL) {
        vhd_image_hold(image);
        count(&device->shared->pmem.batches);
        vhd_worker_leave(worker);
        failed = vhd_image_sync(image) != 0;
        vhd_worker_return(worker);
        /* The device may be gone; while the image is held no other can have the same one. */
        device = vhd_worker_device(worker, slot);
        if (device != NULL && device->image != image)
            device = NULL;
        vhd_image_release(image);
    }
    if (device == NULL)
        return;
    answer_until(device, &device->queues[index], end, failed);
    if (failed)
        vhd_device_raise(device, VHD_EVENT_FLUSH_FAILED);
}
