/* vhd_memory.h - files mapped, guest addresses translated, the dirty log: what is below the rings.
 * Included by vhd.h, after vhd_api.h. */
#ifndef VHD_MEMORY_H
#define VHD_MEMORY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VHD_GUEST_PAGE_SIZE 4096u /* unit of balloon page numbers and of the dirty log */

/* -- memfd.c ---------------------------------------------------------------------------------- */

/* A memfd of that size, sealed so that it stays so, and mapped: a new one, or a duplicate of an
 * inherited one (not -1). The descriptor, or -errno; -EPROTO: the inherited is no such memfd. */
int vhd_memfd_open(const char *name, int inherited, size_t size, void **at);
void vhd_memfd_close(int fd, void *at, size_t size);
/* All of it zero, and no page left. 0 or -errno. */
int vhd_memfd_clear(int fd, size_t size);

/* -- backing.c -------------------------------------------------------------------------------- */

/* A file that may be mapped: of shmem or hugetlbfs, not empty, open for reading and writing. */
struct vhd_backing {
    uint64_t size;
    uint64_t page_size; /* 4096, or the hugetlb page */
};

/* 0; -EINVAL a mere path, -EACCES not open for both, -EOPNOTSUPP of another file system or no file,
 * -ENODATA empty, or what fcntl(2) says. Never waits for a file system of somebody else's. */
int vhd_backing_inspect(int fd, struct vhd_backing *backing);

/* -- mapping.c, guest_mem.c ------------------------------------------------------------------- */

struct vhd_mapping {
    int fd;
    uint8_t *host;
    uint64_t size;      /* of the file when it was mapped */
    uint64_t page_size; /* host page of this file */
    int given_up_fd;
    _Atomic uint64_t *given_up; /* bitmap, one bit per 4 KiB of the file; worker writes it */
    _Atomic uint64_t given_up_pages;
};

/* Mark a 4 KiB page of the file as given up, or not; false when it was so before. Worker only. */
bool vhd_mapping_give_up(vhd_mapping *mapping, uint64_t page, bool given_up);
bool vhd_mapping_all_given_up(const vhd_mapping *mapping, uint64_t page, uint64_t count);
void vhd_mapping_forget_given_up(vhd_mapping *mapping);

/* Sorted by guest_addr, no overlaps; both are checked when the table is set. */
struct vhd_table {
    uint32_t count;
    struct vhd_region regions[VHD_REGIONS_MAX];
};

/* -EINVAL: wraps, overlaps, empty, or outside its mapping. Sorts regions. */
int vhd_table_init(struct vhd_table *table, const struct vhd_region *regions, uint32_t count);
/* The region that holds guest_addr, or NULL. */
const struct vhd_region *vhd_table_find(const struct vhd_table *table, uint64_t guest_addr);
/* Host pointer to a range inside ONE region, or NULL. */
void *vhd_table_contiguous(const struct vhd_table *table, uint64_t guest_addr, uint64_t size);
/* True when every byte of the range is guest memory, across region borders. */
bool vhd_table_covers(const struct vhd_table *table, uint64_t guest_addr, uint64_t size);
/* Copy across region borders. 0 or -EFAULT (then nothing useful was copied). */
int vhd_table_read(const struct vhd_table *table, uint64_t guest_addr, void *bytes, size_t size);
int vhd_table_write(const struct vhd_table *table, uint64_t guest_addr, const void *bytes,
                    size_t size);

/* -- dirty_log.c ------------------------------------------------------------------------------ */

struct vhd_log {
    _Atomic uint8_t *bits;
    uint64_t size; /* bytes of log */
    void *map;
    size_t map_size;
};

/* Mark every page of the range; pages beyond the log are ignored and reported by false. */
bool vhd_log_mark(struct vhd_log *log, uint64_t guest_addr, uint64_t size);

#endif
