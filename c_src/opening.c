/* opening.c - a started ring's first turn: where it stands is read from guest memory, and what a
 * predecessor left undone is done. On the worker's thread, guarded, before it serves or parks: a
 * page of guest memory may be slow, or gone. Must not know handlers. */
#include "barrier.h"
#include "vhd.h"

static void open_ring(void *argument)
{
    struct vhd_queue *queue = argument;

    if (queue->opening == VHD_OPENING_RESUMED)
        vhd_ring_open_resumed(&queue->ring, queue->shared->push);
    else
        vhd_ring_open(&queue->ring);
    /* What a predecessor gave back last may not have been marked for the migration either. */
    if (queue->opening != VHD_OPENING_NEW)
        vhd_ring_log_all_used(&queue->ring);
}

/* From here on what is shared is of this start. Who dies before leaves that of the start before. */
static void publish(struct vhd_queue *queue)
{
    if (queue->opening != VHD_OPENING_RESUMED)
        queue->shared->push = (struct vhd_ring_push){0, 0};
    if (queue->shared->start_number != queue->start_number)
        queue->shared->taken = 0;
    vhd_queue_publish_position(queue);
    vhd_fence_before_death();
    queue->shared->start_number = queue->start_number;
}

static void open_queue(struct vhd_device *device, struct vhd_queue *queue)
{
    bool inherited = queue->opening != VHD_OPENING_NEW;

    if (vhd_sigbus_guard(open_ring, queue)) {
        publish(queue);
        queue->opening = VHD_OPENING_NONE;
        if (queue->shared->fault != VHD_FAULT_NONE)
            vhd_queue_signal_fault(device, queue);
    } else {
        queue->opening = VHD_OPENING_NONE;
        vhd_queue_quarantine(device, queue, VHD_FAULT_SIGBUS, UINT64_MAX);
    }
    /* The predecessor may have died before it did. */
    if (inherited || queue->owed & VHD_OWED_CALL)
        vhd_queue_call_unasked(device, queue);
}

void vhd_device_open_rings(struct vhd_device *device)
{
    for (uint32_t index = 0; index < device->queue_count; index++)
        if (device->queues[index].opening != VHD_OPENING_NONE)
            open_queue(device, &device->queues[index]);
}
