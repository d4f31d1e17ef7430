/* The least a server can do: wait with epoll, take what came, answer. What vhostd is held against.
 *
 *   echo eventfd KICK-FD CALL-FD    for each kick, raise the call
 *   echo socket FD SIZE             for each message of SIZE bytes, send SIZE bytes back
 *
 * Ends when the peer hangs up (socket) or standard input ends. Exit status 0, or 1 with a reason.
 * It must not know rings or messages.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MESSAGE_MAX = 512 };

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void watch(int epoll, int fd)
{
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

/* Return the descriptor that is ready. Ends the process at the end of standard input. */
static int wait_ready(int epoll)
{
    struct epoll_event event;
    while (epoll_wait(epoll, &event, 1, -1) < 0)
        if (errno != EINTR)
            die("epoll_wait");
    if (event.data.fd == STDIN_FILENO)
        exit(0);
    return event.data.fd;
}

static void echo_eventfd(int epoll, int kick, int call)
{
    uint64_t count;
    watch(epoll, kick);
    for (;;) {
        wait_ready(epoll);
        if (read(kick, &count, sizeof count) < 0) {
            if (errno == EAGAIN)
                continue;
            die("read");
        }
        count = 1;
        if (write(call, &count, sizeof count) < 0)
            die("write");
    }
}

static void echo_socket(int epoll, int fd, size_t size)
{
    char message[MESSAGE_MAX];
    size_t have = 0;
    watch(epoll, fd);
    for (;;) {
        wait_ready(epoll);
        ssize_t got = recv(fd, message + have, size - have, MSG_DONTWAIT);
        if (got == 0)
            return;
        if (got < 0) {
            if (errno == EAGAIN)
                continue;
            die("recv");
        }
        have += (size_t)got;
        if (have < size)
            continue;
        if (send(fd, message, size, MSG_NOSIGNAL) != (ssize_t)size)
            die("send");
        have = 0;
    }
}

int main(int argc, char **argv)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (epoll < 0)
        die("epoll_create1");
    watch(epoll, STDIN_FILENO);
    if (argc == 4 && strcmp(argv[1], "eventfd") == 0) {
        echo_eventfd(epoll, atoi(argv[2]), atoi(argv[3]));
    } else if (argc == 4 && strcmp(argv[1], "socket") == 0 && atoi(argv[3]) <= MESSAGE_MAX) {
        echo_socket(epoll, atoi(argv[2]), (size_t)atoi(argv[3]));
        return 0;
    }
    fputs("use: echo eventfd KICK-FD CALL-FD | echo socket FD SIZE\n", stderr);
    return 1;
}
