/* mapping.c - guest memory files, mapped whole and shared. Must not know what lies in them. */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <fcntl.h>

#include "vhd.h"

static size_t bitmap_size(uint64_t file_size)
{
    uint64_t pages = (file_size + VHD_GUEST_PAGE_SIZE - 1) / VHD_GUEST_PAGE_SIZE;

    return (size_t)((pages + 63) / 64 * sizeof(uint64_t));
}

static int map(struct vhd_mapping *mapping)
{
    mapping->host = mmap(NULL, mapping->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                         mapping->fd, 0);
    if (mapping->host == MAP_FAILED)
        return -errno;
    /* Guest memory has no place in our core dumps, nor in a child. Advice only. */
    (void)madvise(mapping->host, mapping->size, MADV_DONTDUMP);
    (void)madvise(mapping->host, mapping->size, MADV_DONTFORK);
    return 0;
}

static void count_word(struct vhd_mapping *mapping, uint64_t index)
{
    uint64_t word = atomic_load_explicit(&mapping->given_up[index], memory_order_relaxed);

    mapping->given_up_pages += (uint64_t)__builtin_popcountll(word);
}

/* Count what a predecessor left, where the bitmap has any page at all. */
static int count_given_up(struct vhd_mapping *mapping)
{
    off_t begin = 0, end;

    for (;;) {
        begin = lseek(mapping->given_up_fd, begin, SEEK_DATA);
        if (begin < 0)
            return errno == ENXIO ? 0 : -errno;
        end = lseek(mapping->given_up_fd, begin, SEEK_HOLE);
        if (end < 0)
            return -errno;
        /* Both are borders of pages or the file's end. */
        for (; begin < end; begin += (off_t)sizeof(uint64_t))
            count_word(mapping, (uint64_t)begin / sizeof(uint64_t));
    }
}

static int open_given_up(struct vhd_mapping *mapping, int inherited)
{
    size_t size = bitmap_size(mapping->size);
    void *at;
    int rc = vhd_memfd_open("vhostd-given-up", inherited, size, &at);

    if (rc < 0)
        return rc;
    mapping->given_up_fd = rc;
    mapping->given_up = at;
    rc = count_given_up(mapping);
    if (rc != 0)
        vhd_memfd_close(mapping->given_up_fd, at, size);
    return rc;
}

static int open_all(struct vhd_mapping *mapping, int fd, int given_up_fd)
{
    int rc;

    mapping->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (mapping->fd < 0)
        return -errno;
    rc = map(mapping);
    if (rc != 0)
        return rc;
    rc = open_given_up(mapping, given_up_fd);
    if (rc != 0)
        munmap(mapping->host, mapping->size);
    return rc;
}

vhd_mapping *vhd_mapping_create(int fd, int given_up_fd, int *error)
{
    struct vhd_backing backing;
    struct vhd_mapping *mapping;

    *error = vhd_backing_inspect(fd, &backing);
    if (*error != 0)
        return NULL;
    mapping = calloc(1, sizeof *mapping);
    if (mapping == NULL) {
        *error = -ENOMEM;
        return NULL;
    }
    mapping->fd = -1;
    mapping->size = backing.size;
    mapping->page_size = backing.page_size;
    *error = open_all(mapping, fd, given_up_fd);
    if (*error != 0) {
        if (mapping->fd >= 0)
            close(mapping->fd);
        free(mapping);
        return NULL;
    }
    return mapping;
}

void vhd_mapping_destroy(vhd_mapping *mapping)
{
    if (mapping == NULL)
        return;
    munmap(mapping->host, mapping->size);
    vhd_memfd_close(mapping->given_up_fd, (void *)mapping->given_up, bitmap_size(mapping->size));
    close(mapping->fd);
    free(mapping);
}

uint64_t vhd_mapping_size(const vhd_mapping *mapping)
{
    return mapping->size;
}

uint64_t vhd_mapping_page_size(const vhd_mapping *mapping)
{
    return mapping->page_size;
}

uint64_t vhd_mapping_given_up_pages(const vhd_mapping *mapping)
{
    return atomic_load_explicit(&mapping->given_up_pages, memory_order_relaxed);
}

int vhd_mapping_given_up_fd(const vhd_mapping *mapping)
{
    return mapping->given_up_fd;
}

bool vhd_mapping_give_up(vhd_mapping *mapping, uint64_t page, bool given_up)
{
    _Atomic uint64_t *word = &mapping->given_up[page / 64];
    uint64_t bit = 1ull << (page % 64);
    uint64_t old = atomic_load_explicit(word, memory_order_relaxed);

    if (((old & bit) != 0) == given_up)
        return false;
    atomic_store_explicit(word, old ^ bit, memory_order_relaxed);
    /* One thread writes, so neither needs a locked instruction. */
    atomic_store_explicit(&mapping->given_up_pages,
                          vhd_mapping_given_up_pages(mapping) + (given_up ? 1 : UINT64_MAX),
                          memory_order_relaxed);
    return true;
}

bool vhd_mapping_all_given_up(const vhd_mapping *mapping, uint64_t page, uint64_t count)
{
    for (uint64_t at = page; at < page + count; at++) {
        uint64_t word = atomic_load_explicit(&mapping->given_up[at / 64], memory_order_relaxed);

        if (at % 64 == 0 && at + 64 <= page + count) {
            if (word != UINT64_MAX)
                return false;
            at += 63;
        } else if (!(word & (1ull << (at % 64)))) {
            return false;
        }
    }
    return true;
}

void vhd_mapping_forget_given_up(vhd_mapping *mapping)
{
    if (vhd_mapping_given_up_pages(mapping) == 0)
        return;
    int rc = vhd_memfd_clear(mapping->given_up_fd, bitmap_size(mapping->size));
    assert(rc == 0);
    (void)rc;
    atomic_store_explicit(&mapping->given_up_pages, 0, memory_order_relaxed);
}
