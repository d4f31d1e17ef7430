/* balloon.c - inflate, deflate and reporting: page numbers and ranges to runs to discards.
 *
 * virtio 1.x, 5.5.6. A page number counts 4 KiB pages whatever the guest's or host's page size. On
 * larger host pages nothing goes until the guest gave up all of one: dropping a huge page for one
 * of its parts would drop data the guest still uses. Must not know rings. */
#include <stdlib.h>
#include <string.h>

#include "vhd.h"

enum { PFN_SIZE = 4, PFN_SHIFT = 12 };

struct page {
    vhd_mapping *mapping;
    uint64_t index; /* 4 KiB page of the file */
    uint64_t guest_addr;
};

/* 4 KiB pages [first, end) of a file. */
struct page_run {
    vhd_mapping *mapping;
    uint64_t first;
    uint64_t end;
};

static void count(uint64_t *counter, uint64_t by)
{
    /* Read by Python at any time; only the worker writes. */
    __atomic_store_n(counter, *counter + by, __ATOMIC_RELAXED);
}

/* A page or range of the driver's is in no region: counted there. */
static void count_outside(struct vhd_balloon_counters *counters, uint64_t *counter, uint64_t addr)
{
    count(counter, 1);
    __atomic_store_n(&counters->outside_addr, addr, __ATOMIC_RELAXED);
}

static void discard(struct vhd_balloon *balloon, vhd_mapping *mapping, uint64_t offset,
                    uint64_t size)
{
    int rc = vhd_discard(mapping, offset, size);

    count(&balloon->counters->discards, 1);
    if (rc == 0) {
        count(&balloon->counters->discarded_size, size);
    } else {
        /* The pages stay resident, which loses nothing: the guest is answered as ever. */
        count(&balloon->counters->discard_errors, 1);
        __atomic_store_n(&balloon->counters->discard_errno, (uint64_t)-rc, __ATOMIC_RELAXED);
    }
}

/* -- inflate, deflate ------------------------------------------------------------------------- */

/* Read the page numbers of a chain, at most VHD_PFNS_PER_CHAIN_MAX; returns how many, or
 * -VHD_FAULT_ADDRESS. A number may straddle two descriptors: framing is the driver's choice. */
static int read_pfns(const struct vhd_table *table, const struct vhd_walk *walk, uint32_t *pfns,
                     struct vhd_balloon_counters *counters)
{
    uint64_t wanted = walk->readable_size;
    uint8_t *to = (uint8_t *)pfns;

    if (wanted > VHD_PFNS_PER_CHAIN_MAX * PFN_SIZE)
        wanted = VHD_PFNS_PER_CHAIN_MAX * PFN_SIZE;
    wanted -= wanted % PFN_SIZE;
    count(&counters->pfns_excess, (walk->readable_size - wanted + PFN_SIZE - 1) / PFN_SIZE);
    for (uint64_t left = wanted, i = 0; left != 0; i++) {
        const struct vhd_segment *segment = &walk->segments[i];
        uint64_t size = segment->size < left ? segment->size : left;

        if (vhd_table_read(table, segment->guest_addr, to, size) != 0)
            return -VHD_FAULT_ADDRESS;
        to += size;
        left -= size;
    }
    return (int)(wanted / PFN_SIZE);
}

/* The page a number stands for; false outside guest memory, or where it is no page of the file. */
static bool locate(const struct vhd_table *table, uint32_t pfn, const struct vhd_region **last,
                   struct page *page)
{
    uint64_t guest_addr = (uint64_t)pfn << PFN_SHIFT;
    const struct vhd_region *region = *last;

    if (region == NULL || guest_addr - region->guest_addr >= region->size)
        region = *last = vhd_table_find(table, guest_addr);
    if (region == NULL || guest_addr < region->guest_addr ||
        region->size - (guest_addr - region->guest_addr) < VHD_GUEST_PAGE_SIZE)
        return false;
    uint64_t offset = region->file_offset + (guest_addr - region->guest_addr);
    /* A slot may begin off the file's pages; then no page of the file is this page alone. */
    if (offset % VHD_GUEST_PAGE_SIZE != 0)
        return false;
    page->mapping = region->mapping;
    page->index = offset / VHD_GUEST_PAGE_SIZE;
    page->guest_addr = guest_addr;
    return true;
}

/* A list becomes runs before it is sorted: guests mostly send neighbours one after the other, up or
 * down, so that there are few. Returns how many there are now. */
static uint32_t add_page(struct page_run *runs, uint32_t length, const struct page *page)
{
    if (length != 0 && runs[length - 1].mapping == page->mapping) {
        struct page_run *last = &runs[length - 1];

        if (page->index == last->end) {
            last->end++;
            return length;
        }
        if (page->index + 1 == last->first) {
            last->first--;
            return length;
        }
        if (page->index >= last->first && page->index < last->end)
            return length;
    }
    runs[length] = (struct page_run){page->mapping, page->index, page->index + 1};
    return length + 1;
}

static int compare_runs(const struct page_run *left, const struct page_run *right)
{
    if (left->mapping != right->mapping)
        return (uintptr_t)left->mapping < (uintptr_t)right->mapping ? -1 : 1;
    return (left->first > right->first) - (left->first < right->first);
}

static void swap_runs(struct page_run *a, struct page_run *b)
{
    struct page_run kept = *a;

    *a = *b;
    *b = kept;
}

static void sift_down(struct page_run *runs, uint32_t root, uint32_t length)
{
    for (;;) {
        uint32_t child = 2 * root + 1;

        if (child >= length)
            return;
        if (child + 1 < length && compare_runs(&runs[child], &runs[child + 1]) < 0)
            child++;
        if (compare_runs(&runs[root], &runs[child]) >= 0)
            return;
        swap_runs(&runs[root], &runs[child]);
        root = child;
    }
}

/* Ascending order. Heap sort: no allocation, and no input makes it quadratic. */
static void sort_runs(struct page_run *runs, uint32_t length)
{
    uint32_t sorted = 1;

    while (sorted < length && compare_runs(&runs[sorted - 1], &runs[sorted]) <= 0)
        sorted++;
    if (sorted >= length)
        return;
    for (uint32_t root = length / 2; root-- > 0;)
        sift_down(runs, root, length);
    for (uint32_t end = length; end-- > 1;) {
        swap_runs(&runs[0], &runs[end]);
        sift_down(runs, 0, end);
    }
}

/* Punch the host pages of one file that pages [first, first + length) complete. */
static void discard_run(struct vhd_balloon *balloon, vhd_mapping *mapping, uint64_t first,
                        uint64_t length, bool may_combine)
{
    uint64_t parts = mapping->page_size / VHD_GUEST_PAGE_SIZE;
    uint64_t host = first / parts;
    uint64_t host_end = (first + length - 1) / parts + 1;
    uint64_t begin = UINT64_MAX; /* of the run of complete host pages, none yet */
    uint64_t generation = *balloon->generation;

    if (parts == 1) {
        discard(balloon, mapping, first * VHD_GUEST_PAGE_SIZE, length * VHD_GUEST_PAGE_SIZE);
        return;
    }
    for (; host <= host_end; host++) {
        bool listed = host * parts >= first && (host + 1) * parts <= first + length;
        bool complete = host < host_end && (host + 1) * mapping->page_size <= mapping->size &&
                        (listed || (may_combine && vhd_given_up_all(&mapping->given_up, generation,
                                                                    host * parts, parts)));

        if (complete && begin == UINT64_MAX)
            begin = host;
        if (!complete && begin != UINT64_MAX) {
            discard(balloon, mapping, begin * mapping->page_size,
                    (host - begin) * mapping->page_size);
            begin = UINT64_MAX;
        }
        if (!complete && host < host_end) {
            uint64_t from = host * parts < first ? first : host * parts;
            uint64_t to = (host + 1) * parts > first + length ? first + length : (host + 1) * parts;

            count(&balloon->counters->pages_kept, to - from);
        }
    }
}

static void discard_runs(struct vhd_balloon *balloon, const struct page_run *runs, uint32_t length,
                         uint32_t flags)
{
    for (uint32_t at = 0; at < length;) {
        struct page_run run = runs[at];

        /* One that touches or, with a page listed twice, overlaps this one. */
        for (at++; at < length && runs[at].mapping == run.mapping && runs[at].first <= run.end;
             at++)
            if (runs[at].end > run.end)
                run.end = runs[at].end;
        discard_run(balloon, run.mapping, run.first, run.end - run.first,
                    flags & VHD_BALLOON_MUST_TELL_HOST);
    }
}

static void count_withheld(struct vhd_balloon_counters *counters, const struct page_run *runs,
                           uint32_t length)
{
    uint64_t pages = 0;

    for (uint32_t i = 0; i < length; i++)
        pages += runs[i].end - runs[i].first;
    count(&counters->withheld_size, pages * VHD_GUEST_PAGE_SIZE);
}

int vhd_balloon_inflate(struct vhd_balloon *balloon, const struct vhd_table *table,
                        const struct vhd_walk *walk)
{
    struct vhd_balloon_counters *counters = balloon->counters;
    uint32_t flags = atomic_load_explicit(&balloon->flags, memory_order_relaxed);
    const struct vhd_region *last = NULL;
    struct page_run runs[VHD_PFNS_PER_CHAIN_MAX];
    uint32_t pfns[VHD_PFNS_PER_CHAIN_MAX];
    uint32_t length = 0;
    int listed;

    if (walk->writable_count != 0)
        return VHD_CHAIN_REJECTED;
    listed = read_pfns(table, walk, pfns, counters);
    if (listed < 0)
        return listed;
    count(&counters->inflate_pfns, (uint64_t)listed);
    for (int i = 0; i < listed; i++) {
        struct page page;

        if (!locate(table, pfns[i], &last, &page)) {
            count_outside(counters, &counters->pfns_outside,
                          (uint64_t)pfns[i] * VHD_GUEST_PAGE_SIZE);
            continue;
        }
        if (vhd_given_up_put(&page.mapping->given_up, *balloon->generation, page.index, true))
            count(&counters->inflated_pages, 1);
        else
            count(&counters->pfns_repeated, 1);
        if (balloon->log != NULL)
            (void)vhd_log_mark(balloon->log, page.guest_addr, VHD_GUEST_PAGE_SIZE);
        length = add_page(runs, length, &page);
    }
    if (!(flags & VHD_BALLOON_MAY_DISCARD)) {
        count_withheld(counters, runs, length);
        return 0;
    }
    sort_runs(runs, length);
    discard_runs(balloon, runs, length, flags);
    return 0;
}

int vhd_balloon_deflate(struct vhd_balloon *balloon, const struct vhd_table *table,
                        const struct vhd_walk *walk)
{
    struct vhd_balloon_counters *counters = balloon->counters;
    const struct vhd_region *last = NULL;
    uint32_t pfns[VHD_PFNS_PER_CHAIN_MAX];
    int listed;

    if (walk->writable_count != 0)
        return VHD_CHAIN_REJECTED;
    listed = read_pfns(table, walk, pfns, counters);
    if (listed < 0)
        return listed;
    count(&counters->deflate_pfns, (uint64_t)listed);
    for (int i = 0; i < listed; i++) {
        struct page page;

        if (!locate(table, pfns[i], &last, &page))
            count_outside(counters, &counters->pfns_outside,
                          (uint64_t)pfns[i] * VHD_GUEST_PAGE_SIZE);
        else if (vhd_given_up_put(&page.mapping->given_up, *balloon->generation, page.index, false))
            count(&counters->inflated_pages, UINT64_MAX); /* one less */
        else
            count(&counters->pfns_repeated, 1);
    }
    return 0;
}

/* -- reporting -------------------------------------------------------------------------------- */

/* A run of bytes of one file, waiting for a neighbour. */
struct run {
    vhd_mapping *mapping;
    uint64_t offset;
    uint64_t size;
};

static void flush_run(struct vhd_balloon *balloon, struct run *run)
{
    if (run->size != 0) {
        uint64_t page_size = run->mapping->page_size;
        uint64_t begin = (run->offset + page_size - 1) / page_size * page_size;
        uint64_t end = (run->offset + run->size) / page_size * page_size;

        if (begin < end)
            discard(balloon, run->mapping, begin, end - begin);
    }
    run->size = 0;
}

static void add_to_run(struct vhd_balloon *balloon, struct run *run, vhd_mapping *mapping,
                       uint64_t offset, uint64_t size)
{
    if (run->size != 0 && run->mapping == mapping && run->offset + run->size == offset) {
        run->size += size;
    } else if (run->size != 0 && run->mapping == mapping && offset + size == run->offset) {
        run->offset = offset;
        run->size += size;
    } else {
        flush_run(balloon, run);
        *run = (struct run){mapping, offset, size};
    }
}

/* One reported range, split at region borders; what is no guest memory is skipped and counted. */
static void report_range(struct vhd_balloon *balloon, const struct vhd_table *table,
                         struct run *run, uint64_t guest_addr, uint64_t size, bool withheld,
                         bool poisoned)
{
    if (guest_addr > UINT64_MAX - size) {
        count(&balloon->counters->reports_refused, 1);
        return;
    }
    while (size != 0) {
        const struct vhd_region *region = vhd_table_find(table, guest_addr);
        uint64_t skip, piece;

        if (region == NULL) {
            count_outside(balloon->counters, &balloon->counters->reports_refused, guest_addr);
            return;
        }
        skip = guest_addr - region->guest_addr;
        piece = region->size - skip < size ? region->size - skip : size;
        count(&balloon->counters->reported_size, piece);
        if (withheld || region->preallocated) {
            count(&balloon->counters->withheld_size, piece);
        } else if (!poisoned) {
            if (balloon->log != NULL)
                (void)vhd_log_mark(balloon->log, guest_addr, piece);
            add_to_run(balloon, run, region->mapping, region->file_offset + skip, piece);
        }
        guest_addr += piece;
        size -= piece;
    }
}

/* A hole reads as zero, and the driver counts on its pattern. Looked up where the driver wrote it:
 * a report that follows the write must not overtake it. */
static bool must_stay_poisoned(const struct vhd_balloon *balloon, uint32_t flags)
{
    return flags & VHD_BALLOON_PAGE_POISON &&
           __atomic_load_n(balloon->poison_val, __ATOMIC_RELAXED) != 0;
}

int vhd_balloon_report(struct vhd_balloon *balloon, const struct vhd_table *table,
                       const struct vhd_walk *walk)
{
    uint32_t flags = atomic_load_explicit(&balloon->flags, memory_order_relaxed);
    bool withheld = !(flags & VHD_BALLOON_MAY_DISCARD);
    bool poisoned = must_stay_poisoned(balloon, flags);
    uint32_t total = (uint32_t)walk->readable_count + walk->writable_count;
    struct run run = {NULL, 0, 0};

    count(&balloon->counters->reports_refused, walk->readable_count);
    for (uint32_t i = walk->readable_count; i < total; i++)
        report_range(balloon, table, &run, walk->segments[i].guest_addr, walk->segments[i].size,
                     withheld, poisoned);
    flush_run(balloon, &run);
    return 0;
}
