/* test_ring.c - what the ring code makes of a driver's bytes, right and wrong ones.
 *
 * Every fault a pop can return is provoked, in every layout that can show it. Exits with 0 or says
 * which claim is not true. Must not know devices or threads. */
#include "driver.h"

static struct driver driver;

static const uint32_t LAYOUTS[] = {0, VHD_RING_PACKED};

/* -- faults ----------------------------------------------------------------------------------- */

/* The next pop shows the fault, takes nothing and moves nothing. */
static void expect_fault(enum vhd_fault fault)
{
    struct vhd_ring_position before = driver.ring.position;

    CHECK(pop(&driver) == -(int)fault);
    CHECK(memcmp(&before, &driver.ring.position, sizeof before) == 0);
    CHECK(driver.ring.in_flight_count == 0);
}

static void expect_fault_of(uint32_t features, enum vhd_fault fault, const struct part *parts,
                            uint32_t count)
{
    driver_start(&driver, 16, features | VHD_RING_INDIRECT, 0);
    offer(&driver, 0, parts, count);
    expect_fault(fault);
}

static void faults_of_one_chain(uint32_t layout)
{
    enum { W = VHD_DESC_WRITE, I = VHD_DESC_INDIRECT };
    static const struct {
        enum vhd_fault fault;
        uint32_t count;
        struct part parts[3];
    } cases[] = {
        {VHD_FAULT_ZERO_LENGTH, 1, {{DATA, 0, 0}}},
        {VHD_FAULT_ZERO_LENGTH, 2, {{DATA, 8, 0}, {DATA, 0, W}}},
        {VHD_FAULT_ORDER, 2, {{DATA, 8, W}, {DATA, 8, 0}}},
        {VHD_FAULT_ADDRESS, 1, {{END, 1, 0}}},
        {VHD_FAULT_ADDRESS, 1, {{END - 8, 9, 0}}},
        {VHD_FAULT_ADDRESS, 1, {{TOP - 1, 2, W}}},
        {VHD_FAULT_ADDRESS, 1, {{TOP + 0xffff, 2, W}}},
        {VHD_FAULT_ADDRESS, 1, {{UINT64_MAX, 1, 0}}},
        {VHD_FAULT_ADDRESS, 1, {{UINT64_MAX - 7, 16, 0}}},
        {VHD_FAULT_ADDRESS, 1, {{0, UINT32_MAX, 0}}},
        {VHD_FAULT_SIZE, 2, {{DATA, 1, 0}, {DATA, UINT32_MAX, W}}},
        {VHD_FAULT_INDIRECT, 1, {{TABLE, 0, I}}},
        {VHD_FAULT_INDIRECT, 1, {{TABLE, 17, I}}},
        {VHD_FAULT_INDIRECT, 2, {{TABLE, 16, I}, {DATA, 8, 0}}},
        {VHD_FAULT_CHAIN_LENGTH, 1, {{TABLE, 16 * (VHD_CHAIN_SEGMENTS_MAX + 1), I}}},
        {VHD_FAULT_ADDRESS, 1, {{END - 16, 32, I}}},
        {VHD_FAULT_ZERO_LENGTH, 1, {{TABLE, 16, I}}},
    };

    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        expect_fault_of(layout, cases[i].fault, cases[i].parts, cases[i].count);
}

static void faults_inside_an_indirect_table(uint32_t layout)
{
    struct part table = {TABLE, 16 * 4, VHD_DESC_INDIRECT};

    driver_start(&driver, 16, layout, 0); /* not negotiated */
    put_entry(&driver, TABLE, 0, DATA, 8, 0, 0);
    offer(&driver, 0, &table, 1);
    expect_fault(VHD_FAULT_INDIRECT);

    driver_start(&driver, 16, layout | VHD_RING_INDIRECT, 0); /* nested */
    put_entry(&driver, TABLE, 0, TABLE, 16, VHD_DESC_INDIRECT, 0);
    offer(&driver, 0, &table, 1);
    expect_fault(VHD_FAULT_INDIRECT);

    if (layout & VHD_RING_PACKED)
        return;
    driver_start(&driver, 16, layout | VHD_RING_INDIRECT, 0); /* out of its table */
    put_entry(&driver, TABLE, 0, DATA, 8, VHD_DESC_NEXT, 4);
    offer(&driver, 0, &table, 1);
    expect_fault(VHD_FAULT_NEXT);

    driver_start(&driver, 16, layout | VHD_RING_INDIRECT, 0); /* round and round */
    put_entry(&driver, TABLE, 0, DATA, 8, VHD_DESC_NEXT, 1);
    put_entry(&driver, TABLE, 1, DATA, 8, VHD_DESC_NEXT, 0);
    offer(&driver, 0, &table, 1);
    expect_fault(VHD_FAULT_LOOP);
}

static void faults_of_a_split_ring(void)
{
    struct part good = {DATA, 8, 0};

    driver_start(&driver, 16, 0, 5);
    put(&driver, AVAIL + 2, 5 + 17, 2);
    expect_fault(VHD_FAULT_AVAIL_INDEX);
    put(&driver, AVAIL + 2, 4, 2); /* backwards is 65535 ahead */
    expect_fault(VHD_FAULT_AVAIL_INDEX);

    driver_start(&driver, 16, 0, 0);
    offer_head(&driver, 16);
    expect_fault(VHD_FAULT_HEAD);

    driver_start(&driver, 16, 0, 0);
    put_entry(&driver, DESC, 3, DATA, 8, VHD_DESC_NEXT, 16);
    offer_head(&driver, 3);
    expect_fault(VHD_FAULT_NEXT);

    driver_start(&driver, 16, 0, 0);
    put_entry(&driver, DESC, 3, DATA, 8, VHD_DESC_NEXT, 3);
    offer_head(&driver, 3);
    expect_fault(VHD_FAULT_LOOP);

    driver_start(&driver, 2048, 0, 0);
    for (uint16_t i = 0; i <= VHD_CHAIN_SEGMENTS_MAX; i++)
        put_entry(&driver, DESC, i, DATA, 1, VHD_DESC_NEXT, (uint16_t)(i + 1));
    offer_head(&driver, 0);
    expect_fault(VHD_FAULT_CHAIN_LENGTH);

    driver_start(&driver, 16, 0, 0);
    offer(&driver, 3, &good, 1);
    offer(&driver, 3, &good, 1);
    CHECK(pop(&driver) == 1);
    CHECK(pop(&driver) == -VHD_FAULT_DUPLICATE);
    push(&driver, 0);
    CHECK(pop(&driver) == 1 && driver.walk.id == 3); /* given back: free to come again */
}

static void faults_of_a_packed_ring(void)
{
    struct part parts[17] = {{DATA, 8, 0}};

    driver_start(&driver, 16, VHD_RING_PACKED, 0);
    offer(&driver, 16, parts, 1);
    expect_fault(VHD_FAULT_PACKED_ID);

    for (int i = 0; i < 17; i++)
        parts[i] = parts[0];
    driver_start(&driver, 16, VHD_RING_PACKED, 0);
    offer(&driver, 0, parts, 17); /* the 17th overwrites the first, which points on */
    put(&driver, DESC + 14, VHD_DESC_NEXT | 1 << 7, 2);
    expect_fault(VHD_FAULT_LOOP);

    driver_start(&driver, 2000, VHD_RING_PACKED, 0);
    for (uint32_t i = 0; i <= VHD_CHAIN_SEGMENTS_MAX; i++)
        put_entry(&driver, DESC, i, DATA, 1, VHD_DESC_NEXT | 1 << 7, 0);
    expect_fault(VHD_FAULT_CHAIN_LENGTH);

    driver_start(&driver, 16, VHD_RING_PACKED, 0);
    offer(&driver, 7, parts, 1);
    offer(&driver, 7, parts, 1);
    CHECK(pop(&driver) == 1);
    CHECK(pop(&driver) == -VHD_FAULT_DUPLICATE);
}

/* -- chains as they should be ----------------------------------------------------------------- */

static void a_chain_comes_out_as_it_went_in(uint32_t layout)
{
    struct part parts[] = {{DATA, 100, 0},
                           {BORDER - 1, 2, 0}, /* one byte on each side of the border */
                           {END - 1, 1, VHD_DESC_WRITE},
                           {TOP, 0x10000, VHD_DESC_WRITE}};

    driver_start(&driver, 16, layout, 3);
    CHECK(pop(&driver) == 0);
    offer(&driver, 5, parts, 4);
    CHECK(pop(&driver) == 1);
    CHECK(driver.walk.id == 5 && driver.walk.slots == (driver.packed ? 4 : 1));
    CHECK(driver.walk.readable_count == 2 && driver.walk.readable_size == 102);
    CHECK(driver.walk.writable_count == 2 && driver.walk.writable_size == 0x10001);
    for (int i = 0; i < 4; i++)
        CHECK(driver.walk.segments[i].guest_addr == parts[i].addr &&
              driver.walk.segments[i].size == parts[i].size);
    CHECK(pop(&driver) == 0);
    push(&driver, 0x1234);
    if (driver.packed) {
        CHECK(get(&driver, DESC + 3 * 16 + 8, 4) == 0x1234 && get(&driver, DESC + 60, 2) == 5);
        CHECK(get(&driver, DESC + 3 * 16 + 14, 2) == (1 << 15 | 1 << 7 | VHD_DESC_WRITE));
        CHECK(driver.ring.position.next_used == 7);
    } else {
        CHECK(get(&driver, USED + 2, 2) == 4);
        CHECK(get(&driver, USED + 4 + 8 * 3, 4) == 5 &&
              get(&driver, USED + 8 + 8 * 3, 4) == 0x1234);
    }
}

static void an_indirect_chain_takes_one_slot(uint32_t layout)
{
    struct part parts[] = {{DATA, 4, 0}, {BORDER - 24, 48, VHD_DESC_INDIRECT}};

    driver_start(&driver, 16, layout | VHD_RING_INDIRECT, 0);
    put_entry(&driver, TABLE, 0, DATA, 8, VHD_DESC_NEXT, 2); /* split: 0 -> 2 -> 1 */
    put_entry(&driver, TABLE, 1, DATA + 16, 24, VHD_DESC_WRITE, 0);
    put_entry(&driver, TABLE, 2, DATA + 8, 16, VHD_DESC_NEXT, 1);
    if (driver.packed) {
        put_entry(&driver, TABLE, 1, DATA + 8, 16, 0, 0);
        put_entry(&driver, TABLE, 2, DATA + 16, 24, VHD_DESC_WRITE, 0);
    }
    CHECK(vhd_table_write(&driver.table, BORDER - 24, host(&driver, TABLE), 48) == 0);
    offer(&driver, 2, &parts[1], 1); /* the table itself lies across a border */
    offer(&driver, 4, parts, 2);     /* a table behind a descriptor */
    CHECK(pop(&driver) == 1 && driver.walk.slots == 1);
    CHECK(driver.walk.readable_count == 2 && driver.walk.readable_size == 24);
    CHECK(driver.walk.writable_count == 1 && driver.walk.writable_size == 24);
    CHECK(driver.walk.segments[2].guest_addr == DATA + 16);
    CHECK(pop(&driver) == 1 && driver.walk.readable_size == 28);
    CHECK(driver.walk.slots == (driver.packed ? 2 : 1) && driver.ring.in_flight_count == 2);
}

/* A walk that is no payload takes any address: the device checks it. */
static void ranges_are_not_checked_as_payload(uint32_t layout)
{
    struct part parts[] = {{END, UINT32_MAX, VHD_DESC_WRITE}, {END, UINT32_MAX, VHD_DESC_WRITE}};

    driver_start(&driver, 16, layout, 0);
    offer(&driver, 0, parts, 2);
    CHECK(vhd_ring_pop(&driver.ring, &driver.walk, false) == 1);
    CHECK(driver.walk.writable_size == 2ull * UINT32_MAX);
}

/* Past 65536 chains every index has wrapped; `size` need not be a power of two when packed. */
static void the_ring_goes_round(uint32_t features, uint32_t size, uint32_t chains)
{
    struct part parts[] = {{DATA, 8, 0}, {DATA + 8, 8, VHD_DESC_WRITE}};

    driver_start(&driver, size, features, 0);
    for (uint32_t chain = 0; chain < chains; chain++) {
        uint16_t id = (uint16_t)(chain % (size - 1));

        offer(&driver, id, parts, 2);
        CHECK(pop(&driver) == 1 && driver.walk.id == id && driver.walk.writable_size == 8);
        uint16_t at = driver.ring.position.next_used;
        uint8_t wrap = driver.ring.position.used_wrap;
        push(&driver, chain);
        if (driver.packed) {
            uint16_t flags = (uint16_t)((wrap ? 1 << 15 | 1 << 7 : 0) | (chain != 0 ? 2 : 0));

            CHECK(get(&driver, DESC + 16ull * at + 14, 2) == flags);
            CHECK(get(&driver, DESC + 16ull * at + 12, 2) == id);
            CHECK(driver.ring.position.next_used == driver.index);
        } else {
            CHECK(get(&driver, USED + 2, 2) == (uint16_t)(chain + 1));
            CHECK(get(&driver, USED + 4 + 8ull * (at % size), 4) == id);
        }
        CHECK(vhd_ring_should_call(&driver.ring));
        CHECK(pop(&driver) == 0 && driver.ring.in_flight_count == 0);
        if (features & VHD_RING_EVENT_IDX) { /* ask for the next one */
            uint16_t next = driver.ring.position.next_used;

            put(&driver, driver.packed ? AVAIL : AVAIL + 4 + 2ull * size,
                next | (driver.packed && driver.ring.position.used_wrap ? 1u << 15 : 0), 2);
            if (driver.packed)
                put(&driver, AVAIL + 2, 2, 2);
        }
    }
}

int main(void)
{
    driver_open(&driver);
    for (int i = 0; i < 2; i++) {
        faults_of_one_chain(LAYOUTS[i]);
        faults_inside_an_indirect_table(LAYOUTS[i]);
        a_chain_comes_out_as_it_went_in(LAYOUTS[i]);
        an_indirect_chain_takes_one_slot(LAYOUTS[i]);
        ranges_are_not_checked_as_payload(LAYOUTS[i]);
        the_ring_goes_round(LAYOUTS[i], 8, 70000);
        the_ring_goes_round(LAYOUTS[i] | VHD_RING_EVENT_IDX, 8, 70000);
        the_ring_goes_round(LAYOUTS[i] | VHD_RING_EVENT_IDX, VHD_QUEUE_SIZE_MAX, 70000);
    }
    the_ring_goes_round(VHD_RING_PACKED | VHD_RING_EVENT_IDX, 7, 70000);
    faults_of_a_split_ring();
    faults_of_a_packed_ring();
    driver_close(&driver);
    return 0;
}
