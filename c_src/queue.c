/* queue.c - one turn of one ring: take chains, have them handled, give them back, interrupt.
 *
 * A guest's fault stops this ring until its next start and nothing else. Must not know layouts,
 * nor what a handler does. */
#include <string.h>
#include <sys/epoll.h>

#include "barrier.h"
#include "vhd.h"

static void count(uint64_t *counter, uint64_t by)
{
    __atomic_store_n(counter, *counter + by, __ATOMIC_RELAXED);
}

void vhd_queue_call_unasked(struct vhd_device *device, struct vhd_queue *queue)
{
    queue->owed &= ~(uint32_t)VHD_OWED_CALL;
    queue->call_missed = queue->call_fd < 0;
    if (queue->call_missed)
        return;
    count(&queue->shared->calls, 1); /* before: who is woken by it may look at once */
    switch (vhd_worker_signal(device->worker, queue->call_fd)) {
    case VHD_SIGNAL_SENT:
        return;
    case VHD_SIGNAL_FULL:
        count(&queue->shared->calls_dropped, 1);
        break;
    case VHD_SIGNAL_INTERRUPTED:
        queue->owed |= VHD_OWED_CALL;
        queue->look = true;
        break;
    }
    count(&queue->shared->calls, UINT64_MAX);
}

void vhd_queue_set_call(struct vhd_queue *queue, int fd)
{
    queue->call_fd = fd;
    if (fd < 0 || !queue->call_missed)
        return;
    queue->call_missed = false;
    queue->owed |= VHD_OWED_CALL;
    queue->look = true;
}

void vhd_queue_call(struct vhd_device *device, struct vhd_queue *queue)
{
    if (vhd_ring_should_call(&queue->ring))
        vhd_queue_call_unasked(device, queue);
}

/* The driver knows of a given back chain before the position says so. A successor finds out at the
 * ring itself whether that had happened, but of a packed ring not how long the chain was. */
void vhd_queue_give_back(struct vhd_queue *queue, uint16_t id, uint16_t slots, uint32_t written)
{
    typedef uint32_t __attribute__((may_alias)) whole;
    struct vhd_ring_push push = vhd_ring_announce(&queue->ring, slots);

    _Static_assert(sizeof push == sizeof(whole) &&
                       offsetof(struct vhd_ring_shared, push) % sizeof(whole) == 0,
                   "no successor finds half of it");
    __atomic_store_n((whole *)&queue->shared->push, *(const whole *)&push, __ATOMIC_RELAXED);
    vhd_fence_before_death();
    vhd_ring_push(&queue->ring, id, slots, written);
    vhd_fence_before_death();
    count(&queue->shared->used, 1);
}

void vhd_queue_publish_position(struct vhd_queue *queue)
{
    typedef uint64_t __attribute__((may_alias)) whole;
    struct vhd_ring_position position = vhd_queue_position(queue);

    _Static_assert(sizeof position == sizeof(whole) &&
                       offsetof(struct vhd_ring_shared, position) % sizeof(whole) == 0,
                   "no successor finds half of it");
    __atomic_store_n((whole *)&queue->shared->position, *(const whole *)&position,
                     __ATOMIC_RELAXED);
}

struct vhd_ring_position vhd_queue_position(const struct vhd_queue *queue)
{
    struct vhd_ring_position position = queue->ring.position;

    if (queue->oldest != queue->popped) {
        const struct vhd_handed_chain *oldest =
            &queue->handed[queue->oldest % VHD_CONTROL_CHAINS_MAX];

        position.next_avail = oldest->before.next_avail;
        position.avail_wrap = oldest->before.avail_wrap;
        position.number = oldest->before.number;
    }
    return position;
}

/* -- the kick --------------------------------------------------------------------------------- */

/* In the worker's epoll from start to stop, so that only a start can fail for want of memory.
 * Edge-triggered and never read: each kick is a new edge, so that one system call a kick is saved,
 * no read can block, and an eventfd that is always readable cannot keep us busy. */
int vhd_queue_watch(struct vhd_device *device, struct vhd_queue *queue)
{
    if (queue->kick_fd < 0)
        return 0;
    return vhd_worker_watch(device->worker, queue->kick_fd, EPOLLET, VHD_SOURCE_KICK, device->slot,
                            queue->index);
}

void vhd_queue_unwatch(struct vhd_device *device, struct vhd_queue *queue)
{
    if (queue->kick_fd >= 0)
        vhd_worker_unwatch(device->worker, queue->kick_fd);
}

void vhd_queue_listen(struct vhd_device *device, struct vhd_queue *queue)
{
    bool wanted = queue->enabled && queue->shared->fault == VHD_FAULT_NONE;

    if (queue->kick_fd >= 0)
        vhd_worker_rewatch(device->worker, queue->kick_fd, wanted ? EPOLLIN | EPOLLET : EPOLLET,
                           VHD_SOURCE_KICK, device->slot, queue->index);
}

void vhd_queue_kicked(struct vhd_queue *queue)
{
    queue->look = true;
    count(&queue->shared->kicks, 1);
}

static void signal_err(struct vhd_device *device, struct vhd_queue *queue)
{
    queue->owed &= ~(uint32_t)VHD_OWED_ERR;
    if (queue->err_fd >= 0 &&
        vhd_worker_signal(device->worker, queue->err_fd) == VHD_SIGNAL_INTERRUPTED) {
        queue->owed |= VHD_OWED_ERR;
        queue->look = true;
    }
}

void vhd_queue_signal_fault(struct vhd_device *device, struct vhd_queue *queue)
{
    signal_err(device, queue);
    vhd_device_raise(device, VHD_EVENT_FAULT);
}

void vhd_queue_quarantine(struct vhd_device *device, struct vhd_queue *queue, int fault,
                          uint64_t addr)
{
    queue->shared->fault_addr = addr;
    queue->shared->fault = (uint8_t)fault;
    count(&queue->shared->faults, 1);
    queue->look = false;
    vhd_queue_listen(device, queue);
    vhd_queue_signal_fault(device, queue);
}

/* -- a turn ----------------------------------------------------------------------------------- */

static bool is_control(const struct vhd_queue *queue)
{
    return queue->handler == VHD_HANDLER_CONTROL || queue->handler == VHD_HANDLER_CONTROL_BLOCKS;
}

/* Are its chains given back later than they are taken? */
static bool hands_on(const struct vhd_queue *queue)
{
    return is_control(queue) || queue->handler == VHD_HANDLER_FLUSH;
}

static int hand_on(struct vhd_device *device, struct vhd_queue *queue, const struct vhd_walk *walk,
                   struct vhd_ring_position before)
{
    int rc;

    if (queue->handler == VHD_HANDLER_FLUSH)
        return vhd_flush_put(device, queue, walk, before);
    rc = vhd_handed_put(device, queue, walk, before);
    if (rc > 0)
        vhd_device_raise(device, VHD_EVENT_CHAINS);
    return rc;
}

/* Are a chain's descriptors buffers to read and write, or is their address itself the payload? */
static bool has_data_ranges(const struct vhd_queue *queue)
{
    return queue->handler != VHD_HANDLER_REPORT && queue->handler != VHD_HANDLER_CONTROL_BLOCKS;
}

static int handle(struct vhd_device *device, struct vhd_queue *queue, const struct vhd_walk *walk)
{
    const struct vhd_table *table = &device->tables[device->table];

    switch (queue->handler) {
    case VHD_HANDLER_INFLATE:
        return vhd_balloon_inflate(&device->balloon, table, walk);
    case VHD_HANDLER_DEFLATE:
        return vhd_balloon_deflate(&device->balloon, table, walk);
    default:
        assert(queue->handler == VHD_HANDLER_REPORT);
        return vhd_balloon_report(&device->balloon, table, walk);
    }
}

struct turn {
    struct vhd_device *device;
    struct vhd_queue *queue;
    struct vhd_walk *walk;
    int fault;
    bool taking; /* a chain is taken, and neither given back nor handed on yet */
    struct vhd_ring_position before; /* of the ring when that chain was popped */
};

/* Take one chain and see it through. 1 done, 0 nothing (or no room), negative -(enum vhd_fault). */
static int serve_one(struct turn *turn)
{
    struct vhd_queue *queue = turn->queue;
    int rc;

    if (hands_on(queue) && vhd_handed_full(queue))
        return 0;
    turn->before = queue->ring.position;
    turn->taking = true;
    rc = vhd_ring_pop(&queue->ring, turn->walk, has_data_ranges(queue));
    if (rc <= 0)
        return rc;
    queue->shared->taken = 1; /* before it changes anything */
    vhd_fence_before_death();
    count(&queue->shared->chains, 1);
    if (hands_on(queue)) {
        rc = hand_on(turn->device, queue, turn->walk, turn->before);
        turn->taking = rc < 0;
        return rc;
    }
    rc = handle(turn->device, queue, turn->walk);
    if (rc < 0)
        return rc;
    turn->taking = false;
    if (rc == VHD_CHAIN_REJECTED)
        count(&queue->shared->rejected, 1);
    vhd_queue_give_back(queue, turn->walk->id, turn->walk->slots, 0);
    vhd_queue_publish_position(queue);
    vhd_queue_call(turn->device, queue);
    return 1;
}

static void take_turn(void *argument)
{
    struct turn *turn = argument;
    struct vhd_queue *queue = turn->queue;

    vhd_ring_kicks_off(&queue->ring);
    for (uint32_t done = 0; done < VHD_CHAINS_PER_TURN; done++) {
        int rc;

        if (vhd_worker_wants_park(turn->device->worker))
            return;
        rc = serve_one(turn);
        if (rc < 0) {
            turn->fault = -rc;
            return;
        }
        /* Something may have come between the last look and kicks being on again. */
        if (rc == 0 &&
            (!vhd_ring_kicks_on(&queue->ring) || (hands_on(queue) && vhd_handed_full(queue)))) {
            queue->look = false;
            return;
        }
        if (rc == 0)
            vhd_ring_kicks_off(&queue->ring);
    }
}

/* What an interrupted turn left to be told. */
static void pay(struct vhd_device *device, struct vhd_queue *queue)
{
    if (queue->owed & VHD_OWED_CALL)
        vhd_queue_call_unasked(device, queue);
    if (queue->owed & VHD_OWED_ERR)
        signal_err(device, queue);
}

static void serve_queue(struct vhd_device *device, struct vhd_queue *queue, struct vhd_walk *walk)
{
    struct turn turn = {.device = device, .queue = queue, .walk = walk};
    uint64_t errors = device->balloon.counters->discard_errors;

    pay(device, queue);
    if (!queue->started || !queue->enabled || queue->handler == VHD_HANDLER_NONE ||
        queue->shared->fault != VHD_FAULT_NONE) {
        queue->look = queue->owed != 0;
        return;
    }
    if (!vhd_sigbus_guard(take_turn, &turn))
        turn.fault = VHD_FAULT_SIGBUS;
    if (turn.fault != VHD_FAULT_NONE) {
        if (turn.taking) { /* the chain comes again when the ring starts again */
            queue->ring.position.next_avail = turn.before.next_avail;
            queue->ring.position.avail_wrap = turn.before.avail_wrap;
            queue->ring.position.number = turn.before.number;
        }
        vhd_queue_quarantine(device, queue, turn.fault,
                             turn.fault == VHD_FAULT_ADDRESS ? walk->outside : UINT64_MAX);
    }
    if (device->balloon.counters->discard_errors != errors)
        vhd_device_raise(device, VHD_EVENT_HOST_ERROR);
}

bool vhd_device_serve_rings(struct vhd_device *device, struct vhd_walk *walk)
{
    bool left = false;

    for (uint32_t index = 0; index < device->queue_count; index++) {
        struct vhd_queue *queue = &device->queues[index];

        if (queue->look && !vhd_worker_wants_park(device->worker))
            serve_queue(device, queue, walk);
        left |= queue->look;
    }
    return left;
}

/* -- completions ------------------------------------------------------------------------------ */

struct delivery {
    struct vhd_device *device;
    struct vhd_queue *queue;
    int fault;
};

static void deliver(void *argument)
{
    struct delivery *delivery = argument;
    bool any = false;

    for (;;) {
        int rc = vhd_handed_deliver_one(delivery->device, delivery->queue);

        if (rc == 0)
            break;
        if (rc < 0) {
            delivery->fault = -rc;
            return;
        }
        any = true;
    }
    if (any) {
        vhd_queue_call(delivery->device, delivery->queue);
        delivery->queue->look = true; /* there is room again */
    }
}

void vhd_queue_deliver(struct vhd_device *device, struct vhd_queue *queue)
{
    struct delivery delivery = {device, queue, VHD_FAULT_NONE};

    if (!queue->started || queue->handed == NULL || queue->shared->fault != VHD_FAULT_NONE)
        return;
    if (!vhd_sigbus_guard(deliver, &delivery))
        delivery.fault = VHD_FAULT_SIGBUS;
    if (delivery.fault != VHD_FAULT_NONE)
        vhd_queue_quarantine(device, queue, delivery.fault, UINT64_MAX);
}

void vhd_device_serve_mail(struct vhd_device *device)
{
    if (!atomic_exchange(&device->mail, false))
        return;
    for (uint32_t index = 0; index < device->queue_count; index++)
        vhd_queue_deliver(device, &device->queues[index]);
}

bool vhd_device_flush(struct vhd_worker *worker, struct vhd_device *device)
{
    for (uint32_t index = 0; index < device->queue_count; index++)
        if (vhd_flush_due(&device->queues[index])) {
            vhd_flush(worker, device, index);
            return true;
        }
    return false;
}
