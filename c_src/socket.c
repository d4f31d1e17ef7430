/* socket.c - GET_CONFIG and SET_CONFIG answered in place.
 *
 * A Linux guest waits for several of them, its vCPU stopped, for every MiB it inflates; the way
 * through Python would cost more than the rest. Every other message is left in the socket, whole,
 * for Python. Source: vhost-user, "Virtio device config space". Must not know any other message. */
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "vhd.h"

enum { GET_CONFIG = 24, SET_CONFIG = 25 };
enum { FLAG_VERSION_MASK = 3, FLAG_VERSION = 1, FLAG_REPLY = 4, FLAG_NEED_REPLY = 8 };

struct header {
    uint32_t request;
    uint32_t flags;
    uint32_t size;
};

struct window {
    uint32_t offset;
    uint32_t size;
    uint32_t flags;
};

struct message {
    struct header header;
    struct window window;
    uint8_t bytes[VHD_CONFIG_SIZE_MAX];
};

_Static_assert(sizeof(struct message) == 24 + VHD_CONFIG_SIZE_MAX, "no padding on the wire");

enum { WINDOW_SIZE = sizeof(struct window), HEAD_SIZE = sizeof(struct header) + WINDOW_SIZE };

static void hand_over(struct vhd_device *device)
{
    vhd_worker_unwatch(device->worker, device->socket_fd);
    vhd_reply_socket_left(device);
    device->socket_watched = false;
    vhd_device_raise(device, VHD_EVENT_SOCKET);
}

static void listen_for(struct vhd_device *device, uint32_t events)
{
    vhd_worker_rewatch(device->worker, device->socket_fd, events, VHD_SOURCE_SOCKET, device->slot,
                       0);
}

/* True when the message is one of ours, legal, and all there. Nothing is consumed. */
static bool is_ours(const struct vhd_device *device, const struct message *message, ssize_t there)
{
    const struct header *header = &message->header;
    const struct window *window = &message->window;

    if (there < HEAD_SIZE || (header->flags & (FLAG_VERSION_MASK | FLAG_REPLY)) != FLAG_VERSION)
        return false;
    if (header->request != GET_CONFIG && header->request != SET_CONFIG)
        return false;
    if (window->size == 0 || window->size > VHD_CONFIG_SIZE_MAX ||
        header->size != WINDOW_SIZE + window->size || there < (ssize_t)(HEAD_SIZE + window->size))
        return false;
    if (window->offset > device->shared->config_size ||
        window->size > device->shared->config_size - window->offset)
        return false;
    /* Flags of SET_CONFIG: 0 is a write of the guest; migration is Python's. */
    return header->request == GET_CONFIG || window->flags == 0;
}

static void count(uint64_t *counter)
{
    __atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED);
}

/* Both turn the message into its reply and return the reply's size. */
static uint32_t answer_get(struct vhd_device *device, struct message *message)
{
    uint32_t size = message->window.size;

    pthread_mutex_lock(&device->lock);
    memcpy(message->bytes, device->shared->config + message->window.offset, size);
    pthread_mutex_unlock(&device->lock);
    message->header.flags = FLAG_VERSION | FLAG_REPLY;
    count(&device->shared->config_reads);
    return (uint32_t)HEAD_SIZE + size;
}

static uint32_t apply_set(struct vhd_device *device, struct message *message)
{
    uint8_t *config = device->shared->config + message->window.offset;
    const uint8_t *writable = device->config_writable + message->window.offset;
    bool asks = message->header.flags & FLAG_NEED_REPLY;

    /* QEMU sends the whole space at each write, with bytes of its last GET_CONFIG around the one
     * field the guest wrote: only what is the guest's may be taken. */
    pthread_mutex_lock(&device->lock);
    for (uint32_t i = 0; i < message->window.size; i++)
        config[i] = (uint8_t)((config[i] & ~writable[i]) | (message->bytes[i] & writable[i]));
    pthread_mutex_unlock(&device->lock);
    count(&device->shared->config_writes);
    vhd_device_raise(device, VHD_EVENT_CONFIG);
    if (!asks || !atomic_load(&device->socket_reply_ack))
        return 0;
    message->header = (struct header){SET_CONFIG, FLAG_VERSION | FLAG_REPLY, sizeof(uint64_t)};
    memset(&message->window, 0, sizeof(uint64_t));
    return sizeof message->header + sizeof(uint64_t);
}

/* Look at the next message without taking it. Without room for control data the kernel installs no
 * descriptor and says with MSG_CTRUNC that there are some. */
static ssize_t peek(int fd, struct message *message, bool *has_fds)
{
    struct iovec io = {message, sizeof *message};
    struct msghdr head = {.msg_iov = &io, .msg_iovlen = 1};
    ssize_t there;

    do {
        there = recvmsg(fd, &head, MSG_PEEK | MSG_DONTWAIT);
    } while (there < 0 && errno == EINTR);
    *has_fds = there >= 0 && (head.msg_flags & MSG_CTRUNC);
    return there;
}

/* Take and answer what was prepared; false when it must wait, or Python got the socket back. */
static bool finish(struct vhd_device *device)
{
    int rc = vhd_reply_finish(device);

    if (rc == -EAGAIN)
        listen_for(device, EPOLLOUT);
    else if (rc != 0)
        hand_over(device);
    return rc == 0;
}

static void serve_one(struct vhd_device *device)
{
    struct message message;
    uint32_t size, reply_size;
    ssize_t there;
    bool has_fds;

    there = peek(device->socket_fd, &message, &has_fds);
    if (there < 0 && errno == EAGAIN)
        return;
    if (there > 0)
        vhd_reply_peeked(device, (size_t)there);
    if (there <= 0 || has_fds || !atomic_load(&device->socket_hot) ||
        !is_ours(device, &message, there)) {
        hand_over(device);
        return;
    }
    size = (uint32_t)HEAD_SIZE + message.window.size;
    if (message.header.request == GET_CONFIG)
        reply_size = answer_get(device, &message);
    else
        reply_size = apply_set(device, &message);
    if (vhd_reply_prepare(device, UINT64_MAX, size, (const uint8_t *)&message, reply_size) != 0)
        hand_over(device); /* Python finds it in the socket, and what is wrong with that */
    else
        (void)finish(device);
}

void vhd_socket_serve(struct vhd_device *device, uint32_t events)
{
    (void)events;
    if (!device->socket_watched)
        return; /* handed over by an earlier event of the same round */
    if (vhd_reply_pending(device)) {
        if (!finish(device))
            return;
        listen_for(device, EPOLLIN);
    }
    serve_one(device);
}

void vhd_socket_set(vhd_device *device, int fd)
{
    if (device->socket_watched) {
        vhd_worker_unwatch(device->worker, device->socket_fd);
        device->socket_watched = false;
    }
    if (device->socket_fd >= 0)
        vhd_reply_socket_left(device);
    device->socket_fd = fd;
    if (fd >= 0)
        vhd_reply_socket_set(device);
}

int vhd_socket_arm(vhd_device *device)
{
    bool pending = vhd_reply_pending(device);
    int rc;

    assert(device->socket_fd >= 0 && !device->socket_watched && device->worker != NULL);
    if (!pending) {
        rc = vhd_reply_mark(device, 0); /* the worker peeks from the head on */
        if (rc != 0)
            return rc;
    }
    device->socket_watched = true;
    /* The worker may answer from the next instruction on, so this is the last thing done here. */
    rc = vhd_worker_watch(device->worker, device->socket_fd, pending ? EPOLLOUT : EPOLLIN,
                          VHD_SOURCE_SOCKET, device->slot, 0);
    if (rc != 0) {
        device->socket_watched = false;
        vhd_reply_socket_left(device);
    }
    return rc;
}

void vhd_socket_configure(vhd_device *device, int hot, int reply_ack)
{
    atomic_store(&device->socket_reply_ack, reply_ack != 0);
    atomic_store(&device->socket_hot, hot != 0);
}
