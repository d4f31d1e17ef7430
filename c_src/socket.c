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
    device->socket_watched = false;
    vhd_device_raise(device, VHD_EVENT_SOCKET);
}

/* Send what is left of the reply; false when it must wait or the peer is gone. */
static bool send_reply(struct vhd_device *device)
{
    while (device->reply_sent < device->reply_size) {
        ssize_t sent = send(device->socket_fd, device->reply + device->reply_sent,
                            device->reply_size - device->reply_sent, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0)
            return false;
        device->reply_sent += (uint32_t)sent;
    }
    device->reply_size = device->reply_sent = 0;
    return true;
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

static void answer_get(struct vhd_device *device, struct message *message)
{
    uint32_t size = message->window.size;

    pthread_mutex_lock(&device->lock);
    memcpy(message->bytes, device->shared->config + message->window.offset, size);
    pthread_mutex_unlock(&device->lock);
    message->header.flags = FLAG_VERSION | FLAG_REPLY;
    memcpy(device->reply, message, HEAD_SIZE + size);
    device->reply_size = (uint32_t)HEAD_SIZE + size;
    count(&device->shared->config_reads);
}

static void apply_set(struct vhd_device *device, struct message *message)
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
    if (asks && atomic_load(&device->socket_reply_ack)) {
        struct header header = {SET_CONFIG, FLAG_VERSION | FLAG_REPLY, sizeof(uint64_t)};

        memcpy(device->reply, &header, sizeof header);
        memset(device->reply + sizeof header, 0, sizeof(uint64_t));
        device->reply_size = sizeof header + sizeof(uint64_t);
    }
    vhd_device_raise(device, VHD_EVENT_CONFIG);
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

void vhd_socket_serve(struct vhd_device *device, uint32_t events)
{
    struct message message;
    ssize_t there, taken;
    size_t size;
    bool has_fds;

    (void)events;
    if (!device->socket_watched)
        return; /* handed over by an earlier event of the same round */
    if (device->reply_size != 0) {
        if (!send_reply(device)) {
            if (errno != EAGAIN)
                hand_over(device);
            return;
        }
        vhd_worker_rewatch(device->worker, device->socket_fd, EPOLLIN, VHD_SOURCE_SOCKET,
                           device->slot, 0);
    }
    there = peek(device->socket_fd, &message, &has_fds);
    if (there < 0 && errno == EAGAIN)
        return;
    if (there <= 0 || has_fds || !atomic_load(&device->socket_hot) ||
        !is_ours(device, &message, there)) {
        hand_over(device);
        return;
    }
    size = HEAD_SIZE + message.window.size;
    do {
        taken = recv(device->socket_fd, &message, size, MSG_DONTWAIT);
    } while (taken < 0 && errno == EINTR);
    assert(taken == (ssize_t)size); /* it was all there, and nobody else reads */
    if (message.header.request == GET_CONFIG)
        answer_get(device, &message);
    else
        apply_set(device, &message);
    if (device->reply_size != 0 && !send_reply(device)) {
        if (errno == EAGAIN)
            vhd_worker_rewatch(device->worker, device->socket_fd, EPOLLOUT, VHD_SOURCE_SOCKET,
                               device->slot, 0);
        else
            hand_over(device);
    }
}

void vhd_socket_set(vhd_device *device, int fd)
{
    if (device->socket_watched) {
        vhd_worker_unwatch(device->worker, device->socket_fd);
        device->socket_watched = false;
    }
    device->socket_fd = fd;
    device->reply_size = device->reply_sent = 0;
}

int vhd_socket_arm(vhd_device *device)
{
    int rc;

    assert(device->socket_fd >= 0 && !device->socket_watched && device->worker != NULL);
    device->socket_watched = true;
    /* The worker may answer from the next instruction on, so this is the last thing done here. */
    rc = vhd_worker_watch(device->worker, device->socket_fd, EPOLLIN, VHD_SOURCE_SOCKET,
                          device->slot, 0);
    if (rc != 0)
        device->socket_watched = false;
    return rc;
}

void vhd_socket_configure(vhd_device *device, int hot, int reply_ack)
{
    atomic_store(&device->socket_reply_ack, reply_ack != 0);
    atomic_store(&device->socket_hot, hot != 0);
}
