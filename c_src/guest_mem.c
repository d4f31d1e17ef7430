/* guest_mem.c - guest address to host pointer, by range, never by start alone.
 *
 * Knows the memory table. Must not know rings: what a range is for is its caller's business. */
#include <string.h>

#include "vhd.h"

static uint64_t region_end(const struct vhd_region *region)
{
    return region->guest_addr + region->size;
}

static bool region_is_legal(const struct vhd_region *region)
{
    const struct vhd_mapping *mapping = region->mapping;

    return region->size != 0 && region->guest_addr <= UINT64_MAX - region->size &&
           region->file_offset <= mapping->size &&
           region->size <= mapping->size - region->file_offset;
}

int vhd_table_init(struct vhd_table *table, const struct vhd_region *regions, uint32_t count)
{
    if (count > VHD_REGIONS_MAX)
        return -EINVAL;
    table->count = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = table->count;

        if (!region_is_legal(&regions[i]))
            return -EINVAL;
        /* Insertion keeps the table sorted; it has a handful of entries and is set rarely. */
        for (; at > 0 && table->regions[at - 1].guest_addr > regions[i].guest_addr; at--)
            table->regions[at] = table->regions[at - 1];
        table->regions[at] = regions[i];
        table->count++;
    }
    for (uint32_t i = 1; i < table->count; i++)
        if (region_end(&table->regions[i - 1]) > table->regions[i].guest_addr)
            return -EINVAL;
    return 0;
}

const struct vhd_region *vhd_table_find(const struct vhd_table *table, uint64_t guest_addr)
{
    uint32_t low = 0;
    uint32_t high = table->count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;

        if (table->regions[middle].guest_addr <= guest_addr)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return NULL;
    const struct vhd_region *region = &table->regions[low - 1];
    return guest_addr - region->guest_addr < region->size ? region : NULL;
}

static uint8_t *host_address(const struct vhd_region *region, uint64_t guest_addr)
{
    return region->mapping->host + region->file_offset + (guest_addr - region->guest_addr);
}

void *vhd_table_contiguous(const struct vhd_table *table, uint64_t guest_addr, uint64_t size)
{
    const struct vhd_region *region = vhd_table_find(table, guest_addr);

    if (region == NULL || size > region->size - (guest_addr - region->guest_addr))
        return NULL;
    return host_address(region, guest_addr);
}

/* The host pointer at guest_addr and how many of `size` bytes lie in that region; NULL in a
 * hole. */
static uint8_t *host_piece(const struct vhd_table *table, uint64_t guest_addr, uint64_t size,
                           uint64_t *piece_size)
{
    const struct vhd_region *region = vhd_table_find(table, guest_addr);

    if (region == NULL)
        return NULL;
    uint64_t left = region->size - (guest_addr - region->guest_addr);
    *piece_size = size < left ? size : left;
    return host_address(region, guest_addr);
}

bool vhd_table_covers(const struct vhd_table *table, uint64_t guest_addr, uint64_t size)
{
    uint64_t outside;

    return !vhd_table_outside(table, guest_addr, size, &outside);
}

bool vhd_table_outside(const struct vhd_table *table, uint64_t guest_addr, uint64_t size,
                       uint64_t *outside)
{
    bool wraps = guest_addr > UINT64_MAX - size;
    uint64_t left = wraps ? 0 : size;

    *outside = guest_addr;
    while (left != 0) {
        uint64_t piece_size;

        if (host_piece(table, *outside, left, &piece_size) == NULL)
            return true;
        *outside += piece_size;
        left -= piece_size;
    }
    return wraps;
}

int vhd_table_read(const struct vhd_table *table, uint64_t guest_addr, void *bytes, size_t size)
{
    uint8_t *to = bytes;

    if (guest_addr > UINT64_MAX - size)
        return -EFAULT;
    while (size != 0) {
        uint64_t piece_size;
        const uint8_t *from = host_piece(table, guest_addr, size, &piece_size);

        if (from == NULL)
            return -EFAULT;
        memcpy(to, from, piece_size);
        to += piece_size;
        guest_addr += piece_size;
        size -= piece_size;
    }
    return 0;
}

int vhd_table_write(const struct vhd_table *table, uint64_t guest_addr, const void *bytes,
                    size_t size)
{
    const uint8_t *from = bytes;

    if (!vhd_table_covers(table, guest_addr, size))
        return -EFAULT;
    while (size != 0) {
        uint64_t piece_size = 0;
        uint8_t *to = host_piece(table, guest_addr, size, &piece_size);

        assert(to != NULL); /* covered, as checked above */
        memcpy(to, from, piece_size);
        from += piece_size;
        guest_addr += piece_size;
        size -= piece_size;
    }
    return 0;
}
