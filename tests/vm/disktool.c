/* Durable writes, seen from inside the guest.
 *
 *   disktool records PATH             write numbered records of 512 bytes to PATH for ever, fsync
 *                                     after each, then print its number; record N is at N * 512:
 *                                     eight bytes N, then 63 words that follow from N
 *   disktool fsyncs PATH COUNT WRITERS SIZE
 *                                     WRITERS threads, each with a file PATH.n (or all with PATH
 *                                     itself where that is a block device): COUNT times write SIZE
 *                                     bytes (0: nothing) and fsync; print
 *                                     "fsyncs N seconds S p50_us A p99_us B"
 *   disktool readonly PATH            map PATH shared and writable, write a byte, and say what came
 *                                     of it: "written", "refused: REASON" or "fault"
 *
 * Exit status: 0 all well, 1 the disk refused (the reason is printed), 2 wrong use.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { RECORD_SIZE = 512, WRITERS_MAX = 64, WRITE_MAX = 1 << 20, SPAN = 1 << 20 };

static int refused(const char *what)
{
    printf("%s: %s\n", what, strerror(errno));
    return 1;
}

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static int records(const char *path)
{
    uint64_t record[RECORD_SIZE / sizeof(uint64_t)];
    int fd = open(path, O_RDWR | O_CREAT, 0644);

    if (fd < 0)
        return refused(path);
    for (uint64_t number = 1;; number++) {
        record[0] = number;
        for (size_t i = 1; i < RECORD_SIZE / sizeof(uint64_t); i++)
            record[i] = mix(number * 64 + i);
        if (pwrite(fd, record, RECORD_SIZE, (off_t)(number * RECORD_SIZE)) != RECORD_SIZE)
            return refused("write");
        if (fsync(fd) != 0)
            return refused("fsync");
        printf("%llu\n", (unsigned long long)number);
        fflush(stdout);
    }
}

struct writer {
    pthread_t thread;
    char path[256];
    long count;
    size_t size;
    double *took_us;
    int failed;
};

static double now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static void *write_and_sync(void *argument)
{
    struct writer *writer = argument;
    static const char bytes[WRITE_MAX] = {1};
    uint64_t random = (uint64_t)(uintptr_t)writer;
    int fd = open(writer->path, O_RDWR | O_CREAT, 0644);

    if (fd < 0) {
        writer->failed = errno;
        return NULL;
    }
    for (long i = 0; i < writer->count && !writer->failed; i++) {
        off_t at = (off_t)((random = mix(random)) % (SPAN / 4096) * 4096);
        double start = now_us();

        if (writer->size != 0 && pwrite(fd, bytes, writer->size, at) < 0)
            writer->failed = errno;
        if (fsync(fd) != 0)
            writer->failed = errno;
        writer->took_us[i] = now_us() - start;
    }
    close(fd);
    return NULL;
}

static int compare(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;

    return (a > b) - (a < b);
}

static int fsyncs(const char *path, long count, long writers, long size)
{
    static struct writer all[WRITERS_MAX];
    double *took_us = calloc((size_t)(count * writers), sizeof *took_us);
    struct stat status;
    int block_device = stat(path, &status) == 0 && S_ISBLK(status.st_mode);
    double start = now_us(), seconds;

    for (long i = 0; i < writers; i++) {
        snprintf(all[i].path, sizeof all[i].path, block_device ? "%s" : "%s.%ld", path, i);
        all[i].count = count;
        all[i].size = (size_t)size;
        all[i].took_us = took_us + i * count;
        pthread_create(&all[i].thread, NULL, write_and_sync, &all[i]);
    }
    for (long i = 0; i < writers; i++)
        pthread_join(all[i].thread, NULL);
    seconds = (now_us() - start) / 1e6;
    for (long i = 0; i < writers; i++)
        if (all[i].failed) {
            errno = all[i].failed;
            return refused(all[i].path);
        }
    count *= writers;
    qsort(took_us, (size_t)count, sizeof *took_us, compare);
    printf("fsyncs %ld seconds %.6f p50_us %.1f p99_us %.1f\n", count, seconds, took_us[count / 2],
           took_us[count * 99 / 100]);
    return 0;
}

static sigjmp_buf landing;

static void on_fault(int number)
{
    (void)number;
    siglongjmp(landing, 1);
}

static int readonly(const char *path)
{
    int fd = open(path, O_RDWR);
    volatile char *at;

    if (fd < 0) {
        printf("refused: %s\n", strerror(errno));
        return 0;
    }
    at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        printf("refused: %s\n", strerror(errno));
        return 0;
    }
    signal(SIGBUS, on_fault);
    signal(SIGSEGV, on_fault);
    if (sigsetjmp(landing, 1) != 0) {
        printf("fault\n");
        return 0;
    }
    at[0] = (char)(at[0] + 1);
    printf("written\n");
    return 0;
}

int main(int argc, char **argv)
{
    const char *verb = argc > 2 ? argv[1] : "";

    if (strcmp(verb, "records") == 0 && argc == 3)
        return records(argv[2]);
    if (strcmp(verb, "readonly") == 0 && argc == 3)
        return readonly(argv[2]);
    if (strcmp(verb, "fsyncs") == 0 && argc == 6) {
        long count = atol(argv[3]), writers = atol(argv[4]), size = atol(argv[5]);

        if (count > 0 && writers > 0 && writers <= WRITERS_MAX && size >= 0 && size <= WRITE_MAX)
            return fsyncs(argv[2], count, writers, size);
    }
    fprintf(stderr, "disktool: see the head of disktool.c\n");
    return 2;
}
