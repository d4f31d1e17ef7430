/* heap_shim.c - stands below a program by LD_PRELOAD: counts the bytes its heap has given out.
 *
 * With PYTHONMALLOC=malloc that is every Python object and all of C's. Must not know what the
 * program is. */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *at);

static _Atomic long in_use;

/* The bytes that are given out now. */
long heap_in_use(void)
{
    return atomic_load(&in_use);
}

static void *counted(void *at)
{
    atomic_fetch_add(&in_use, (long)malloc_usable_size(at));
    return at;
}

void *malloc(size_t size)
{
    return counted(__libc_malloc(size));
}

void *calloc(size_t count, size_t size)
{
    return counted(__libc_calloc(count, size));
}

void *realloc(void *old, size_t size)
{
    long before = (long)malloc_usable_size(old);
    void *at = __libc_realloc(old, size);

    if (at == NULL && size != 0)
        return NULL; /* the old one stays */
    atomic_fetch_sub(&in_use, before);
    return counted(at);
}

void *memalign(size_t alignment, size_t size)
{
    return counted(__libc_memalign(alignment, size));
}

void *aligned_alloc(size_t alignment, size_t size)
{
    return memalign(alignment, size);
}

int posix_memalign(void **result, size_t alignment, size_t size)
{
    void *at = memalign(alignment, size);

    if (at == NULL)
        return ENOMEM;
    *result = at;
    return 0;
}

void free(void *at)
{
    atomic_fetch_sub(&in_use, (long)malloc_usable_size(at));
    __libc_free(at);
}
