/* barrier.h - every load, store and fence on memory the guest writes at the same time.
 *
 * The loads take one access of the named width, so that a guest that rewrites the field cannot
 * show us two values. Each fence says which one of Linux' driver (drivers/virtio/virtio_ring.c) it
 * pairs with.
 */
#ifndef VHD_BARRIER_H
#define VHD_BARRIER_H

#include <stdatomic.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "virtio is little endian and so must the host be"
#endif

static inline uint16_t vhd_load16(const void *at)
{
    return atomic_load_explicit((const _Atomic uint16_t *)at, memory_order_relaxed);
}

static inline uint32_t vhd_load32(const void *at)
{
    return atomic_load_explicit((const _Atomic uint32_t *)at, memory_order_relaxed);
}

static inline uint64_t vhd_load64(const void *at)
{
    return atomic_load_explicit((const _Atomic uint64_t *)at, memory_order_relaxed);
}

static inline void vhd_store16(void *at, uint16_t value)
{
    atomic_store_explicit((_Atomic uint16_t *)at, value, memory_order_relaxed);
}

static inline void vhd_store32(void *at, uint32_t value)
{
    atomic_store_explicit((_Atomic uint32_t *)at, value, memory_order_relaxed);
}

static inline void vhd_store64(void *at, uint64_t value)
{
    atomic_store_explicit((_Atomic uint64_t *)at, value, memory_order_relaxed);
}

/* After reading avail.idx (packed: a descriptor's flags), before reading what it announces. Pairs
 * with virtio_wmb() in virtqueue_add_split() / virtqueue_add_packed(). */
static inline void vhd_fence_after_avail(void)
{
    atomic_thread_fence(memory_order_acquire);
}

/* After writing a used element, before writing used.idx (packed: the flags). Pairs with
 * virtio_rmb() in virtqueue_get_buf_ctx_split() / _packed(). */
static inline void vhd_fence_before_used(void)
{
    atomic_thread_fence(memory_order_release);
}

/* Between publishing something and reading what the other side published: used.idx then
 * used_event, or avail_event then avail.idx. Pairs with virtio_mb() in
 * virtqueue_enable_cb_prepare()/virtqueue_poll() and in virtqueue_kick_prepare(). */
static inline void vhd_fence_store_load(void)
{
    atomic_thread_fence(memory_order_seq_cst);
}

/* Between two stores of which a successor may find only the first. SIGKILL ends a thread between
 * two instructions: all that come before are done, whatever order other processors see them in,
 * and the kernel orders the end of a process before what its successor does. So it is the
 * program's order alone that must hold, and only the compiler could break it. */
static inline void vhd_fence_before_death(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

#endif
