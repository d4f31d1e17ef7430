/* shared.c - what a device leaves to the process after this one: made, or found and checked. Must
 * not know how any of it is used. */
#include <unistd.h>

#include "barrier.h"
#include "vhd.h"

static void begin_shared(struct vhd_shared *shared, uint32_t queue_count, uint32_t config_size)
{
    shared->queue_count = queue_count;
    shared->config_size = config_size;
    for (uint32_t i = 0; i < VHD_QUEUES_MAX; i++)
        shared->rings[i].start_number = UINT64_MAX;
    shared->driver_generation = vhd_generation_after(0);
    shared->version = VHD_SHARED_VERSION;
    vhd_fence_before_death();
    shared->magic = VHD_SHARED_MAGIC; /* last: who dies before has left nothing to take over */
}

static int check_shared(struct vhd_shared *shared, uint32_t queue_count, uint32_t config_size)
{
    if (shared->magic != VHD_SHARED_MAGIC || shared->version != VHD_SHARED_VERSION ||
        shared->queue_count != queue_count || shared->config_size != config_size)
        return -EPROTO;
    for (uint32_t i = 0; i < VHD_QUEUES_MAX; i++)
        shared->rings[i].started = shared->rings[i].enabled = 0;
    return 0;
}

int vhd_shared_open(struct vhd_device *device, int shared_fd, int reply_fd, uint32_t queue_count,
                    uint32_t config_size)
{
    size_t size = sizeof *device->shared;
    void *at;
    int converted = -1;
    int rc = vhd_memfd_open("vhostd-device", shared_fd, size, &at);

    if (rc == -EPROTO && (converted = vhd_shared_convert(shared_fd)) >= 0) {
        rc = vhd_memfd_open("vhostd-device", converted, size, &at);
        close(converted);
    }
    if (rc < 0)
        return rc;
    device->shared_fd = rc;
    device->shared = at;
    rc = 0;
    if (shared_fd < 0)
        begin_shared(at, queue_count, config_size);
    else
        rc = check_shared(at, queue_count, config_size);
    if (rc == 0)
        rc = vhd_reply_open(device, reply_fd);
    if (rc != 0)
        vhd_memfd_close(device->shared_fd, at, size);
    return rc;
}

void vhd_shared_close(struct vhd_device *device)
{
    vhd_reply_close(device);
    vhd_memfd_close(device->shared_fd, device->shared, sizeof *device->shared);
}

void vhd_shared_recount(struct vhd_device *device, const struct vhd_table *table)
{
    uint64_t pages = 0;

    /* Other devices than a balloon use the same files: their generations gave up nothing. */
    for (uint32_t i = 0; i < table->count; i++) {
        const struct vhd_mapping *mapping = table->regions[i].mapping;
        uint32_t before = 0;

        while (table->regions[before].mapping != mapping)
            before++;
        if (before == i)
            pages += vhd_given_up_pages(&mapping->given_up, device->shared->driver_generation);
    }
    __atomic_store_n(&device->shared->balloon.inflated_pages, pages, __ATOMIC_RELAXED);
}
