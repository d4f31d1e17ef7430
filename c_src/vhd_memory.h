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

/* -- given_up.c -------------------------------------------------------------------------------- */

/* Pages of a memory file, 4 KiB each, that one generation of the driver gave up. */
struct vhd_given_up {
    int fd;
    _Atomic uint64_t *words; /* [count] bits, then the generation they are of; the worker writes */
    uint64_t count;
    _Atomic uint64_t pages; /* how many bits are set */
};

/* The generation of what a release left that knew of none (shared_before.c). */
enum { VHD_GENERATION_BEFORE = 1 };

/* A new memfd of such a release's bits, with that generation behind them; or -errno. */
int vhd_given_up_convert(int fd, uint64_t words);
/* inherited: a predecessor's memfd, -1 = a new one; 0 or -errno. */
int vhd_given_up_open(struct vhd_given_up *given_up, uint64_t file_size, int inherited);
void vhd_given_up_close(struct vhd_given_up *given_up);
/* No page is given up; the memory of the bits goes back to the host. [parked] */
void vhd_given_up_forget(struct vhd_given_up *given_up);
/* Mark a page as given up by this generation, or not; false when it was so before. A page that a
 * new generation gives up is its only one: what another one gave up is forgotten. Worker only. */
bool vhd_given_up_put(struct vhd_given_up *given_up, uint64_t generation, uint64_t page,
                      bool is_given_up);
bool vhd_given_up_all(const struct vhd_given_up *given_up, uint64_t generation, uint64_t page,
                      uint64_t count);
uint64_t vhd_given_up_pages(const struct vhd_given_up *given_up, uint64_t generation);
/* The number of a generation that never was before, on this host since it booted; not 0. */
uint64_t vhd_generation_after(uint64_t generation);

/* -- mapping.c, guest_mem.c ------------------------------------------------------------------- */

struct vhd_mapping {
    int fd;
    uint8_t *host;
    uint64_t size;      /* of the file when it was mapped */
    uint64_t page_size; /* host page of this file */
    struct vhd_given_up given_up;
};

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
/* False when all of the range is guest memory, else its first address that is none. */
bool vhd_table_outside(const struct vhd_table *table, uint64_t guest_addr, uint64_t size,
                       uint64_t *outside);
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
