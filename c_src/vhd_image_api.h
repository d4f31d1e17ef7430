/* vhd_image_api.h - images: files that are a guest's persistent memory. Read after vhd_api.h, by
 * its rules. */

/* How an image does, as a successor finds it too. Sizes in bytes, times in nanoseconds. */
struct vhd_image_shared {
    uint32_t magic;
    uint32_t version;
    uint32_t failed_errno; /* not 0: a sync failed, and every later one does until it is cleared */
    uint32_t syncing;      /* a sync is under way: who finds this 1 knows nothing of its outcome */
    uint64_t syncs;
    uint64_t sync_ns; /* spent in all of them */
    uint64_t sync_ns_last;
    uint64_t sync_ns_max;
};

/* Page cache of an image, bytes. */
struct vhd_image_cache {
    uint64_t cached;
    uint64_t dirty;
    uint64_t writeback;
};

/* For a regular file or block device. Descriptors are duplicated. NULL: *error is -errno. [any]
 * shared_fd: a predecessor's memfd, -EPROTO when it is none; -1 = a new one. If it died in a sync,
 * nobody saw what came of it, and the kernel tells of a write error once for each open file: the
 * next sync then asks witness_fd too, the same file (else -EINVAL) opened a second time, not
 * duplicated, before the predecessor's first sync. Without one (-1) such an error is lost. fd must
 * be the open file that the predecessor had. */
vhd_image *vhd_image_create(int fd, int witness_fd, int shared_fd, int *error);
/* The last user closes it: a worker may be in a sync that ends much later. [any] */
void vhd_image_release(vhd_image *image);
/* Wait until no device and no worker uses it any more, for its one other user; blocks as long as a
 * sync. [any] */
void vhd_image_wait_alone(vhd_image *image);
const struct vhd_image_shared *vhd_image_shared(const vhd_image *image);
int vhd_image_shared_fd(const vhd_image *image); /* memfd behind it, borrowed */
/* Make all that was written durable; blocks. One sync at a time: the kernel reports a write error
 * once for each open file, and whoever waits must learn of it. Once one failed all fail with the
 * same -errno. [any] */
int vhd_image_sync(vhd_image *image);
/* Declare it failed, or forget that it is (blocks as long as a sync). [any] */
void vhd_image_fail(vhd_image *image, uint32_t error);
void vhd_image_clear(vhd_image *image);
/* Begin to write dirty pages without waiting for them; may block where the disk's queue is full.
 * Errors are left for the next sync to report. [any] */
int vhd_image_write_back(vhd_image *image);
/* -ENOSYS: the kernel has no cachestat(2). [any] */
int vhd_image_cache(vhd_image *image, struct vhd_image_cache *cache);

/* Advise another process' memory (its address, bytes), which needs the right to look into it and
 * CAP_SYS_NICE: take the pages out of host memory; or forget that they were used. [any] */
int vhd_process_page_out(int pidfd, uint64_t address, uint64_t size);
int vhd_process_cool(int pidfd, uint64_t address, uint64_t size);
