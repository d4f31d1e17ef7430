/* Memory under test, seen from inside the guest.
 *
 *   guesttool fill MIB SEED [PATH]   fill anonymous memory (or a shared mapping of PATH) with a
 *                                    pattern, print "filled N pages", then obey lines on stdin:
 *                                    verify -> "ok N pages" or "BAD page P offset O: ..." (exit 1)
 *                                    refill SEED -> "filled N pages", sync -> "synced",
 *                                    drop -> "dropped" (gives the pages back), quit or end of input
 *   guesttool check MIB SEED PATH    like fill, but expect the pattern of an earlier fill in PATH
 *   guesttool cycle MIB SEED         verify and refill pages in random order until "stop" or end
 *                                    of input, then "ok N verified"; "status" -> "verified N"
 *   guesttool hold MIB               touch every page, print "held N pages", wait for a line
 *   guesttool touch MIB              touch every page, print "touched N pages", exit
 *   guesttool scatter MIB            touch every page, give back every second one, print
 *                                    "scattered N pages", wait for a line: free memory in single
 *                                    pages, too small for free page reporting
 *   guesttool poke ADDR MIB          write to every page at this physical address through /dev/mem,
 *                                    print "poked N pages", exit: what a cheating guest would do
 *
 * Exit status: 0 all well, 1 memory did not hold what was written, 2 wrong use, 3 no memory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t), BATCH = 256 };

struct region {
    uint64_t *words;
    size_t pages;
    uint64_t seed;
};

static uint64_t mix(uint64_t x)
{
    /* SplitMix64's finalizer: neighbouring pages share no bytes, so a mix-up of two shows. */
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static void fill_page(struct region *region, size_t page, uint64_t seed)
{
    uint64_t *words = region->words + page * WORDS;
    uint64_t value = mix(seed ^ mix(page));
    for (size_t i = 0; i < WORDS; i++, value += 0x9e3779b97f4a7c15u)
        words[i] = value;
}

/* Return 1 if the page holds its pattern, else say what is wrong and return 0. */
static int verify_page(const struct region *region, size_t page, uint64_t seed)
{
    const volatile uint64_t *words = region->words + page * WORDS;
    uint64_t value = mix(seed ^ mix(page));
    for (size_t i = 0; i < WORDS; i++, value += 0x9e3779b97f4a7c15u) {
        uint64_t found = words[i];
        if (found == value)
            continue;
        printf("BAD page %zu offset %zu: found %016llx, expected %016llx\n", page, i * sizeof value,
               (unsigned long long)found, (unsigned long long)value);
        return 0;
    }
    return 1;
}

static void fill(struct region *region, uint64_t seed)
{
    region->seed = seed;
    for (size_t page = 0; page < region->pages; page++)
        fill_page(region, page, seed);
    printf("filled %zu pages\n", region->pages);
}

static int verify(const struct region *region)
{
    for (size_t page = 0; page < region->pages; page++)
        if (!verify_page(region, page, region->seed))
            return 0;
    printf("ok %zu pages\n", region->pages);
    return 1;
}

static struct region map_region(const char *mib, const char *path, int creates)
{
    size_t size = strtoul(mib, NULL, 0) << 20;
    int fd = -1;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (path != NULL) {
        flags = MAP_SHARED;
        fd = open(path, O_RDWR | O_CLOEXEC | (creates ? O_CREAT : 0), 0644);
        /* A block device has its size already and refuses to be given one. */
        if (fd < 0 || (creates && ftruncate(fd, (off_t)size) < 0 && errno != EINVAL)) {
            perror(path);
            exit(3);
        }
    }
    void *at = size == 0 ? MAP_FAILED : mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (at == MAP_FAILED) {
        perror("mmap");
        exit(3);
    }
    return (struct region){.words = at, .pages = size / PAGE};
}

static void touch(struct region *region)
{
    for (size_t page = 0; page < region->pages; page++)
        region->words[page * WORDS] = page + 1;
}

static void scatter(struct region *region)
{
    /* A huge page would only be split later, under pressure: its half stays allocated. */
    madvise(region->words, region->pages * PAGE, MADV_NOHUGEPAGE);
    touch(region);
    for (size_t page = 1; page < region->pages; page += 2)
        madvise(region->words + page * WORDS, PAGE, MADV_DONTNEED);
    printf("scattered %zu pages\n", region->pages / 2);
}

static int obey(struct region *region)
{
    char line[64];
    while (fgets(line, sizeof line, stdin) != NULL) {
        if (strcmp(line, "verify\n") == 0) {
            if (!verify(region))
                return 1;
        } else if (strncmp(line, "refill ", 7) == 0) {
            fill(region, strtoull(line + 7, NULL, 0));
        } else if (strcmp(line, "sync\n") == 0) {
            if (msync(region->words, region->pages * PAGE, MS_SYNC) < 0) {
                perror("msync");
                return 3;
            }
            puts("synced");
        } else if (strcmp(line, "drop\n") == 0) {
            madvise(region->words, region->pages * PAGE, MADV_DONTNEED);
            puts("dropped");
        } else if (strcmp(line, "quit\n") == 0) {
            return 0;
        } else {
            fprintf(stderr, "unknown request: %s", line);
            return 2;
        }
    }
    return 0;
}

/* What to do next: 0 go on, 1 stop. Answers "status". */
static int asked_to_stop(uint64_t verified)
{
    static char line[64];
    static size_t used;
    struct pollfd input = {.fd = 0, .events = POLLIN};
    if (poll(&input, 1, 0) <= 0)
        return 0;
    ssize_t got = read(0, line + used, sizeof line - 1 - used);
    if (got <= 0)
        return 1;
    used += (size_t)got;
    line[used] = 0;
    if (strstr(line, "stop\n") != NULL)
        return 1;
    if (strstr(line, "status\n") != NULL)
        printf("verified %llu\n", (unsigned long long)verified);
    if (strchr(line, '\n') != NULL || used == sizeof line - 1)
        used = 0;
    return 0;
}

static int cycle(struct region *region, uint64_t seed)
{
    uint32_t *generation = calloc(region->pages, sizeof *generation);
    uint64_t verified = 0;
    uint64_t state = seed;
    if (generation == NULL)
        return 3;
    fill(region, seed);
    while (!asked_to_stop(verified)) {
        for (int i = 0; i < BATCH; i++, verified++) {
            size_t page = (size_t)(mix(state++) % region->pages);
            if (!verify_page(region, page, seed + generation[page]))
                return 1;
            fill_page(region, page, seed + ++generation[page]);
        }
    }
    for (size_t page = 0; page < region->pages; page++, verified++)
        if (!verify_page(region, page, seed + generation[page]))
            return 1;
    printf("ok %llu verified\n", (unsigned long long)verified);
    return 0;
}

static int poke(off_t addr, size_t mib)
{
    size_t size = mib << 20;
    int fd = open("/dev/mem", O_RDWR);
    volatile char *at;

    if (fd < 0) {
        printf("/dev/mem: %s\n", strerror(errno));
        return 3;
    }
    at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, addr);
    if (at == MAP_FAILED) {
        printf("/dev/mem at %#llx: %s\n", (unsigned long long)addr, strerror(errno));
        return 3;
    }
    for (size_t i = 0; i < size; i += PAGE)
        at[i] = 1;
    printf("poked %zu pages\n", size / PAGE);
    return 0;
}

int main(int argc, char **argv)
{
    const char *verb = argc > 2 ? argv[1] : "";
    struct region region;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (strcmp(verb, "fill") == 0 && (argc == 4 || argc == 5)) {
        region = map_region(argv[2], argv[4], 1);
        fill(&region, strtoull(argv[3], NULL, 0));
        return obey(&region);
    }
    if (strcmp(verb, "check") == 0 && argc == 5) {
        region = map_region(argv[2], argv[4], 0);
        region.seed = strtoull(argv[3], NULL, 0);
        return verify(&region) ? 0 : 1;
    }
    if (strcmp(verb, "cycle") == 0 && argc == 4) {
        region = map_region(argv[2], NULL, 0);
        return cycle(&region, strtoull(argv[3], NULL, 0));
    }
    if (strcmp(verb, "hold") == 0 || strcmp(verb, "touch") == 0) {
        region = map_region(argv[2], NULL, 0);
        touch(&region);
        printf("%s %zu pages\n", verb[0] == 'h' ? "held" : "touched", region.pages);
        if (verb[0] == 'h')
            (void)getchar();
        return 0;
    }
    if (strcmp(verb, "poke") == 0 && argc == 4)
        return poke((off_t)strtoull(argv[2], NULL, 0), strtoul(argv[3], NULL, 0));
    if (strcmp(verb, "scatter") == 0) {
        region = map_region(argv[2], NULL, 0);
        scatter(&region);
        (void)getchar();
        return 0;
    }
    fputs("use: guesttool fill|check|cycle|hold|touch|scatter MIB [SEED] [PATH]\n", stderr);
    return 2;
}
