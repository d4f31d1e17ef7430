/* fuzz_balloon.c - any page numbers and any reported ranges against the balloon.
 *
 * Input: 1 byte of setup, then calls. Guest RAM carries a pattern. Oracles: only pages that were
 * given up lose it, those that had to go did go, and inflated_pages is what a model counts. Must
 * not know rings. */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "input.h"
#include "vhd.h"

enum {
    PAGE = 4096,
    PAGES = 64,       /* of the file */
    CHUNK = 256,      /* reported ranges begin at a multiple */
    LIST_PAGE = 1024, /* guest page where page numbers are written; a file of its own */
    LIST_PAGES = 8,
    CALLS_MAX = 32,
    LISTED_MAX = 256,
    RANGES_MAX = 12,
    COARSE = 4 /* 4 KiB pages of a host page in the mode that plays hugetlbfs */
};

/* Guest page, pages, file page. The second and third touch in guest memory, not in the file. */
static const struct {
    uint64_t guest, count, file;
} LAYOUT[] = {{0, 24, 0}, {32, 24, 32}, {56, 8, 24}};
enum { REGIONS = sizeof LAYOUT / sizeof LAYOUT[0] };

static vhd_mapping *ram, *list_memory;
static struct vhd_log *dirty_log;
static struct vhd_table table;
static struct vhd_walk walk;

static const uint32_t poison_val = 0xaaaaaaaa;
static const uint64_t generation = 1;

struct model {
    struct vhd_balloon balloon;
    struct vhd_balloon_counters counters;
    uint32_t flags;
    uint64_t given_up;      /* of RAM, one bit per file page */
    uint64_t list_given_up; /* of the pages the numbers stand in */
    uint64_t listed;        /* by this call */
    uint16_t chunks[PAGES]; /* of each page, reported by this call */
    uint64_t whole;         /* pages reported by one range of this call */
};

static vhd_mapping *create(const char *name, off_t size)
{
    int error = 0;
    int fd = memfd_create(name, MFD_CLOEXEC);

    REQUIRE(fd >= 0 && ftruncate(fd, size) == 0);
    vhd_mapping *mapping = vhd_mapping_create(fd, -1, &error);
    REQUIRE(mapping != NULL);
    if (dirty_log == NULL)
        dirty_log = vhd_log_create(fd, 64, 0, &error);
    close(fd);
    return mapping;
}

static void write_pattern(uint64_t page)
{
    for (uint64_t at = 0; at < PAGE; at += 1024) {
        uint64_t word = (page << 32 | at) + 1;

        memcpy(ram->host + page * PAGE + at, &word, sizeof word);
    }
}

/* 1: carries its pattern, 0: reads as zero. Nothing else is possible. */
static bool pattern_holds(uint64_t page)
{
    uint32_t same = 0, zero = 0;

    for (uint64_t at = 0; at < PAGE; at += 1024) {
        uint64_t word;

        memcpy(&word, ram->host + page * PAGE + at, sizeof word);
        same += word == (page << 32 | at) + 1;
        zero += word == 0;
    }
    REQUIRE(same == 4 || zero == 4);
    return same == 4;
}

static void begin(struct model *model, uint8_t mode)
{
    if (ram == NULL) {
        vhd_mapping *log_memory = create("log", PAGE);
        struct vhd_region regions[REGIONS + 1];

        REQUIRE(dirty_log != NULL);
        vhd_mapping_destroy(log_memory);
        ram = create("ram", PAGES * PAGE);
        list_memory = create("list", LIST_PAGES * PAGE);
        for (int i = 0; i < REGIONS; i++)
            regions[i] = (struct vhd_region){LAYOUT[i].guest * PAGE, LAYOUT[i].count * PAGE,
                                             LAYOUT[i].file * PAGE, ram, 0};
        regions[REGIONS] =
            (struct vhd_region){(uint64_t)LIST_PAGE * PAGE, LIST_PAGES * PAGE, 0, list_memory, 0};
        REQUIRE(vhd_table_init(&table, regions, REGIONS + 1) == 0);
    }
    memset(model, 0, sizeof *model);
    vhd_given_up_forget(&ram->given_up);
    vhd_given_up_forget(&list_memory->given_up);
    ram->page_size = mode & 16 ? COARSE * PAGE : PAGE;
    for (uint64_t page = 0; page < PAGES; page++)
        if (!pattern_holds(page))
            write_pattern(page);
    model->flags = (mode & 7) ^ VHD_BALLOON_MAY_DISCARD; /* 4 in the corpus: it may not */
    model->balloon.flags = model->flags;
    model->balloon.counters = &model->counters;
    model->balloon.poison_val = &poison_val;
    model->balloon.generation = &generation;
    model->balloon.log = mode & 8 ? dirty_log : NULL;
}

/* The file page of a guest page, or -1. */
static int file_page(uint64_t guest)
{
    for (int i = 0; i < REGIONS; i++)
        if (guest >= LAYOUT[i].guest && guest < LAYOUT[i].guest + LAYOUT[i].count)
            return (int)(guest - LAYOUT[i].guest + LAYOUT[i].file);
    return -1;
}

/* Write a list of page numbers into guest memory and the chain that shows it, cut at odd places. */
static uint32_t list_pages(struct input *input, uint32_t *pfns)
{
    uint64_t addr = (uint64_t)LIST_PAGE * PAGE;
    uint8_t mode = take8(input);
    uint32_t length = take8(input) % LISTED_MAX;
    uint32_t step = take8(input), from = take8(input), size, cut;

    for (uint32_t i = 0; i < length; i++) {
        uint32_t pfn = mode & 1 ? from + i * (mode & 2 ? step % 3 : 1) : take8(input) % 80;

        if (mode & 4)
            pfn = from + length - i;
        if (pfn == 79)
            pfn = 0x100000u * step + (step & 1 ? LIST_PAGE + from % 10 : from);
        pfns[i] = pfn;
    }
    memcpy(list_memory->host, pfns, 4 * (size_t)length);
    size = 4 * length + (mode & 8 ? 3 : 0);
    vhd_walk_begin(&walk);
    cut = mode & 16 && size > 1 ? 1 + step % (size - 1) : size;
    if (cut != 0)
        walk.segments[walk.readable_count++] = (struct vhd_segment){addr, cut};
    if (size > cut)
        walk.segments[walk.readable_count++] = (struct vhd_segment){addr + cut, size - cut};
    walk.readable_size = size;
    return length;
}

static uint32_t count_bits(uint64_t bits)
{
    return (uint32_t)__builtin_popcountll(bits);
}

static void change(struct model *model, struct input *input, bool inflate)
{
    uint32_t pfns[LISTED_MAX];
    uint32_t length = list_pages(input, pfns);
    int rc = inflate ? vhd_balloon_inflate(&model->balloon, &table, &walk)
                     : vhd_balloon_deflate(&model->balloon, &table, &walk);

    REQUIRE(rc == 0);
    for (uint32_t i = 0; i < length; i++) {
        int page = file_page(pfns[i]);
        uint64_t *bits = page >= 0 ? &model->given_up : &model->list_given_up;
        uint64_t bit = page >= 0 ? 1ull << page : 0;

        if (page < 0 && pfns[i] >= LIST_PAGE && pfns[i] < LIST_PAGE + LIST_PAGES)
            bit = 1ull << (pfns[i] - LIST_PAGE);
        *bits = inflate ? *bits | bit : *bits & ~bit;
        if (page >= 0 && inflate)
            model->listed |= bit;
    }
    REQUIRE(vhd_mapping_given_up_pages(ram) == count_bits(model->given_up));
    REQUIRE(vhd_mapping_given_up_pages(list_memory) == count_bits(model->list_given_up));
    REQUIRE(model->counters.inflated_pages ==
            count_bits(model->given_up) + count_bits(model->list_given_up));
}

/* One reported range as the model sees it: chunk by chunk until the first that is no RAM. */
static void expect_range(struct model *model, uint64_t addr, uint64_t size)
{
    if (addr + size < addr)
        return;
    for (uint64_t at = addr; at + CHUNK <= addr + size; at += CHUNK) {
        int page = file_page(at / PAGE);
        bool list = at / PAGE >= LIST_PAGE && at / PAGE < LIST_PAGE + LIST_PAGES;

        if (page < 0 && !list)
            return;
        if (page >= 0)
            model->chunks[page] |= (uint16_t)(1u << at % PAGE / CHUNK);
        if (page >= 0 && at % PAGE == 0 && size - (at - addr) >= PAGE)
            model->whole |= 1ull << page;
    }
}

static void report(struct model *model, struct input *input)
{
    uint32_t length = take8(input) % RANGES_MAX;

    vhd_walk_begin(&walk);
    walk.readable_count = take8(input) & 1;
    walk.segments[0] = (struct vhd_segment){0, PAGE};
    walk.readable_size = walk.readable_count * (uint64_t)PAGE;
    for (uint32_t i = 0; i < length; i++) {
        uint64_t addr = (uint64_t)take16(input) * CHUNK;
        uint32_t size = (take16(input) % (PAGES * PAGE / CHUNK) + 1u) * CHUNK;
        uint8_t odd = take8(input);

        if (odd & 2) {
            addr &= ~(uint64_t)(PAGE - 1);
            size = (size + PAGE - 1) & ~(PAGE - 1u);
        }
        size -= odd & 1;
        if (odd == 0xff)
            addr = UINT64_MAX - addr;
        walk.segments[walk.readable_count + i] = (struct vhd_segment){addr, size};
        walk.writable_count++;
        walk.writable_size += size;
        expect_range(model, addr, size);
    }
    REQUIRE(vhd_balloon_report(&model->balloon, &table, &walk) == 0);
}

/* May this host page have gone, must it have? `free_pages`: of the call and, where the driver must
 * tell before reuse, of the balloon. */
static void check_host_page(const struct model *model, uint64_t first, uint64_t parts)
{
    uint64_t mask = ((1ull << parts) - 1) << first;
    uint64_t may = model->listed;
    bool inhibited = !(model->flags & VHD_BALLOON_MAY_DISCARD);

    if (model->flags & VHD_BALLOON_MUST_TELL_HOST)
        may |= model->given_up;
    bool may_go = (may & mask) == mask && !inhibited;
    bool must_go = (model->listed & mask) == mask && !inhibited;
    bool kept = inhibited || model->flags & VHD_BALLOON_PAGE_POISON;
    bool reported = !kept;

    for (uint64_t page = first; page < first + parts; page++)
        reported &= model->chunks[page] == 0xffff;
    may_go |= reported;
    must_go |= parts == 1 && !kept && (model->whole & mask) == mask;
    for (uint64_t page = first; page < first + parts; page++) {
        bool there = pattern_holds(page);

        REQUIRE(there || may_go);
        REQUIRE(!there || !must_go);
        if (!there)
            write_pattern(page);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    static struct model model;
    struct input input = {bytes, size};

    begin(&model, take8(&input));
    for (int call = 0; call < CALLS_MAX && input.left != 0; call++) {
        uint8_t kind = take8(&input) % 4;

        model.listed = 0;
        model.whole = 0;
        memset(model.chunks, 0, sizeof model.chunks);
        if (kind == 3)
            report(&model, &input);
        else
            change(&model, &input, kind != 2);
        uint64_t parts = ram->page_size / PAGE;
        for (uint64_t page = 0; page < PAGES; page += parts)
            check_host_page(&model, page, parts);
        REQUIRE(model.counters.discard_errors == 0);
    }
    return 0;
}
