/* device.c - one connection's queues, config bytes and events: their life, under Python's command.
 * Must not know what runs on a queue, nor wait for anything. */
#include <stdlib.h>
#include <string.h>

#include "barrier.h"
#include "vhd.h"

static void assert_parked(const struct vhd_device *device)
{
    assert(device->worker == NULL || vhd_worker_parked(device->worker));
}

static struct vhd_queue *queue_at(struct vhd_device *device, uint32_t index)
{
    assert(index < device->queue_count);
    return &device->queues[index];
}

/* -- life ------------------------------------------------------------------------------------- */

static vhd_device *make(int shared_fd, int reply_fd, uint32_t queue_count, uint32_t config_size,
                        const uint8_t *config_writable, int *error)
{
    struct vhd_device *device;

    assert(queue_count > 0 && queue_count <= VHD_QUEUES_MAX);
    assert(config_size <= VHD_CONFIG_SIZE_MAX);
    device = calloc(1, sizeof *device);
    if (device == NULL) {
        *error = -ENOMEM;
        return NULL;
    }
    *error = vhd_shared_open(device, shared_fd, reply_fd, queue_count, config_size);
    if (*error != 0) {
        free(device);
        return NULL;
    }
    pthread_mutex_init(&device->lock, NULL);
    device->socket_fd = -1;
    device->queue_count = queue_count;
    memcpy(device->config_writable, config_writable, config_size);
    device->balloon.counters = &device->shared->balloon;
    device->balloon.generation = &device->shared->driver_generation;
    device->balloon.poison_val =
        (const uint32_t *)(device->shared->config + VHD_BALLOON_POISON_VAL);
    for (uint32_t i = 0; i < queue_count; i++) {
        struct vhd_queue *queue = &device->queues[i];

        queue->index = i;
        queue->shared = &device->shared->rings[i];
        queue->kick_fd = queue->call_fd = queue->err_fd = -1;
    }
    return device;
}

vhd_device *vhd_device_create(uint32_t queue_count, uint32_t config_size,
                              const uint8_t *config_writable, int *error)
{
    return make(-1, -1, queue_count, config_size, config_writable, error);
}

vhd_device *vhd_device_adopt(int shared_fd, int reply_fd, uint32_t queue_count,
                             uint32_t config_size, const uint8_t *config_writable, int *error)
{
    struct vhd_device *device = NULL;

    *error = -EBADF;
    if (shared_fd >= 0 && reply_fd >= 0)
        device = make(shared_fd, reply_fd, queue_count, config_size, config_writable, error);
    if (device != NULL)
        device->events = VHD_EVENT_CONFIG;
    return device;
}

void vhd_device_destroy(vhd_device *device)
{
    if (device == NULL)
        return;
    assert(device->worker == NULL);
    pthread_mutex_destroy(&device->lock);
    vhd_shared_close(device);
    free(device);
}

int vhd_device_attach(vhd_device *device, vhd_worker *worker)
{
    int rc;

    assert(device->worker == NULL && vhd_worker_parked(worker));
    rc = vhd_worker_add(worker, device);
    if (rc == 0)
        device->worker = worker;
    if (rc == 0 && device->events != 0)
        vhd_worker_notify(worker); /* raised before there was one */
    return rc;
}

void vhd_device_set_image(vhd_device *device, vhd_image *image)
{
    assert_parked(device);
    if (image != NULL)
        vhd_image_hold(image);
    vhd_image_release(device->image);
    device->image = image;
}

void vhd_device_detach(vhd_device *device)
{
    struct vhd_ring_position position;

    assert(device->worker != NULL);
    assert_parked(device);
    vhd_socket_set(device, -1);
    vhd_device_set_image(device, NULL);
    for (uint32_t i = 0; i < device->queue_count; i++)
        vhd_ring_stop(device, i, &position);
    vhd_worker_remove(device->worker, device);
    device->worker = NULL;
}

const struct vhd_shared *vhd_device_shared(const vhd_device *device)
{
    return device->shared;
}

int vhd_device_shared_fd(const vhd_device *device)
{
    return device->shared_fd;
}

/* -- events ----------------------------------------------------------------------------------- */

void vhd_device_raise(struct vhd_device *device, uint32_t event)
{
    if (!(atomic_fetch_or(&device->events, event) & event))
        vhd_worker_notify(device->worker);
}

uint32_t vhd_device_take_events(vhd_device *device)
{
    return atomic_exchange(&device->events, 0);
}

/* -- config space ----------------------------------------------------------------------------- */

void vhd_config_publish(vhd_device *device, uint32_t offset, const uint8_t *bytes, uint32_t size)
{
    assert(offset <= device->shared->config_size);
    assert(size <= device->shared->config_size - offset);
    pthread_mutex_lock(&device->lock);
    memcpy(device->shared->config + offset, bytes, size);
    pthread_mutex_unlock(&device->lock);
}

void vhd_config_read(vhd_device *device, uint8_t *bytes, uint32_t size)
{
    assert(size <= device->shared->config_size);
    pthread_mutex_lock(&device->lock);
    memcpy(bytes, device->shared->config, size);
    pthread_mutex_unlock(&device->lock);
}

/* -- memory ----------------------------------------------------------------------------------- */

static const struct vhd_table *table_of(const struct vhd_device *device)
{
    return &device->tables[device->table];
}

int vhd_device_set_regions(vhd_device *device, const struct vhd_region *regions, uint32_t count)
{
    uint32_t next = 1 - device->table;
    int rc;

    assert_parked(device);
    rc = vhd_table_init(&device->tables[next], regions, count);
    if (rc != 0)
        return rc;
    for (uint32_t i = 0; i < device->queue_count && rc == 0; i++)
        if (device->queues[i].started)
            rc = vhd_ring_translate(&device->queues[i].ring, &device->tables[next]);
    if (rc == 0) {
        device->table = next;
        vhd_shared_recount(device, table_of(device));
        return 0;
    }
    /* All lay in the old table before, so they do again. */
    for (uint32_t i = 0; i < device->queue_count; i++)
        if (device->queues[i].started) {
            int back = vhd_ring_translate(&device->queues[i].ring, table_of(device));
            assert(back == 0);
            (void)back;
        }
    return rc;
}

void vhd_device_set_log(vhd_device *device, vhd_log *log, int log_all)
{
    assert_parked(device);
    device->log = log;
    device->balloon.log = log_all ? log : NULL;
    for (uint32_t i = 0; i < device->queue_count; i++)
        device->queues[i].ring.log = log;
}

/* -- rings ------------------------------------------------------------------------------------ */

/* Serve queue->ring, which is set up, as soon as the worker has opened it. */
static int start(struct vhd_device *device, struct vhd_queue *queue,
                 const struct vhd_ring_setup *setup, enum vhd_opening opening)
{
    int rc = vhd_handed_open(queue);

    if (rc != 0)
        return rc;
    queue->kick_fd = setup->kick_fd;
    rc = vhd_queue_watch(device, queue);
    if (rc != 0) {
        queue->kick_fd = -1;
        vhd_handed_close(queue);
        return rc;
    }
    queue->ring.log = device->log;
    queue->handler = setup->handler;
    queue->call_missed = false;
    queue->call_fd = setup->call_fd;
    queue->err_fd = setup->err_fd;
    queue->started = true;
    queue->enabled = queue->look = false;
    queue->opening = opening;
    queue->start_number = setup->start_number;
    queue->shared->started = 1;
    queue->shared->enabled = 0;
    vhd_worker_open_later(device->worker);
    return 0;
}

static int begin(struct vhd_device *device, uint32_t index, const struct vhd_ring_setup *setup,
                 enum vhd_opening opening)
{
    struct vhd_queue *queue = queue_at(device, index);
    int rc;

    assert(device->worker != NULL && !queue->started);
    assert_parked(device);
    rc = vhd_ring_init(&queue->ring, table_of(device), setup);
    /* Chains are numbered on from the start before; a ring that is resumed has its number. */
    if (opening != VHD_OPENING_RESUMED)
        queue->ring.position.number = queue->shared->position.number;
    if (rc == 0)
        rc = start(device, queue, setup, opening);
    if (rc == 0 && opening != VHD_OPENING_RESUMED)
        queue->shared->fault = VHD_FAULT_NONE;
    return rc;
}

int vhd_ring_start(vhd_device *device, uint32_t index, const struct vhd_ring_setup *setup)
{
    return begin(device, index, setup, VHD_OPENING_NEW);
}

int vhd_ring_resume(vhd_device *device, uint32_t index, const struct vhd_ring_setup *setup)
{
    const struct vhd_ring_shared *shared = queue_at(device, index)->shared;
    struct vhd_ring_setup found = *setup;

    if (shared->start_number != setup->start_number)
        return begin(device, index, setup, VHD_OPENING_AFTER);
    found.position = shared->position;
    return begin(device, index, &found, VHD_OPENING_RESUMED);
}

void vhd_ring_enable(vhd_device *device, uint32_t index, int enabled)
{
    struct vhd_queue *queue = queue_at(device, index);

    assert_parked(device);
    if (!queue->started)
        return;
    queue->enabled = enabled != 0;
    queue->shared->enabled = enabled != 0;
    /* The driver's kick may have come before anybody listened, so look once without one. */
    queue->look = queue->enabled;
    vhd_queue_listen(device, queue);
}

void vhd_ring_set_handler(vhd_device *device, uint32_t index, uint32_t handler)
{
    struct vhd_queue *queue = queue_at(device, index);

    assert_parked(device);
    queue->handler = handler;
    queue->look = queue->enabled;
}

void vhd_ring_set_call(vhd_device *device, uint32_t index, int fd)
{
    assert_parked(device);
    vhd_queue_set_call(queue_at(device, index), fd);
}

void vhd_ring_set_err(vhd_device *device, uint32_t index, int fd)
{
    assert_parked(device);
    queue_at(device, index)->err_fd = fd;
}

void vhd_ring_stop(vhd_device *device, uint32_t index, struct vhd_ring_position *position)
{
    struct vhd_queue *queue = queue_at(device, index);

    assert_parked(device);
    memset(position, 0, sizeof *position);
    if (!queue->started)
        return;
    *position = vhd_queue_position(queue);
    queue->started = queue->enabled = queue->look = false;
    queue->opening = VHD_OPENING_NONE;
    queue->owed &= VHD_OWED_CALL; /* the driver waits for it, perhaps, when the ring starts again */
    queue->shared->started = queue->shared->enabled = 0;
    vhd_queue_unwatch(device, queue);
    pthread_mutex_lock(&device->lock);
    vhd_handed_close(queue);
    pthread_mutex_unlock(&device->lock);
    queue->kick_fd = queue->call_fd = -1;
}

/* -- balloon ---------------------------------------------------------------------------------- */

void vhd_balloon_configure(vhd_device *device, uint32_t flags)
{
    atomic_store_explicit(&device->balloon.flags, flags, memory_order_relaxed);
}

void vhd_balloon_reset(vhd_device *device)
{
    const struct vhd_table *table = table_of(device);

    assert_parked(device);
    device->shared->driver_generation = vhd_generation_after(device->shared->driver_generation);
    for (uint32_t i = 0; i < table->count; i++)
        vhd_given_up_forget(&table->regions[i].mapping->given_up);
    __atomic_store_n(&device->shared->balloon.inflated_pages, 0, __ATOMIC_RELAXED);
}
