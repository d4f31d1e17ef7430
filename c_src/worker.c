/* worker.c - the one native thread of a VM: waits for kicks, sockets and commands, without the GIL.
 *
 * Python changes rings and tables only while this thread is parked, so that nothing here needs a
 * lock around them. Must not know a ring's layout, a message or a device. */
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "vhd.h"

enum { EPOLL_EVENTS = 32 };

struct vhd_worker {
    pthread_t thread;
    int epoll_fd;
    int command_fd;
    int notify_fd;
    _Atomic bool stop;
    _Atomic bool park_wanted;
    _Atomic bool parked;
    _Atomic bool away;    /* under lock: it syncs, and is parked as soon as anybody wants it */
    pthread_mutex_t lock; /* parking alone */
    pthread_cond_t unparked;
    _Atomic uint64_t rounds;
    _Atomic bool asleep;                         /* it waits for events */
    _Atomic bool waiting;                        /* for the VMM; see interrupt.c */
    bool openings;                               /* rings wait to be opened */
    struct vhd_device *devices[VHD_DEVICES_MAX]; /* changed only while parked */
    struct vhd_walk walk;
};

/* -- sources ---------------------------------------------------------------------------------- */

static uint64_t source_key(uint32_t source, uint32_t slot, uint32_t queue)
{
    return (uint64_t)slot << 32 | (uint64_t)queue << 8 | source;
}

static int control(struct vhd_worker *worker, int operation, int fd, uint32_t events, uint64_t key)
{
    struct epoll_event event = {.events = events, .data.u64 = key};

    return epoll_ctl(worker->epoll_fd, operation, fd, &event) == 0 ? 0 : -errno;
}

int vhd_worker_watch(struct vhd_worker *worker, int fd, uint32_t events, uint32_t source,
                     uint32_t slot, uint32_t queue)
{
    return control(worker, EPOLL_CTL_ADD, fd, events, source_key(source, slot, queue));
}

void vhd_worker_rewatch(struct vhd_worker *worker, int fd, uint32_t events, uint32_t source,
                        uint32_t slot, uint32_t queue)
{
    int rc = control(worker, EPOLL_CTL_MOD, fd, events, source_key(source, slot, queue));
    assert(rc == 0);
    (void)rc;
}

void vhd_worker_unwatch(struct vhd_worker *worker, int fd)
{
    /* Whoever closed it already has taken it out with that. */
    (void)control(worker, EPOLL_CTL_DEL, fd, 0, 0);
}

static void add_one(int event_fd)
{
    uint64_t one = 1;
    ssize_t rc;

    do {
        rc = write(event_fd, &one, sizeof one);
    } while (rc < 0 && errno == EINTR);
    /* EAGAIN: its counter is full, so whoever waits is awake anyway. */
}

void vhd_worker_wake(struct vhd_worker *worker)
{
    add_one(worker->command_fd);
}

void vhd_worker_notify(struct vhd_worker *worker)
{
    add_one(worker->notify_fd);
}

enum vhd_signalled vhd_worker_signal(struct vhd_worker *worker, int fd)
{
    return vhd_interruptible_signal(worker, &worker->waiting, fd);
}

bool vhd_worker_wants_park(const struct vhd_worker *worker)
{
    return atomic_load_explicit(&worker->park_wanted, memory_order_relaxed) ||
           atomic_load_explicit(&worker->stop, memory_order_relaxed);
}

/* -- the thread ------------------------------------------------------------------------------- */

void vhd_worker_open_later(struct vhd_worker *worker)
{
    worker->openings = true;
}

/* Before anything else is done with a ring that was started, its stop included. */
static void open_rings(struct vhd_worker *worker)
{
    if (!worker->openings)
        return;
    worker->openings = false;
    for (uint32_t slot = 0; slot < VHD_DEVICES_MAX; slot++)
        if (worker->devices[slot] != NULL)
            vhd_device_open_rings(worker->devices[slot]);
}

static void stay_parked(struct vhd_worker *worker)
{
    pthread_mutex_lock(&worker->lock);
    while (atomic_load(&worker->park_wanted) && !atomic_load(&worker->stop)) {
        if (!atomic_load(&worker->parked) && worker->openings) {
            /* It may take long, and is ours alone: whoever parks us waits until we say so. */
            pthread_mutex_unlock(&worker->lock);
            open_rings(worker);
            pthread_mutex_lock(&worker->lock);
            continue;
        }
        /* Release: what this thread did to rings is seen by whoever sees it parked. Said in every
         * round, because it may be parked again before it woke from the last time. */
        atomic_store_explicit(&worker->parked, true, memory_order_release);
        vhd_worker_notify(worker);
        pthread_cond_wait(&worker->unparked, &worker->lock);
    }
    atomic_store_explicit(&worker->parked, false, memory_order_relaxed);
    pthread_mutex_unlock(&worker->lock);
}

void vhd_worker_leave(struct vhd_worker *worker)
{
    pthread_mutex_lock(&worker->lock);
    worker->away = true;
    if (atomic_load(&worker->park_wanted)) {
        atomic_store_explicit(&worker->parked, true, memory_order_release);
        vhd_worker_notify(worker);
    }
    pthread_mutex_unlock(&worker->lock);
}

void vhd_worker_return(struct vhd_worker *worker)
{
    pthread_mutex_lock(&worker->lock);
    worker->away = false;
    pthread_mutex_unlock(&worker->lock);
    stay_parked(worker); /* if somebody parked it meanwhile */
}

struct vhd_device *vhd_worker_device(struct vhd_worker *worker, uint32_t slot)
{
    return worker->devices[slot];
}

/* One sync at most, so that rings are looked at between two. */
static bool flush(struct vhd_worker *worker)
{
    for (uint32_t slot = 0; slot < VHD_DEVICES_MAX; slot++)
        if (worker->devices[slot] != NULL && vhd_device_flush(worker, worker->devices[slot]))
            return true;
    return false;
}

static bool serve_rings(struct vhd_worker *worker)
{
    bool left = false;

    for (uint32_t slot = 0; slot < VHD_DEVICES_MAX; slot++)
        if (worker->devices[slot] != NULL)
            left |= vhd_device_serve_rings(worker->devices[slot], &worker->walk);
    return left;
}

static void take_commands(struct vhd_worker *worker)
{
    uint64_t count;
    ssize_t rc = read(worker->command_fd, &count, sizeof count);

    (void)rc; /* EAGAIN is fine: the command was seen in an earlier round */
    for (uint32_t slot = 0; slot < VHD_DEVICES_MAX; slot++)
        if (worker->devices[slot] != NULL)
            vhd_device_serve_mail(worker->devices[slot]);
}

static void take_event(struct vhd_worker *worker, const struct epoll_event *event)
{
    uint64_t key = event->data.u64;
    struct vhd_device *device = worker->devices[key >> 32];

    switch (key & 0xff) {
    case VHD_SOURCE_COMMAND:
        take_commands(worker);
        break;
    case VHD_SOURCE_SOCKET:
        vhd_socket_serve(device, event->events);
        break;
    case VHD_SOURCE_KICK:
        vhd_queue_kicked(&device->queues[key >> 8 & 0xff]);
        break;
    }
}

static void *run(void *argument)
{
    struct vhd_worker *worker = argument;
    struct epoll_event events[EPOLL_EVENTS];

    while (!atomic_load(&worker->stop)) {
        bool left;
        int count;

        if (atomic_load(&worker->park_wanted)) {
            stay_parked(worker);
            continue;
        }
        atomic_fetch_add_explicit(&worker->rounds, 1, memory_order_relaxed);
        open_rings(worker);
        left = serve_rings(worker);
        if (vhd_worker_wants_park(worker) || flush(worker))
            continue;
        atomic_store_explicit(&worker->asleep, true, memory_order_relaxed);
        count = epoll_wait(worker->epoll_fd, events, EPOLL_EVENTS, left ? 0 : -1);
        assert(count >= 0 || errno == EINTR);
        atomic_store_explicit(&worker->asleep, false, memory_order_relaxed);
        for (int i = 0; i < count; i++)
            take_event(worker, &events[i]);
    }
    return NULL;
}

/* -- life ------------------------------------------------------------------------------------- */

/* The faults of this thread's own code must still be signals to it; all others are Python's. */
static int start_thread(struct vhd_worker *worker)
{
    sigset_t blocked, before;
    int rc;

    sigfillset(&blocked);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, SIGFPE);
    sigdelset(&blocked, SIGILL);
    vhd_interrupt_unmask(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    rc = pthread_create(&worker->thread, NULL, run, worker);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -rc;
}

static void close_fds(struct vhd_worker *worker)
{
    int fds[] = {worker->epoll_fd, worker->command_fd, worker->notify_fd};

    for (size_t i = 0; i < sizeof fds / sizeof fds[0]; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

static int open_fds(struct vhd_worker *worker)
{
    worker->command_fd = worker->notify_fd = -1;
    worker->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (worker->epoll_fd < 0)
        return -errno;
    worker->command_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    worker->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (worker->command_fd < 0 || worker->notify_fd < 0)
        return -errno;
    return vhd_worker_watch(worker, worker->command_fd, EPOLLIN, VHD_SOURCE_COMMAND, 0, 0);
}

vhd_worker *vhd_worker_create(const char *name, int *error)
{
    struct vhd_worker *worker = calloc(1, sizeof *worker);
    char short_name[16]; /* pthread_setname_np(3) takes 15 characters */
    size_t length = 0;

    if (worker == NULL) {
        *error = -ENOMEM;
        return NULL;
    }
    pthread_mutex_init(&worker->lock, NULL);
    pthread_cond_init(&worker->unparked, NULL);
    *error = open_fds(worker);
    if (*error == 0)
        *error = start_thread(worker);
    if (*error != 0) {
        close_fds(worker);
        free(worker);
        return NULL;
    }
    for (; length < sizeof short_name - 1 && name[length] != 0; length++)
        short_name[length] = name[length];
    short_name[length] = 0;
    (void)pthread_setname_np(worker->thread, short_name);
    return worker;
}

void vhd_worker_destroy(vhd_worker *worker)
{
    if (worker == NULL)
        return;
    for (uint32_t slot = 0; slot < VHD_DEVICES_MAX; slot++)
        assert(worker->devices[slot] == NULL);
    pthread_mutex_lock(&worker->lock);
    atomic_store(&worker->stop, true);
    pthread_cond_signal(&worker->unparked);
    pthread_mutex_unlock(&worker->lock);
    vhd_worker_wake(worker);
    vhd_interrupt_send(worker->thread, &worker->waiting);
    pthread_join(worker->thread, NULL);
    close_fds(worker);
    pthread_cond_destroy(&worker->unparked);
    pthread_mutex_destroy(&worker->lock);
    free(worker);
}

int vhd_worker_notify_fd(const vhd_worker *worker)
{
    return worker->notify_fd;
}

void vhd_worker_park(vhd_worker *worker)
{
    pthread_mutex_lock(&worker->lock);
    atomic_store(&worker->park_wanted, true);
    if (worker->away)
        atomic_store_explicit(&worker->parked, true, memory_order_release);
    pthread_mutex_unlock(&worker->lock);
    vhd_worker_wake(worker);
    vhd_interrupt_send(worker->thread, &worker->waiting);
}

int vhd_worker_parked(const vhd_worker *worker)
{
    return atomic_load_explicit(&worker->parked, memory_order_acquire);
}

void vhd_worker_unpark(vhd_worker *worker)
{
    assert(vhd_worker_parked(worker));
    pthread_mutex_lock(&worker->lock);
    atomic_store(&worker->park_wanted, false);
    /* Not left to the worker: a caller that parks again at once must not see the old parking. */
    atomic_store_explicit(&worker->parked, false, memory_order_relaxed);
    pthread_cond_signal(&worker->unparked);
    pthread_mutex_unlock(&worker->lock);
}

uint64_t vhd_worker_rounds(const vhd_worker *worker)
{
    return atomic_load_explicit(&worker->rounds, memory_order_relaxed);
}

uint64_t vhd_worker_busy_round(const vhd_worker *worker)
{
    bool rests = atomic_load_explicit(&worker->asleep, memory_order_relaxed) ||
                 atomic_load_explicit(&worker->away, memory_order_relaxed) ||
                 atomic_load_explicit(&worker->parked, memory_order_relaxed);

    return rests ? 0 : vhd_worker_rounds(worker) + 1;
}

int vhd_worker_add(struct vhd_worker *worker, struct vhd_device *device)
{
    for (uint32_t slot = 0; slot < VHD_DEVICES_MAX; slot++)
        if (worker->devices[slot] == NULL) {
            worker->devices[slot] = device;
            device->slot = slot;
            return 0;
        }
    return -ENOSPC;
}

void vhd_worker_remove(struct vhd_worker *worker, struct vhd_device *device)
{
    assert(worker->devices[device->slot] == device);
    worker->devices[device->slot] = NULL;
}
