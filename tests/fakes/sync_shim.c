/* sync_shim.c - stands below a program by LD_PRELOAD: records, holds and fails its syncs.
 *
 * fsync(2), fdatasync(2) and sync_file_range(2) of chosen files, told apart by st_dev and st_ino.
 * Orders come and the record goes through one shared file, named by SYNC_SHIM; sync_shim.py has the
 * other end of it. Must not know what the program is. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { FILES_MAX = 4, CALLS_MAX = 16384, LOOK_AGAIN_NS = 100000 };
enum { FSYNC = 1, FDATASYNC = 2, SYNC_FILE_RANGE = 3 };
#define FOR_EVER UINT32_MAX

/* One call, there once `kind` is not 0; its end is, once `ended` is 1. */
struct call {
    _Atomic uint32_t kind;
    _Atomic uint32_t ended;
    uint32_t error;    /* what it told the program, 0 = success */
    uint32_t injected; /* the real call was not made */
    uint64_t begin;    /* of one count for all files, so that the order is certain */
    uint64_t end;
    uint64_t begin_ns; /* CLOCK_MONOTONIC */
    uint64_t end_ns;
};

struct file {
    uint64_t device, inode;  /* 0, 0 = none */
    _Atomic uint32_t gate;   /* 1: syncs wait in front of it */
    _Atomic uint32_t passes; /* so many may pass all the same */
    _Atomic uint32_t waiting;
    _Atomic uint32_t failures; /* that many calls are failed; FOR_EVER */
    _Atomic uint32_t error;
    _Atomic uint32_t count; /* calls begun; the record has the first CALLS_MAX of them */
    struct call calls[CALLS_MAX];
};

struct control {
    _Atomic uint64_t sequence;
    struct file files[FILES_MAX];
};

static struct control *control;

__attribute__((constructor)) static void attach(void)
{
    const char *path = getenv("SYNC_SHIM");
    int fd = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
    void *at;

    if (fd < 0)
        return;
    at = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (at == MAP_FAILED)
        abort();
    control = at;
}

static struct file *find(int fd)
{
    struct stat status;

    if (control == NULL || fstat(fd, &status) != 0)
        return NULL;
    for (int i = 0; i < FILES_MAX; i++)
        if (control->files[i].inode == status.st_ino && control->files[i].device == status.st_dev)
            return &control->files[i];
    return NULL;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Take one of a number, unless it is 0; FOR_EVER stays. */
static int take(_Atomic uint32_t *number)
{
    uint32_t left = atomic_load(number);

    while (left != 0)
        if (left == FOR_EVER || atomic_compare_exchange_weak(number, &left, left - 1))
            return 1;
    return 0;
}

static void wait_at_gate(struct file *file)
{
    struct timespec pause = {0, LOOK_AGAIN_NS};

    atomic_fetch_add(&file->waiting, 1);
    while (atomic_load(&file->gate) && !take(&file->passes))
        syscall(SYS_nanosleep, &pause, NULL);
    atomic_fetch_sub(&file->waiting, 1);
}

static struct call *begin(struct file *file, uint32_t kind)
{
    static struct call beyond; /* what is too much is told by the count */
    uint32_t number = atomic_fetch_add(&file->count, 1);
    struct call *call = number < CALLS_MAX ? &file->calls[number] : &beyond;

    call->begin_ns = now_ns();
    call->begin = atomic_fetch_add(&control->sequence, 1) + 1;
    atomic_store(&call->kind, kind);
    return call;
}

static int end(struct call *call, int result, int error)
{
    call->error = result == 0 ? 0 : (uint32_t)error;
    call->end_ns = now_ns();
    call->end = atomic_fetch_add(&control->sequence, 1) + 1;
    atomic_store(&call->ended, 1);
    errno = error;
    return result;
}

static int sync_one(const char *name, int fd, uint32_t kind)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    struct file *file = find(fd);
    struct call *call;
    int result;

    if (file == NULL)
        return real(fd);
    call = begin(file, kind);
    wait_at_gate(file);
    if (take(&file->failures)) {
        call->injected = 1;
        return end(call, -1, (int)atomic_load(&file->error));
    }
    result = real(fd);
    return end(call, result, errno);
}

int fsync(int fd)
{
    return sync_one("fsync", fd, FSYNC);
}

int fdatasync(int fd)
{
    return sync_one("fdatasync", fd, FDATASYNC);
}

int sync_file_range(int fd, off64_t offset, off64_t size, unsigned int flags)
{
    int (*real)(int, off64_t, off64_t, unsigned int) =
        (int (*)(int, off64_t, off64_t, unsigned int))dlsym(RTLD_NEXT, "sync_file_range");
    struct file *file = find(fd);
    struct call *call;
    int result;

    if (file == NULL)
        return real(fd, offset, size, flags);
    call = begin(file, SYNC_FILE_RANGE); /* recorded alone: it makes nothing durable */
    result = real(fd, offset, size, flags);
    return end(call, result, errno);
}
