/* vhd.h - what the C files share, with vhd_memory.h. Not seen by Python.
 *
 * Rooms, in the order a kick passes through them:
 *   worker.c         the thread: epoll and parking. Knows no ring layout and no device.
 *   socket.c         GET_CONFIG and SET_CONFIG answered in place. Knows no other message.
 *   shared.c         what a device leaves to the process after this one.
 *   reply.c          a request taken and answered once, whoever is killed when.
 *   device.c         one connection's queues, config bytes and events: their life.
 *   opening.c        a started ring's first turn, where guest memory is touched first.
 *   queue.c          one turn of one ring, fairness, quarantine.   handed.c  chains through Python.
 *   ring.c           starting, stopping and the choice of layout; ring_split.c, ring_packed.c the
 *                    two layouts; chain.c the descriptor walk both share.
 *   guest_mem.c      guest range -> host pointer, checked; mapping.c the mapped files; backing.c
 *                    what kind of file they are.
 *   given_up.c       which of their pages are in the balloon, of which generation of the driver.
 *   balloon.c        inflate, deflate, report: page numbers -> runs -> discards.
 *   discard.c        the one place that punches holes.   window.c  ranges plugged and unplugged.
 *   flush.c          pmem requests: one sync answers many.   image.c  the file: syncs, page cache.
 *   memfd.c          what outlives us, made or taken over.
 *   dirty_log.c      the migration log.   sigbus.c   survives a truncated memory file.
 *   interrupt.c      a wait for the VMM that parking ends.
 *
 * Rules: guest memory is read once into a local with the loads of barrier.h, then checked, then
 * used. No allocation on the ring path. Nothing here trusts a byte that came from a ring.
 */
#ifndef VHD_H
#define VHD_H

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "vhd_api.h"
#include "vhd_image_api.h"
#include "vhd_memory.h"

/* -- ring.c, ring_split.c, ring_packed.c, chain.c --------------------------------------------- */

struct vhd_segment {
    uint64_t guest_addr;
    uint32_t size;
};

struct vhd_ring;

/* One chain, copied out of guest memory: readable segments first, then writable ones. */
struct vhd_walk {
    uint16_t id;    /* split: head index; packed: buffer id */
    uint16_t slots; /* packed: descriptors of the ring used up; split: 1 */
    uint16_t readable_count;
    uint16_t writable_count;
    uint64_t readable_size;
    uint64_t writable_size;
    uint64_t outside; /* of VHD_FAULT_ADDRESS: the first address that is in no region */
    struct vhd_segment segments[VHD_CHAIN_SEGMENTS_MAX];
    uint8_t indirect[VHD_CHAIN_SEGMENTS_MAX * 16]; /* private copy of an indirect table */
};

struct vhd_ring {
    uint32_t size;
    uint32_t features; /* VHD_RING_ bits */
    uint64_t desc_addr, avail_addr, used_addr, log_addr;
    uint8_t *desc, *avail, *used;      /* host addresses, each inside one region */
    struct vhd_ring_position position; /* where the next pop and the next push happen */
    uint16_t signalled_used;           /* split event index: used index at the last call decision */
    bool signalled_valid;
    const struct vhd_table *table;
    struct vhd_log *log;                         /* NULL = not logging */
    uint64_t in_flight[VHD_QUEUE_SIZE_MAX / 64]; /* heads or ids taken and not given back */
    uint32_t in_flight_count;
};

/* A descriptor after it was read once; next is the buffer id in a packed ring. */
struct vhd_descriptor {
    uint64_t addr;
    uint32_t size;
    uint16_t flags;
    uint16_t next;
};

enum { VHD_DESC_NEXT = 1, VHD_DESC_WRITE = 2, VHD_DESC_INDIRECT = 4 };
enum { VHD_DESC_SIZE = 16 };

/* chain.c: begin an empty walk; add one descriptor, or the indirect table one points to. 0 or
 * -(enum vhd_fault). */
void vhd_walk_begin(struct vhd_walk *walk);
int vhd_walk_add(struct vhd_walk *walk, const struct vhd_ring *ring,
                 const struct vhd_descriptor *descriptor, bool data_ranges);
int vhd_walk_add_indirect(struct vhd_walk *walk, const struct vhd_ring *ring,
                          const struct vhd_descriptor *descriptor, bool data_ranges);

static inline bool vhd_ring_holds(const struct vhd_ring *ring, uint16_t id)
{
    return (ring->in_flight[id / 64] >> (id % 64)) & 1;
}

/* The two layouts behind the functions below. */
int vhd_split_pop(struct vhd_ring *ring, struct vhd_walk *walk, bool data_ranges);
void vhd_split_push(struct vhd_ring *ring, uint16_t id, uint32_t written);
bool vhd_split_should_call(struct vhd_ring *ring);
void vhd_split_kicks_off(struct vhd_ring *ring);
bool vhd_split_kicks_on(struct vhd_ring *ring);
int vhd_packed_pop(struct vhd_ring *ring, struct vhd_walk *walk, bool data_ranges);
void vhd_packed_push(struct vhd_ring *ring, uint16_t id, uint16_t slots, uint32_t written);
/* What a push is about to do; if that was done and position is still as before, step over it. */
struct vhd_ring_push vhd_packed_announce(const struct vhd_ring *ring, uint16_t slots);
void vhd_packed_catch_up(struct vhd_ring *ring, struct vhd_ring_push push);
bool vhd_packed_should_call(struct vhd_ring *ring);
void vhd_packed_kicks_off(struct vhd_ring *ring);
bool vhd_packed_kicks_on(struct vhd_ring *ring);

/* Mark bytes of the used part in the dirty log, when the VMM asked for it. */
void vhd_ring_log_used(struct vhd_ring *ring, uint64_t offset, uint64_t size);
/* All of it, wherever the layout has it. */
void vhd_ring_log_all_used(struct vhd_ring *ring);

/* Check sizes, alignment, overlap; translate. -EINVAL, -EFAULT as vhd_ring_start(). Guest memory is
 * not touched, so the ring is to be opened before its first use. */
int vhd_ring_init(struct vhd_ring *ring, const struct vhd_table *table,
                  const struct vhd_ring_setup *setup);
/* Split rings take position.next_used from used.idx. */
void vhd_ring_open(struct vhd_ring *ring);
/* The same for a ring that a predecessor served: its position is the last one that was stored, push
 * what was announced last. */
void vhd_ring_open_resumed(struct vhd_ring *ring, struct vhd_ring_push push);
/* Translate the three parts again after the table changed. -EFAULT leaves the ring unchanged. */
int vhd_ring_translate(struct vhd_ring *ring, const struct vhd_table *table);
/* 1: walk holds the next chain; 0: nothing available; negative: -(enum vhd_fault), ring unchanged
 * and must be quarantined. data_ranges: segments are payload that will be read or written, so each
 * must lie in guest memory (VHD_FAULT_ADDRESS); false for queues whose descriptors ARE the payload
 * (reporting, hinting): those ranges are checked by the device. */
int vhd_ring_pop(struct vhd_ring *ring, struct vhd_walk *walk, bool data_ranges);
/* What is stored for a successor before a push. */
struct vhd_ring_push vhd_ring_announce(const struct vhd_ring *ring, uint16_t slots);
/* Give a chain back with `written` bytes used. Marks the dirty log. */
void vhd_ring_push(struct vhd_ring *ring, uint16_t id, uint16_t slots, uint32_t written);
/* After pushes: must the driver be interrupted? Evaluates flags or the event index, once. */
bool vhd_ring_should_call(struct vhd_ring *ring);
/* Tell the driver whether kicks are wanted. Turning them on returns true when something became
 * available meanwhile (the classic race), so the caller must look again. */
void vhd_ring_kicks_off(struct vhd_ring *ring);
bool vhd_ring_kicks_on(struct vhd_ring *ring);

/* -- sigbus.c --------------------------------------------------------------------------------- */

/* Runs body(argument) so that SIGBUS inside it returns false instead of killing the process.
 * Any thread; not nested. Installs the handler once per process. */
bool vhd_sigbus_guard(void (*body)(void *argument), void *argument);

/* -- interrupt.c ------------------------------------------------------------------------------ */

enum vhd_signalled { VHD_SIGNAL_SENT, VHD_SIGNAL_FULL, VHD_SIGNAL_INTERRUPTED };

/* Let the thread that is to be started with this mask be interrupted. */
void vhd_interrupt_unmask(sigset_t *blocked);
/* End the thread's wait, if it is in one; it was asked to park or stop before. */
void vhd_interrupt_send(pthread_t thread, const _Atomic bool *waiting);
/* Add 1 to an eventfd of the VMM's; the worker's own thread. INTERRUPTED: do it again later. */
enum vhd_signalled vhd_interruptible_signal(struct vhd_worker *worker, _Atomic bool *waiting,
                                            int fd);

/* -- discard.c -------------------------------------------------------------------------------- */

/* Punch [offset, offset+size) of the mapping's file; page aligned by the caller, asserted. */
int vhd_discard(const struct vhd_mapping *mapping, uint64_t offset, uint64_t size);

/* -- balloon.c -------------------------------------------------------------------------------- */

struct vhd_balloon {
    _Atomic uint32_t flags;     /* VHD_BALLOON_ bits */
    const uint32_t *poison_val; /* of the config space, where the driver writes it; le32 */
    const uint64_t *generation; /* of the driver, see vhd_shared */
    struct vhd_balloon_counters *counters;
    struct vhd_log *log; /* discards are writes for a migration; NULL = not logging */
};

enum { VHD_CHAIN_REJECTED = 1 };

enum { VHD_BALLOON_POISON_VAL = 12 }; /* offset in the config space, virtio 1.x, 5.5.4 */

/* Each handles one chain and returns 0, VHD_CHAIN_REJECTED (its shape is wrong, it is given back
 * unused) or -(enum vhd_fault). Discards are complete on return. */
int vhd_balloon_inflate(struct vhd_balloon *balloon, const struct vhd_table *table,
                        const struct vhd_walk *walk);
int vhd_balloon_deflate(struct vhd_balloon *balloon, const struct vhd_table *table,
                        const struct vhd_walk *walk);
int vhd_balloon_report(struct vhd_balloon *balloon, const struct vhd_table *table,
                       const struct vhd_walk *walk);

/* -- image.c ---------------------------------------------------------------------------------- */

void vhd_image_hold(struct vhd_image *image);

/* -- device.c, socket.c, worker.c -------------------------------------------------------------- */

enum {
    VHD_DEVICES_MAX = 64,           /* of one worker */
    VHD_CONTROL_CHAINS_MAX = 64,    /* handed to Python and not completed, of one queue */
    VHD_CONTROL_WRITABLE_MAX = 256, /* bytes Python may write into a chain */
    VHD_CHAINS_PER_TURN = 64        /* of one ring before the others get their turn */
};

/* A chain on its way through Python. */
struct vhd_handed_chain {
    struct vhd_chain chain;
    struct vhd_ring_position before; /* of the ring when the chain was popped */
    uint16_t id;
    uint16_t slots;
    uint16_t segment_count; /* writable ones, enough for VHD_CONTROL_WRITABLE_MAX bytes */
    bool completed;
    uint32_t answer_size;
    struct vhd_segment segments[VHD_CONTROL_WRITABLE_MAX];
    uint8_t answer[VHD_CONTROL_WRITABLE_MAX];
    uint8_t bytes[VHD_CONTROL_READABLE_MAX];
};

/* How a started ring begins on the worker's thread; see opening.c. */
enum vhd_opening {
    VHD_OPENING_NONE,    /* it has, or is not started */
    VHD_OPENING_NEW,     /* where the VMM says */
    VHD_OPENING_AFTER,   /* the same, but a predecessor may have served an earlier start of it */
    VHD_OPENING_RESUMED, /* where a predecessor left it */
};

/* What the VMM is to be told as soon as the worker runs again: interrupt.c */
enum { VHD_OWED_CALL = 1, VHD_OWED_ERR = 2 };

struct vhd_queue {
    struct vhd_ring ring;
    uint32_t index;
    uint32_t handler;
    bool started;
    bool enabled;
    bool look; /* something may be available */
    enum vhd_opening opening;
    uint32_t owed;         /* VHD_OWED_ bits */
    uint64_t start_number; /* as in vhd_ring_setup */
    int kick_fd, call_fd, err_fd;
    bool call_missed; /* it was due before SET_VRING_CALL came, which some send after the kick */
    struct vhd_ring_shared *shared;
    /* Chains [oldest, popped) are ours; of these [oldest, taken) Python knows, or on a ring of
     * flush.c are answered. Counted by token;
     * guarded by the device's lock, but the worker alone writes an entry before it is popped. */
    struct vhd_handed_chain *handed;
    uint32_t oldest, taken, popped;
};

/* What reply.c knows beside the record in vhd_shared. */
struct vhd_reply {
    int fd;
    uint8_t *bytes;    /* the file */
    uint32_t position; /* of the file, as the kernel has it */
    int peek_offset;   /* SO_PEEK_OFF of the socket, as the kernel has it */
    bool inherited;    /* a record is the predecessor's, and no socket was set since */
};

struct vhd_device {
    struct vhd_worker *worker; /* NULL = detached */
    uint32_t slot;             /* in the worker */
    uint32_t queue_count;
    struct vhd_queue queues[VHD_QUEUES_MAX];
    struct vhd_table tables[2];
    uint32_t table; /* which of them is in force */
    struct vhd_shared *shared;
    int shared_fd;
    _Atomic uint32_t events;
    _Atomic bool mail;    /* completions wait for the worker */
    pthread_mutex_t lock; /* config bytes and handed chains; never held over guest memory */
    uint8_t config_writable[VHD_CONFIG_SIZE_MAX];
    struct vhd_balloon balloon;
    struct vhd_image *image; /* held; NULL = none */
    struct vhd_log *log;
    int socket_fd;
    _Atomic bool socket_watched;
    _Atomic bool socket_hot, socket_reply_ack;
    struct vhd_reply reply;
};

enum { VHD_SOURCE_COMMAND, VHD_SOURCE_SOCKET, VHD_SOURCE_KICK };

/* worker.c: watch fd for `events`; -errno. */
int vhd_worker_watch(struct vhd_worker *worker, int fd, uint32_t events, uint32_t source,
                     uint32_t slot, uint32_t queue);
void vhd_worker_rewatch(struct vhd_worker *worker, int fd, uint32_t events, uint32_t source,
                        uint32_t slot, uint32_t queue);
void vhd_worker_unwatch(struct vhd_worker *worker, int fd);
void vhd_worker_wake(struct vhd_worker *worker);
bool vhd_worker_wants_park(const struct vhd_worker *worker);
/* Tell Python that a device has events. */
void vhd_worker_notify(struct vhd_worker *worker);
int vhd_worker_add(struct vhd_worker *worker, struct vhd_device *device);
void vhd_worker_remove(struct vhd_worker *worker, struct vhd_device *device);
struct vhd_device *vhd_worker_device(struct vhd_worker *worker, uint32_t slot); /* or NULL */
/* A ring was started; the worker opens it before it serves or parks again. */
void vhd_worker_open_later(struct vhd_worker *worker);
/* Add 1 to an eventfd of the VMM's. The worker's own thread. */
enum vhd_signalled vhd_worker_signal(struct vhd_worker *worker, int fd);
/* The worker's own thread: between these two it touches neither rings nor devices and counts as
 * parked. After return() every device may be another, or gone. */
void vhd_worker_leave(struct vhd_worker *worker);
void vhd_worker_return(struct vhd_worker *worker);

/* device.c, called by the worker. */
void vhd_device_raise(struct vhd_device *device, uint32_t event);
void vhd_device_serve_mail(struct vhd_device *device);
/* Serve what is available, bounded; true when something is left. */
bool vhd_device_serve_rings(struct vhd_device *device, struct vhd_walk *walk);
/* Sync for what waits for it on one ring; true when it did, and the device may be gone. */
bool vhd_device_flush(struct vhd_worker *worker, struct vhd_device *device);

/* opening.c, called by the worker: the rings that were started since it was last called. */
void vhd_device_open_rings(struct vhd_device *device);

/* queue.c: the kick is watched from start to stop, -errno; listened to only while served. */
int vhd_queue_watch(struct vhd_device *device, struct vhd_queue *queue);
void vhd_queue_unwatch(struct vhd_device *device, struct vhd_queue *queue);
void vhd_queue_listen(struct vhd_device *device, struct vhd_queue *queue);
void vhd_queue_kicked(struct vhd_queue *queue);
/* Interrupt the driver if it wants to be; in any case. */
void vhd_queue_set_call(struct vhd_queue *queue, int fd);
void vhd_queue_call(struct vhd_device *device, struct vhd_queue *queue);
void vhd_queue_call_unasked(struct vhd_device *device, struct vhd_queue *queue);
/* Serve the ring no more until its next start, and tell the VMM; or only tell it. addr: as
 * vhd_ring_shared.fault_addr. */
void vhd_queue_quarantine(struct vhd_device *device, struct vhd_queue *queue, int fault,
                          uint64_t addr);
void vhd_queue_signal_fault(struct vhd_device *device, struct vhd_queue *queue);
/* The position is to be published once the chain is no longer counted as ours. */
void vhd_queue_give_back(struct vhd_queue *queue, uint16_t id, uint16_t slots, uint32_t written);
struct vhd_ring_position vhd_queue_position(const struct vhd_queue *queue);
void vhd_queue_publish_position(struct vhd_queue *queue);
/* Give back the chains that are completed, oldest first. */
void vhd_queue_deliver(struct vhd_device *device, struct vhd_queue *queue);

/* handed.c: room for another chain; put one (1, or -(enum vhd_fault)); give back the oldest if it
 * is completed (1, 0, or -(enum vhd_fault)). */
int vhd_handed_open(struct vhd_queue *queue);
void vhd_handed_close(struct vhd_queue *queue);
bool vhd_handed_full(const struct vhd_queue *queue);
int vhd_handed_put(struct vhd_device *device, struct vhd_queue *queue, const struct vhd_walk *walk,
                   struct vhd_ring_position before);
int vhd_handed_deliver_one(struct vhd_device *device, struct vhd_queue *queue);

/* flush.c: put a request, as vhd_handed_put(); does one wait for a sync; sync and answer. */
int vhd_flush_put(struct vhd_device *device, struct vhd_queue *queue, const struct vhd_walk *walk,
                  struct vhd_ring_position before);
bool vhd_flush_due(const struct vhd_queue *queue);
void vhd_flush(struct vhd_worker *worker, struct vhd_device *device, uint32_t index);

/* The version rises with every change of struct vhd_shared, and of what its fields mean. */
enum { VHD_SHARED_MAGIC = 0x76686473 /* "vhds" */, VHD_SHARED_VERSION = 5 };

/* shared_before.c: a new memfd of this release's layout with what fd, of a release before, has; or
 * -errno, -EPROTO when it is none. */
int vhd_shared_convert(int fd);

/* shared.c: both memfds, -1 = a new one. 0 or -errno. */
int vhd_shared_open(struct vhd_device *device, int shared_fd, int reply_fd, uint32_t queue_count,
                    uint32_t config_size);
void vhd_shared_close(struct vhd_device *device);
/* inflated_pages is what the bits say of the files in the table; called where the table changes. A
 * file that left it took its pages along, and a predecessor may have died between bit and sum. */
void vhd_shared_recount(struct vhd_device *device, const struct vhd_table *table);

/* reply.c */
enum { VHD_REPLY_FILE_SIZE = 16384 };
int vhd_reply_open(struct vhd_device *device, int inherited); /* -1: a new one; -errno */
void vhd_reply_close(struct vhd_device *device);
/* Was a request handled whose answer is not out? */
bool vhd_reply_pending(const struct vhd_device *device);
/* Where the next MSG_PEEK begins, from the head of the socket; -1: at the head, always. -errno. */
int vhd_reply_mark(struct vhd_device *device, int offset);
/* MSG_PEEK went on by that much. */
void vhd_reply_peeked(struct vhd_device *device, size_t size);
/* The socket is another one; the worker is done with it, or it is to be given up. */
void vhd_reply_socket_set(struct vhd_device *device);
void vhd_reply_socket_left(struct vhd_device *device);

/* socket.c, called by the worker when the socket has something. */
void vhd_socket_serve(struct vhd_device *device, uint32_t events);

#endif
