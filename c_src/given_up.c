/* given_up.c - which pages of a memory file the guest gave up to its balloon.
 *
 * A new driver has an empty balloon, and all of the guest's memory is its own again. So the bits
 * belong to a generation of the driver, whose number stands beside them in the same memfd, and each
 * question names the generation that it is about. Bits of another one are not there: they need not
 * be cleared in time, by whichever process, in whichever order a table and a driver come and go.
 * The worker writes, all read. Must not know regions or rings. */
#include <time.h>
#include <unistd.h>

#include "barrier.h"
#include "vhd.h"

/* The bits, and behind them one word: the generation, 0 = the bits are of none. */
static uint64_t bit_words(uint64_t file_size)
{
    uint64_t pages = (file_size + VHD_GUEST_PAGE_SIZE - 1) / VHD_GUEST_PAGE_SIZE;

    return (pages + 63) / 64;
}

static size_t size_of(const struct vhd_given_up *given_up)
{
    return (size_t)(given_up->count + 1) * sizeof(uint64_t);
}

static uint64_t load_word(const struct vhd_given_up *given_up, uint64_t index)
{
    return atomic_load_explicit(&given_up->words[index], memory_order_relaxed);
}

static bool is_of(const struct vhd_given_up *given_up, uint64_t generation)
{
    return generation != 0 && load_word(given_up, given_up->count) == generation;
}

static void count_word(struct vhd_given_up *given_up, uint64_t index)
{
    if (index < given_up->count)
        given_up->pages += (uint64_t)__builtin_popcountll(load_word(given_up, index));
}

/* Count what a predecessor left, where the file has any page at all. */
static int count_all(struct vhd_given_up *given_up)
{
    off_t begin = 0, end;

    for (;;) {
        begin = lseek(given_up->fd, begin, SEEK_DATA);
        if (begin < 0)
            return errno == ENXIO ? 0 : -errno;
        end = lseek(given_up->fd, begin, SEEK_HOLE);
        if (end < 0)
            return -errno;
        /* Both are borders of pages or the file's end. */
        for (; begin < end; begin += (off_t)sizeof(uint64_t))
            count_word(given_up, (uint64_t)begin / sizeof(uint64_t));
    }
}

int vhd_given_up_open(struct vhd_given_up *given_up, uint64_t file_size, int inherited)
{
    void *at;
    int converted = -1, rc;

    given_up->count = bit_words(file_size);
    rc = vhd_memfd_open("vhostd-given-up", inherited, size_of(given_up), &at);
    if (rc == -EPROTO && (converted = vhd_given_up_convert(inherited, given_up->count)) >= 0) {
        rc = vhd_memfd_open("vhostd-given-up", converted, size_of(given_up), &at);
        close(converted);
    }
    if (rc < 0)
        return rc;
    given_up->fd = rc;
    given_up->words = at;
    given_up->pages = 0;
    rc = count_all(given_up);
    if (rc != 0)
        vhd_given_up_close(given_up);
    return rc;
}

void vhd_given_up_close(struct vhd_given_up *given_up)
{
    vhd_memfd_close(given_up->fd, (void *)given_up->words, size_of(given_up));
}

void vhd_given_up_forget(struct vhd_given_up *given_up)
{
    if (load_word(given_up, given_up->count) == 0)
        return; /* it has not one page */
    /* The generation lies behind the bits: a death half-way leaves fewer bits of the old one. */
    if (vhd_memfd_clear(given_up->fd, size_of(given_up)) != 0)
        for (uint64_t at = 0; at <= given_up->count; at++)
            atomic_store_explicit(&given_up->words[at], 0, memory_order_relaxed);
    atomic_store_explicit(&given_up->pages, 0, memory_order_relaxed);
}

bool vhd_given_up_put(struct vhd_given_up *given_up, uint64_t generation, uint64_t page,
                      bool is_given_up)
{
    uint64_t bit = 1ull << (page % 64);
    uint64_t old;

    assert(generation != 0 && page / 64 < given_up->count);
    if (!is_of(given_up, generation)) {
        if (!is_given_up)
            return false; /* this driver has given up nothing yet */
        vhd_given_up_forget(given_up);
        vhd_fence_before_death();
        atomic_store_explicit(&given_up->words[given_up->count], generation, memory_order_relaxed);
        vhd_fence_before_death();
    }
    old = load_word(given_up, page / 64);
    if (((old & bit) != 0) == is_given_up)
        return false;
    /* One thread writes, so neither needs a locked instruction. */
    atomic_store_explicit(&given_up->words[page / 64], old ^ bit, memory_order_relaxed);
    atomic_store_explicit(&given_up->pages, given_up->pages + (is_given_up ? 1 : UINT64_MAX),
                          memory_order_relaxed);
    return true;
}

bool vhd_given_up_all(const struct vhd_given_up *given_up, uint64_t generation, uint64_t page,
                      uint64_t count)
{
    if (!is_of(given_up, generation))
        return false;
    for (uint64_t at = page; at < page + count; at++) {
        uint64_t word = load_word(given_up, at / 64);

        if (at % 64 == 0 && at + 64 <= page + count) {
            if (word != UINT64_MAX)
                return false;
            at += 63;
        } else if (!(word & (1ull << (at % 64)))) {
            return false;
        }
    }
    return true;
}

uint64_t vhd_given_up_pages(const struct vhd_given_up *given_up, uint64_t generation)
{
    return is_of(given_up, generation)
               ? atomic_load_explicit(&given_up->pages, memory_order_relaxed)
               : 0;
}

uint64_t vhd_generation_after(uint64_t generation)
{
    struct timespec now;
    uint64_t number;

    /* The host's time since it booted outlives every process and connection that had a generation
     * before, and the memfds do not outlive the host. */
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    number = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    return number > generation ? number : generation + 1;
}
