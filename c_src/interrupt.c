/* interrupt.c - the one wait that a VMM could make endless for a worker: a write to an eventfd of
 * the VMM's. Whoever parks the worker ends it. Must not know what the eventfd is for.
 *
 * Whether such a write blocks is a setting of the open file, which the VMM shares and can change at
 * any time; the eventfd can become full between a look and the write. So the write is one that a
 * signal ends by a long jump: it may come before the system call, too, where EINTR would be lost.
 * What was interrupted was done or not, so whoever is interrupted does it again later. */
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <unistd.h>

#include "vhd.h"

enum { INTERRUPT = SIGURG }; /* ignored by default: one that comes late does nothing */

static _Thread_local sigjmp_buf *landing;
static pthread_once_t installed = PTHREAD_ONCE_INIT;

static void on_interrupt(int number)
{
    sigjmp_buf *target = landing;

    (void)number;
    if (target == NULL)
        return;
    landing = NULL;
    siglongjmp(*target, 1);
}

static void install(void)
{
    struct sigaction action = {.sa_handler = on_interrupt, .sa_flags = SA_RESTART | SA_NODEFER};

    sigemptyset(&action.sa_mask);
    int rc = sigaction(INTERRUPT, &action, NULL);
    assert(rc == 0);
    (void)rc;
}

void vhd_interrupt_unmask(sigset_t *blocked)
{
    pthread_once(&installed, install);
    sigdelset(blocked, INTERRUPT);
}

void vhd_interrupt_send(pthread_t thread, const _Atomic bool *waiting)
{
    /* The worker says that it waits before it looks whether it is to park; the caller asked it to
     * park before it looks here: one of the two sees the other. */
    if (atomic_load(waiting))
        (void)pthread_kill(thread, INTERRUPT);
}

static bool has_room(int fd)
{
    struct pollfd writable = {.fd = fd, .events = POLLOUT};

    return poll(&writable, 1, 0) == 1 && (writable.revents & POLLOUT);
}

static void add_one(int fd)
{
    uint64_t one = 1;
    ssize_t rc = write(fd, &one, sizeof one);

    (void)rc; /* full since we looked: then whoever waits for it is awake */
}

enum vhd_signalled vhd_interruptible_signal(struct vhd_worker *worker, _Atomic bool *waiting,
                                            int fd)
{
    sigjmp_buf here;

    if (!has_room(fd))
        return VHD_SIGNAL_FULL;
    if (sigsetjmp(here, 0) == 0) {
        landing = &here;
        atomic_store(waiting, true);
        if (!vhd_worker_wants_park(worker)) {
            add_one(fd);
            landing = NULL;
            atomic_store(waiting, false);
            return VHD_SIGNAL_SENT;
        }
    }
    landing = NULL;
    atomic_store(waiting, false);
    return VHD_SIGNAL_INTERRUPTED;
}
