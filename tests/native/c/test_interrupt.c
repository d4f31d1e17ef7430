/* A worker's write to the VMM's eventfd, which is full and blocks though a look said it has room:
 * whoever parks the worker ends the wait, whenever the signal comes. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/poll.h>

static int always_room(struct pollfd *fds, unsigned long count, int timeout)
{
    (void)count, (void)timeout;
    fds->revents = POLLOUT;
    return 1;
}

#define poll always_room
#include "../../../c_src/interrupt.c"
#undef poll

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

enum { ROUNDS = 20000 };

static _Atomic bool waiting, park_wanted;
static int call_fd;
static _Atomic uint32_t rounds, interrupted;

bool vhd_worker_wants_park(const struct vhd_worker *worker)
{
    (void)worker;
    return atomic_load(&park_wanted);
}

/* Each round ends only by an interruption: nobody drains the eventfd. */
static void *wait_again_and_again(void *argument)
{
    (void)argument;
    while (atomic_load(&rounds) < ROUNDS) {
        if (vhd_interruptible_signal(NULL, &waiting, call_fd) == VHD_SIGNAL_INTERRUPTED)
            atomic_fetch_add(&interrupted, 1);
        atomic_store(&park_wanted, false);
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}

static pthread_t start(void)
{
    sigset_t blocked, before;
    pthread_t thread;

    sigfillset(&blocked);
    vhd_interrupt_unmask(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    CHECK(pthread_create(&thread, NULL, wait_again_and_again, NULL) == 0);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return thread;
}

int main(void)
{
    call_fd = eventfd(0, EFD_CLOEXEC); /* blocking */
    CHECK(vhd_interruptible_signal(NULL, &waiting, call_fd) == VHD_SIGNAL_SENT);
    CHECK(eventfd_write(call_fd, UINT64_MAX - 2) == 0);
    pthread_t thread = start();
    for (uint32_t round = 0; round < ROUNDS; round++) {
        for (unsigned spin = 0; spin < round % 512; spin++)
            atomic_signal_fence(memory_order_seq_cst); /* meet it at another instruction */
        atomic_store(&park_wanted, true);
        vhd_interrupt_send(thread, &waiting); /* once */
        while (atomic_load(&rounds) == round)
            sched_yield();
    }
    pthread_join(thread, NULL);
    CHECK(atomic_load(&interrupted) == ROUNDS);
    return 0;
}
