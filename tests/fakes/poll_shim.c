/* poll_shim.c - has a look at a descriptor always find room to write, as it may until another
 * process fills it between the look and the write. Only looks that do not wait are answered. */
#define _GNU_SOURCE
#include <dlfcn.h>

enum { OUT = 4 }; /* POLLOUT; poll.h has poll() only write to what we read */

struct pollfd {
    int fd;
    short events;
    short revents;
};

int poll(struct pollfd *fds, unsigned long count, int timeout);

int poll(struct pollfd *fds, unsigned long count, int timeout)
{
    static int (*real)(struct pollfd *, unsigned long, int);

    if (count == 1 && timeout == 0 && fds->events == OUT) {
        fds->revents = OUT;
        return 1;
    }
    if (!real)
        real = (int (*)(struct pollfd *, unsigned long, int))dlsym(RTLD_NEXT, "poll");
    return real(fds, count, timeout);
}
