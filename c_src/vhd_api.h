/* vhd_api.h - the boundary between Python and the C core; vhd_image_api.h goes on with images.
 *
 * One declaration, two readers: C includes both files through vhd.h, cffi parses them as its cdef.
 * That is why they hold no preprocessor line. Every size is in bytes unless the name says _pages;
 * addresses named guest_addr are guest-physical.
 *
 * Threads. "The worker" is the one native thread of a VM. Functions are called from Python threads
 * and carry one of three marks:
 *   [parked]  only while the worker is parked (vhd_worker_parked() != 0), asserted
 *   [any]     at any time
 *   [setup]   before the object is attached to a worker or after it is detached
 * Only the worker reads or writes guest memory, rings included, and only while it is not parked.
 *
 * Functions return 0 or a count on success and -errno on failure, unless said otherwise.
 */

enum {
    VHD_QUEUES_MAX = 8,              /* per device; a balloon has 5, virtio-mem and pmem 1 */
    VHD_QUEUE_SIZE_MAX = 32768,      /* virtio 1.x, 2.6 "Queue Size" */
    VHD_REGIONS_MAX = 509,           /* what GET_MAX_MEM_SLOTS advertises, as rust-vmm does */
    VHD_CHAIN_SEGMENTS_MAX = 1024,   /* longest chain taken; QEMU's VIRTQUEUE_MAX_SIZE */
    VHD_CONFIG_SIZE_MAX = 256,       /* VHOST_USER_MAX_CONFIG_SIZE */
    VHD_CONTROL_READABLE_MAX = 4096, /* of a control chain handed up; the rest is counted */
    VHD_PFNS_PER_CHAIN_MAX = 1024,   /* one 4 KiB table, the largest any known driver sends */
    VHD_REPLY_SIZE_MAX = 8192        /* of vhd_reply_prepare() */
};

/* What was wrong with a ring or chain; a ring with a fault is quarantined until its next start. */
enum vhd_fault {
    VHD_FAULT_NONE = 0,
    VHD_FAULT_AVAIL_INDEX,  /* avail.idx ran ahead by more than the queue size */
    VHD_FAULT_HEAD,         /* head descriptor index >= queue size */
    VHD_FAULT_NEXT,         /* next descriptor index >= table size */
    VHD_FAULT_LOOP,         /* chain longer than its table: it loops */
    VHD_FAULT_CHAIN_LENGTH, /* more than VHD_CHAIN_SEGMENTS_MAX descriptors */
    VHD_FAULT_INDIRECT,     /* indirect table empty, ragged, nested, chained on or not negotiated */
    VHD_FAULT_ZERO_LENGTH,  /* a descriptor of length 0 */
    VHD_FAULT_ORDER,        /* readable descriptor after a writable one */
    VHD_FAULT_ADDRESS,      /* a range that is not wholly inside guest memory */
    VHD_FAULT_SIZE,         /* total chain length >= 2^32 */
    VHD_FAULT_DUPLICATE,    /* a head made available again while still in flight */
    VHD_FAULT_PACKED_ID,    /* packed: buffer id >= queue size, or bad flags */
    VHD_FAULT_SIGBUS,       /* guest memory file was truncated under us */
    VHD_FAULT_COUNT
};

/* What runs a queue: the C data plane, or Python (chains are handed up). */
enum vhd_handler {
    VHD_HANDLER_NONE = 0,       /* role not known yet: the ring is started but not served */
    VHD_HANDLER_CONTROL,        /* chains go to Python, which completes them in order */
    VHD_HANDLER_CONTROL_BLOCKS, /* the same, but writable descriptors are ranges, not buffers */
    VHD_HANDLER_INFLATE,
    VHD_HANDLER_DEFLATE,
    VHD_HANDLER_REPORT,
    VHD_HANDLER_FLUSH /* virtio-pmem requests, answered after a sync of the device's image */
};

/* Bits of vhd_ring_setup.features */
enum {
    VHD_RING_PACKED = 1,
    VHD_RING_EVENT_IDX = 2,
    VHD_RING_INDIRECT = 4,
    VHD_RING_IN_ORDER = 8,
    VHD_RING_LOG_USED = 16 /* VHOST_VRING_F_LOG: mark used-ring writes in the dirty log */
};

/* Bits returned by vhd_device_take_events() */
enum {
    VHD_EVENT_SOCKET = 1,       /* the socket needs Python: a cold message, or end of file */
    VHD_EVENT_CONFIG = 2,       /* the guest wrote its config bytes */
    VHD_EVENT_CHAINS = 4,       /* control chains wait in an inbox */
    VHD_EVENT_FAULT = 8,        /* a ring was quarantined; see vhd_ring_shared.fault */
    VHD_EVENT_HOST_ERROR = 16,  /* a discard failed; see vhd_balloon_counters.discard_errno */
    VHD_EVENT_FLUSH_FAILED = 32 /* the guest was told that a flush failed */
};

/* Bits of vhd_balloon_configure() */
enum {
    VHD_BALLOON_MUST_TELL_HOST = 1, /* negotiated: a deflate is acknowledged before it is used */
    VHD_BALLOON_PAGE_POISON =
        2, /* negotiated: while poison_val is not 0 reported pages keep their bytes */
    VHD_BALLOON_MAY_DISCARD = 4 /* nothing pins guest memory; a new device has not heard so */
};

/* Where a ring stands. Packed rings use the wrap counters (0 or 1), split rings ignore them. */
struct vhd_ring_position {
    uint16_t next_avail;
    uint16_t next_used;
    uint8_t avail_wrap;
    uint8_t used_wrap;
    uint16_t number; /* of the chain at next_avail: all of the ring are counted, whatever start they
                        are of, and one that comes again keeps its own; modulo 2^16 */
};

/* The chain that is given back, or was last: told before the driver can see it (packed). */
struct vhd_ring_push {
    uint16_t at; /* next_used before, used wrap counter << 15 */
    uint16_t slots;
};

/* One ring as all processes that may serve it see it. Written by the worker with relaxed stores. */
struct vhd_ring_shared {
    /* next_avail: oldest chain not yet completed. Stored at once after each chain given back. */
    struct vhd_ring_position position;
    uint8_t started;
    uint8_t enabled;
    uint8_t fault; /* enum vhd_fault; not 0 = quarantined */
    uint8_t taken; /* a chain was taken since that start */
    struct vhd_ring_push push;
    uint64_t start_number;  /* of the start that the above is of; UINT64_MAX: never started */
    uint64_t fault_addr;    /* of VHD_FAULT_ADDRESS: in no region; UINT64_MAX: not known */
    uint64_t kicks;         /* seen; several before we look are one */
    uint64_t chains;        /* taken from the ring */
    uint64_t used;          /* given back */
    uint64_t calls;         /* interrupts raised */
    uint64_t calls_dropped; /* call eventfd was full */
    uint64_t faults;
    uint64_t rejected; /* well-formed chains whose content was refused, given back unused */
};

struct vhd_balloon_counters {
    uint64_t inflated_pages; /* now in the balloon, by our own bitmaps of the table's files */
    uint64_t inflate_pfns;   /* ever listed by the guest */
    uint64_t deflate_pfns;
    uint64_t reported_size;  /* bytes ever reported free */
    uint64_t discarded_size; /* bytes of holes ever punched */
    uint64_t discards;       /* fallocate calls */
    uint64_t discard_errors;
    uint64_t discard_errno;   /* of the latest error */
    uint64_t pfns_outside;    /* page numbers outside guest RAM */
    uint64_t pfns_repeated;   /* inflate of a page already in, deflate of one not in */
    uint64_t pfns_excess;     /* beyond VHD_PFNS_PER_CHAIN_MAX or a ragged tail: ignored */
    uint64_t reports_refused; /* reported ranges outside RAM or not device-writable */
    uint64_t pages_kept;      /* given up, kept because their host page is not complete */
    uint64_t withheld_size;   /* bytes ever given up or reported that may not be discarded */
    uint64_t outside_addr; /* the latest that was given up or reported and is in no region; or 0 */
};

struct vhd_pmem_counters {
    uint64_t flushes;      /* requests that were answered, well or badly */
    uint64_t flush_errors; /* of these: the sync failed, or one has before */
    uint64_t malformed;    /* of an unknown type, or too short; answered as failed where possible */
    uint64_t batches;      /* syncs made for them: one serves all requests taken before it began */
};

/* A request that was handled and must now be taken from the socket and answered, once. */
struct vhd_reply_shared {
    uint64_t pending;  /* its number, UINT64_MAX one that the worker serves; 0 = there is none */
    uint64_t finished; /* number of the latest one that was finished, the worker's not counted */
    uint32_t consume_size; /* of the request */
    uint32_t begin;        /* of the reply in its memfd */
    uint32_t end;
};

struct vhd_shared {
    uint32_t magic;
    uint32_t version;
    uint32_t queue_count;
    uint32_t config_size;
    struct vhd_reply_shared reply;
    uint8_t config[256];
    uint64_t config_reads; /* answered by the worker */
    uint64_t config_writes;
    /* Of the driver: another one after each reset, on each connection. What is known of the pages a
     * driver gave up stands beside its generation and is of no use to another one. */
    uint64_t driver_generation;
    struct vhd_balloon_counters balloon;
    struct vhd_pmem_counters pmem;
    struct vhd_ring_shared rings[8];
};

/* -- host memory ------------------------------------------------------------------------------ */

typedef struct vhd_mapping
    vhd_mapping; /* one guest memory file, mapped whole and shared, once per VM */

/* What a descriptor of somebody else's is of, as fstat(2) has it; 0 or -errno. A file system that
 * may never answer is not asked: what the kernel knows of it must do. [any] */
struct vhd_file {
    uint64_t device; /* st_dev */
    uint64_t inode;  /* st_ino */
    uint64_t size;   /* st_size as the kernel has it: of a file that has no pages, 0 */
    uint32_t mode;   /* st_mode, the file's type alone */
};
int vhd_file_identify(int fd, struct vhd_file *file);

/* Map all of fd's file. The fd is duplicated. *error gets -errno when NULL is returned:
 * -EOPNOTSUPP neither shmem (memfd, tmpfs) nor hugetlbfs, -EINVAL a mere path, -ENODATA empty file,
 * -EACCES not writable. given_up_fd: a predecessor's memfd of the same file's pages in the balloon,
 * with the generation that gave them up; duplicated, -EPROTO when it is none or of another size;
 * -1 = a new one, nothing in the balloon. [any] */
vhd_mapping *vhd_mapping_create(int fd, int given_up_fd, int *error);
void vhd_mapping_destroy(vhd_mapping *mapping); /* no device may use it any more [any] */
uint64_t vhd_mapping_size(const vhd_mapping *mapping);
uint64_t vhd_mapping_page_size(const vhd_mapping *mapping); /* 4096, or the hugetlb page */
/* Count of 4 KiB pages the guest gave up to the balloon in this file, by bitmap. [any] */
uint64_t vhd_mapping_given_up_pages(const vhd_mapping *mapping);
int vhd_mapping_given_up_fd(const vhd_mapping *mapping); /* memfd behind it, borrowed */

/* Ranges of the file in whole pages of it, else -EINVAL; for memory that comes and goes by the
 * block. All may take long and are for a helper thread. [any] */
/* Give the range back to the host. */
int vhd_mapping_discard(vhd_mapping *mapping, uint64_t offset, uint64_t size);
/* Allocate the range's pages, zeroed. On failure (-ENOMEM, -ENOSPC) some of it may be allocated. */
int vhd_mapping_populate(vhd_mapping *mapping, uint64_t offset, uint64_t size);
/* The first part of the range that has memory, cut at its end: 1 found, 0 there is none.
 * -EOPNOTSUPP on hugetlbfs. */
int vhd_mapping_next_data(const vhd_mapping *mapping, uint64_t offset, uint64_t size,
                          uint64_t *begin, uint64_t *end);
/* Bytes of host memory the whole file takes up; -errno. */
int64_t vhd_mapping_resident_size(const vhd_mapping *mapping);
/* Take the range's future pages from one host NUMA node (MPOL_BIND), for all who map the file. */
int vhd_mapping_bind(vhd_mapping *mapping, uint64_t offset, uint64_t size, uint32_t node);

struct vhd_region {
    uint64_t guest_addr;
    uint64_t size;
    uint64_t file_offset;
    vhd_mapping *mapping;
    uint32_t preallocated; /* 1: what is reported free in it stays, it was allocated ahead */
};

typedef struct vhd_log vhd_log; /* dirty log of LOG_SHMFD: one bit per 4 KiB guest page */
/* size and offset in bytes; the file as for a mapping. -EINVAL: the window leaves it. [any] */
vhd_log *vhd_log_create(int fd, uint64_t size, uint64_t offset, int *error);
void vhd_log_destroy(vhd_log *log);

/* -- worker ----------------------------------------------------------------------------------- */

typedef struct vhd_worker vhd_worker;
typedef struct vhd_device vhd_device;

vhd_worker *vhd_worker_create(const char *name, int *error); /* starts the thread, unparked */
/* Stops and joins the thread; every device must be detached. Blocks for one discard at most. */
void vhd_worker_destroy(vhd_worker *worker);
/* An eventfd that becomes readable when any device has events or the worker has parked. [any] */
int vhd_worker_notify_fd(const vhd_worker *worker);
/* Ask the worker to stop between two chains; notify_fd tells when it has, or it is at once: while
 * the worker syncs an image it counts as parked. [any] */
void vhd_worker_park(vhd_worker *worker);
int vhd_worker_parked(const vhd_worker *worker);
void vhd_worker_unpark(vhd_worker *worker); /* [parked] */
/* Rises with every round of the worker's loop; for a watchdog. [any] */
uint64_t vhd_worker_rounds(const vhd_worker *worker);
/* A number of the round it is in; 0 while it waits for events, is parked or syncs an image. */
uint64_t vhd_worker_busy_round(const vhd_worker *worker);

/* -- device ----------------------------------------------------------------------------------- */

/* Queues and config space. config_writable: a 1 bit for each bit the guest may write. [setup] */
vhd_device *vhd_device_create(uint32_t queue_count, uint32_t config_size,
                              const uint8_t *config_writable, int *error);
/* The same over the two memfds of a dead predecessor, duplicated: counters, config bytes and a
 * reply that is owed go on where they were; no ring is started. Raises VHD_EVENT_CONFIG: nobody may
 * have seen what the guest wrote last. Config bytes Python is the author of it publishes again.
 * -EPROTO: of another version, for another kind of device, or not these memfds. [setup] */
vhd_device *vhd_device_adopt(int shared_fd, int reply_fd, uint32_t queue_count,
                             uint32_t config_size, const uint8_t *config_writable, int *error);
void vhd_device_destroy(vhd_device *device);                   /* [setup] */
int vhd_device_attach(vhd_device *device, vhd_worker *worker); /* [parked] */
void vhd_device_detach(vhd_device *device);                    /* [parked] stops all rings */
/* Take and clear the VHD_EVENT_ bits raised since the last call. [any] */
uint32_t vhd_device_take_events(vhd_device *device);
const struct vhd_shared *vhd_device_shared(const vhd_device *device);
int vhd_device_shared_fd(const vhd_device *device); /* memfd behind it, borrowed */
/* The memfd replies are sent from, borrowed; a successor needs its file position too, so it must be
 * this open file (dup(2), SCM_RIGHTS), not the same file opened anew. */
int vhd_device_reply_fd(const vhd_device *device);

/* The socket: Python owns it at first. arm() hands it to the worker, which answers GET_CONFIG and
 * SET_CONFIG (flags 0) alone once hot is set, and hands it back with VHD_EVENT_SOCKET, nothing
 * consumed, on any other message, an incomplete one, fds attached, or end of file. */
/* Borrowed, made non-blocking; -1 = none. On an adopted device the first one must be the one the
 * predecessor had. [parked] */
void vhd_socket_set(vhd_device *device, int fd);
int vhd_socket_arm(vhd_device *device); /* [any] Python owns it */
/* hot: PROTOCOL_F_CONFIG acknowledged. reply_ack: PROTOCOL_F_REPLY_ACK acknowledged. [any] */
void vhd_socket_configure(vhd_device *device, int hot, int reply_ack);

/* A request is answered once, whoever is killed when: handle the request at the head of the socket
 * without taking it (MSG_PEEK), prepare, finish. Who dies before prepare returns leaves it to be
 * handled again, which handling must bear; who dies later leaves the rest of finish, which a
 * successor calls after vhd_socket_set() and before it looks at the socket. Nothing is read or
 * peeked between the two. Only for the side that owns the socket.
 * number: see vhd_reply_shared. consume_size: of the request, all there; descriptors with it are
 * closed. size: of the reply, at most VHD_REPLY_SIZE_MAX, may be 0; descriptors can't be sent.
 * -EBUSY: finish the last one; -EINVAL; -ENOTCONN. [any] */
int vhd_reply_prepare(vhd_device *device, uint64_t number, uint32_t consume_size,
                      const uint8_t *bytes, uint32_t size);
/* 0: done, or nothing was prepared; -EAGAIN: full, call again when it is writable; -EPROTO: less
 * than consume_size was there; else of sendfile(2), which may raise SIGPIPE. [any] */
int vhd_reply_finish(vhd_device *device);

void vhd_config_publish(vhd_device *device, uint32_t offset, const uint8_t *bytes,
                        uint32_t size);                                  /* [any] */
void vhd_config_read(vhd_device *device, uint8_t *bytes, uint32_t size); /* [any] */

/* Replace the memory table. Started rings are translated anew; where one no longer lies wholly in
 * guest memory nothing changes and -EFAULT is returned. [parked] */
int vhd_device_set_regions(vhd_device *device, const struct vhd_region *regions, uint32_t count);
void vhd_device_set_log(vhd_device *device, vhd_log *log, int log_all); /* [parked] NULL = off */

struct vhd_ring_setup {
    uint32_t size;
    uint32_t features;                 /* VHD_RING_ bits */
    uint64_t desc_addr;                /* guest addresses; packed: descriptor ring */
    uint64_t avail_addr;               /* packed: driver event suppression */
    uint64_t used_addr;                /* packed: device event suppression */
    uint64_t log_addr;                 /* guest address that used-ring writes are logged at */
    struct vhd_ring_position position; /* next_used matters for packed; split reads used.idx;
                                          number is the ring's own */
    uint32_t handler;
    int kick_fd; /* borrowed until vhd_ring_stop; -1 = none */
    int call_fd;
    int err_fd;
    /* The caller's, another for each start of the ring; what vhd_ring_resume() goes by. */
    uint64_t start_number;
};

/* -EINVAL: size not legal; -EFAULT: a part is unaligned, outside one region, or overlaps another
 * part; else what mmap(2) and epoll_ctl(2) say. The device must be attached. The worker opens the
 * ring when it runs again, and before it parks again: what must be read from guest memory it reads
 * then, and quarantines the ring where that is gone. The ring is looked at once as soon as it is
 * enabled. [parked] */
int vhd_ring_start(vhd_device *device, uint32_t index, const struct vhd_ring_setup *setup);
/* As vhd_ring_start(), on an adopted device. If the predecessor started the ring with the same
 * start_number (and even if it stopped it since), where it stands is found out, chains not given
 * back come again, and a quarantine stays; otherwise it starts at setup's position. Either way the
 * driver is interrupted once: the predecessor may have died before it did. What vhd_ring_shared
 * says is of this start as soon as the worker has opened the ring. [parked] */
int vhd_ring_resume(vhd_device *device, uint32_t index, const struct vhd_ring_setup *setup);
/* Nothing for a ring that is not started. [parked] */
void vhd_ring_enable(vhd_device *device, uint32_t index, int enabled);
void vhd_ring_set_handler(vhd_device *device, uint32_t index, uint32_t handler); /* [parked] */
void vhd_ring_set_call(vhd_device *device, uint32_t index, int fd);              /* [parked] */
void vhd_ring_set_err(vhd_device *device, uint32_t index, int fd);               /* [parked] */
/* Forget chains Python holds and report where the ring stands: next_avail is the oldest chain not
 * completed, so that nothing is lost when it starts again. Not started: zeroes. [parked] */
void vhd_ring_stop(vhd_device *device, uint32_t index, struct vhd_ring_position *position);

/* -- chains handed to Python ------------------------------------------------------------------ */

struct vhd_chain {
    uint32_t token;          /* for vhd_chain_complete */
    uint32_t position;       /* its number in the low half, above it the avail index, or the slot
                                and the wrap counter << 15 */
    uint32_t copied_size;    /* readable bytes given to the caller */
    uint32_t readable_size;  /* what the driver sent in all */
    uint32_t writable_count; /* device-writable descriptors */
    uint64_t writable_size;
    uint64_t writable_addr; /* guest address of the first of them */
};

/* 1: one chain and its bytes (at most VHD_CONTROL_READABLE_MAX); 0: none. [any] */
int vhd_chain_take(vhd_device *device, uint32_t index, struct vhd_chain *chain, uint8_t *bytes);
/* Let the worker write bytes into the chain and give it back. Completions leave the device in the
 * order the chains were taken. -ESTALE: the ring was stopped meanwhile. [any] */
int vhd_chain_complete(vhd_device *device, uint32_t index, uint32_t token, const uint8_t *bytes,
                       uint32_t size);

/* -- balloon data plane ----------------------------------------------------------------------- */

void vhd_balloon_configure(vhd_device *device, uint32_t flags); /* [any] VHD_BALLOON_ bits */
/* The driver started afresh, as a new generation: nothing is in the balloon any more. [parked] */
void vhd_balloon_reset(vhd_device *device);

/* -- images ----------------------------------------------------------------------------------- */

typedef struct vhd_image vhd_image; /* see vhd_image_api.h */

/* Whose syncs the device's VHD_HANDLER_FLUSH ring asks for; the device holds it until it gets
 * another, NULL or is detached. [parked] */
void vhd_device_set_image(vhd_device *device, vhd_image *image);
