/* image.c - a file that is a guest's persistent memory: made durable, and its page cache seen.
 *
 * Must not know a ring or a device. The file is never mapped here: what is durable is the kernel's
 * business, and a file that shrinks can't hurt who does not touch it. */
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "barrier.h"
#include "vhd.h"

enum { SHARED_MAGIC = 0x76686469 /* "vhdi" */, SHARED_VERSION = 1 };

#ifndef SYS_cachestat
enum { SYS_cachestat = 451 }; /* of every architecture; Linux 6.5 */
#endif

/* include/uapi/linux/mman.h; counts are of pages */
struct cachestat_range {
    uint64_t offset;
    uint64_t size; /* 0 = to the end */
};
struct cachestat_counts {
    uint64_t cached;
    uint64_t dirty;
    uint64_t writeback;
    uint64_t evicted;
    uint64_t recently_evicted;
};

struct vhd_image {
    int fd;
    int witness_fd; /* -1 = none */
    int shared_fd;
    struct vhd_image_shared *shared;
    pthread_mutex_t syncing;
    bool outcome_unknown; /* under syncing: a sync was cut short by a predecessor's death */
    pthread_mutex_t counting;
    pthread_cond_t alone;
    uint32_t users; /* under counting */
};

static int check(int fd)
{
    struct stat status;
    int flags = fcntl(fd, F_GETFL);

    if (flags < 0 || fstat(fd, &status) != 0)
        return -errno;
    if (flags & O_PATH || !(S_ISREG(status.st_mode) || S_ISBLK(status.st_mode)))
        return -EINVAL;
    return 0;
}

static bool same_file(int fd, int other)
{
    struct stat one, two;

    if (fstat(fd, &one) != 0 || fstat(other, &two) != 0)
        return false;
    if (S_ISBLK(one.st_mode)) /* two device nodes may name one disk */
        return S_ISBLK(two.st_mode) && one.st_rdev == two.st_rdev;
    return one.st_dev == two.st_dev && one.st_ino == two.st_ino;
}

static int open_shared(struct vhd_image *image, int inherited)
{
    void *at;
    int rc = vhd_memfd_open("vhostd-image", inherited, sizeof *image->shared, &at);

    if (rc < 0)
        return rc;
    image->shared_fd = rc;
    image->shared = at;
    if (inherited < 0) {
        image->shared->version = SHARED_VERSION;
        vhd_fence_before_death();
        image->shared->magic = SHARED_MAGIC;
    }
    if (image->shared->magic != SHARED_MAGIC || image->shared->version != SHARED_VERSION)
        return -EPROTO;
    image->outcome_unknown = image->shared->syncing != 0;
    return 0;
}

/* The open file stays the caller's: its locks, and what it was told about errors. */
static int open_files(struct vhd_image *image, int fd, int witness_fd)
{
    image->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (image->fd < 0)
        return -errno;
    if (witness_fd < 0)
        return 0;
    if (!same_file(fd, witness_fd))
        return -EINVAL;
    image->witness_fd = fcntl(witness_fd, F_DUPFD_CLOEXEC, 0);
    return image->witness_fd < 0 ? -errno : 0;
}

static void free_image(struct vhd_image *image)
{
    if (image->shared != NULL)
        vhd_memfd_close(image->shared_fd, image->shared, sizeof *image->shared);
    if (image->witness_fd >= 0)
        close(image->witness_fd);
    if (image->fd >= 0)
        close(image->fd);
    pthread_cond_destroy(&image->alone);
    pthread_mutex_destroy(&image->counting);
    pthread_mutex_destroy(&image->syncing);
    free(image);
}

vhd_image *vhd_image_create(int fd, int witness_fd, int shared_fd, int *error)
{
    struct vhd_image *image = calloc(1, sizeof *image);

    if (image == NULL) {
        *error = -ENOMEM;
        return NULL;
    }
    pthread_mutex_init(&image->syncing, NULL);
    pthread_mutex_init(&image->counting, NULL);
    pthread_cond_init(&image->alone, NULL);
    image->users = 1;
    image->fd = image->witness_fd = image->shared_fd = -1;
    *error = check(fd);
    if (*error == 0)
        *error = open_files(image, fd, witness_fd);
    if (*error == 0)
        *error = open_shared(image, shared_fd);
    if (*error != 0) {
        free_image(image);
        return NULL;
    }
    return image;
}

void vhd_image_hold(struct vhd_image *image)
{
    pthread_mutex_lock(&image->counting);
    image->users++;
    pthread_mutex_unlock(&image->counting);
}

void vhd_image_release(vhd_image *image)
{
    uint32_t left;

    if (image == NULL)
        return;
    pthread_mutex_lock(&image->counting);
    left = --image->users;
    if (left == 1)
        pthread_cond_broadcast(&image->alone);
    pthread_mutex_unlock(&image->counting);
    if (left == 0)
        free_image(image);
}

void vhd_image_wait_alone(vhd_image *image)
{
    pthread_mutex_lock(&image->counting);
    while (image->users > 1)
        pthread_cond_wait(&image->alone, &image->counting);
    pthread_mutex_unlock(&image->counting);
}

const struct vhd_image_shared *vhd_image_shared(const vhd_image *image)
{
    return image->shared;
}

int vhd_image_shared_fd(const vhd_image *image)
{
    return image->shared_fd;
}

/* -- durability ------------------------------------------------------------------------------- */

static uint32_t failure_of(const struct vhd_image *image)
{
    return __atomic_load_n(&image->shared->failed_errno, __ATOMIC_ACQUIRE);
}

void vhd_image_fail(vhd_image *image, uint32_t error)
{
    uint32_t healthy = 0;

    /* The first failure is the one to be told. */
    (void)__atomic_compare_exchange_n(&image->shared->failed_errno, &healthy, error, false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

/* What fdatasync(2) says of the witness, which is told of each write error for itself. */
static uint32_t ask_witness(struct vhd_image *image)
{
    int rc;

    if (image->witness_fd < 0)
        return 0;
    do {
        rc = fdatasync(image->witness_fd);
    } while (rc != 0 && errno == EINTR);
    return rc == 0 ? 0 : (uint32_t)errno;
}

void vhd_image_clear(vhd_image *image)
{
    pthread_mutex_lock(&image->syncing);
    /* The witness has not been told yet of what is forgotten now, and must not tell it later. */
    (void)ask_witness(image);
    image->outcome_unknown = false;
    __atomic_store_n(&image->shared->syncing, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&image->shared->failed_errno, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&image->syncing);
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void count_sync(struct vhd_image_shared *shared, uint64_t took_ns)
{
    __atomic_store_n(&shared->syncs, shared->syncs + 1, __ATOMIC_RELAXED);
    __atomic_store_n(&shared->sync_ns, shared->sync_ns + took_ns, __ATOMIC_RELAXED);
    __atomic_store_n(&shared->sync_ns_last, took_ns, __ATOMIC_RELAXED);
    if (took_ns > shared->sync_ns_max)
        __atomic_store_n(&shared->sync_ns_max, took_ns, __ATOMIC_RELAXED);
}

static void sync_file(struct vhd_image *image)
{
    struct vhd_image_shared *shared = image->shared;
    uint64_t start_ns = now_ns();
    int rc;

    __atomic_store_n(&shared->syncing, 1, __ATOMIC_RELEASE);
    do {
        /* The first one takes along what happened to the file before we came, its size included;
         * later ones need only the data and what finds it again. */
        rc = shared->syncs == 0 ? fsync(image->fd) : fdatasync(image->fd);
    } while (rc != 0 && errno == EINTR);
    if (rc != 0)
        vhd_image_fail(image, (uint32_t)errno);
    if (image->outcome_unknown) {
        uint32_t error = ask_witness(image);

        if (error != 0)
            vhd_image_fail(image, error);
        image->outcome_unknown = false;
    }
    vhd_fence_before_death(); /* the failure before the end, for whoever takes over */
    __atomic_store_n(&shared->syncing, 0, __ATOMIC_RELEASE);
    count_sync(shared, now_ns() - start_ns);
}

int vhd_image_sync(vhd_image *image)
{
    int error;

    pthread_mutex_lock(&image->syncing);
    /* After a failure the kernel calls the pages clean that it could not write: a sync that
     * succeeds now would prove nothing. */
    if (failure_of(image) == 0)
        sync_file(image);
    error = (int)failure_of(image);
    pthread_mutex_unlock(&image->syncing);
    return -error;
}

int vhd_image_write_back(vhd_image *image)
{
    /* Without the flags that wait: those would take a write error away from the next sync. */
    return sync_file_range(image->fd, 0, 0, SYNC_FILE_RANGE_WRITE) == 0 ? 0 : -errno;
}

int vhd_image_cache(vhd_image *image, struct vhd_image_cache *cache)
{
    struct cachestat_range all = {0, 0};
    struct cachestat_counts counts;
    uint64_t page_size = (uint64_t)sysconf(_SC_PAGESIZE);

    if (syscall(SYS_cachestat, image->fd, &all, &counts, 0) != 0)
        return -errno;
    cache->cached = counts.cached * page_size;
    cache->dirty = counts.dirty * page_size;
    cache->writeback = counts.writeback * page_size;
    return 0;
}

/* -- in another process ----------------------------------------------------------------------- */

static int process_advise(int pidfd, uint64_t address, uint64_t size, int advice)
{
    while (size != 0) {
        /* The kernel takes less than 2 GiB (MAX_RW_COUNT) at a time, and says how much. */
        struct iovec part = {(void *)(uintptr_t)address, size < 1u << 30 ? size : 1u << 30};
        long done = syscall(SYS_process_madvise, pidfd, &part, 1, advice, 0);

        if (done < 0)
            return -errno;
        if (done == 0)
            return -EIO;
        address += (uint64_t)done;
        size -= (uint64_t)done;
    }
    return 0;
}

int vhd_process_page_out(int pidfd, uint64_t address, uint64_t size)
{
    return process_advise(pidfd, address, size, MADV_PAGEOUT);
}

int vhd_process_cool(int pidfd, uint64_t address, uint64_t size)
{
    return process_advise(pidfd, address, size, MADV_COLD);
}
