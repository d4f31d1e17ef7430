/* driver.h - the driver's side of a ring, for tests: guest memory with a border and a hole, and
 * both layouts built byte by byte. Must not know the device side's structures beyond its API. */
#ifndef TEST_DRIVER_H
#define TEST_DRIVER_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vhd.h"

#define CHECK(claim)                                                                               \
    do {                                                                                           \
        if (!(claim)) {                                                                            \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #claim);                  \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

enum {
    PAGE = 4096,
    BORDER = 0x100000, /* two regions touch here; in the file they do not */
    END = 0x110000,    /* the second one ends, a hole follows */
    TOP = 0x200000,    /* a third one, behind the hole */
    DESC = 0x10000,
    AVAIL = 0x90000,
    USED = 0xb0000,
    TABLE = 0x1000, /* indirect tables */
    DATA = 0x8000,
    FILE_SIZE = 0x130000
};

struct driver {
    vhd_mapping *mapping;
    struct vhd_table table;
    struct vhd_ring ring;
    struct vhd_walk walk;
    bool packed;
    uint16_t index; /* packed: where the next descriptor goes; split: avail.idx */
    bool wrap;
    uint16_t id, slots; /* of the chain popped last; a pop without one clears the walk */
};

static inline uint8_t *host(struct driver *driver, uint64_t addr)
{
    uint8_t *at = vhd_table_contiguous(&driver->table, addr, 1);

    CHECK(at != NULL);
    return at;
}

static inline void put(struct driver *driver, uint64_t addr, uint64_t value, size_t size)
{
    memcpy(host(driver, addr), &value, size);
}

static inline uint64_t get(struct driver *driver, uint64_t addr, size_t size)
{
    uint64_t value = 0;

    memcpy(&value, host(driver, addr), size);
    return value;
}

static inline void driver_open(struct driver *driver)
{
    int error = 0;
    int fd = memfd_create("ram", MFD_CLOEXEC);

    memset(driver, 0, sizeof *driver);
    CHECK(fd >= 0 && ftruncate(fd, FILE_SIZE) == 0);
    driver->mapping = vhd_mapping_create(fd, -1, &error);
    CHECK(driver->mapping != NULL);
    close(fd);
    /* Out of order on purpose: the table sorts them. */
    struct vhd_region regions[] = {
        {TOP, 0x10000, 0x110000, driver->mapping, 0},
        {0, BORDER, 0, driver->mapping, 0},
        {BORDER, END - BORDER, 0x120000, driver->mapping, 0},
    };
    CHECK(vhd_table_init(&driver->table, regions, 3) == 0);
}

static inline void driver_close(struct driver *driver)
{
    vhd_mapping_destroy(driver->mapping);
}

/* Zero the memory and start a ring at `index` (packed: with wrap counter 1). */
static inline void driver_start(struct driver *driver, uint32_t size, uint32_t features,
                                uint16_t index)
{
    struct vhd_ring_setup setup = {.size = size,
                                   .features = features,
                                   .desc_addr = DESC,
                                   .avail_addr = AVAIL,
                                   .used_addr = USED,
                                   .log_addr = USED,
                                   .position = {index, index, 1, 1, 0},
                                   .kick_fd = -1,
                                   .call_fd = -1,
                                   .err_fd = -1};

    memset(driver->mapping->host, 0, FILE_SIZE);
    driver->packed = features & VHD_RING_PACKED;
    driver->index = index;
    driver->wrap = true;
    if (!driver->packed) {
        put(driver, AVAIL + 2, index, 2);
        put(driver, USED + 2, index, 2);
    }
    CHECK(vhd_ring_init(&driver->ring, &driver->table, &setup) == 0);
    vhd_ring_open(&driver->ring);
}

/* A descriptor of a split ring or of an indirect table; packed tables have the flags last. */
static inline void put_entry(struct driver *driver, uint64_t table, uint32_t index, uint64_t addr,
                             uint32_t size, uint16_t flags, uint16_t next)
{
    uint64_t at = table + 16ull * index;

    put(driver, at, addr, 8);
    put(driver, at + 8, size, 4);
    put(driver, at + 12, driver->packed ? next : flags, 2);
    put(driver, at + 14, driver->packed ? flags : next, 2);
}

struct part {
    uint64_t addr;
    uint32_t size;
    uint16_t flags; /* WRITE, INDIRECT; NEXT is added between parts */
};

static inline void offer_packed(struct driver *driver, uint16_t id, const struct part *parts,
                                uint32_t count)
{
    uint64_t first_flags_at = DESC + 16ull * driver->index + 14;
    uint16_t first_flags = 0;

    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)(parts[i].flags | (i + 1 < count ? VHD_DESC_NEXT : 0) |
                                    (driver->wrap ? 1 << 7 : 1 << 15));
        uint64_t at = DESC + 16ull * driver->index;

        put(driver, at, parts[i].addr, 8);
        put(driver, at + 8, parts[i].size, 4);
        put(driver, at + 12, id, 2);
        if (i == 0)
            first_flags = flags;
        else
            put(driver, at + 14, flags, 2);
        if (++driver->index == driver->ring.size) {
            driver->index = 0;
            driver->wrap = !driver->wrap;
        }
    }
    put(driver, first_flags_at, first_flags, 2); /* last: it announces the chain */
}

static inline void offer_head(struct driver *driver, uint16_t head)
{
    put(driver, AVAIL + 4 + 2ull * (driver->index & (driver->ring.size - 1)), head, 2);
    driver->index++;
    put(driver, AVAIL + 2, driver->index, 2);
}

/* Make one chain available as `id`; split: in descriptors id, id + 1, ... */
static inline void offer(struct driver *driver, uint16_t id, const struct part *parts,
                         uint32_t count)
{
    if (driver->packed) {
        offer_packed(driver, id, parts, count);
        return;
    }
    for (uint32_t i = 0; i < count; i++)
        put_entry(driver, DESC, id + i, parts[i].addr, parts[i].size,
                  (uint16_t)(parts[i].flags | (i + 1 < count ? VHD_DESC_NEXT : 0)),
                  (uint16_t)(id + i + 1));
    offer_head(driver, id);
}

static inline int pop(struct driver *driver)
{
    int rc = vhd_ring_pop(&driver->ring, &driver->walk, true);

    if (rc == 1) {
        driver->id = driver->walk.id;
        driver->slots = driver->walk.slots;
    }
    return rc;
}

static inline void push(struct driver *driver, uint32_t written)
{
    vhd_ring_push(&driver->ring, driver->id, driver->slots, written);
}

#endif
