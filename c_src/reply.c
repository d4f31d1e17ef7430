/* reply.c - a request is taken from the socket and answered once, whichever process is killed
 * where.
 *
 * What a system call does can't be cut in two by a signal, so each step leaves its trace in the
 * same call that makes it, in an object that outlives us and is not memory of ours:
 *   taking    the socket's SO_PEEK_OFF, which the kernel lowers by what recv(2) takes; it is set
 *             to the request's size before the record below is valid
 *   sending   the file position of the reply's memfd, which sendfile(2) advances by what it sends;
 *             it belongs to the open file, which all descriptors of it share
 * The record in vhd_shared says that there is such a request; a successor does what is left.
 *
 * Must not know what a request means. */
#include <fcntl.h>
#include <linux/sockios.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#include "barrier.h"
#include "vhd.h"

enum { FILE_SIZE = VHD_REPLY_FILE_SIZE, OFFSET_UNKNOWN = -2, OFFSET_OFF = -1 };

_Static_assert((int)VHD_REPLY_SIZE_MAX <= (int)FILE_SIZE, "a reply has room");

/* -- life ------------------------------------------------------------------------------------- */

static int inspect(struct vhd_device *device)
{
    const struct vhd_reply_shared *record = &device->shared->reply;
    off_t position = lseek(device->reply.fd, 0, SEEK_CUR);

    if (position < 0)
        return -errno;
    if (position > FILE_SIZE)
        return -EPROTO;
    device->reply.position = (uint32_t)position;
    if (record->pending != 0 && (position < record->begin || position > record->end ||
                                 record->end > FILE_SIZE || record->begin > record->end))
        return -EPROTO; /* another open file than the one the record is about */
    return 0;
}

int vhd_reply_open(struct vhd_device *device, int inherited)
{
    struct vhd_reply *reply = &device->reply;
    void *at;
    int rc = vhd_memfd_open("vhostd-reply", inherited, FILE_SIZE, &at);

    if (rc < 0)
        return rc;
    reply->fd = rc;
    reply->bytes = at;
    /* A huge page could not be punched without clearing what is still unread. Advice only: a
     * kernel without huge pages refuses it. */
    (void)madvise(at, FILE_SIZE, MADV_NOHUGEPAGE);
    reply->peek_offset = OFFSET_OFF;
    reply->inherited = inherited >= 0;
    rc = inspect(device);
    if (rc != 0)
        vhd_reply_close(device);
    return rc;
}

void vhd_reply_close(struct vhd_device *device)
{
    vhd_memfd_close(device->reply.fd, device->reply.bytes, FILE_SIZE);
}

bool vhd_reply_pending(const struct vhd_device *device)
{
    return __atomic_load_n(&device->shared->reply.pending, __ATOMIC_RELAXED) != 0;
}

/* -- the mark in the socket ------------------------------------------------------------------- */

int vhd_reply_mark(struct vhd_device *device, int offset)
{
    struct vhd_reply *reply = &device->reply;

    if (reply->peek_offset == offset)
        return 0;
    if (setsockopt(device->socket_fd, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof offset) != 0)
        return -errno;
    reply->peek_offset = offset;
    return 0;
}

void vhd_reply_peeked(struct vhd_device *device, size_t size)
{
    assert(device->reply.peek_offset >= 0);
    device->reply.peek_offset += (int)size;
}

void vhd_reply_socket_left(struct vhd_device *device)
{
    /* With a record the mark says how much of its request was taken: it stays for a successor. */
    if (!vhd_reply_pending(device))
        (void)vhd_reply_mark(device, OFFSET_OFF);
}

void vhd_reply_socket_set(struct vhd_device *device)
{
    if (!device->reply.inherited)
        device->shared->reply.pending = 0; /* it was of another socket */
    device->reply.inherited = false;
    device->reply.peek_offset = OFFSET_UNKNOWN;
    /* sendfile(2) knows no MSG_DONTWAIT. */
    int flags = fcntl(device->socket_fd, F_GETFL);
    if (flags >= 0 && !(flags & O_NONBLOCK))
        (void)fcntl(device->socket_fd, F_SETFL, flags | O_NONBLOCK);
    if (!vhd_reply_pending(device))
        (void)vhd_reply_mark(device, OFFSET_OFF);
}

/* -- prepare ---------------------------------------------------------------------------------- */

/* The socket holds pages of the file by reference until the VMM reads them, so that bytes before
 * the file position are never written again while some may be unread. */
static int begin_anew(struct vhd_device *device)
{
    struct vhd_reply *reply = &device->reply;
    int unread;

    if (ioctl(device->socket_fd, SIOCOUTQ, &unread) != 0 || unread != 0) {
        /* A VMM that asks ahead. What it has not read keeps its pages; the file gets new ones. */
        int rc = vhd_memfd_clear(reply->fd, FILE_SIZE);

        if (rc != 0)
            return rc;
    }
    if (lseek(reply->fd, 0, SEEK_SET) != 0)
        return -errno;
    reply->position = 0;
    return 0;
}

int vhd_reply_prepare(vhd_device *device, uint64_t number, uint32_t consume_size,
                      const uint8_t *bytes, uint32_t size)
{
    struct vhd_reply_shared *record = &device->shared->reply;
    struct vhd_reply *reply = &device->reply;
    int rc;

    if (number == 0 || size > VHD_REPLY_SIZE_MAX || consume_size > INT32_MAX)
        return -EINVAL;
    if (device->socket_fd < 0)
        return -ENOTCONN;
    if (vhd_reply_pending(device))
        return -EBUSY;
    if (size > FILE_SIZE - reply->position) {
        rc = begin_anew(device);
        if (rc != 0)
            return rc;
    }
    memcpy(reply->bytes + reply->position, bytes, size);
    record->consume_size = consume_size;
    record->begin = reply->position;
    record->end = reply->position + size;
    rc = vhd_reply_mark(device, (int)consume_size);
    if (rc != 0)
        return rc;
    vhd_fence_before_death();
    __atomic_store_n(&record->pending, number, __ATOMIC_RELAXED);
    return 0;
}

/* -- finish ----------------------------------------------------------------------------------- */

/* Take what is left of the request; descriptors that came with it are closed by the kernel. */
static int consume(struct vhd_device *device)
{
    struct vhd_reply *reply = &device->reply;
    uint8_t scratch[512];

    if (reply->peek_offset == OFFSET_UNKNOWN) {
        socklen_t size = sizeof reply->peek_offset;

        if (getsockopt(device->socket_fd, SOL_SOCKET, SO_PEEK_OFF, &reply->peek_offset, &size) != 0)
            return -errno;
    }
    while (reply->peek_offset > 0) {
        size_t left = (size_t)reply->peek_offset;
        ssize_t taken = recv(device->socket_fd, scratch,
                             left < sizeof scratch ? left : sizeof scratch, MSG_DONTWAIT);

        if (taken < 0 && errno == EINTR)
            continue;
        if (taken < 0 && errno != EAGAIN)
            return -errno;
        if (taken <= 0)
            return -EPROTO; /* the caller saw more than there is */
        reply->peek_offset -= (int)taken;
    }
    return 0;
}

static int send_rest(struct vhd_device *device)
{
    const struct vhd_reply_shared *record = &device->shared->reply;
    struct vhd_reply *reply = &device->reply;

    while (reply->position < record->end) {
        ssize_t sent = sendfile(device->socket_fd, reply->fd, NULL, record->end - reply->position);

        if (sent < 0 && errno == EINTR)
            continue;
        if (sent <= 0)
            return sent < 0 ? -errno : -EIO;
        reply->position += (uint32_t)sent;
    }
    return 0;
}

/* Is nobody left who could be answered, now or later? */
static bool is_final(int error)
{
    return error == -EPIPE || error == -ECONNRESET || error == -EPROTO;
}

int vhd_reply_finish(vhd_device *device)
{
    struct vhd_reply_shared *record = &device->shared->reply;
    int rc;

    if (!vhd_reply_pending(device))
        return 0;
    if (device->socket_fd < 0)
        return -ENOTCONN;
    rc = consume(device);
    if (rc == 0)
        rc = send_rest(device);
    if (rc != 0 && !is_final(rc))
        return rc;
    vhd_fence_before_death();
    if (record->pending != UINT64_MAX)
        __atomic_store_n(&record->finished, record->pending, __ATOMIC_RELAXED);
    vhd_fence_before_death();
    __atomic_store_n(&record->pending, 0, __ATOMIC_RELAXED);
    /* Whoever peeks next, if it is not the worker, expects to begin at the head. */
    if (!device->socket_watched)
        (void)vhd_reply_mark(device, OFFSET_OFF);
    return rc;
}

int vhd_device_reply_fd(const vhd_device *device)
{
    return device->reply.fd;
}
