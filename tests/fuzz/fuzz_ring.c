/* fuzz_ring.c - a driver that does anything at all against the ring code.
 *
 * Input: 4 bytes of setup, then operations. Oracles: a chain handed out lies in guest memory, is
 * bounded and unique; pop() writes nothing; push() writes its used element and nothing else; a
 * fault leaves the ring as it was. Must not know devices. */
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "input.h"
#include "vhd.h"

enum {
    PAGE = 4096,
    FILE_SIZE = 8 * PAGE,
    BASE = 0x10000,
    DESC = BASE,
    AVAIL = BASE + 0x800,
    USED = BASE + 0xc00,
    TABLE = BASE + PAGE, /* where indirect tables are written */
    SIZE_MAX_HERE = 64,
    STEPS_MAX = 512
};

/* A and B touch each other in guest memory, not in the file; then comes a hole, then C. */
static const struct vhd_region LAYOUT[] = {
    {BASE, 4 * PAGE, 0, NULL, 0},
    {BASE + 4 * PAGE, 2 * PAGE, 6 * PAGE, NULL, 0},
    {BASE + 8 * PAGE, 2 * PAGE, 4 * PAGE, NULL, 0},
};
enum { REGIONS = sizeof LAYOUT / sizeof LAYOUT[0] };

static vhd_mapping *mapping;
static struct vhd_log *dirty_log;
static struct vhd_table table;
static uint8_t before[FILE_SIZE];

struct state {
    struct vhd_ring ring;
    struct vhd_walk walk;
    bool data_ranges;
    uint16_t slots[SIZE_MAX_HERE]; /* of each id in flight, 0 = not in flight */
    uint32_t in_flight;
    uint16_t driver_index; /* the driver's own position, packed */
    bool driver_wrap;
};

static int memory_file(const char *name, off_t size)
{
    int fd = memfd_create(name, MFD_CLOEXEC);

    REQUIRE(fd >= 0 && ftruncate(fd, size) == 0);
    return fd;
}

static void begin(void)
{
    if (mapping == NULL) {
        int error = 0;
        int fd = memory_file("ram", FILE_SIZE);
        int log_fd = memory_file("log", PAGE);

        mapping = vhd_mapping_create(fd, -1, &error);
        dirty_log = vhd_log_create(log_fd, PAGE, 0, &error);
        REQUIRE(mapping != NULL && dirty_log != NULL);
        close(fd);
        close(log_fd);
        struct vhd_region regions[REGIONS];
        for (int i = 0; i < REGIONS; i++) {
            regions[i] = LAYOUT[i];
            regions[i].mapping = mapping;
        }
        REQUIRE(vhd_table_init(&table, regions, REGIONS) == 0);
    }
    memset(mapping->host, 0, FILE_SIZE);
    memset((void *)dirty_log->bits, 0, PAGE);
}

/* The same question as vhd_table_covers(), asked of each byte's page. */
static bool in_guest_memory(uint64_t addr, uint64_t size)
{
    if (addr + size < addr)
        return false;
    for (uint64_t page = addr / PAGE; page <= (addr + size - 1) / PAGE; page++) {
        bool found = false;

        for (int i = 0; i < REGIONS; i++)
            found |= page >= LAYOUT[i].guest_addr / PAGE &&
                     page < (LAYOUT[i].guest_addr + LAYOUT[i].size) / PAGE;
        if (!found)
            return false;
    }
    return true;
}

static uint8_t *host(uint64_t addr)
{
    return mapping->host + (addr - BASE); /* of region A only */
}

/* -- operations of the driver ----------------------------------------------------------------- */

static void write_descriptor(struct state *state, struct input *input, uint8_t *at)
{
    bool packed = state->ring.features & VHD_RING_PACKED;
    uint8_t kind = take8(input);
    uint64_t addr = BASE - 0x800 + 4ull * take16(input);
    uint32_t size = take16(input);
    uint16_t flags = take8(input) & 7;
    uint16_t next = take8(input);

    if (kind & 1)
        addr = TABLE + (uint64_t)(kind & 0xf0);
    if (kind & 2)
        size = 16 * (size & 63);
    if (kind & 4)
        size = (size & 1 ? 0xffffffffu : 0x80000000u) - (size >> 1);
    if (kind & 8)
        addr = ~addr;
    memcpy(at, &addr, 8);
    memcpy(at + 8, &size, 4);
    memcpy(at + 12, packed ? &next : &flags, 2);
    memcpy(at + 14, packed ? &flags : &next, 2);
}

static void write_raw(struct input *input)
{
    uint32_t offset = take16(input) % FILE_SIZE;
    uint8_t length = take8(input) % 17;

    for (uint32_t i = 0; i < length; i++)
        mapping->host[(offset + i) % FILE_SIZE] = take8(input);
}

static void offer(struct state *state, struct input *input)
{
    struct vhd_ring *ring = &state->ring;
    uint8_t value = take8(input);

    if (ring->features & VHD_RING_PACKED) {
        uint8_t *flags = host(DESC) + 16 * (size_t)state->driver_index + 14;
        uint16_t now;

        memcpy(&now, flags, 2);
        now = (uint16_t)((now & 7) | (state->driver_wrap ? 1 << 7 : 1 << 15));
        memcpy(flags, &now, 2);
        state->driver_index++;
        if (state->driver_index == ring->size) {
            state->driver_index = 0;
            state->driver_wrap = !state->driver_wrap;
        }
    } else {
        uint16_t idx, head = value;

        memcpy(&idx, host(AVAIL) + 2, 2);
        memcpy(host(AVAIL) + 4 + 2 * (size_t)(idx & (ring->size - 1)), &head, 2);
        idx++;
        memcpy(host(AVAIL) + 2, &idx, 2);
    }
}

/* -- operations of the device, and what must hold after them ---------------------------------- */

static void check_walk(struct state *state)
{
    const struct vhd_walk *walk = &state->walk;
    uint32_t total = (uint32_t)walk->readable_count + walk->writable_count;
    uint64_t readable_size = 0, writable_size = 0;

    REQUIRE(walk->id < state->ring.size && state->slots[walk->id] == 0);
    REQUIRE(walk->slots >= 1 && walk->slots <= state->ring.size);
    REQUIRE(total >= 1 && total <= VHD_CHAIN_SEGMENTS_MAX);
    for (uint32_t i = 0; i < total; i++) {
        const struct vhd_segment *segment = &walk->segments[i];

        REQUIRE(segment->size != 0);
        if (state->data_ranges)
            REQUIRE(in_guest_memory(segment->guest_addr, segment->size));
        if (i < walk->readable_count)
            readable_size += segment->size;
        else
            writable_size += segment->size;
    }
    REQUIRE(readable_size == walk->readable_size && writable_size == walk->writable_size);
    if (state->data_ranges)
        REQUIRE(readable_size + writable_size <= UINT32_MAX);
}

static void pop(struct state *state)
{
    struct vhd_ring_position position = state->ring.position;
    int rc;

    memcpy(before, mapping->host, FILE_SIZE);
    rc = vhd_ring_pop(&state->ring, &state->walk, state->data_ranges);
    REQUIRE(rc <= 1 && rc > -VHD_FAULT_COUNT);
    REQUIRE(memcmp(before, mapping->host, FILE_SIZE) == 0);
    if (rc == 1) {
        check_walk(state);
        state->slots[state->walk.id] = state->walk.slots;
        state->in_flight++;
    } else {
        REQUIRE(memcmp(&position, &state->ring.position, sizeof position) == 0);
    }
    REQUIRE(state->in_flight == state->ring.in_flight_count);
    REQUIRE(state->in_flight <= state->ring.size);
}

/* Only [offset, offset + size) of the file may differ from `before`. */
static void check_written(size_t offset, size_t size)
{
    memcpy(before + offset, mapping->host + offset, size);
    REQUIRE(memcmp(before, mapping->host, FILE_SIZE) == 0);
}

static void push(struct state *state, struct input *input)
{
    struct vhd_ring *ring = &state->ring;
    bool packed = ring->features & VHD_RING_PACKED;
    uint32_t id = take8(input) % ring->size;
    uint32_t written = take8(input);
    uint16_t at = ring->position.next_used;
    uint32_t told[2];

    if (state->slots[id] == 0)
        return;
    memcpy(before, mapping->host, FILE_SIZE);
    vhd_ring_push(ring, (uint16_t)id, state->slots[id], written);
    state->slots[id] = 0;
    state->in_flight--;
    REQUIRE(state->in_flight == ring->in_flight_count);
    size_t offset = packed ? DESC - BASE + 16 * (size_t)at + 8
                           : USED - BASE + 4 + 8 * (size_t)(at & (ring->size - 1));
    memcpy(told, mapping->host + offset, sizeof told);
    REQUIRE(packed ? told[0] == written && (told[1] & 0xffff) == id
                   : told[0] == id && told[1] == written);
    if (!packed) {
        uint16_t idx;

        memcpy(&idx, host(USED) + 2, 2);
        REQUIRE(idx == (uint16_t)(at + 1) && idx == ring->position.next_used);
        memcpy(before + (USED - BASE) + 2, &idx, 2);
    } else {
        REQUIRE(ring->position.next_used < ring->size);
    }
    check_written(offset, 8);
    if (ring->log != NULL)
        REQUIRE(dirty_log->bits[BASE / PAGE / 8] == 1);
}

static void suppress(struct state *state, bool on)
{
    bool packed = state->ring.features & VHD_RING_PACKED;
    size_t event = packed ? 0 : 4 + 8 * (size_t)state->ring.size;

    memcpy(before, mapping->host, FILE_SIZE);
    if (on)
        vhd_ring_kicks_on(&state->ring);
    else
        vhd_ring_kicks_off(&state->ring);
    memcpy(before + (USED - BASE) + event, host(USED) + event, packed ? 4 : 2);
    check_written(USED - BASE, packed ? 4 : 2);
}

static bool start(struct state *state, struct input *input)
{
    uint8_t mode = take8(input);
    uint8_t size = take8(input);
    uint8_t next = take8(input);
    uint8_t wrap = take8(input);
    struct vhd_ring_setup setup = {
        .size = 1u + size % SIZE_MAX_HERE,
        .features = mode & (VHD_RING_PACKED | VHD_RING_EVENT_IDX | VHD_RING_INDIRECT),
        .desc_addr = DESC,
        .avail_addr = AVAIL,
        .used_addr = USED,
        .log_addr = USED,
        .kick_fd = -1,
        .call_fd = -1,
        .err_fd = -1,
    };

    memset(state, 0, sizeof *state);
    state->data_ranges = mode & 8;
    if (mode & VHD_RING_PACKED) {
        setup.position = (struct vhd_ring_position){
            (uint16_t)(next % setup.size), (uint16_t)(next % setup.size), wrap & 1, wrap & 1, 0};
        state->driver_index = setup.position.next_avail;
        state->driver_wrap = wrap & 1;
    } else {
        uint16_t idx = (uint16_t)(next - 128);

        setup.size = 1u << size % 7;
        setup.position.next_avail = idx;
        memcpy(host(AVAIL) + 2, &idx, 2);
        memcpy(host(USED) + 2, &idx, 2);
    }
    setup.features |= mode & 0x10 ? VHD_RING_LOG_USED : 0;
    if (vhd_ring_init(&state->ring, &table, &setup) != 0)
        return false;
    vhd_ring_open(&state->ring);
    state->ring.log = mode & 0x10 ? dirty_log : NULL;
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    static struct state state;
    struct input input = {bytes, size};

    begin();
    REQUIRE(start(&state, &input));
    for (int step = 0; step < STEPS_MAX && input.left != 0; step++) {
        switch (take8(&input) % 9) {
        case 0:
            pop(&state);
            break;
        case 1:
            push(&state, &input);
            break;
        case 2:
            vhd_ring_should_call(&state.ring);
            break;
        case 3:
        case 4:
            suppress(&state, take8(&input) & 1);
            break;
        case 5:
            write_descriptor(&state, &input, host(DESC) + 16 * (take8(&input) % state.ring.size));
            break;
        case 6:
            write_descriptor(&state, &input, host(TABLE) + 16 * (take8(&input) % 64u));
            break;
        case 7:
            write_raw(&input);
            break;
        default:
            offer(&state, &input);
        }
    }
    return 0;
}
