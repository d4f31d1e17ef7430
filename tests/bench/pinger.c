/* The asking side of every round trip, without a line of Python in the timed path.
 *
 * A shared library, called through ctypes. Every function times its rounds into ns[] and returns 0,
 * or -errno: -ETIMEDOUT when an answer does not come in ANSWER_TIMEOUT_MS, -EPROTO when it came but
 * is not what it must be. Descriptors may be non-blocking or not: every wait is a poll().
 * Ring positions live in guest memory alone: each call goes on from where the indexes stand.
 * It must not know what the requests in a ring mean.
 */
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ANSWER_TIMEOUT_MS = 20000, MESSAGE_MAX = 512 };

/* A split ring with event index (virtio 1.2, 2.7); avail.ring[i] is filled in beforehand. */
struct pinger_ring {
    _Atomic uint16_t *avail_index;
    _Atomic uint16_t *used_index;
    _Atomic uint16_t *used_event;
    _Atomic uint16_t *avail_event;
    int kick;
    int call;
};

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static int wait_readable(int fd)
{
    struct pollfd wait = {.fd = fd, .events = POLLIN};
    int ready;
    do
        ready = poll(&wait, 1, ANSWER_TIMEOUT_MS);
    while (ready < 0 && errno == EINTR);
    return ready > 0 ? 0 : ready == 0 ? -ETIMEDOUT : -errno;
}

static int raise_event(int fd)
{
    uint64_t one = 1;
    return write(fd, &one, sizeof one) < 0 ? -errno : 0;
}

static int take_event(int fd)
{
    uint64_t count;
    int status = wait_readable(fd);
    if (status < 0)
        return status;
    return read(fd, &count, sizeof count) < 0 && errno != EAGAIN ? -errno : 0;
}

/* Publish `count` requests at once and wait for the call that the last of them raises. */
static int ring_round(const struct pinger_ring *ring, uint16_t count)
{
    uint16_t old = atomic_load(ring->avail_index);
    uint16_t next = (uint16_t)(old + count);
    int status = 0;
    if (atomic_load(ring->used_index) != old)
        return -EPROTO;
    atomic_store(ring->used_event, (uint16_t)(next - 1));
    atomic_store(ring->avail_index, next);
    atomic_thread_fence(memory_order_seq_cst);
    /* vring_need_event(): the device may still be awake from the round before. */
    if ((uint16_t)(next - atomic_load(ring->avail_event) - 1) < count)
        status = raise_event(ring->kick);
    /* The call is waited for even where the index is there already: it is what is measured. */
    do
        status = status < 0 ? status : take_event(ring->call);
    while (status == 0 && atomic_load(ring->used_index) != next);
    return status;
}

static void drain(int fd)
{
    uint64_t count;
    struct pollfd now = {.fd = fd, .events = POLLIN};
    while (poll(&now, 1, 0) > 0 && read(fd, &count, sizeof count) > 0)
        continue;
}

int pinger_ring_rounds(const struct pinger_ring *ring, uint32_t batch, uint32_t rounds,
                       long long *ns)
{
    drain(ring->call);
    for (uint32_t i = 0; i < rounds; i++) {
        long long start = now_ns();
        int status = ring_round(ring, (uint16_t)batch);
        if (status < 0)
            return status;
        ns[i] = now_ns() - start;
    }
    return 0;
}

int pinger_eventfd_rounds(int kick, int call, uint32_t rounds, long long *ns)
{
    for (uint32_t i = 0; i < rounds; i++) {
        long long start = now_ns();
        int status = raise_event(kick);
        if (status == 0)
            status = take_event(call);
        if (status < 0)
            return status;
        ns[i] = now_ns() - start;
    }
    return 0;
}

static int receive_whole(int fd, char *message, size_t size)
{
    for (size_t have = 0; have < size;) {
        int status = wait_readable(fd);
        if (status < 0)
            return status;
        ssize_t got = recv(fd, message + have, size - have, MSG_DONTWAIT);
        if (got == 0)
            return -EPIPE;
        if (got < 0 && errno != EAGAIN)
            return -errno;
        have += got > 0 ? (size_t)got : 0;
    }
    return 0;
}

/* Send `request` and insist on `answer`, both `size` bytes. */
int pinger_socket_rounds(int fd, const char *request, const char *answer, uint32_t size,
                         uint32_t rounds, long long *ns)
{
    char message[MESSAGE_MAX];
    if (size > sizeof message)
        return -EMSGSIZE;
    for (uint32_t i = 0; i < rounds; i++) {
        long long start = now_ns();
        if (send(fd, request, size, MSG_NOSIGNAL) != (ssize_t)size)
            return -errno;
        int status = receive_whole(fd, message, size);
        if (status < 0)
            return status;
        ns[i] = now_ns() - start;
        if (memcmp(message, answer, size) != 0)
            return -EPROTO;
    }
    return 0;
}
