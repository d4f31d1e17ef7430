/* Stands for QEMU: a process that maps a guest's memory, and can discard pages of it itself.
 *
 *   vmm MEMORY-FD PAGES-FD
 *
 * PAGES-FD holds the offsets of the pages in question in MEMORY-FD, uint64_t each, in the order a
 * guest gave them up. Obeys one letter a line on standard input, answers one line each:
 *   p   populate: touch every page of the list   -> "ok"
 *   b   the built-in device's way, page by page  -> "WALL-NS CPU-NS"
 *   w   one punch over the whole file            -> "WALL-NS CPU-NS"
 *   c   count pages of the list that are absent  -> "N"
 * Ends at the end of its input. Exit status 0, or 1 with a reason on standard error.
 * It must not know who else discards pages.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, DISCARD = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE };

struct guest {
    int fd;
    size_t size;
    unsigned char *memory;
    const uint64_t *pages;
    size_t count;
};

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static size_t size_of(int fd)
{
    struct stat status;
    if (fstat(fd, &status) < 0)
        die("fstat");
    return (size_t)status.st_size;
}

static void *map(int fd, size_t size, int protection)
{
    void *at = mmap(NULL, size, protection, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        die("mmap");
    return at;
}

static long long now_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void populate(const struct guest *guest)
{
    for (size_t i = 0; i < guest->count; i++)
        ((volatile unsigned char *)guest->memory)[guest->pages[i]] = 0xa5;
}

/* QEMU, system/physmem.c, ram_block_discard_range(): the file first, then the own mapping. */
static void discard_like_built_in(const struct guest *guest)
{
    for (size_t i = 0; i < guest->count; i++) {
        if (fallocate(guest->fd, DISCARD, (off_t)guest->pages[i], PAGE) < 0)
            die("fallocate");
        if (madvise(guest->memory + guest->pages[i], PAGE, MADV_DONTNEED) < 0)
            die("madvise");
    }
}

static void discard_whole(const struct guest *guest)
{
    if (fallocate(guest->fd, DISCARD, 0, (off_t)guest->size) < 0)
        die("fallocate");
}

static void timed(void (*discard)(const struct guest *), const struct guest *guest)
{
    long long cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
    long long wall = now_ns(CLOCK_MONOTONIC);
    discard(guest);
    wall = now_ns(CLOCK_MONOTONIC) - wall;
    cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    printf("%lld %lld\n", wall, cpu);
}

static size_t count_absent(const struct guest *guest)
{
    size_t absent = 0;
    unsigned char *present = malloc(guest->size / PAGE);
    if (present == NULL || mincore(guest->memory, guest->size, present) < 0)
        die("mincore");
    for (size_t i = 0; i < guest->count; i++)
        absent += !(present[guest->pages[i] / PAGE] & 1);
    free(present);
    return absent;
}

int main(int argc, char **argv)
{
    char line[16];
    if (argc != 3) {
        fputs("use: vmm MEMORY-FD PAGES-FD\n", stderr);
        return 1;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct guest guest = {.fd = atoi(argv[1])};
    int pages_fd = atoi(argv[2]);
    guest.size = size_of(guest.fd);
    guest.memory = map(guest.fd, guest.size, PROT_READ | PROT_WRITE);
    guest.count = size_of(pages_fd) / sizeof *guest.pages;
    guest.pages = map(pages_fd, guest.count * sizeof *guest.pages, PROT_READ);
    while (fgets(line, sizeof line, stdin) != NULL) {
        switch (line[0]) {
        case 'p':
            populate(&guest);
            puts("ok");
            break;
        case 'b':
            timed(discard_like_built_in, &guest);
            break;
        case 'w':
            timed(discard_whole, &guest);
            break;
        case 'c':
            printf("%zu\n", count_absent(&guest));
            break;
        default:
            fprintf(stderr, "unknown request: %s", line);
            return 1;
        }
    }
    return 0;
}
