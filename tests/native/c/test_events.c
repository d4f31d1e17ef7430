/* test_events.c - when the driver is interrupted and when it is asked to kick, in both layouts,
 * and which of our writes the dirty log shows. Must not know devices or threads. */
#include "driver.h"

static struct driver driver;

static const struct part DATA_PART = {DATA, 8, 0};

static void serve(uint16_t id)
{
    offer(&driver, id, &DATA_PART, 1);
    CHECK(pop(&driver) == 1);
    push(&driver, 0);
}

/* Push `count` chains after a call decision at used index `before`; is there a call? */
static bool split_calls(uint16_t before, uint16_t event, uint32_t count)
{
    driver_start(&driver, 16, VHD_RING_EVENT_IDX, (uint16_t)(before - 1));
    serve(0);
    CHECK(vhd_ring_should_call(&driver.ring)); /* the first decision has no index before it */
    put(&driver, AVAIL + 4 + 2 * 16, event, 2);
    for (uint32_t i = 0; i < count; i++)
        serve((uint16_t)(i % 16));
    return vhd_ring_should_call(&driver.ring);
}

/* A call comes exactly when an index in [before, before + count) is the event. */
static void split_event_index(void)
{
    static const uint16_t befores[] = {1, 100, 65530, 65535, 0, 32767};

    for (size_t i = 0; i < sizeof befores / sizeof befores[0]; i++)
        for (uint32_t count = 1; count <= 8; count++)
            for (int offset = -3; offset <= 10; offset++) {
                bool passed = offset >= 0 && offset < (int)count;

                CHECK(split_calls(befores[i], (uint16_t)(befores[i] + offset), count) == passed);
            }
}

/* The same with descriptor positions: `offset` counts descriptors from `before` on, and goes over
 * the ring's end. */
static void packed_event_index(uint32_t size)
{
    for (uint16_t before = 1; before <= size; before++)
        for (uint32_t count = 1; count <= size; count++)
            for (uint32_t offset = 0; offset < size; offset++) {
                uint32_t at = before % size + offset;
                bool wrapped = before == size;

                if (at >= size) {
                    at -= size;
                    wrapped = !wrapped;
                }
                driver_start(&driver, size, VHD_RING_PACKED | VHD_RING_EVENT_IDX,
                             (uint16_t)(before - 1));
                serve(0);
                CHECK(vhd_ring_should_call(&driver.ring));
                put(&driver, AVAIL, at | (wrapped ? 0 : 1u << 15), 2);
                put(&driver, AVAIL + 2, 2, 2);
                for (uint32_t i = 0; i < count; i++)
                    serve((uint16_t)(i % size));
                CHECK(vhd_ring_should_call(&driver.ring) == (offset < count));
            }
}

static void flags_decide_without_the_event_index(void)
{
    driver_start(&driver, 16, 0, 0);
    serve(0);
    CHECK(vhd_ring_should_call(&driver.ring));
    put(&driver, AVAIL, 1, 2); /* NO_INTERRUPT */
    CHECK(!vhd_ring_should_call(&driver.ring));

    for (int event_index = 0; event_index < 2; event_index++) {
        driver_start(&driver, 16, VHD_RING_PACKED | (event_index ? VHD_RING_EVENT_IDX : 0), 0);
        serve(0);
        put(&driver, AVAIL + 2, 1, 2); /* RING_EVENT_FLAGS_DISABLE */
        CHECK(!vhd_ring_should_call(&driver.ring));
        put(&driver, AVAIL + 2, 0, 2);
        serve(1);
        CHECK(vhd_ring_should_call(&driver.ring));
    }
}

/* What the driver reads before it kicks; `on` sees what came meanwhile. */
static void kicks_are_asked_for(void)
{
    driver_start(&driver, 16, 0, 65535);
    vhd_ring_kicks_off(&driver.ring);
    CHECK(get(&driver, USED, 2) == 1);
    CHECK(!vhd_ring_kicks_on(&driver.ring) && get(&driver, USED, 2) == 0);
    offer(&driver, 0, &DATA_PART, 1);
    CHECK(vhd_ring_kicks_on(&driver.ring));

    driver_start(&driver, 16, VHD_RING_EVENT_IDX, 65535);
    vhd_ring_kicks_off(&driver.ring);
    CHECK(get(&driver, USED, 2) == 0);
    serve(0); /* avail_event is where the next chain will be: 0, past 65535 */
    put(&driver, USED + 4 + 8 * 16, 77, 2);
    CHECK(!vhd_ring_kicks_on(&driver.ring) && get(&driver, USED + 4 + 8 * 16, 2) == 0);
    offer(&driver, 1, &DATA_PART, 1);
    CHECK(vhd_ring_kicks_on(&driver.ring));

    for (int event_index = 0; event_index < 2; event_index++) {
        driver_start(&driver, 5, VHD_RING_PACKED | (event_index ? VHD_RING_EVENT_IDX : 0), 3);
        vhd_ring_kicks_off(&driver.ring);
        CHECK(get(&driver, USED + 2, 2) == 1);
        serve(0);
        CHECK(!vhd_ring_kicks_on(&driver.ring));
        CHECK(get(&driver, USED + 2, 2) == (event_index ? 2 : 0));
        CHECK(!event_index || get(&driver, USED, 2) == (4 | 1 << 15));
        serve(1); /* the wrap counter turns over */
        CHECK(!vhd_ring_kicks_on(&driver.ring) && (!event_index || get(&driver, USED, 2) == 0));
        offer(&driver, 2, &DATA_PART, 1);
        CHECK(vhd_ring_kicks_on(&driver.ring));
    }
}

/* -- the dirty log ---------------------------------------------------------------------------- */

static bool logged(const struct vhd_log *log, uint64_t addr)
{
    return log->bits[addr / PAGE / 8] >> (addr / PAGE % 8) & 1;
}

static void the_dirty_log_shows_what_we_wrote(void)
{
    int error = 0;
    int fd = memfd_create("log", MFD_CLOEXEC);

    CHECK(fd >= 0 && ftruncate(fd, PAGE) == 0);
    vhd_log *log = vhd_log_create(fd, PAGE, 0, &error);
    CHECK(log != NULL);
    for (int packed = 0; packed < 2; packed++) {
        memset((void *)log->bits, 0, PAGE);
        driver_start(&driver, 1024, (packed ? VHD_RING_PACKED : 0) | VHD_RING_LOG_USED, 600);
        driver.ring.log = log;
        serve(0);
        /* Split: the index and the 600th element. Packed: the descriptor, in its own page, whatever
         * address the used part is logged at. */
        CHECK(logged(log, USED) == !packed && logged(log, USED + 4 + 8 * 600) == !packed);
        CHECK(logged(log, DESC + 16 * 600) == packed);
        CHECK(!logged(log, DESC) && !logged(log, AVAIL) && !logged(log, DATA));
        vhd_ring_kicks_on(&driver.ring);
        CHECK(logged(log, USED));
    }
    memset((void *)log->bits, 0, PAGE);
    driver_start(&driver, 16, 0, 0); /* not asked for */
    driver.ring.log = log;
    serve(0);
    CHECK(!logged(log, USED));
    CHECK(vhd_log_mark(log, 8ull * PAGE * PAGE - 1, 1) && log->bits[PAGE - 1] == 0x80);
    CHECK(!vhd_log_mark(log, 8ull * PAGE * PAGE - 1, 2)); /* one byte beyond the log */
    CHECK(!vhd_log_mark(log, UINT64_MAX - 1, UINT64_MAX));
    vhd_log_destroy(log);
    close(fd);
}

/* -- starting --------------------------------------------------------------------------------- */

static int start(uint32_t size, uint32_t features, uint64_t desc, uint64_t avail, uint64_t used)
{
    struct vhd_ring ring;
    struct vhd_ring_setup setup = {.size = size,
                                   .features = features,
                                   .desc_addr = desc,
                                   .avail_addr = avail,
                                   .used_addr = used};

    return vhd_ring_init(&ring, &driver.table, &setup);
}

static void only_a_legal_ring_starts(void)
{
    static const uint32_t layouts[] = {0, VHD_RING_PACKED};

    for (int i = 0; i < 2; i++) {
        uint32_t layout = layouts[i];

        CHECK(start(0, layout, DESC, AVAIL, USED) == -EINVAL);
        CHECK(start(VHD_QUEUE_SIZE_MAX + 1, layout, DESC, AVAIL, USED) == -EINVAL);
        CHECK(start(7, layout, DESC, AVAIL, USED) == (layout ? 0 : -EINVAL));
        CHECK(start(8, layout, DESC + 8, AVAIL, USED) == -EFAULT);
        CHECK(start(8, layout, DESC, AVAIL + 1, USED) == -EFAULT);
        CHECK(start(8, layout, DESC, AVAIL, USED + 2) == -EFAULT);
        CHECK(start(8, layout, END - 128, AVAIL, USED) == 0);
        CHECK(start(8, layout, END - 112, AVAIL, USED) == -EFAULT);
        CHECK(start(8, layout, BORDER - 112, AVAIL, USED) == -EFAULT); /* in two pieces */
        CHECK(start(8, layout, DESC, DESC + 124, USED) == -EFAULT);    /* overlap */
        CHECK(start(8, layout, DESC, DESC + 128, USED) == 0);
        CHECK(start(8, layout, UINT64_MAX - 15, AVAIL, USED) == -EFAULT);
    }
}

int main(void)
{
    driver_open(&driver);
    split_event_index();
    packed_event_index(5);
    packed_event_index(8);
    flags_decide_without_the_event_index();
    kicks_are_asked_for();
    the_dirty_log_shows_what_we_wrote();
    only_a_legal_ring_starts();
    driver_close(&driver);
    return 0;
}
