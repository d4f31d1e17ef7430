/* mapping.c - guest memory files, mapped whole and shared. Must not know what lies in them. */
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
#include <fcntl.h>

#include "vhd.h"

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

static int open_all(struct vhd_mapping *mapping, int fd, int given_up_fd)
{
    int rc;

    mapping->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (mapping->fd < 0)
        return -errno;
    rc = map(mapping);
    if (rc != 0)
        return rc;
    rc = vhd_given_up_open(&mapping->given_up, mapping->size, given_up_fd);
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
    vhd_given_up_close(&mapping->given_up);
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
    return atomic_load_explicit(&mapping->given_up.pages, memory_order_relaxed);
}

int vhd_mapping_given_up_fd(const vhd_mapping *mapping)
{
    return mapping->given_up.fd;
}
